"""``sparse-train evaluate``: perplexity and zero-shot accuracy of a model."""

import functools
from typing import Any

import torch

from sparse_train.data.blocks import beginning
from sparse_train.data.texts import PackagedWikipedia, Split, TextSource
from sparse_train.evaluation import evaluate_perplexity, evaluate_zero_shot, token_ids
from sparse_train.evaluation.perplexity import check_length
from sparse_train.evaluation.zeroshot import check_tasks, task_names
from sparse_train.models.sources import Autocast, ModelSource, as_model_source, torch_dtype
from sparse_train.terminal import bars_are_seen


def evaluate(
    model: ModelSource | str,
    tasks: str | None = None,
    task_data: str | None = None,
    tokenizer: ModelSource | str | None = None,
    limit: int | None = None,
    text: TextSource | None = None,
    split: Split = "test",
    window: int = 512,
    stride: int | None = None,
    bos: bool = False,
    batch_size: int = 4,
    max_tokens: int | None = None,
    autocast: Autocast | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Token perplexity of a model, or its accuracy on tasks, printed with the protocol.

    Args:
        model: Hugging Face id or local folder, whose weights keep their dtype; or a model source.
        tasks: what to measure, separated by commas: perplexity, wanda7 (the seven zero-shot tasks of the Wanda paper),
            or any task of lm-eval; default: perplexity.
        task_data: folder with JSONL files of wanda7's items, see docs/evaluation.md; default: from the hub.
        tokenizer: model source, Hugging Face id or folder with the tokenizer; default: that of the model.
        limit: use only the first items of each zero-shot task.
        text: for perplexity: files or folders of .txt and .jsonl, or a text source; default: the packaged Wikipedia
            text.
        split: train, validation or test.
        window: tokens per window.
        stride: tokens between starts of windows; default: no overlap.
        bos: put the tokens that the tokenizer puts in front of a text (such as <bos>) in front of every window, and not
            only at the start of the text. Models such as Gemma need this.
        batch_size: windows, or zero-shot requests, per forward pass.
        max_tokens: use only the first tokens of the split.
        autocast: compute in this dtype, such as "bfloat16"; the loss stays float32.
        device: where to compute, such as "cpu" or "cuda"; default: a GPU if there is one.
    """
    from sparse_train.cli.tables import show_zero_shot

    device = chosen_device(device)
    names = ["perplexity"] if tasks is None else task_names(tasks)
    zero_shot = [name for name in names if name != "perplexity"]
    if zero_shot:
        check_tasks(zero_shot, task_data, progress=bars_are_seen())
    source, measure = as_model_source(model, dtype="auto"), None
    reader = source if tokenizer is None else as_model_source(tokenizer)
    common: dict[str, Any] = {"batch_size": batch_size, "autocast": torch_dtype(autocast)}
    if "perplexity" in names:
        options: dict[str, Any] = {"window": window, "max_tokens": max_tokens, "bos": bos, "stride": stride}
        measure = perplexity_on(source, reader, text or PackagedWikipedia(), split, **options, **common)
    loaded = source.load().to(device)
    found: dict[str, Any] = {}
    if measure is not None:
        perplexity = measure(loaded)
        found["perplexity"] = perplexity.as_dict()
        print(perplexity.line(), flush=True)  # now: a task may fail
    if zero_shot:
        common |= {"task_data": task_data, "limit": limit, "model_name": source.name, "progress": bars_are_seen()}
        accuracy = evaluate_zero_shot(loaded, reader.tokenizer(), zero_shot, **common)
        found["zero_shot"] = accuracy.as_dict()
        show_zero_shot(accuracy)
    return dict(found["perplexity"]) if tasks is None else found


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
    reader: ModelSource,
    text: TextSource,
    split: Split = "test",
    *,
    window: int,
    max_tokens: int | None,
    bos: bool,
    **options: Any,
) -> functools.partial[Any]:
    """``evaluate_perplexity`` as a function of a model; its text is read and tokenised now, before a command's work.

    ``source`` is that of the model, ``reader`` that of its tokenizer. With ``bos``, the tokens with which the text
    begins are in front of every window. Raises ValueError if the split has less than one window of text.
    """
    documents, tokenizer = text.documents(split), reader.tokenizer()
    if not documents:
        raise ValueError(f"{text.name} has no text in its {split} split; give a text that has one.")
    prefix = beginning(tokenizer) if bos else []
    ids = token_ids(documents, tokenizer, text.separator)[len(prefix) :]  # the text begins with it, too
    check_length(ids, window, max_tokens)
    return functools.partial(
        evaluate_perplexity,
        ids=ids,
        window=window,
        prefix=prefix,
        max_tokens=max_tokens,
        model_name=source.name,
        tokenizer_name=reader.name,
        data_name=text.name,
        split=split,
        progress=True,  # a line a minute where bars are not seen
        **options,
    )
