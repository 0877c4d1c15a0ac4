"""What a training step costs: dense, re-pruned, with Lightning's ModelPruning, and distilled; ratios from one run.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --rounds 16 --batch_size 1
    python benchmarks/overhead.py --device cuda --model HuggingFaceTB/SmolLM2-1.7B

Same model (SmolLM2-135M-Instruct, dequantised from Q4_1, or --model), same batches, bfloat16 autocast, AdamW of
CausalLM, gradients clipped. The kinds of step take turns in one process, in an order that rotates, so that disturbances
of the machine affect all of them. A round gives each ratio once; their medians and quartiles are printed. The update is
timed apart, every step, and counted 1/k times; of k steps, half record their inputs, as by default. ModelPruning prunes
half of each layer by magnitude, without rewinding; its update is timed on weights that it has made permanent before.
Peak memory is the resident memory of processes of their own, which take three steps of one kind.
"""

import copy
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import rows
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from sparse_train import NM, MaskUpdater, sparse_layers
from sparse_train.data.blocks import blocks_of
from sparse_train.data.texts import PackagedWikipedia
from sparse_train.environment import peak_bytes
from sparse_train.layers.targets import find_targets
from sparse_train.models.distillation import CachedTeacher, Distillation, Teacher, cast_linear
from sparse_train.models.losses import next_token_loss
from sparse_train.models.sources import PackagedSmolLM2, as_model_source

FREQUENCIES = (1, 10)
MEASURED = ("dense", "re-pruned", "ModelPruning")
"""Kinds of run whose peak memory is measured."""
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


class Fields:
    """Lightning's ModelPruning on the layers that we prune, as a run without a Trainer."""

    def __init__(self, model: Any, names: list[str]) -> None:
        from lightning.pytorch.callbacks import ModelPruning

        self.model, layers = model, [(model.get_submodule(name), "weight") for name in names]
        how: dict[str, Any] = {"use_global_unstructured": False, "use_lottery_ticket_hypothesis": False}
        self.callback = ModelPruning("l1_unstructured", layers, **how)
        self.callback.setup(None, model, "fit")  # type: ignore[arg-type]
        self.update()

    def update(self) -> None:
        self.callback.apply_pruning(0.5)

    def make_permanent(self) -> None:
        """Otherwise the next update would prune half of the rest."""
        self.callback.make_pruning_permanent(self.model)


def batches_of(source: Any, batch_size: int, count: int, device: str) -> list[dict[str, torch.Tensor]]:
    blocks = blocks_of(PackagedWikipedia().documents("validation"), source.tokenizer(), BLOCK_SIZE)
    return [
        {name: column.to(device) for name, column in blocks[i : i + batch_size].items()}
        for i in range(0, batch_size * count, batch_size)
    ]


def source_of(model: str) -> Any:
    return PackagedSmolLM2() if model == "PackagedSmolLM2" else as_model_source(model)


def take_steps(kind: str, model: str, batch_size: int) -> None:
    """Runs in the process that is measured: three steps, with updates, and print peak bytes and targeted weights."""
    source = source_of(model)
    loaded = source.load()
    student, batches, count = Student(loaded), batches_of(source, batch_size, 3, "cpu"), 0
    if kind == "ModelPruning":
        pruning = Fields(loaded, list(find_targets(loaded, NM(2, 4), None, []).layers))
    elif kind == "re-pruned":
        updater = MaskUpdater(loaded, "2:4", update_freq=1, total_steps=4, end_step=1.0)
        count = sum(layer.size for layer in sparse_layers(loaded).values())
    for batch in batches:
        student.step(batch)
        if kind == "re-pruned":
            updater.step()
        elif kind == "ModelPruning":
            pruning.make_permanent()
            pruning.update()
    print(json.dumps([peak_bytes(), count]))


def peaks(model: str, batch_size: int) -> dict[str, list[int]]:
    """Peak bytes and targeted weights of runs in processes of their own."""
    # return freed memory to the system, so that it is measured as free
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    found = {}
    for kind in MEASURED:
        call = [sys.executable, __file__, "--measure", kind, model, str(batch_size)]
        done = subprocess.run(call, env=env, check=True, stdout=subprocess.PIPE, text=True)
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    return found


