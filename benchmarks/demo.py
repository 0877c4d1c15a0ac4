"""The main workflow on a real model: prune, fine-tune sparse with re-pruning, compare, export, report.

    make demo                 # STEPS=20
    make demo STEPS=200

Runs the recipes of this repository on SmolLM2-135M-Instruct and English Wikipedia lead sections, both from Python
packages. All results are in runs/demo/: model/ (exported), report.html, table.csv, and a folder per training run, whose
version_0/ has the resolved recipe (config.yaml), metrics (metrics.csv) and the rest of the record (run.json).
"""

import csv
import ctypes
import gc
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from sparse_train import Magnitude, Wanda, environment
from sparse_train.cli import lightning_cli
from sparse_train.data.blocks import calibration_batches
from sparse_train.data.texts import PackagedWikipedia, TextSource
from sparse_train.evaluation import PerplexityResult, evaluate_perplexity, token_ids
from sparse_train.inspection import layer_sparsities, overall_sparsity
from sparse_train.models.sources import ModelSource, PackagedSmolLM2, Pretrained
from sparse_train.oneshot.prune import prune
from sparse_train.report import read_metrics, write_run_report
from sparse_train.report.page import paragraph
from sparse_train.report.page import table as html_table

WINDOW, BATCH = 512, 4
CONSOLE = Console()


@dataclass(frozen=True)
class Arm:
    """One line of the table."""

    name: str
    result: PerplexityResult
    sparsity: float
    train_tokens: int
    seconds: float
    peak_bytes: int


