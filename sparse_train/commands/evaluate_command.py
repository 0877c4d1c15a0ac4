"""``sparse-train evaluate``: perplexity and zero-shot accuracy of a model."""

from typing import Any

from sparse_train.commands.devices import chosen_device
from sparse_train.data.special_tokens import beginning
from sparse_train.data.texts import PackagedWikipedia, Split, TextSource
from sparse_train.models.sources import ModelSource, as_model_source, float_dtype
from sparse_train.terminal.streams import bars_are_seen
from sparse_train.terminal.tables import show_zero_shot


def evaluate(
    model: ModelSource | str,
    tasks: str | None = None,
    task_data: str | None = None,
    limit: int | None = None,
    text: TextSource | None = None,
    split: Split = "test",
    window: int = 512,
    stride: int | None = None,
    bos: bool = False,
    batch_size: int = 4,
    max_tokens: int | None = None,
    autocast: str | None = None,
    device: str | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """Token and word perplexity of a model, or its accuracy on tasks, printed with the protocol.

    Args:
        model: Hugging Face id or local folder, whose weights keep their dtype; or a model source.
        tasks: what to measure, separated by commas: perplexity, wanda7 (the seven zero-shot tasks of the Wanda paper),
            or any task of lm-eval; default: perplexity.
        task_data: folder with JSONL files of wanda7's items, see docs/evaluation.md; default: from the hub.
        limit: use only the first items of each zero-shot task.
        text: for perplexity; default: the packaged Wikipedia text.
        split: train, validation or test.
        window: tokens per window.
        stride: tokens between starts of windows; default: no overlap.
        bos: put the tokens that the tokenizer puts in front of a text (such as <bos>) in front of every window, and not
            only at the start of the text. Models such as Gemma need this.
        batch_size: windows, or zero-shot requests, per forward pass.
        max_tokens: use only the first tokens of the split.
        autocast: compute in this dtype, such as "bfloat16"; the loss stays float32.
        device: where to compute, such as "cpu" or "cuda"; default: a GPU if there is one.
        json: print one JSON object instead of text.
    """
    from sparse_train.evaluation import evaluate_perplexity, evaluate_zero_shot, token_ids, word_starts
    from sparse_train.evaluation.undisturbed import check_autocast
    from sparse_train.evaluation.zeroshot import check_tasks, task_names

    device = chosen_device(device)
    dtype = None if autocast is None else float_dtype(autocast)
    check_autocast(dtype)
    names = ["perplexity"] if tasks is None else task_names([name.strip() for name in tasks.split(",")])
    zero_shot = [name for name in names if name != "perplexity"]
    if not zero_shot and (task_data is not None or limit is not None):
        raise ValueError("--task_data and --limit are for zero-shot tasks. Name those in --tasks, such as wanda7.")
    if "perplexity" not in names and (max_tokens is not None or stride is not None or bos):
        raise ValueError("--max_tokens, --stride and --bos are for perplexity. Add it to --tasks: perplexity,wanda7.")
    source, text = as_model_source(model, dtype="auto"), text or PackagedWikipedia()
    documents = text.documents(split) if "perplexity" in names else []
    if "perplexity" in names and not documents:
        raise ValueError(f"{text.name} has no text in its {split} split.")
    if zero_shot:
        check_tasks(zero_shot, task_data, progress=bars_are_seen())
    loaded, tokenizer = source.load().to(device), source.tokenizer()
    results: dict[str, Any] = {}
    if "perplexity" in names:
        prefix = beginning(tokenizer) if bos else []
        ids = token_ids(documents, tokenizer, text.separator)
        words = word_starts(documents, tokenizer, text.separator)
        results["perplexity"] = evaluate_perplexity(
            loaded,
            ids[len(prefix) :],  # the text begins with it, too
            words=None if words is None else words[len(prefix) :],
            window=window,
            stride=stride,
            prefix=prefix,
            batch_size=batch_size,
            max_tokens=max_tokens,
            model_name=source.name,
            data_name=text.name,
            split=split,
            autocast=dtype,
            progress=True,  # a line a minute where bars are not seen
        )
        if not json:  # now: a task may fail
            print("\n".join(results["perplexity"].lines()), flush=True)
    if zero_shot:
        results["zero_shot"] = evaluate_zero_shot(
            loaded,
            tokenizer,
            zero_shot,
            task_data=task_data,
            limit=limit,
            batch_size=batch_size,
            model_name=source.name,
            autocast=dtype,
            progress=bars_are_seen(),
        )
    if zero_shot and not json:
        show_zero_shot(results["zero_shot"])
    found = {kind: result.as_dict() for kind, result in results.items()}
    return dict(found["perplexity"]) if tasks is None else found
