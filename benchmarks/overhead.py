"""What a training step costs: dense, re-pruned, and distilled with a live or cached teacher; ratios from one run.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --rounds 16 --batch_size 1
    python benchmarks/overhead.py --device cuda --model HuggingFaceTB/SmolLM2-1.7B

Same model (SmolLM2-135M-Instruct, dequantised from Q4_1, or --model), same batches, bfloat16 autocast, AdamW of
CausalLM, gradients clipped. The kinds of step take turns in one process, in an order that rotates, so that disturbances
of the machine affect all of them. A round gives each ratio once; their medians and quartiles are printed. The update is
timed apart, every step, and counted 1/k times.
"""

import copy
import itertools
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from sparse_train import MaskUpdater
from sparse_train.data.blocks import blocks_of
from sparse_train.data.texts import PackagedWikipedia
from sparse_train.models.distillation import CachedTeacher, Distillation, Teacher, cast_linear
from sparse_train.models.losses import next_token_loss
from sparse_train.models.sources import PackagedSmolLM2, as_model_source

FREQUENCIES = (1, 10)
BLOCK_SIZE = 512
DISTILLATION = Distillation(hardness_ce=0.33, hardness_kldiv=0.67, temperature=2.0)
"""As in recipes/smollm2_2of4_distill.yaml."""


class Student:
    """A model with its optimizer, and one step of training."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model.train(), next(model.parameters()).device.type
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def losses(self, batch: dict[str, torch.Tensor], teacher: Callable[..., Any] | None = None) -> Any:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.autocast(self.device, torch.bfloat16):
            taught = None if teacher is None else teacher(**inputs)
            logits_BLV = self.model(use_cache=False, **inputs).logits
            if taught is None:
                return next_token_loss(logits_BLV, batch["labels"])
            return DISTILLATION.loss(logits_BLV, taught, batch["labels"])

    def step(self, batch: dict[str, torch.Tensor], teacher: Callable[..., Any] | None = None) -> None:
        self.losses(batch, teacher)[0].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main(
    rounds: int = 8, batch_size: int = 4, device: str = "cpu", model: str = "PackagedSmolLM2", out: str | None = None
) -> None:
    """Print the table.

    Args:
        rounds: of one step of each kind.
        batch_size: blocks of 512 tokens of a step.
        device: cpu or cuda.
        model: another model: a Hugging Face id or a local folder.
        out: JSON file for the seconds.
    """
    warnings.filterwarnings("ignore")
    source = PackagedSmolLM2() if model == "PackagedSmolLM2" else as_model_source(model)
    blocks = blocks_of(PackagedWikipedia().documents("validation"), source.tokenizer(), BLOCK_SIZE)
    batches = [
        {name: column.to(device) for name, column in blocks[i : i + batch_size].items()}
        for i in range(0, batch_size * (rounds + 1), batch_size)
    ]
    first = source.load().to(device)
    dense, sparse, teacher = Student(first), Student(copy.deepcopy(first)), Teacher(copy.deepcopy(first))
    cast_linear(teacher.model, torch.bfloat16)
    updater = MaskUpdater(sparse.model, "2:4", update_freq=1, total_steps=2 * rounds + 2, end_step=1.0)
    cache = CachedTeacher(
        Path(tempfile.mkdtemp()), lambda: teacher, k=DISTILLATION.top_k, temperature=DISTILLATION.temperature
    )
    with torch.autocast(device, torch.bfloat16):
        for batch in batches:
            cache(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    cache.close()
    kinds: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
        "dense": dense.step,
        "re-pruned": sparse.step,
        "distilled": lambda batch: dense.step(batch, teacher),
        "cached teacher": lambda batch: dense.step(batch, cache),
    }
    found: dict[str, list[float]] = {name: [] for name in (*kinds, "update")}
    for i, batch in enumerate(batches):
        names = list(itertools.islice(itertools.cycle(kinds), i, i + len(kinds)))
        for name in names:
            found[name].append(seconds(lambda name=name, batch=batch: kinds[name](batch)))  # type: ignore[misc]
            if name == "re-pruned":
                found["update"].append(seconds(updater.step))
    found = {name: times[1:] for name, times in found.items()}  # the first round warms up
    if out is not None:
        Path(out).write_text(json.dumps(found))
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if device == "cuda" else cores
    title = f"{source.name}, {batch_size} x {BLOCK_SIZE} tokens, bfloat16 autocast, {where}, torch {torch.__version__}"
    table = Table("step", "seconds, median", "against dense, median", "quartiles", title=title)
    rows = {name: found[name] for name in kinds}
    for k in FREQUENCIES:
        pairs = zip(found["re-pruned"], found["update"], strict=True)
        rows[f"re-pruned, with 1/{k} of an update"] = [step + update / k for step, update in pairs]
    for name, times in rows.items():
        ratios = [own / of_dense for own, of_dense in zip(times, found["dense"], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        table.add_row(name, f"{median(times):.3f}", f"{median(ratios):.3f}", f"{low:.3f} to {high:.3f}")
    table.add_row("an update alone", f"{median(found['update']):.3f}", "", "")
    Console(width=120).print(table)
    off = [difference(sparse, batch, teacher, cache) for batch in batches]
    print(
        f"gradient at the logits of the re-pruned model, from the cache against live: {min(off):.1%} to {max(off):.1%}"
    )


def difference(student: Student, batch: dict[str, torch.Tensor], *teachers: Callable[..., Any]) -> float:
    """Of the gradients of the loss at the student's logits, from two teachers: its norm against that of the first."""
    inputs, gradients = {name: batch[name] for name in ("input_ids", "attention_mask")}, []
    with torch.autocast(student.device, torch.bfloat16), torch.no_grad():
        logits_BLV = student.model(use_cache=False, **inputs).logits
        taught = [teacher(**inputs) for teacher in teachers]
    for each in taught:
        leaf_BLV = logits_BLV.float().requires_grad_()
        DISTILLATION.loss(leaf_BLV, each, batch["labels"])[0].backward()
        gradients.append(leaf_BLV.grad)
    live, cached = gradients
    return float((cached - live).norm() / live.norm())


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
