"""A model and a text for the examples: tiny ones, or yours by ``--model NAME --text FILE``. Nothing here is sparse."""

from argparse import ArgumentParser
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM


def load(options=None):
    """The model, its tokenizer and the text of the command line, or of options such as ``["--model", "gpt2"]``."""
    parser = ArgumentParser()
    parser.add_argument("--model", help="hub id or folder; default: a tiny Llama with random weights")
    parser.add_argument("--text", type=Path, help="a file of text; default: a help page of Python")
    chosen = parser.parse_args(options)
    torch.manual_seed(0)
    if chosen.model:
        tokenizer = AutoTokenizer.from_pretrained(chosen.model)
        model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype="float32")
    else:
        tokenizer = ByT5Tokenizer()  # reads bytes, so it has no vocabulary to download
        size = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
        special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, **special))
    return model.train(), tokenizer, chosen.text.read_text() if chosen.text else topics["comparisons"]


def blocks(tokenizer, text, length=128):
    """The text in blocks of as many tokens, with their labels; the rest is dropped."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    return [{"input_ids": block, "labels": block} for block in ids.split(length) if len(block) == length]
