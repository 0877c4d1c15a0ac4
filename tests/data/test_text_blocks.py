import json
import tokenize
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from sparse_train.data.text_blocks import TextBlocks, blocks_of, calibration_batches
from sparse_train.data.texts import HubText, PackagedWikipedia, PythonStandardLibrary, TextFiles, TextSource
from sparse_train.models.sources import FromScratch, Pretrained, as_model_source
from sparse_train.packed.folder import pack_folder
from tests.conftest import tiny_llama, tiny_tokenizer

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


@pytest.fixture
def data(model_folder, text_file):
    blocks = TextBlocks(str(model_folder), TextFiles(train=[str(text_file)]), block_size=64, batch_size=4, seed=3)
    blocks.setup("fit")
    return blocks


def test_batches(data):
    batch = next(iter(data.train_dataloader()))
    assert {key: value.shape for key, value in batch.items()} == dict.fromkeys(
        ["input_ids", "attention_mask", "labels"], (4, 64)
    )
    assert data.val_dataloader() == []


def test_seed_decides_the_order(model_folder, text_file, data):
    def first(seed):
        blocks = TextBlocks(str(model_folder), TextFiles(train=[str(text_file)]), block_size=64, seed=seed)
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
        data = TextBlocks(str(model_folder), TextFiles(train=[str(text_file)]), block_size=512, batch_size=8)
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


def test_too_little_text_and_bad_sizes(model_folder):
    blocks = TextBlocks(str(model_folder), Short(), block_size=8, batch_size=4)
    with pytest.raises(ValueError, match="training split of short texts gives 1 blocks of 8 tokens, fewer than one"):
        blocks.setup("fit")
    with pytest.raises(ValueError, match="gives 1 calibration samples of 8 tokens, fewer than num_cal"):
        calibration_batches(Short(), tiny_tokenizer(), max_seq_length=8)
    with pytest.raises(ValueError, match="block_size must be at least 2"):
        TextBlocks(str(model_folder), block_size=1)


def test_calibration_batches(text_file):
    batches = calibration_batches(
        TextFiles(train=[str(text_file)]), tiny_tokenizer(), num_calibration_samples=5, max_seq_length=32, batch_size=2
    )
    assert [batch["input_ids"].shape for batch in batches] == [(2, 32), (2, 32), (1, 32)]


def test_files(tmp_path):
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("one document\n\nof two paragraphs")
    lines.write_text(json.dumps({"body": "first"}) + "\n\n" + json.dumps({"body": "second"}) + "\n")
    source = TextFiles(train=[str(plain), str(lines)], column="body")
    assert source.documents("train") == ["one document\n\nof two paragraphs", "first", "second"]
    assert source.documents("test") == []
    with pytest.raises(ValueError, match="There is no text file nowhere.txt"):
        TextFiles(train=["nowhere.txt"]).documents("train")
    with pytest.raises(ValueError, match=r"lines without the field 'text'; they have \['body'\]"):
        TextFiles(train=[str(lines)]).documents("train")
    with pytest.raises(ValueError, match="It is a folder: name its files"):
        TextFiles(train=[str(tmp_path)]).documents("train")
    with pytest.raises(ValueError, match="Patterns are not expanded"):
        TextFiles(train=[f"{tmp_path}/*.txt"]).documents("train")
    table, latin = tmp_path / "c.CSV", tmp_path / "d.txt"
    table.write_text("id,text\n1,first")
    with pytest.raises(ValueError, match=r"c.CSV: TextFiles reads plain text and .jsonl, and .CSV would be read as if"):
        TextFiles(train=[str(table)]).documents("train")
    latin.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"d.txt is not text in UTF-8.*position 3"):
        TextFiles(train=[str(latin)]).documents("train")


def test_a_data_set_of_datasets(tmp_path):
    for split, texts in {"train": ["a", "b", "c"], "test": ["d"]}.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    splits = {"train": "train", "test": "test"}
    assert HubText(str(tmp_path), splits=splits).documents("train") == ["a", "b", "c"]
    assert HubText(str(tmp_path), splits=splits).documents("validation") == []
    assert HubText(str(tmp_path), splits=splits, max_documents=2).documents("train") == ["a", "b"]


