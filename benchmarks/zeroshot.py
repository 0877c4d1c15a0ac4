"""Zero-shot accuracy of dense, one-shot and trained 2:4 models: the paper's Table 2 on a small model.

    python benchmarks/quality.py --arm static --seed 2 --lr 5e-4 --export runs/static
    python benchmarks/quality.py --arm dynamic --seed 2 --lr 2e-4 --export runs/dynamic
    python benchmarks/zeroshot.py --static runs/static --dynamic runs/dynamic --limit 50       # all of the table
    python benchmarks/zeroshot.py --arm wanda --limit 50 --task_data DIR --calibration C4_SAMPLE.jsonl
    python benchmarks/zeroshot.py --arm static --model runs/static --limit 50

An arm appends seven rows to benchmarks/zeroshot.csv, one per task, with the answer to each item. An arm that is already
there is not run again, so the command resumes after an interruption. Items come from the hub unless --task_data names a
folder with the files that zeroshot_data.py describes.
"""

import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rows
import torch
import yaml
from jsonargparse import auto_cli
from zeroshot_data import read, task_file, write_tasks

from sparse_train import Magnitude, SparseGPT, Wanda
from sparse_train.cli.evaluate import show_zero_shot
from sparse_train.data.packing import calibration_batches
from sparse_train.data.texts import PackagedWikipedia, TextFiles, TextSource
from sparse_train.evaluation import WANDA7, ZeroShotResult, evaluate_zero_shot
from sparse_train.evaluation.zeroshot import check_tasks
from sparse_train.export.card import FILE_NAME as CARD
from sparse_train.inspection import layer_sparsities
from sparse_train.models.sources import PackagedSmolLM2, Pretrained
from sparse_train.oneshot.prune import prune
from sparse_train.pruning.counts import sparsity_of

ONESHOT = {"magnitude": Magnitude, "sparsegpt": SparseGPT, "wanda": Wanda}
TRAINED = ("static", "dynamic")
ARMS = ("dense", *ONESHOT, *TRAINED)


@dataclass(frozen=True)
class Row:
    """One task of one arm."""

    arm: str
    seed: int
    """Seed of the calibration samples, or of the training run."""
    steps: int
    """Optimizer steps that the model was trained for; 0 = not trained."""
    lr: float
    limit: int | None
    task: str
    accuracy: float
    stderr: float | None
    n: int
    metric: str
    num_fewshot: int
    sparsity: float
    """Share of zeros among the weights of the decoder blocks' linear layers, counted."""
    data: str
    calibration: str
    protocol: str
    items: str
    """1 for each item that was answered correctly, otherwise 0, in the order of the data."""
    model: str = PackagedSmolLM2.name


