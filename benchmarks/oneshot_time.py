"""Time of one-shot pruning: ours against the plain published procedure, and Wanda against SparseGPT, in one run.

    python benchmarks/oneshot_time.py
    python benchmarks/oneshot_time.py --structure 2:4 --calibration C4_SAMPLE.jsonl
    python benchmarks/oneshot_time.py --sparsegpt false --out benchmarks/performance.json

The plain procedure is that of Wanda (github.com/locuslab/wanda, lib/prune.py), reimplemented here: every linear layer
has its own hook and running norm, samples go through a block one by one, rows are sorted or there is a loop over groups
of columns, zeros are written by index, and the block runs again for its outputs. Both get the same model and samples.

Times are wall clock. Statistics are timed inside the forwards. Everything that is neither forward nor statistics counts
as scores, selection and zeros; for ours, that includes inserting and removing the masked layers. With autocast, our
forwards compute in bfloat16, and all else in float32. If llm-compressor is installed, which is none of this project's
packages, its Wanda and SparseGPT take their turns; only the whole of each is timed.
"""

import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import performance
import rows
import torch
from jsonargparse import auto_cli
from selection import reference_groups, reference_rows
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparse_train import Wanda
from sparse_train.data.packing import calibration_batches
from sparse_train.data.texts import PackagedWikipedia, TextFiles
from sparse_train.models.sources import PackagedSmolLM2
from sparse_train.oneshot.prune import prune
from sparse_train.solvers import SparseGPT
from sparse_train.statistics import ActivationGram, ActivationNorm


@dataclass
class Times:
    """Seconds."""

    whole: float = 0.0
    forward: float = 0.0
    """Time without statistics."""
    statistics: float = 0.0


class Clock:
    """Sums the seconds spent inside ``with clock``."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._began


class RunningNorm:
    """The mean over samples of the squared norms of one layer's input features, as a forward hook."""

    def __init__(self, layer: nn.Linear, clock: Clock) -> None:
        self.mean_I = torch.zeros(layer.in_features)
        self._samples = 0
        self._clock = clock

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        with self._clock:
            x_IT = args[0].reshape(-1, args[0].shape[-1]).t().float()
            self.mean_I *= self._samples / (self._samples + len(args[0]))
            self._samples += len(args[0])
            self.mean_I += torch.norm(x_IT, p=2, dim=1) ** 2 / self._samples


def first_inputs(model: Any, samples: list[Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """The inputs of the first block: hidden states (samples, L, H), and the other arguments of one call."""
    caught: list[Tensor] = []
    rest: dict[str, Any] = {}

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0])
        rest.update(kwargs)
        raise StopIteration

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for sample in samples:
        try:
            model(sample, use_cache=False)
        except StopIteration:
            continue
    handle.remove()
    return torch.cat(caught), rest


@torch.no_grad()
def plain(model: Any, samples: list[Tensor], structure: str) -> Times:
    """Prune with Wanda as published, block by block."""
    pruned, _, group = structure.partition(":")
    if group:
        select = partial(reference_groups, pruned_in_group=int(group) - int(pruned), group=int(group))
    else:
        select = partial(reference_rows, sparsity=0.5)
    forward, statistics, whole = Clock(), Clock(), Clock()
    with whole:
        with forward:
            inputs, rest = first_inputs(model, samples)
        outputs = torch.zeros_like(inputs)
        for block in model.model.layers:
            linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
            norms = [RunningNorm(layer, statistics) for layer in linears]
            handles = [layer.register_forward_hook(norm) for layer, norm in zip(linears, norms, strict=True)]
            with forward:
                for number in range(len(samples)):
                    outputs[number] = block(inputs[number][None], **rest)[0]
            for handle in handles:
                handle.remove()
            for layer, norm in zip(linears, norms, strict=True):
                weight_OI = layer.weight.data
                scores_OI = weight_OI.abs() * norm.mean_I.reshape(1, -1).sqrt()
                weight_OI[~select(scores_OI)] = 0
            with forward:
                for number in range(len(samples)):
                    outputs[number] = block(inputs[number][None], **rest)[0]
            inputs, outputs = outputs, inputs
    return Times(whole.seconds, forward.seconds - statistics.seconds, statistics.seconds)