def test_penn_treebank_is_read_from_the_hubs_own_copy(monkeypatch):
    asked = {}

    def load_dataset(path, subset, **options):
        asked.update(path=path, subset=subset, **options)
        return [{"sentence": "no it was n't"}, {"sentence": "mr. <unk> said N"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    overlay = yaml.safe_load((Path(__file__).parents[2] / "configs/perplexity/ptb.yaml").read_text())
    source = HubText(**overlay["perplexity"]["init_args"])
    assert source.separator.join(source.documents("test")) == "no it was n't mr. <unk> said N"
    assert asked["path"] == "ptb-text-only/ptb_text_only" and asked["subset"] is None
    assert (asked["split"], asked["revision"]) == ("test", "refs/convert/parquet")


def test_packaged_wikipedia_is_split_by_article():
    source = PackagedWikipedia()
    splits = {split: source.documents(split) for split in ("train", "validation", "test")}
    sizes = {split: len(documents) for split, documents in splits.items()}
    assert sizes["train"] > 8900
    assert 400 < sizes["validation"] < 600
    assert 400 < sizes["test"] < 600
    assert not set(splits["train"]) & set(splits["test"])
    assert "\n\n" in splits["test"][0]


def test_the_standard_library_is_code_split_by_file():
    source = PythonStandardLibrary()
    splits = {split: source.documents(split) for split in ("train", "validation", "test")}
    assert len(splits["train"]) > 300
    assert min(len(splits["validation"]), len(splits["test"])) > 5
    everything = [document for documents in splits.values() for document in documents]
    for module in (json, tokenize):  # each is a file that is there once
        assert everything.count(Path(module.__file__).read_text(encoding="utf-8")) == 1
    here = [Path(json.__file__).parents[1] / name for name in ("encodings/cp1252.py", "pydoc_data/topics.py")]
    assert not {path.read_text(encoding="utf-8") for path in here} & set(everything)
    assert not [document for document in everything if "build_time_vars" in document[:200]]  # paths of this machine
    assert source.name.startswith("Python 3.")


def test_a_python_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match="has no sources of its standard library"):
        PythonStandardLibrary().documents("train")


def test_lines_of_json_may_hold_other_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two\x85"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert TextFiles(train=[str(path)]).documents("train") == ["one\u2028two\x85"]


def test_model_sources(model_folder):
    assert as_model_source("org/name") == Pretrained("org/name")
    model = Pretrained(str(model_folder), dtype="bfloat16").load()
    assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="must name a floating point dtype"):
        Pretrained(str(model_folder), dtype="int8").load()
    scratch = FromScratch(
        "llama",
        Pretrained(str(model_folder)),
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    )
    state = torch.get_rng_state()
    first, second = scratch.load(), scratch.load()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert first.config.vocab_size == len(scratch.tokenizer())
    assert first.config.eos_token_id == scratch.tokenizer().eos_token_id
    for wrong, message in (
        ({"hidden_sizes": 16}, "'hidden_sizes' is not a setting of llama. Did you mean 'hidden_size'"),
        ({"hidden_size": 16, "num_attention_heads": 5}, "hidden size .16. is not a multiple"),
    ):
        with pytest.raises(ValueError, match=message):
            FromScratch("llama", Pretrained(str(model_folder)), wrong).load()


def test_calibration_text_gives_its_training_split_in_blocks_of_the_same_length(model_folder):
    source = str(model_folder)
    assert TextBlocks(source, Short(), block_size=4, batch_size=2).calibration_dataloader() is None
    data = TextBlocks(source, Short(), block_size=4, batch_size=2, calibration_text=Short())
    batches = list(data.calibration_dataloader())
    assert [batch["input_ids"].shape for batch in batches] == [(2, 4)]
    assert set(decoded(batches[0]["input_ids"])) < {"abc</s>", "defg", "h</s></s>i"}
    with pytest.raises(ValueError, match="calibration_text, short texts, gives 0 blocks of 64 tokens"):
        TextBlocks(source, Short(), block_size=64, calibration_text=Short()).calibration_dataloader()


def test_lines_that_are_no_json_objects_are_named(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(ValueError, match=r"text.jsonl, line 3 is not JSON: Expecting value"):
        TextFiles(train=[str(path)]).documents("train")
    path.write_text('["a"]\n')
    with pytest.raises(ValueError, match=r"line 1 is not a JSON object.*\[\"a\"\]"):
        TextFiles(train=[str(path)]).documents("train")


def test_a_line_whose_text_is_none_is_named(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\n')
    with pytest.raises(ValueError, match="text.jsonl, document 2: 'text' is None, not text"):
        TextFiles(train=[str(path)]).documents("train")


def test_a_column_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"sentence": "a", "label": 1}])
    with pytest.raises(
        ValueError, match="org/data has no column 'sentense'; it has 'sentence', 'label'.*Did you mean 'sentence'"
    ):
        HubText("org/data", column="sentense").documents("train")


def test_what_is_no_source_is_told_at_once(model_folder, tmp_path):
    assert as_model_source(model_folder) == Pretrained(str(model_folder))  # a Path
    with pytest.raises(ValueError, match="got a LlamaForCausalLM. A model that you have built"):
        as_model_source(tiny_llama())
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.write_text("")
    for ask in (Pretrained.load, Pretrained.tokenizer, Pretrained.folder):
        with pytest.raises(ValueError, match=r"last.ckpt is a file.*sparse-train export .*last.ckpt FOLDER"):
            ask(Pretrained(str(checkpoint)))
    for name, way_out in (("m.gguf", "gguf_file='m.gguf'"), ("m.safetensors", "folder that has its config.json")):
        (tmp_path / name).write_text("")
        with pytest.raises(ValueError, match=way_out):
            Pretrained(str(tmp_path / name)).load()
    pack_folder(model_folder, tmp_path / "packed")
    for ask in (Pretrained.load, Pretrained.folder):
        with pytest.raises(ValueError, match="packed is packed. Unpack it first: sparse-train unpack"):
            ask(Pretrained(str(tmp_path / "packed")))
