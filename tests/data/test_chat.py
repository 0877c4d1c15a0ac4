"""Conversations as tokens: which of them carry a loss, and how they are put into blocks."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sparse_train import FirstWindow
from sparse_train.callbacks import DynamicPruning
from sparse_train.cli import main as cli
from sparse_train.data.packing import blocks_of, calibration_batches, encoded
from sparse_train.data.text_blocks import TextBlocks
from sparse_train.data.texts import TextSource
from sparse_train.models.causal_lm import CausalLM
from sparse_train.models.sources import PackagedSmolLM2, Pretrained
from tests.conftest import tiny_llama, tiny_tokenizer
from tests.data.test_packing import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':' }}{{ m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)


def chat(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


def chat_tokenizer(template=TEMPLATE):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def words(tokenizer, ids):
    """A token a character: newlines as they are, padding as "_", what has no loss as "."."""
    shown = {"<pad>": "_", "</s>": "$", "Ċ": "\n", "Ġ": " "}
    ids = map(int, ids)
    return "".join("." if i == -100 else shown.get(t := tokenizer.convert_ids_to_tokens(i), t) for i in ids)


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["by its prefixes", "marked"])
def test_what_the_assistant_says_has_a_loss_and_nothing_else(template):
    tokenizer = chat_tokenizer(template)
    rules = chat("s", "u", "a", roles=("system", "user", "assistant"))
    conversations = [chat("Hi", " Yes.\n", "B", "No"), rules, chat("Hi", "")]
    found = [(words(tokenizer, ids), words(tokenizer, labels)) for ids, labels in encoded(conversations, tokenizer)]
    assert found == [
        ("user:Hi$\nassistant: Yes.\n$\nuser:B$\nassistant:No$\n", "." * 19 + " Yes.\n$" + "." * 19 + "No$."),
        ("system:s$\nuser:u$\nassistant:a$\n", "." * 28 + "a$."),
        ("user:Hi$\nassistant:$\n", "." * 19 + "$."),
    ]


def test_a_first_message_by_the_assistant_answers_nothing():
    tokenizer = chat_tokenizer()
    ((_, labels),) = encoded([chat("Hello", "Hi", "No", roles=("assistant", "user", "assistant"))], tokenizer)
    assert words(tokenizer, labels) == "." * 36 + "No$."


def test_a_template_without_a_token_at_the_end_of_turns():
    tokenizer = chat_tokenizer(TEMPLATE.replace(" + eos_token", ""))
    (_, labels), *_ = encoded([chat("Hi", "No")], tokenizer)
    assert words(tokenizer, labels) == "." * 18 + "No\n"  # the newline is what ends the turn


def test_a_token_that_begins_in_the_prompt_has_no_loss():
    vocabulary = ["</s>", "<unk>", "user:", "assistant:", "a", "b", "Ġ", "Ċ", "Ġa"]
    model = models.BPE(vocab={w: i for i, w in enumerate(vocabulary)}, merges=[("Ġ", "a")], unk_token="<unk>")
    plain = Tokenizer(model)
    plain.add_tokens(["user:", "assistant:"])
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE.replace("'assistant:'", "'assistant: '").replace("':' }}", "': ' }}")
    ((ids, labels),) = encoded([chat("b", "ab")], tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids)[-5:] == ["assistant:", "Ġa", "b", "</s>", "Ċ"]
    assert [label != -100 for label in labels[-5:]] == [False, False, True, True, False]


def test_the_packaged_model_learns_to_end_its_turn():
    tokenizer = PackagedSmolLM2().tokenizer()
    conversation = chat("What is X?", " It is Y.\n", "And Z?", "No.")
    ((ids, labels),) = encoded([conversation], tokenizer)
    assert ids == tokenizer.apply_chat_template(conversation)["input_ids"]
    spoken = [label for label in labels if label != -100]
    assert tokenizer.decode(spoken) == " It is Y.\n<|im_end|>No.<|im_end|>"
    prompt = tokenizer.apply_chat_template(conversation[:3], add_generation_prompt=True)["input_ids"]
    assert labels[len(prompt) - 1 : len(prompt) + 1] == [-100, ids[len(prompt)]]


def test_packed_blocks_hold_whole_conversations():
    tokenizer = chat_tokenizer()
    conversations = [chat("a", "b"), chat("c", "d"), chat("e", "f" * 20), chat("g", "h")]
    rows = blocks_of(conversations, tokenizer, 48, pack=True)[:]
    assert [words(tokenizer, ids) for ids in rows["input_ids"]] == [
        "user:a$\nassistant:b$\nuser:c$\nassistant:d$\n" + "_" * 6,
        "user:e$\nassistant:" + "f" * 20 + "$\n" + "_" * 8,
        "user:g$\nassistant:h$\n" + "_" * 27,
    ]
    assert words(tokenizer, rows["labels"][0]) == "." * 18 + "b$" + "." * 19 + "d$." + "." * 6
    assert rows["attention_mask"].tolist() == [[1] * n + [0] * (48 - n) for n in (42, 40, 21)]


def test_long_conversations_are_cut_and_those_without_a_loss_left_out(caplog):
    tokenizer = chat_tokenizer()
    conversations = [chat("a", "b" * 9), chat("c" * 30, "d"), chat("e", "f")]
    rows = blocks_of(conversations, tokenizer, 20, pack=False)[:]
    assert [words(tokenizer, labels) for labels in rows["labels"]] == ["." * 18 + "bb", "." * 18 + "f$"]
    assert "3 of 3 conversations are longer than block_size=20 and were cut there; 1 had no token" in caplog.text
    assert len(blocks_of([], tokenizer, 20)) == 0


def test_conversations_that_cannot_be_read():
    tokenizer = chat_tokenizer()
    for bad in (
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"from": "a", "content": "b"}],
    ):
        with pytest.raises(ValueError, match=r"Number 1 \(from 0\) is"):
            encoded([chat("a", "b"), bad], tokenizer)
    with pytest.raises(ValueError, match="chat_template is not set"):
        encoded([chat("a", "b")], tiny_tokenizer())
    only_last = "{% for m in messages %}{{ m.role + ':' + (m.content if loop.last else '') }}{% endfor %}"
    with pytest.raises(ValueError, match="first 2 messages of a conversation differently when more follows"):
        encoded([chat("a", "b", "c", "d")], chat_tokenizer(only_last))


def test_conversations_without_an_answer_are_left_out_and_counted(caplog):
    rows = blocks_of([chat("a"), chat("b", "c"), chat("d", roles=("assistant",))], chat_tokenizer(), 64)
    assert len(rows) == 1
    assert "0 of 3 conversations are longer than block_size=64 and were cut there; 2 had no token" in caplog.text


def test_padding_of_conversations_is_marked_for_calibration():
    batches = calibration_batches(Talks(), chat_tokenizer(), num_calibration_samples=5, max_seq_length=96, batch_size=2)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 96), (2, 96), (1, 96)]
    for batch in batches:
        assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == chat_tokenizer().pad_token_id)


class Talks(TextSource):
    name = "talks"

    def documents(self, split):
        number = {"train": 40, "validation": 3, "test": 0}[split]
        return [chat(f"question {i}", f"answer {i} " * (i % 5)) for i in range(number)]


@pytest.fixture
def chat_folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    chat_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_padding_does_not_count_in_activation_statistics(chat_folder):
    counted = []

    class Counting(DynamicPruning):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            layer = pl_module.model.model.layers[0].mlp.up_proj
            counted.append(
                (int(layer.statistics.tokens), int(batch["attention_mask"].sum()), batch["input_ids"].numel())
            )

    data = TextBlocks(str(chat_folder), Talks(), block_size=96, batch_size=2, pack=False)
    pruning = Counting("2:4", update_freq=10, end_step=100, first_mask=FirstWindow())
    quiet_trainer(max_steps=11, callbacks=[pruning]).fit(CausalLM(Pretrained(str(chat_folder))), data)
    (first, real, all_of_them), (second, more, _), *_ = counted
    assert (first, second) == (real, real + more)
    assert real < all_of_them


def test_the_loss_is_the_mean_over_the_assistants_tokens(chat_folder):
    rows = blocks_of(Talks().documents("train")[:6], chat_tokenizer(), 96)[:]
    model = tiny_llama().double()
    log_p = model(rows["input_ids"], attention_mask=rows["attention_mask"]).logits.log_softmax(-1)
    expected = [
        -float(log_p[row, at - 1, label])
        for row, labels in enumerate(rows["labels"].tolist())
        for at, label in enumerate(labels)
        if label != -100
    ]
    module = CausalLM(Pretrained(str(chat_folder)))
    module.model = tiny_llama()
    module.log = lambda *args, **kwargs: None
    found = module.training_step(rows, 0)
    torch.testing.assert_close(float(found), sum(expected) / len(expected), rtol=1e-5, atol=0)


def test_the_recipe_of_instruction_tuning(chat_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {split: f"{split}.jsonl" for split in ("train", "validation")}
    for split, path in files.items():
        rows = [json.dumps({"messages": messages}) + "\n" for messages in Talks().documents(split)]
        Path(path).write_text("".join(rows))
    options = [
        f"--model.model={chat_folder}",
        "--data.text=TextFiles",
        "--data.text.column=messages",
        *(f"--data.text.{split}=[{path}]" for split, path in files.items()),
        "--data.block_size=96",
        "--trainer.max_steps=3",
        "--trainer.val_check_interval=3",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
        "--export=exported",
    ]
    cli.main(["fit", "--config=recipes/smollm2_2of4_instruct.yaml", *options])
    metrics = Path("runs/smollm2_2of4_instruct/version_0/metrics.csv").read_text()
    assert "train/loss_kldiv" in metrics and "val/perplexity" in metrics
    assert "train.jsonl, validation.jsonl, blocks of 96" in Path("exported/README.md").read_text()
    weight = AutoModelForCausalLM.from_pretrained("exported").model.layers[0].mlp.up_proj.weight
    assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all()
    tokenizer = AutoTokenizer.from_pretrained("exported")
    assert tokenizer.apply_chat_template(chat("a", "b"), tokenize=False) == "user:a</s>\nassistant:b</s>\n"