def main(
    arm: str = "all",
    task_data: str | None = None,
    limit: int | None = None,
    model: str | None = None,
    static: str | None = None,
    dynamic: str | None = None,
    calibration: str | None = None,
    samples: int = 64,
    length: int = 1024,
    seed: int = 0,
    batch_size: int = 8,
    out: str = "benchmarks/zeroshot.csv",
) -> None:
    """Measure one arm, or all arms, and append their rows.

    Args:
        arm: "dense"; magnitude, sparsegpt or wanda, one-shot at 2:4; or static or dynamic, a trained model. "all": the
            first four, and the trained ones whose folder is given.
        task_data: folder with JSONL files of the items; default: from the hub.
        limit: use only the first items of each task; default: all.
        model: folder of the trained model of one --arm, as written by benchmarks/quality.py --export.
        static, dynamic: the same, for the trained arms of "all".
        calibration: file with calibration text; default: the packaged Wikipedia text.
        samples: number of calibration samples.
        length: tokens per sample.
        seed: of the choice of calibration samples.
        batch_size: requests per forward pass.
        out: CSV file.
    """
    folders = {name: folder for name, folder in (("static", static), ("dynamic", dynamic)) if folder is not None}
    if arm not in ("all", *ARMS):
        raise SystemExit(f"--arm is all or one of {', '.join(ARMS)}, got {arm!r}.")
    if model is not None:
        if arm not in TRAINED:
            raise SystemExit(f"--model goes with one --arm of {', '.join(TRAINED)}.")
        folders[arm] = model
    if arm in TRAINED and arm not in folders:
        raise SystemExit(f"--arm {arm} needs the folder of a trained model: --model FOLDER.")
    chosen = [name for name in ARMS if name not in TRAINED or name in folders] if arm == "all" else [arm]
    if missing := [name for name in TRAINED if arm == "all" and name not in folders]:
        print(f"left out: {', '.join(missing)}. Their folders come from benchmarks/quality.py --export.")
    definitions = tempfile.TemporaryDirectory()
    tasks = list(WANDA7) if task_data is None else write_tasks(task_data, Path(definitions.name))
    check_tasks(tasks, progress=True)
    text: TextSource = TextFiles(train=[calibration]) if calibration else PackagedWikipedia()
    data = {task: _items_of(task, task_data) for task in WANDA7}
    for name in chosen:
        folder = folders.get(name)
        run = {"seed": 0, "steps": 0, "lr": 0.0} if folder is None else _run_of(Path(folder))
        calibrated = name in ("sparsegpt", "wanda")
        about = {
            "arm": name,
            **(run | {"seed": seed} if calibrated else run),
            "calibration": f"{samples} samples of {length} tokens of {text.name}" if calibrated else "",
        }
        key = {column: str(value) for column, value in about.items()} | {"limit": str(limit or "")}
        done = [row for row in rows.read(Path(out)) if key.items() <= row.items()]
        if {(row["task"], row["data"]) for row in done} >= set(data.items()):
            print(f"{name}: already in {out}")
            continue
        began = time.perf_counter()
        source = PackagedSmolLM2() if folder is None else Pretrained(folder)
        loaded, tokenizer = source.load(), source.tokenizer()
        if name in ONESHOT:
            batches = None
            if calibrated:
                batches = calibration_batches(
                    text, tokenizer, num_calibration_samples=samples, max_seq_length=length, seed=seed
                )
            prune(loaded, batches, "2:4", criterion=ONESHOT[name](), progress=True)
        result = evaluate_zero_shot(
            loaded,
            tokenizer,
            tasks,
            limit=limit,
            batch_size=batch_size,
            model_name=f"{PackagedSmolLM2.name}, {name}",
            autocast=torch.bfloat16,
            progress=True,
        )
        layers = [layer for layer in layer_sparsities(loaded) if layer.name.startswith("model.layers.")]
        for row in _rows(result, data, sparsity=sparsity_of(layers), **about):
            rows.append(Path(out), row)
        show_zero_shot(result)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


def _rows(result: ZeroShotResult, data: dict[str, str], **about: Any) -> list[Row]:
    said = (
        f"at most {result.max_length} tokens, batches of {result.batch_size}, float32 weights, "
        f"{result.computed_in} autocast, log-likelihoods in float32, lm-eval {result.lm_eval}"
    )
    return [
        Row(
            **about,
            limit=result.limit,
            task=found.task,
            accuracy=found.accuracy,
            stderr=found.stderr,
            n=found.n,
            metric=found.metric,
            num_fewshot=result.num_fewshot,
            data=data[found.task],
            protocol=said,
            items="".join(str(int(right)) for right in found.items),
        )
        for found in result.tasks
    ]


def _items_of(task: str, task_data: str | None) -> str:
    """Where the items of a task come from; for BoolQ, also which edition."""
    if task_data is None:
        return "lm-eval's data set"
    name = task_file(task_data, task).name
    if task != "boolq":
        return name
    items = read(task_data, task)
    titled = sum(bool(re.match(r"Passage: [^\n]{1,100}? -- ", item["query"])) for item in items)
    return f"{name}, {'with' if 2 * titled > len(items) else 'without'} the titles of articles"


def _run_of(folder: Path) -> dict[str, Any]:
    """Seed, steps and learning rate of the run that wrote a folder, from the recipe in its model card."""
    card = folder / CARD
    found = re.search(r"^## Recipe\n\n```yaml\n(.*?)^```", card.read_text(), re.M | re.S) if card.is_file() else None
    if found is None:
        raise SystemExit(f"{folder} has no {CARD} with a recipe. benchmarks/quality.py --export writes such folders.")
    recipe = yaml.safe_load(found[1])
    return {
        "seed": int(recipe["seed_everything"]),
        "steps": int(recipe["trainer"]["max_steps"]),
        "lr": float(recipe["model"]["lr"]),
    }


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