def profiled(run: Callable[[], object], top: int = 8) -> list[tuple[str, int, float]]:
    """The operators that take most of the time: name, calls, and share of all."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    events = seen.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    highest = sorted(events, key=lambda event: event.self_cpu_time_total, reverse=True)[:top]
    return [(event.key, event.count, event.self_cpu_time_total / total) for event in highest]


def main(
    rounds: int = 8,
    batch_size: int = 4,
    device: str = "cpu",
    model: str = "PackagedSmolLM2",
    memory: bool = True,
    out: str | None = None,
) -> None:
    """Print the table.

    Args:
        rounds: of one step of each kind.
        batch_size: blocks of 512 tokens of a step.
        device: cpu or cuda.
        model: another model: a Hugging Face id or a local folder.
        memory: also measure peak memory, on the CPU.
        out: JSON file for the seconds.
    """
    warnings.filterwarnings("ignore")
    source = source_of(model)
    batches = batches_of(source, batch_size, rounds + 1, device)
    first = source.load().to(device)
    dense, sparse, teacher = Student(first), Student(copy.deepcopy(first)), Teacher(copy.deepcopy(first))
    cast_linear(teacher.model, torch.bfloat16)
    updater = MaskUpdater(sparse.model, "2:4", update_freq=1, total_steps=2 * rounds + 2, end_step=1.0)
    recorder = next(iter(updater.layers.values())).recorder
    assert recorder is not None
    field = Student(copy.deepcopy(first))
    pruning = Fields(field.model, list(updater.layers))
    cache = CachedTeacher(
        Path(tempfile.mkdtemp()), lambda: teacher, k=DISTILLATION.top_k, temperature=DISTILLATION.temperature
    )
    with torch.autocast(device, torch.bfloat16):
        for batch in batches:
            cache(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    def unrecorded(batch: dict[str, torch.Tensor]) -> None:
        with recorder.paused():
            sparse.step(batch)

    kinds: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
        "dense": dense.step,
        "re-pruned": sparse.step,
        "re-pruned, not recorded": unrecorded,
        "ModelPruning": field.step,
        "distilled": lambda batch: dense.step(batch, teacher),
        "cached teacher": lambda batch: dense.step(batch, cache),
    }
    found: dict[str, list[float]] = {name: [] for name in (*kinds, "update", "update of ModelPruning")}
    for i, batch in enumerate(batches):
        names = list(itertools.islice(itertools.cycle(kinds), i, i + len(kinds)))
        for name in names:
            found[name].append(seconds(lambda name=name, batch=batch: kinds[name](batch)))  # type: ignore[misc]
            if name == "re-pruned":
                found["update"].append(seconds(updater.step))
            elif name == "ModelPruning":
                pruning.make_permanent()
                found["update of ModelPruning"].append(seconds(pruning.update))
    found = {name: times[1:] for name, times in found.items()}  # the first round warms up
    profiles = {name: profiled(lambda name=name: kinds[name](batches[0])) for name in ("dense", "re-pruned")}  # type: ignore[misc]
    profiles["update"] = profiled(updater.step)
    used = peaks(model, batch_size) if memory and device == "cpu" else {}
    tokens = f"{source.name}, {batch_size} x {BLOCK_SIZE} tokens, bfloat16 autocast"
    rows.record(out, "step", {"model": tokens, "seconds": found, "profiles": profiles, "peaks": used})
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if device == "cuda" else cores
    title = f"{tokens}, {where}, torch {torch.__version__}"
    table = Table("step", "seconds, median", "against dense, median", "quartiles", title=title)
    shown = {name: found[name] for name in kinds}
    shown |= {f"re-pruned, k = {k}": rows.steps_of_a_run(found, k) for k in FREQUENCIES}
    for name, times in shown.items():
        ratios = [own / of_dense for own, of_dense in zip(times, found["dense"], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        table.add_row(name, f"{median(times):.3f}", f"{median(ratios):.3f}", f"{low:.3f} to {high:.3f}")
    for name in ("update", "update of ModelPruning"):
        table.add_row(f"{name}, alone", f"{median(found[name]):.3f}", "", "")
    Console(width=120).print(table)
    for kind, (peak, count) in used.items():
        more = f", {(peak - used['dense'][0]) / count:.3f} byte more for each targeted weight" if count else ""
        print(f"peak memory, {kind}: {peak / 2**20:.0f} MiB, {peak / used['dense'][0]:.3f}x dense{more}")
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
    if sys.argv[1:2] == ["--measure"]:
        take_steps(*sys.argv[2:4], batch_size=int(sys.argv[4]))
    else:
        auto_cli(main, as_positional=False)
