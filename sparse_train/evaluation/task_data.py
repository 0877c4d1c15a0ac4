"""The seven zero-shot tasks from local JSONL files; the task definitions in ``tasks/`` read them through this module.

A file holds one JSON item per line. In every item, ``gold`` is the index of the right choice, counted from 0.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TASKS_FOLDER = Path(__file__).parent / "tasks"
"""Definitions of the seven tasks for lm-eval; plain lm-eval can also read them: ``lm_eval --include_path``."""

WANDA7 = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The tasks of arXiv 2306.11695, section 4, in the order of its tables, by their names in lm-eval."""

Rule = tuple[Callable[[Any], bool], str]


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 2 and all(isinstance(text, str) and text for text in value)


_TEXT: Rule = (lambda value: isinstance(value, str) and bool(value), "a text")
_TEXTS: Rule = (_is_texts, "a list of at least two texts")
_NO_YES: Rule = (lambda value: value == ["no", "yes"], 'the list ["no", "yes"]')
_QUESTION: dict[str, Rule] = {"query": _TEXT, "choices": _TEXTS}
_FIELDS: dict[str, dict[str, Rule]] = {
    **dict.fromkeys(WANDA7, _QUESTION),
    "boolq": {"query": _TEXT, "choices": _NO_YES},
    "rte": {"premise": _TEXT, "hypothesis": _TEXT},
    "winogrande": {"context_options": _TEXTS, "continuation": _TEXT},
}
_BEGINNINGS = {"boolq": "Passage: ", "arc_easy": "Question: ", "arc_challenge": "Question: "}


def task_file(folder: str | Path, task: str) -> Path:
    """The file of a task: ``TASK.jsonl``, or a sample of its items, named with their number: ``TASK1000.jsonl``.

    Raises:
        ValueError: there is no file, or only several samples.
    """
    folder = Path(folder)
    whole = folder / f"{task}.jsonl"
    if whole.is_file():
        return whole
    if not folder.is_dir():
        raise ValueError(f"--task_data names a folder with JSONL files, and there is no folder {folder}.")
    samples = sorted(path for path in folder.iterdir() if re.fullmatch(rf"{task}\d+\.jsonl", path.name))
    if len(samples) > 1:
        names = ", ".join(path.name for path in samples)
        raise ValueError(f"{folder} has several samples of {task} ({names}). Leave one, or add {whole.name}.")
    if not samples:
        raise ValueError(
            f"{task} expects its items in {whole} (or a sample of N of them in {task}N.jsonl), and there is no such "
            "file. Its format: docs/evaluation.md."
        )
    return samples[0]


def read(folder: str | Path, task: str) -> list[dict[str, Any]]:
    """The items of a task, checked.

    Raises:
        ValueError: no file, no items, or an item that lacks what its task needs; the message has file and line.
    """
    path = task_file(folder, task)
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
        if wrong := _mistake(task, item):
            raise ValueError(f"{path}, line {number}: {wrong}. The format: docs/evaluation.md.")
        items.append(item)
    if not items:
        raise ValueError(f"{path} holds no items.")
    return items


def _mistake(task: str, item: Any) -> str:
    if not isinstance(item, Mapping):
        return "an item is a JSON object"
    fields = _FIELDS[task]
    for name, (fits, what) in fields.items():
        if not fits(item.get(name)):
            return f"{task} needs {name!r}, {what}"
    beginning = _BEGINNINGS.get(task, "")
    if not item.get("query", "").startswith(beginning):
        return f"the query of {task} begins with {beginning!r}"
    count = next((len(item[name]) for name, rule in fields.items() if rule is _TEXTS), 2)
    gold = item.get("gold")
    if type(gold) is not int or not 0 <= gold < count:
        return f"{task} needs 'gold', the number of the right choice, 0 to {count - 1}, got {gold!r}"
    return ""


def load(*, task: str, task_data: str | None = None, **_: Any) -> dict[str, Any]:
    """The data set of a task, in the form of lm-eval's ``custom_dataset``; used by the definitions in ``tasks/``.

    Args:
        task: from the definition.
        task_data: folder with the files, from the metadata of lm-eval's ``TaskManager``.
        _: other metadata of lm-eval, not used here.
    """
    from datasets import Dataset

    if task_data is None:
        raise ValueError(f"{task} of sparse_train reads a file: give the folder in the metadata, {{'task_data': DIR}}.")
    names = [*_FIELDS[task], "gold"]
    return {"test": Dataset.from_list([{name: item[name] for name in names} for item in read(task_data, task)])}