def main(
    steps: int = 20,
    model: ModelSource = PackagedSmolLM2(),  # noqa: B008  (shown as the default)
    text: TextSource = PackagedWikipedia(),  # noqa: B008
    eval_tokens: int = 16384,
    window: int = WINDOW,
    out: str = "runs/demo",
) -> None:
    """Run the whole workflow.

    Args:
        steps: optimizer steps of each trained arm, of 4 x window tokens.
        model: the dense model.
        text: training, validation and held-out text.
        eval_tokens: number of held-out tokens for the evaluation.
        window: tokens per sequence, in training and evaluation.
        out: folder for all results; replaced.
    """
    folder = Path(out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    CONSOLE.rule("preparing the model")
    loaded, tokenizer = model.load(), model.tokenizer()
    dense = folder / "dense"  # a plain folder loads faster than a GGUF file
    loaded.save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    del loaded
    ids = token_ids(text.documents("test"), tokenizer)
    runner = _Runner(folder, dense, model.name, text, ids, window, eval_tokens)

    def oneshot(criterion: Magnitude | Wanda) -> Callable[[], Any]:
        def run() -> Any:
            loaded = Pretrained(str(dense)).load()
            batches = None
            if criterion.needs_activations:
                batches = calibration_batches(text, tokenizer, num_calibration_samples=32, max_seq_length=window)
            with torch.autocast("cpu", torch.bfloat16):
                prune(loaded, batches, "2:4", criterion=criterion, progress=True)
            return loaded

        return run

    def trained(recipe: str, name: str, *changes: str) -> Callable[[], Any]:
        def run() -> Any:
            cli = lightning_cli.run(runner.arguments(recipe, name, steps, *changes))
            trained_model = cli.model.model
            vars(cli).clear()  # jsonargparse keeps the last parser, which keeps the CLI, trainer and optimizer state
            return trained_model

        return run

    tokens = steps * BATCH * window
    runner.arm("dense", lambda: Pretrained(str(dense)).load())
    runner.arm("one-shot magnitude", oneshot(Magnitude()))
    runner.arm("one-shot Wanda", oneshot(Wanda()))
    runner.arm("dense, fine-tuned", trained("smollm2_dense", "dense_finetuned"), tokens)
    runner.arm("static mask, fine-tuned", trained("smollm2_2of4_static", "static"), tokens)
    exported = folder / "model"
    runner.arm("dynamically re-pruned", trained("smollm2_2of4", "dynamic", f"--export={exported}"), tokens)
    shutil.rmtree(dense)
    page = _write(folder, runner.arms, steps, exported, isinstance(model, PackagedSmolLM2))
    CONSOLE.print(f"exported model: {exported}\nreport: {page}", highlight=False)


class _Runner:
    """Builds each arm's model, evaluates it, and records time and memory."""

    def __init__(
        self, folder: Path, dense: Path, name: str, text: TextSource, ids: torch.Tensor, window: int, eval_tokens: int
    ) -> None:
        self._folder, self._dense, self._name, self._text = folder, dense, name, text
        self._ids, self._window, self._eval_tokens = ids, window, eval_tokens
        self.arms: list[Arm] = []

    def arguments(self, recipe: str, name: str, steps: int, *changes: str) -> list[str]:
        """Command line of a training run: the recipe with the length, model, data and folder of the demo."""
        config = Path(__file__).parent.parent / "recipes" / f"{recipe}.yaml"
        own = self._text
        names = [each.name for each in fields(own) if each.init] if is_dataclass(own) else []
        text = {
            "class_path": f"{type(own).__module__}.{type(own).__name__}",
            "init_args": {each: getattr(own, each) for each in names},
        }
        run = self._folder / name
        return [
            "fit",
            f"--config={config}",
            f"--model.model={self._dense}",
            f"--data.text={text}",
            f"--data.block_size={self._window}",
            "--data.max_validation_blocks=8",
            f"--trainer.max_steps={steps}",
            f"--trainer.val_check_interval={max(1, steps // 5)}",
            f"--trainer.logger.init_args.save_dir={run}",
            f"--trainer.default_root_dir={run}",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_model_summary=false",
            *changes,
        ]

    def arm(self, name: str, build: Callable[[], Any], train_tokens: int = 0) -> None:
        CONSOLE.rule(name)
        _reset_peak()
        began = time.perf_counter()
        model = build()
        seconds, peak = time.perf_counter() - began, environment.peak_bytes()
        result = evaluate_perplexity(
            model,
            self._ids,
            window=self._window,
            max_tokens=self._eval_tokens,
            model_name=self._name,
            data_name=self._text.name,
            split="test (held-out articles)",
            autocast=torch.bfloat16,
            progress=True,
        )
        layers = [layer for layer in layer_sparsities(model) if layer.name.startswith("model.layers.")]
        self.arms.append(Arm(name, result, overall_sparsity(layers), train_tokens, seconds, peak))
        CONSOLE.print(f"{name}: perplexity {result.perplexity:.2f}", highlight=False)
        del model
        gc.collect()


def _reset_peak() -> None:
    """Count the peak of memory anew, where the system can (Linux); elsewhere it stays that of the process."""
    with suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # so that memory freed by earlier work does not count
        Path("/proc/self/clear_refs").write_text("5")


def _write(folder: Path, arms: list[Arm], steps: int, exported: Path, packaged: bool) -> Path:
    columns = [
        "arm",
        "held-out perplexity",
        "sparsity, decoder blocks",
        "tokens trained",
        "seconds",
        "peak memory, GiB",
    ]
    rows = [
        [
            a.name,
            f"{a.result.perplexity:.2f}",
            f"{a.sparsity:.4f}",
            f"{a.train_tokens:,}",
            f"{a.seconds:.0f}",
            f"{a.peak_bytes / 2**30:.1f}",
        ]
        for a in arms
    ]
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "sparsity", "train_tokens", "seconds", "peak_bytes", *arms[0].result.as_dict()])
        for arm in arms:
            numbers = [arm.name, arm.sparsity, arm.train_tokens, arm.seconds, arm.peak_bytes]
            writer.writerow([*numbers, *arm.result.as_dict().values()])
    notes = [
        f"Protocol: {arms[0].result.protocol}. Seconds and peak memory are those of making the model (loading, "
        "calibration, training with its validations), without the final evaluation.",
        f"Trained arms: {steps} steps each, same batches in the same order, each at its recipe's learning "
        "rate; sparse ones at 2:4. One seed, and far too few steps to rank methods: this only shows that everything "
        "works.",
        f"Machine: {os.cpu_count()} CPU cores, torch {torch.__version__}.",
    ]
    table = Table(*columns, title="SPARSE-TRAIN DEMO")
    for row in rows:
        table.add_row(*row)
    CONSOLE.rule("result")
    CONSOLE.print(table)
    for note in notes:
        CONSOLE.print(note, highlight=False)
    runs = [folder / name / "version_0" for name in ("dense_finetuned", "static", "dynamic")]
    if not any(row.get("sparsity/flip_rate", 0) > 0 for row in read_metrics(runs[-1] / "metrics.csv")):
        notes.append("There was no re-pruning: the run is shorter than an interval between updates. Use more steps.")
    notes.append("Curves are on validation articles, this table is on held-out ones.")
    for run in runs if packaged else ():  # name the model that was copied to the folder that is gone
        recipe = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(recipe.replace(f"model: {folder / 'dense'}\n", "model: PackagedSmolLM2\n"))
    return write_run_report(
        runs, folder, title="sparse-train demo", lead=[html_table(columns, rows), *map(paragraph, notes)]
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
