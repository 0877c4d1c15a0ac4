"""What a training step costs: dense, re-pruned, with Lightning's ModelPruning, and distilled; ratios from one run.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --rounds 16 --batch_size 1
    python benchmarks/overhead.py --device cuda --model HuggingFaceTB/SmolLM2-1.7B

Same model (SmolLM2-135M-Instruct, dequantised from Q4_1, or --model), same batches, bfloat16 autocast, AdamW of
CausalLM, gradients clipped. The kinds of step take turns in one process, in an order that rotates, so that disturbances
of the machine affect all of them. A round gives each ratio once; their medians and quartiles are printed. The update is
timed apart, every step, and counted 1/k times; of k steps, half record their inputs, as by default. A second dense step
in each round says how much of a ratio is the machine. ModelPruning prunes
half of each layer by magnitude, without rewinding; its update is timed on weights that it has made permanent before.
Peak memory is the resident memory of processes of their own, which take three steps of one kind.
"""

import copy
import cProfile
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import performance
import rows
import torch
from jsonargparse import auto_cli
from torch.profiler import ProfilerActivity, profile

from sparse_train import NM, MaskUpdater, sparse_layers, statistics
from sparse_train.data.packing import blocks_of
from sparse_train.data.texts import PackagedWikipedia
from sparse_train.environment import peak_bytes
from sparse_train.layers import masks
from sparse_train.layers.targets import find_targets
from sparse_train.models.distillation import CachedTeacher, Distillation, Teacher, cast_linear
from sparse_train.models.losses import next_token_loss
from sparse_train.models.sources import PackagedSmolLM2, as_model_source

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


TOP = 8
"""Operators or functions that a profile names."""


def profiled(run: Callable[[], object], device: str) -> dict[str, Any]:
    """The operators of torch that take most of the time (on a GPU: its kernels): name, calls, and share of all."""
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as seen:
        wall = seconds(run)
    events = [
        (e.key, e.count, e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in seen.key_averages()
    ]
    return highest([(name, calls, time / 1e6) for name, calls, time in events], wall)


def functions(seen: cProfile.Profile, wall: float) -> dict[str, Any]:
    """The same of functions. A ufunc of numpy, such as a comparison, counts for the function that calls it."""
    named = [(each.code if isinstance(each.code, str) else each.code.co_name, each) for each in seen.getstats()]
    parts = [(re.sub(r"<.*?method '?([^' ]+)'?.*>", r"\1", name), e.callcount, e.inlinetime) for name, e in named]
    return highest(parts, wall)


def highest(parts: list[tuple[str, int, float]], wall: float) -> dict[str, Any]:
    total = sum(time for *_, time in parts)
    top = sorted(parts, key=lambda part: part[2], reverse=True)[:TOP]
    return {"wall": wall, "sum": total, "top": [(name, calls, time / total) for name, calls, time in top]}


@contextmanager
def one_thread() -> Iterator[None]:
    """cProfile sees one thread, and ``time.thread_time`` counts it alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def profiles_of_numpy(step: Callable[[], object], update: Callable[[], object]) -> dict[str, Any]:
    """Of the sums of squares in a recorded step, and of an update: on the CPU numpy does both, which torch's profiler
    does not see."""
    sums, whole, inner = cProfile.Profile(), cProfile.Profile(), statistics.batch_sums
    with one_thread():
        statistics.batch_sums = lambda *args: sums.runcall(inner, *args)
        try:
            wall_of_step = seconds(step)
        finally:
            statistics.batch_sums = inner
        wall = seconds(lambda: whole.runcall(update))
    return {"sums of squares": functions(sums, wall_of_step), "update": functions(whole, wall)}


def masking(layers: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Processor time of one thread, to mask and cast the weights of all layers, and to cast them alone."""
    ways: dict[str, Callable[[Any], object]] = {
        "mask and cast": lambda layer: masks.apply(layer.weight, layer.weight_mask, torch.bfloat16),
        "cast alone": lambda layer: layer.weight.to(torch.bfloat16),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    with one_thread(), torch.no_grad():
        for _ in range(rounds + 1):
            for name, way in ways.items():
                began = time.thread_time()
                for layer in layers.values():
                    way(layer)
                found[name].append(time.thread_time() - began)
    return {name: times[1:] for name, times in found.items()}


def starts(rounds: int = 3) -> dict[str, list[float]]:
    """Seconds to print the help, in processes of their own."""
    call = [sys.executable, "-m", "sparse_train.cli.main"]
    ways = {" ".join(["sparse-train", *more]): [*call, *more] for more in (["--help"], ["fit", "--help"])}
    run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
    return {name: [seconds(partial(run, way)) for _ in range(rounds)] for name, way in ways.items()}


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
        "dense, again": dense.step,  # how far the machine alone makes steps differ
        "re-pruned, not recorded": unrecorded,
        "ModelPruning": field.step,
        "distilled": lambda batch: dense.step(batch, teacher),
        "cached teacher": lambda batch: dense.step(batch, cache),
        "re-pruned, distilled": lambda batch: sparse.step(batch, teacher),
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
    step, recorded = partial(dense.step, batches[0]), partial(sparse.step, batches[0])
    profiles = {"dense": profiled(step, device), "re-pruned": profiled(recorded, device)}
    masked: dict[str, list[float]] = {}
    if device == "cpu":
        profiles |= profiles_of_numpy(recorded, updater.step)
        masked = masking(updater.layers, rounds)
    else:
        profiles["update"] = profiled(updater.step, device)
    used = peaks(model, batch_size) if memory and device == "cpu" else {}
    tokens = f"{source.name}, {batch_size} x {BLOCK_SIZE} tokens, bfloat16 autocast"
    told = {"model": tokens, "seconds": found, "masking": masked, "profile": profiles, "peaks": used}
    if device == "cpu":
        rows.record(out, "start", {"seconds": starts()})
    print("\n".join(performance.step(rows.record(out, "step", told))))
    for name, off in zip(
        ("loss", "KL", "gradient at the logits"),
        zip(*(differences(sparse, batch, teacher, cache) for batch in batches), strict=True),
        strict=True,
    ):
        print(f"{name} of the re-pruned model, from the cache against live: {min(off):+.2%} to {max(off):+.2%}")


def differences(student: Student, batch: dict[str, torch.Tensor], *teachers: Callable[..., Any]) -> list[float]:
    """Between two teachers, against the first: of the loss, of its KL, and the norm of the difference between the
    gradients of the loss at the student's logits."""
    inputs, found = {name: batch[name] for name in ("input_ids", "attention_mask")}, []
    with torch.autocast(student.device, torch.bfloat16), torch.no_grad():
        logits_BLV = student.model(use_cache=False, **inputs).logits
        taught = [teacher(**inputs) for teacher in teachers]
    for each in taught:
        leaf_BLV = logits_BLV.float().requires_grad_()
        loss, _, kldiv = DISTILLATION.loss(leaf_BLV, each, batch["labels"])
        loss.backward()
        found.append((loss.detach(), kldiv, leaf_BLV.grad))
    (*live, of_live), (*cached, of_cached) = found
    ratios = [float(b / a) - 1 for a, b in zip(live, cached, strict=True)]
    return [*ratios, float((of_cached - of_live).norm() / of_live.norm())]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        take_steps(*sys.argv[2:4], batch_size=int(sys.argv[4]))
    else:
        auto_cli(main, as_positional=False)
