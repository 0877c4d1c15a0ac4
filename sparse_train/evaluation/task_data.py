"""The seven zero-shot tasks from local JSONL files; the task definitions in ``tasks/`` read them through this module.

A file holds one JSON item per line. In every item, ``gold`` is the index of the right choice, counted from 0.
"""

import json
import re
from pathlib import Path
from typing import Any

TASKS_FOLDER = Path(__file__).parent / "tasks"
"""Definitions of the seven tasks for lm-eval; plain lm-eval can also read them: ``lm_eval --include_path``."""

WANDA7 = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The tasks of arXiv 2306.11695, section 4, in the order of its tables, by their names in lm-eval."""

_FIELDS = dict.fromkeys(WANDA7, ("query", "choices"))
_FIELDS |= {"rte": ("premise", "hypothesis"), "winogrande": ("context_options", "continuation")}
_LISTS = ("choices", "context_options")
_BEGINNINGS = {"boolq": "Passage: ", "arc_easy": "Question: ", "arc_challenge": "Question: "}


def task_file(folder: str | Path, task: str) -> Path:
    """The file of a task: ``TASK.jsonl``, or a sample of its items, named with their number: ``TASK1000.jsonl``."""
    whole = Path(folder) / f"{task}.jsonl"
    samples = sorted(path for path in whole.parent.glob(f"{task}*.jsonl") if re.fullmatch(rf"{task}\d+", path.stem))
    if whole.is_file() or len(samples) == 1:
        return whole if whole.is_file() else samples[0]
    if samples:
        names = ", ".join(path.name for path in samples)
        raise ValueError(f"{folder} has several samples of {task} ({names}). Leave one, or add {whole.name}.")
    raise ValueError(
        f"{task} expects its items in {whole} (or a sample of N of them in {task}N.jsonl), and there is no such file. "
        "Its format: docs/evaluation.md."
    )


def read(folder: str | Path, task: str) -> list[dict[str, Any]]:
    """The items of a task, checked, because lm-eval counts many mistakes in silence as wrong answers."""
    path, items = task_file(folder, task), []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                items.append(json.loads(line))
                _check(task, items[-1])
            except ValueError as error:  # JSONDecodeError is one
                raise ValueError(f"{path}, line {number}: {error}. The format: docs/evaluation.md.") from error
    if not items:
        raise ValueError(f"{path} holds no items.")
    return items


def _check(task: str, item: Any) -> None:
    if not isinstance(item, dict):
        raise ValueError("an item is a JSON object")
    choices = ["False", "True"]  # of rte
    for name in _FIELDS[task]:
        texts = item.get(name) if name in _LISTS else [item.get(name)]
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{task} needs {name!r}, a {'list of texts' if name in _LISTS else 'text'}")
        choices = texts if name in _LISTS else choices
    if len(choices) < 2:
        raise ValueError(f"an item of {task} has at least two choices")
    if task == "boolq" and choices != ["no", "yes"]:
        raise ValueError('the choices of boolq are ["no", "yes"]')
    if not item.get("query", "").startswith(beginning := _BEGINNINGS.get(task, "")):
        raise ValueError(f"the query of {task} begins with {beginning!r}")
    gold = item.get("gold")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise ValueError(f"{task} needs 'gold', the index of the right choice, 0 to {len(choices) - 1}, got {gold!r}")


def load(*, task: str, task_data: str, **_: Any) -> dict[str, Any]:
    """The data set of a task for the definitions in ``tasks/``; ``task_data`` is in lm-eval's metadata."""
    from datasets import Dataset

    names = [*_FIELDS[task], "gold"]
    return {"test": Dataset.from_list([{name: item[name] for name in names} for item in read(task_data, task)])}
