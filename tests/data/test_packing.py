"""Documents as blocks of tokens, in the order that a seed decides, and the batches that calibrate a pruning."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from sparse_train.data.packing import beginning, blocks_of, calibration_batches
from sparse_train.data.text_blocks import TextBlocks
from sparse_train.data.texts import TextFiles, TextSource
from tests.conftest import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Short(TextSource):
    name = "short texts"

    def documents(self, split):
        return ["abc", "defgh", "", "ij"] if split == "train" else []


def decoded(rows):
    return ["".join(tiny_tokenizer().convert_ids_to_tokens(row)) for row in rows]


def test_packing_joins_documents_and_loses_no_token():
    tokenizer = tiny_tokenizer()
    packed = blocks_of(["abc", "defgh", "ij"], tokenizer, 4, drop_rest=False)
    assert decoded(packed["input_ids"]) == ["abc</s>", "defg", "h</s>ij", "</s><pad><pad><pad>"]
    assert packed["attention_mask"][3].tolist() == [1, 0, 0, 0]
    assert packed["labels"][3].tolist() == [tokenizer.eos_token_id, -100, -100, -100]
    assert len(blocks_of(["abc", "defgh", "ij"], tokenizer, 4)) == 3


def test_without_packing_each_document_has_its_own_block():
    rows = blocks_of(["abc", "defgh"], tiny_tokenizer(), 5, pack=False)
    assert decoded(rows["input_ids"]) == ["abc</s><pad>", "defgh"]
    assert rows[:]["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_packing_does_not_stop_at_chunk_edges():
    tokenizer = tiny_tokenizer()
    many = [f"text {i}" for i in range(2500)]
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in many)
    assert len(blocks_of(many, tokenizer, 16)) == tokens // 16


def tokenizer_with(single: str):
    tokenizer = tiny_tokenizer()
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize(("single", "expected"), [("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A </s>", []), ("$A", [])])
def test_what_a_text_begins_with(single, expected):
    assert beginning(tokenizer_with(single)) == expected


def test_documents_begin_and_end_as_the_model_knows_them():
    rows = blocks_of(["abc", "de"], tokenizer_with("<s> $A"), 3, drop_rest=False)
    decoded = ["".join(tiny_tokenizer().convert_ids_to_tokens(row)) for row in rows["input_ids"]]
    assert decoded == ["<s>ab", "c</s><s>", "de</s>"]


class Documents(TextSource):
    name = "documents"

    def documents(self, split):
        return ["abcd"]


def test_parts_of_documents_are_cut_from_the_text_with_its_beginning():
    tokenizer = tokenizer_with("<s> $A")
    seen = set()
    for seed in range(20):
        (batch,) = calibration_batches(
            Documents(), tokenizer, num_calibration_samples=1, max_seq_length=3, seed=seed, sampling="documents"
        )
        seen.add("".join(tokenizer.convert_ids_to_tokens(batch["input_ids"][0])))
    assert seen == {"<s>ab", "abc"}  # of 5 tokens, starting at 0 or 1, as the paper's script draws


def test_a_tokenizer_without_an_end_of_text_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end-of-text token, which separates the documents of a block"):
        blocks_of(["abc"], tokenizer, 4)


@pytest.fixture
def data(model_folder, text_file):
    blocks = TextBlocks(
        str(model_folder), TextFiles(train=[str(text_file)]), block_size=64, batch_size=4, seed=3, hold_out=0
    )
    blocks.setup("fit")
    return blocks


def test_batches(data):
    batch = next(iter(data.train_dataloader()))
    assert {key: value.shape for key, value in batch.items()} == dict.fromkeys(
        ["input_ids", "attention_mask", "labels"], (4, 64)
    )
    assert data.val_dataloader() == []


def test_a_text_without_validation_is_held_out_in_part(model_folder, text_file):
    whole = TextBlocks(str(model_folder), TextFiles(train=[str(text_file)]), block_size=32, batch_size=4, hold_out=0)
    part = TextBlocks(str(model_folder), TextFiles(train=[str(text_file)]), block_size=32, batch_size=4, hold_out=0.1)
    for each in (whole, part):
        each.setup("fit")
    assert not whole.val_dataloader()
    (all_blocks,), (trained, held) = (
        [
            [row["input_ids"].tolist() for row in loader.dataset]
            for loader in (each.train_dataloader(), each.val_dataloader())
            if loader
        ]
        for each in (whole, part)
    )
    assert len(held) == len(all_blocks) // 10 and trained + held == all_blocks
    little = TextBlocks(str(model_folder), TextFiles(train=[str(text_file)]), block_size=32, hold_out=1e-9)
    little.setup("fit")
    assert len(little.val_dataloader().dataset) == 1


def test_seed_decides_the_order(model_folder, text_file, data):
    def first(seed):
        blocks = TextBlocks(str(model_folder), TextFiles(train=[str(text_file)]), block_size=64, seed=seed, hold_out=0)
        blocks.setup("fit")
        return next(iter(blocks.train_dataloader()))["input_ids"]

    assert torch.equal(first(3), next(iter(data.train_dataloader()))["input_ids"])
    assert not torch.equal(first(3), first(4))


class Seen(L.LightningModule):
    def __init__(self, stop=None):
        super().__init__()
        self.layer, self.sums, self.stop = torch.nn.Linear(1, 1), [], stop

    def training_step(self, batch, _):
        self.sums.append(int(batch["input_ids"].sum()))
        return self.layer(torch.ones(1)).sum()

    def on_train_batch_end(self, *args):
        if self.global_step == self.stop:
            self.trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet_trainer(**arguments):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", logger=False, **quiet, **arguments)


def test_a_resumed_run_gets_the_next_batch_and_the_same_next_epochs(model_folder, text_file, tmp_path):
    def run(module, **arguments):
        data = TextBlocks(str(model_folder), TextFiles(train=[str(text_file)]), block_size=512, batch_size=4)
        quiet_trainer(max_epochs=3).fit(module, data, **arguments)
        return module.sums

    whole = run(Seen())
    per_epoch = len(whole) // 3
    assert per_epoch > 3
    assert whole[:per_epoch] != whole[per_epoch : 2 * per_epoch]
    for stop in (2, per_epoch + 2):
        first = Seen(stop)
        first.path = tmp_path / f"{stop}.ckpt"
        with pytest.raises(SystemExit):
            run(first)
        assert first.sums + run(Seen(), ckpt_path=first.path, weights_only=False) == whole


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_no_block_is_measured_twice_by_several_processes(model_folder, text_file, ranks):
    data = TextBlocks(str(model_folder), TextFiles(validation=[str(text_file)]), 8, 2, max_validation_blocks=7)
    data.trainer = SimpleNamespace(world_size=ranks, validating=True)
    data.setup("validate")
    blocks = data.val_dataloader().dataset
    assert len(blocks) == 7 - 7 % ranks  # Lightning's sampler would fill up with blocks that are there already


def test_too_little_text_and_bad_sizes(model_folder, caplog):
    blocks = TextBlocks(str(model_folder), Short(), block_size=8, batch_size=4)
    with pytest.raises(ValueError, match="training split of short texts gives 1 blocks of 8 tokens, fewer than one"):
        blocks.setup("fit")
    assert len(calibration_batches(Short(), tiny_tokenizer(), max_seq_length=8)) == 1
    assert "32 samples were asked for, and the training split of short texts gives 1 calibration" in caplog.text
    with pytest.raises(ValueError, match="gives no calibration sample of 800 tokens"):
        calibration_batches(Short(), tiny_tokenizer(), max_seq_length=800)
    with pytest.raises(ValueError, match="block_size must be at least 2"):
        TextBlocks(str(model_folder), block_size=1)


def test_calibration_batches(text_file):
    batches = calibration_batches(
        TextFiles(train=[str(text_file)]), tiny_tokenizer(), num_calibration_samples=5, max_seq_length=32, batch_size=2
    )
    assert [batch["input_ids"].shape for batch in batches] == [(2, 32), (2, 32), (1, 32)]


def test_calibration_text_gives_its_training_split_in_blocks_of_the_same_length(model_folder):
    source = str(model_folder)
    assert TextBlocks(source, Short(), block_size=4, batch_size=2).calibration_dataloader() is None
    data = TextBlocks(source, Short(), block_size=4, batch_size=2, calibration_text=Short())
    batches = list(data.calibration_dataloader())
    assert [batch["input_ids"].shape for batch in batches] == [(2, 4)]
    assert set(decoded(batches[0]["input_ids"])) < {"abc</s>", "defg", "h</s></s>i"}
    with pytest.raises(ValueError, match="short texts gives 0 blocks of 64 tokens"):
        TextBlocks(source, Short(), block_size=64, calibration_text=Short()).calibration_dataloader()


def test_what_a_run_holds_out_is_what_validate_measures(model_folder, text_file):
    text = TextFiles(train=[str(text_file)])
    run, alone = (TextBlocks(str(model_folder), text, block_size=32, batch_size=4, hold_out=0.1) for _ in range(2))
    run.setup("fit")
    alone.setup("validate")
    held, measured = ([row["input_ids"].tolist() for row in each.val_dataloader().dataset] for each in (run, alone))
    assert held == measured and len(held) > 1
    alone.setup("test")
    with pytest.raises(ValueError, match="has no text in its test split"):
        alone.test_dataloader()
