"""The seven zero-shot tasks of the Wanda paper from JSONL files, with the definitions in ``zeroshot_tasks/``.

Prompts and scores are lm-eval's, item by item. A file, ``TASK.jsonl`` or ``TASKN.jsonl`` for a sample of N items, holds
one item per line; ``gold`` is the index of the right choice, counted from 0. How an item of lm-eval is converted:

    boolq                      query: "{passage}\\nQuestion: {question}?", choices: ["no", "yes"]
    rte                        premise, hypothesis; 0 is entailment
    hellaswag                  query, choices: context and endings after lm-eval's preprocessing
    winogrande                 context_options: the sentence up to the blank, filled in; continuation: what follows it
    arc_easy, arc_challenge    query: the question, with or without "Question: " in front; choices
    openbookqa                 query: the bare stem; choices

BoolQ exists in two editions: lm-eval's (SuperGLUE) puts the title of the article in front of the passage, and the
original does not.
"""

import json
import re
from pathlib import Path
from typing import Any

from sparse_train.evaluation import WANDA7

_DEFINITIONS = Path(__file__).parent / "zeroshot_tasks"
_FIELDS = dict.fromkeys(WANDA7, ("query", "choices"))
_FIELDS |= {"rte": ("premise", "hypothesis"), "winogrande": ("continuation", "context_options")}


def task_file(folder: str | Path, task: str) -> Path:
    """The file with the items of a task."""
    files = sorted(path for path in Path(folder).glob(f"{task}*.jsonl") if re.fullmatch(rf"{task}\d*", path.stem))
    if len(files) != 1:
        raise ValueError(
            f"{task} expects its items in one file, {folder}/{task}.jsonl or a sample of N of them, {task}N.jsonl, and "
            f"there is {' and '.join(path.name for path in files) or 'none'}."
        )
    return files[0]


def read(folder: str | Path, task: str) -> list[dict[str, Any]]:
    """The items of a task, checked, because lm-eval counts many mistakes in silence as wrong answers."""
    path = task_file(folder, task)
    # not splitlines(): texts may contain U+2028, at which it breaks lines
    items = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    for number, item in enumerate(items, 1):
        texts = [item[name] for name in _FIELDS[task]]
        choices = ["False", "True"] if task == "rte" else texts.pop()
        right = isinstance(choices, list) and all(isinstance(each, str) and each for each in (*texts, *choices))
        if not right or type(item["gold"]) is not int or not 0 <= item["gold"] < len(choices) >= 2:
            raise ValueError(f"{path}: item {number} is to have {', '.join(_FIELDS[task])} and gold, and is {item}.")
    return items


def write_tasks(folder: str | Path, out: Path) -> list[str]:
    """Task files of lm-eval for the seven, which read their items from ``folder``; written to ``out``."""
    tasks = []
    for task in WANDA7:
        read(folder, task)
        own = {"data_files": {"test": str(task_file(folder, task).resolve())}}
        tasks.append(str(out / f"{task}.yaml"))
        Path(tasks[-1]).write_text(json.dumps({"include": str(_DEFINITIONS / f"{task}.yaml"), "dataset_kwargs": own}))
    return tasks
