"""The special tokens around a text: those that it begins with, and the one that ends a document."""

from typing import Any


def beginning(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts in front of a text, such as Llama's beginning-of-text token; often none."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    with_special: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(with_special)):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


def end_of_text(tokenizer: Any) -> int:
    """The token that ends a document.

    Raises:
        ValueError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer ({type(tokenizer).__name__}, {tokenizer.name_or_path or 'without a name'}) has no "
            "end-of-text token, which separates the documents of a block. Set its eos_token, in "
            "tokenizer_config.json or by tokenizer.eos_token = ..."
        )
    return int(tokenizer.eos_token_id)
