"""What ``prune`` and ``evaluate`` share: the device, and the measurement of perplexity."""

import functools
from typing import Any

import torch

from sparse_train.data.blocks import beginning
from sparse_train.data.texts import Split, TextSource
from sparse_train.models.sources import ModelSource


def chosen_device(device: str | None) -> str:
    """The device that was named; otherwise a GPU if there is one. Raises ValueError if torch cannot compute there."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ValueError(f"torch cannot compute on device={device!r} here ({error}). Use cpu or cuda.") from error
    return device


def perplexity_on(
    source: ModelSource,
    text: TextSource,
    split: Split = "test",
    *,
    window: int,
    max_tokens: int | None,
    bos: bool,
    **options: Any,
) -> functools.partial[Any]:
    """``evaluate_perplexity`` as a function of a model. The text is read and tokenised now, before a command's work.

    Args:
        source: of the tokenizer.
        text, split: what is read.
        bos: put the tokens with which the text begins in front of every window.
        window, max_tokens, options: further arguments of ``evaluate_perplexity``.

    Raises:
        ValueError: there is no text in this split, or less than one window of it.
    """
    from sparse_train.evaluation import evaluate_perplexity, token_ids, word_starts
    from sparse_train.evaluation.perplexity import check_length

    documents, tokenizer = text.documents(split), source.tokenizer()
    if not documents:
        raise ValueError(f"{text.name} has no text in its {split} split; give a text that has one.")
    prefix = beginning(tokenizer) if bos else []
    ids = token_ids(documents, tokenizer, text.separator)[len(prefix) :]  # the text begins with it, too
    words = word_starts(documents, tokenizer, text.separator)
    check_length(ids, window, max_tokens)
    return functools.partial(
        evaluate_perplexity,
        ids=ids,
        words=None if words is None else words[len(prefix) :],
        window=window,
        prefix=prefix,
        max_tokens=max_tokens,
        model_name=source.name,
        data_name=text.name,
        split=split,
        progress=True,  # a line a minute where bars are not seen
        **options,
    )
