"""Small real models, text and tokenizers that tests share; nothing is downloaded."""

import builtins
import gc
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # machines are noisy: no test is timed
settings.register_profile("untimed", **UNTIMED)
settings.register_profile("thorough", **UNTIMED, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "untimed"))

VOCABULARY = 128


LONG = ("faults", "golden", "ranks", "test_readme")


def pytest_collection_modifyitems(items):
    """Long files first: at the end of a run no worker waits for one that has just begun such a file."""
    items.sort(key=lambda item: item.path.parent.name not in LONG and item.path.stem not in LONG)
    gc.collect()
    gc.freeze()  # what there is now stays: the collector need not look at it again


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Inside the filters of a test: one that ignores warnings would ignore those that pyproject.toml makes errors."""
    for line in item.config.getini("filterwarnings"):
        action, message, category, module = line.split(":")
        warnings.filterwarnings(action, message, getattr(builtins, category), module)
    return (yield)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def tiny_llama(**changes) -> LlamaForCausalLM:
    """Three blocks, grouped queries, about 60,000 weights."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
        for name, parameter in model.named_parameters():  # larger than the default: outputs that differ visibly
            if "proj" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def shallow_llama(**changes) -> LlamaForCausalLM:
    """Two blocks, for tests that train: a run takes as long as it has steps and blocks."""
    return tiny_llama(**({"num_hidden_layers": 2} | changes))


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def ids() -> list[torch.Tensor]:
    """Four batches of token ids (2, 16)."""
    return list(torch.randint(3, VOCABULARY, (4, 2, 16)))


def tiny_gemma3() -> PreTrainedModel:
    """A model that reads images; its checkpoints call ``model.language_model.`` ``language_model.model.``."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": 160, "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    special = {"image_token_index": 150, "boi_token_index": 151, "eoi_token_index": 152, "mm_tokens_per_image": 4}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **special)).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a vocabulary of 128 that reads any ASCII text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ascii_only = [symbol for symbol in alphabet if ord(symbol) < 128 or symbol in "ĠĊ"]
    words = ["<pad>", "<s>", "</s>", "<unk>", *ascii_only]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def without_pictures():
    """A context in which reports are words alone: to draw takes longer than a short run. cli/test_json.py draws."""
    return mock.patch("sparse_train.report.page.curves", return_value="")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A Hugging Face folder with the shallow Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    shallow_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Real English prose: some of what ``help("topics")`` of Python shows."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(topics[key] for key in sorted(topics)[:3]).encode("ascii", "ignore").decode())
    return path
