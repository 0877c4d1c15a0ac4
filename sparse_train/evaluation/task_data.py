"""The seven zero-shot tasks from local JSONL files; the task definitions in ``tasks/`` read them through this module.

A file holds one JSON item per line. In every item, ``gold`` is the index of the right choice, counted from 0.
"""

import json
import re
from pathlib import Path
from typing import Any

from sparse_train.files import reading

TASKS_FOLDER = Path(__file__).parent / "tasks"
"""Definitions of the seven tasks for lm-eval; plain lm-eval can also read them: ``lm_eval --include_path``."""

WANDA7 = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The tasks of arXiv 2306.11695, section 4, in the order of its tables, by their names in lm-eval."""

_FIELDS = dict.fromkeys(WANDA7, ("query", "choices"))
_FIELDS |= {"rte": ("premise", "hypothesis"), "winogrande": ("continuation", "context_options")}


def task_file(folder: str | Path, task: str) -> Path:
    """The file of a task: ``TASK.jsonl``, or a sample of its items, named with their number: ``TASK1000.jsonl``."""
    files = sorted(path for path in Path(folder).glob(f"{task}*.jsonl") if re.fullmatch(rf"{task}\d*", path.stem))
    if len(files) != 1:
        raise ValueError(
            f"{task} expects its items in one file, {folder}/{task}.jsonl or a sample of N of them, {task}N.jsonl, and "
            f"there is {' and '.join(path.name for path in files) or 'none'}. Its format: docs/evaluation.md."
        )
    return files[0]


def read(folder: str | Path, task: str) -> list[dict[str, Any]]:
    """The items of a task, checked, because lm-eval counts many mistakes in silence as wrong answers."""
    path = task_file(folder, task)
    with reading(path, lambda: " The format of its items is in docs/evaluation.md."):
        # not splitlines(): texts may contain U+2028, at which it breaks lines
        items = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        for number, item in enumerate(items, 1):
            texts = [item[name] for name in _FIELDS[task]]
            choices = ["False", "True"] if task == "rte" else texts.pop()
            right = isinstance(choices, list) and all(isinstance(each, str) and each for each in (*texts, *choices))
            if not right or type(item["gold"]) is not int or not 0 <= item["gold"] < len(choices) >= 2:
                raise ValueError(f"Item {number} is to have {', '.join(_FIELDS[task])} and gold, and is {item}.")
        if not items:
            raise ValueError("It has no items.")
    return items


def load(*, task: str, task_data: str, **_: Any) -> dict[str, Any]:
    """The data set of a task for the definitions in ``tasks/``; ``task_data`` is in lm-eval's metadata."""
    from datasets import Dataset

    names = [*_FIELDS[task], "gold"]
    return {"test": Dataset.from_list([{name: item[name] for name in names} for item in read(task_data, task)])}