@contextmanager
def timed_statistics(clock: Clock) -> Iterator[None]:
    """Measure the time for the statistics of our layers."""
    before: dict[Any, Callable[..., None]] = {kind: kind.add for kind in (ActivationNorm, ActivationGram)}

    def timed(add: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            with clock:
                add(*args, **kwargs)

        return run

    for kind, add in before.items():
        kind.add = timed(add)
    try:
        yield
    finally:
        for kind, add in before.items():
            kind.add = add


def ours(model: Any, samples: list[Tensor], structure: str, method: Any, autocast: torch.dtype | None = None) -> Times:
    """Prune with ``sparse_train.prune``."""
    whole, statistics = Clock(), Clock()
    sparsity = 0.5 if structure == "unstructured" else None
    with whole, timed_statistics(statistics):
        report = prune(model, samples, structure, sparsity=sparsity, criterion=method, autocast=autocast)
    return Times(whole.seconds, report.forward_seconds - statistics.seconds, statistics.seconds)


def llm_compressor(model: Any, samples: list[Tensor], structure: str, tokenizer: Any, method: Any) -> Times:
    """Prune with llm-compressor, block by block."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    how = {"mask_structure": "0:0" if structure == "unstructured" else structure, "sparsity": 0.5}
    chosen = {"targets": ["Linear"], "ignore": ["re:.*lm_head"], **how}
    if isinstance(method, SparseGPT):
        modifier = SparseGPTModifier(block_size=method.block_size, dampening_frac=method.dampening_frac, **chosen)
    else:
        modifier = WandaPruningModifier(**chosen)
    data = DataLoader([{"input_ids": sample[0]} for sample in samples], batch_size=1)
    whole = Clock()
    with tempfile.TemporaryDirectory() as folder, whole:
        model.config.save_pretrained(folder)
        model.config.name_or_path = folder  # where it looks for the configuration
        oneshot(
            model=model,
            processor=tokenizer,
            dataset=data,
            recipe=[modifier],
            pipeline="sequential",
            num_calibration_samples=len(samples),
            max_seq_length=samples[0].shape[1],
        )
    return Times(whole.seconds, math.nan, math.nan)


PLAIN, OURS = "Wanda, plain procedure", "Wanda, ours"


def main(
    structure: str = "unstructured",
    samples: int = 16,
    length: int = 1024,
    batch_size: int = 1,
    calibration: str | None = None,
    rounds: int = 1,
    sparsegpt: bool = True,
    out: str | None = None,
) -> None:
    """Print the table.

    Args:
        structure: "unstructured", at 50 % sparsity, or "N:M".
        samples: number of calibration samples.
        length: tokens per sample.
        batch_size: samples per forward pass for ours; the plain procedure uses one.
        calibration: file with calibration text; default: the packaged Wikipedia.
        rounds: runs of each, alternating.
        sparsegpt: also time SparseGPT.
        out: JSON file for the seconds.
    """
    source = PackagedSmolLM2()
    text = TextFiles(train=[calibration]) if calibration else PackagedWikipedia()
    settings: Any = {"num_calibration_samples": samples, "max_seq_length": length, "batch_size": batch_size}
    batches = [batch["input_ids"] for batch in calibration_batches(text, source.tokenizer(), **settings)]
    single = list(torch.cat(batches).split(1))
    runs: dict[str, Callable[[Any], Times]] = {PLAIN: lambda model: plain(model, single, structure)}
    own: Any = partial(ours, samples=batches, structure=structure, method=Wanda())
    runs |= {OURS: own, "Wanda, ours, autocast": partial(own, autocast=torch.bfloat16)}
    theirs: Any = partial(llm_compressor, samples=single, structure=structure, tokenizer=source.tokenizer())
    has_theirs = importlib.util.find_spec("llmcompressor") is not None
    if has_theirs:
        runs["Wanda, llm-compressor"] = partial(theirs, method=Wanda())
    if sparsegpt:
        runs["SparseGPT, ours"] = partial(own, method=SparseGPT())
        runs["SparseGPT, ours, autocast"] = partial(own, method=SparseGPT(), autocast=torch.bfloat16)
        if has_theirs:
            runs["SparseGPT, llm-compressor"] = partial(theirs, method=SparseGPT())
    plain(source.load(), single[:1], structure)  # warm up libraries and the allocator
    taken: dict[str, list[Times]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(run(source.load().eval()))
    title = f"{structure}, {samples} x {length} tokens of {text.name}, batches of {batch_size}; {source.name}"
    found = {n: [{k: s for k, s in asdict(t).items() if s == s} for t in each] for n, each in taken.items()}  # no NaN
    print("\n".join(performance.oneshot(rows.record(out, "oneshot", {"title": title, "seconds": found}))))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
