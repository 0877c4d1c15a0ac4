"""How the cost of re-pruning grows with width, blocks, tokens and k: steps of small Llamas with random weights.

    python benchmarks/growth.py
    python benchmarks/growth.py --out benchmarks/performance.json     # then performance.py --write draws it

One size differs from the middle one at a time. Dense and re-pruned steps (2:4, bfloat16 autocast, AdamW) take turns, as
in ``overhead.py``. How the cost grows with processes is computed in ``scaling.py``.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import rows
import torch
from jsonargparse import auto_cli
from overhead import Student, seconds
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_train import MaskUpdater

VOCABULARY, LENGTH = 2048, 256


class Size(NamedTuple):
    width: int = 512
    blocks: int = 4
    tokens: int = 1024
    """Of a step."""


SIZES = [
    *(Size(width=width) for width in (256, 512, 1024)),
    *(Size(blocks=blocks) for blocks in (2, 8)),
    *(Size(tokens=tokens) for tokens in (256, 512, 2048, 4096)),
]


def measured(size: Size, rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind of step in each round, after one that warms up."""
    heads = size.width // 64
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=size.blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    dense = Student(LlamaForCausalLM(config))
    sparse = Student(copy.deepcopy(dense.model))
    updater = MaskUpdater(sparse.model, "2:4", update_freq=1, total_steps=rounds + 2, end_step=1.0)
    recorder = next(iter(updater.layers.values())).recorder
    assert recorder is not None
    ids = torch.randint(VOCABULARY, (size.tokens // LENGTH, LENGTH))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    def unrecorded() -> None:
        with recorder.paused():
            sparse.step(batch)

    kinds: dict[str, Callable[[], object]] = {
        "dense": partial(dense.step, batch),
        "re-pruned": partial(sparse.step, batch),
        "update": updater.step,
        "re-pruned, not recorded": unrecorded,
    }
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds + 1):
        for name, run in kinds.items():
            found[name].append(seconds(run))
    return {name: times[1:] for name, times in found.items()}


def main(rounds: int = 7, out: str | None = None) -> None:
    """Print medians.

    Args:
        rounds: of each kind of step at each size.
        out: JSON file for the seconds.
    """
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []
    for size in SIZES:
        times = measured(size, rounds)
        found.append({**size._asdict(), "seconds": times})
        ratios = {k: rows.ratio_of_a_run(times, k) for k in (1, 10)}
        print(size, {name: f"{sorted(each)[rounds // 2]:.3f} s" for name, each in times.items()}, ratios)
    rows.record(out, "growth", {"sizes": found})


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
