"""Tasks for lm-eval without a hub: its own definitions with an item of each data set, and files of one's own."""

import json
import random
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
from lm_eval.tasks import TaskManager

STOCK = Path(lm_eval.tasks.__file__).parent
STOCK_FOLDERS = [
    STOCK / name for name in ("arc", "super_glue/boolq", "glue/rte", "hellaswag", "winogrande", "openbookqa")
]

ARC = {"label": ["A", "B", "C", "D"], "text": ["a scale", "a 'ruler'", 'a "cup"', "Bob's clock"]}
HUB = {
    "boolq": {"passage": "Ice -- Ice is frozen water.\nIt floats.", "question": "does ice float", "idx": 0, "label": 1},
    "rte": {"sentence1": "Ann sold her car.", "sentence2": "Ann had a car.", "label": 0, "idx": 0},
    "hellaswag": {
        "activity_label": "Home and Garden",
        "ctx_a": "[header] How to mend a roof [title] Climb up. [step] Take a ladder.",
        "ctx_b": "then",
        "endings": [
            "[substeps] Nail the shingles  down.",
            "climb down",
            "paint it [title] Use red.",
            "call a friend.",
        ],
        "label": "2",
    },
    "winogrande": {
        "sentence": "The cat fled the dog as the _ was big.",
        "option1": "cat",
        "option2": "dog",
        "answer": "2",
    },
    "arc_easy": {"id": "1", "question": "What measures length?", "choices": ARC, "answerKey": "B"},
    "arc_challenge": {
        "id": "2",
        "question": "What measures time?",
        "choices": {**ARC, "label": list("1234")},
        "answerKey": "4",
    },
    "openbookqa": {"id": "3", "question_stem": "A thing that measures mass is", "choices": ARC, "answerKey": " A"},
}
"""An item of each data set, as it is on the hub."""


@pytest.fixture
def hub(monkeypatch):
    """lm-eval's own definitions of a few tasks, and a hub with one item of each data set."""
    data = {
        ("aps/super_glue", "boolq"): "boolq",
        ("nyu-mll/glue", "rte"): "rte",
        ("Rowan/hellaswag", None): "hellaswag",
        ("allenai/winogrande", "winogrande_xl"): "winogrande",
        ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
        ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
        ("allenai/openbookqa", "main"): "openbookqa",
    }

    load = datasets.load_dataset

    def load_dataset(path, name=None, **options):
        if path == "json":
            return load(path, name, **options)
        items = datasets.Dataset.from_list([HUB[data[path, name]]])
        return {"train": items, "validation": items, "test": items}

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", load_dataset)
    return TaskManager(include_defaults=False, include_path=STOCK_FOLDERS)


def task_file(folder, name="mine", count=8, **changes):
    """A task with so many random items, which reports acc and acc_norm, in a file that names the file of its items."""
    chance = random.Random(name)

    def text(count):
        return " ".join("".join(chance.choices("abcdefgh", k=4)) for _ in range(count))

    items = [
        {"query": text(3), "choices": [text(2), text(2), text(3)], "gold": chance.randrange(3)} for _ in range(count)
    ]
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in items))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(task | changes))
    return str(file)
