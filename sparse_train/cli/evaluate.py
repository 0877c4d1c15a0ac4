"""``sparse-train evaluate``: perplexity and zero-shot accuracy of a model."""

import sys
from typing import Any

from sparse_train.data.packing import beginning
from sparse_train.data.texts import PackagedWikipedia, Split, TextSource
from sparse_train.evaluation import ZeroShotResult, evaluate_perplexity, evaluate_zero_shot, token_ids
from sparse_train.evaluation.perplexity import check_length
from sparse_train.evaluation.zeroshot import check_tasks, task_names
from sparse_train.models.lora import LoRA
from sparse_train.models.sources import Autocast, ModelSource, as_model_source, chosen_device, torch_dtype
from sparse_train.terminal import bars_are_seen, print_table


def evaluate(
    model: ModelSource | str,
    tasks: str | None = None,
    tokenizer: ModelSource | str | None = None,
    adapter: str | None = None,
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
            or any task of lm-eval, by its name or in a file of your own (TASK.yaml); default: perplexity.
        tokenizer: model source, Hugging Face id or folder with the tokenizer; default: that of the model.
        adapter: folder of an adapter of peft that is added to the model.
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
    device = chosen_device(device)
    names = ["perplexity"] if tasks is None else task_names(tasks)
    zero_shot = [name for name in names if name != "perplexity"]
    if zero_shot:
        check_tasks(zero_shot, progress=bars_are_seen())
    source = as_model_source(model, dtype="auto")
    reader = source if tokenizer is None else as_model_source(tokenizer)
    text = text or PackagedWikipedia()
    if "perplexity" in names:  # before the model is loaded, which takes longer
        ids, prefix = _ids(text, split, reader.tokenizer(), bos)
        check_length(ids, window, max_tokens)
    loaded = source.load()
    if adapter is not None:
        loaded = LoRA(adapter=adapter).added_to(loaded)
    loaded.to(device)
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "autocast": torch_dtype(autocast),
        "model_name": source.name if adapter is None else f"{source.name} with {adapter}",
    }
    results: dict[str, Any] = {}
    if "perplexity" in names:
        perplexity = evaluate_perplexity(
            loaded,
            ids,
            window=window,
            stride=stride,
            prefix=prefix,
            max_tokens=max_tokens,
            tokenizer_name=reader.name,
            data_name=text.name,
            split=split,
            progress=True,  # a line a minute where bars are not seen
            **common,
        )
        results["perplexity"] = perplexity.as_dict()
        print(perplexity.line(), flush=True)  # now: a task may fail
    if zero_shot:
        common |= {"limit": limit, "progress": bars_are_seen()}
        accuracy = evaluate_zero_shot(loaded, reader.tokenizer(), zero_shot, **common)
        results["zero_shot"] = accuracy.as_dict()
        show_zero_shot(accuracy)
    return dict(results["perplexity"]) if tasks is None else results


def _ids(text: TextSource, split: Split, tokenizer: Any, bos: bool) -> tuple[Any, list[int]]:
    """The tokens of a text, and those that are put in front of every window."""
    print(f"reading {text.name}", file=sys.stderr)
    documents = text.documents(split)
    if not documents:
        raise ValueError(f"{text.name} has no text in its {split} split; give a text that has one.")
    prefix = beginning(tokenizer) if bos else []
    return token_ids(documents, tokenizer, text.separator)[len(prefix) :], prefix  # the text begins with it, too


def show_zero_shot(result: ZeroShotResult) -> None:
    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.2f}"

    rows = [[row.task, percent(row.accuracy), percent(row.stderr), str(row.n), row.metric] for row in result.tasks]
    if len(rows) > 1:
        items = str(sum(row.n for row in result.tasks))
        rows.append([f"mean of {len(rows)}", percent(result.mean), percent(result.mean_stderr), items, ""])
    print_table(["task", "accuracy, %", "standard error", "items", "metric"], rows, words=(0, 4))
    print(result.protocol)
