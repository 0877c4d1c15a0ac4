"""The cost of re-pruning on many processes, from formulas; tests compare them with counters of a run of two processes.

    python benchmarks/scaling.py             # the tables of docs/scaling.md
    python benchmarks/scaling.py --write     # put them there

Letters: O out_features, I in_features, J = ceil(I / 8) packed mask bytes per row, W processes, k steps between updates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import rows

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- scaling -->", "<!-- /scaling -->"


@dataclass(frozen=True)
class Layer:
    """A targeted layer."""

    out_features: int
    in_features: int

    @property
    def size(self) -> int:
        return self.out_features * self.in_features

    @property
    def mask_bytes(self) -> int:
        return self.out_features * row_bytes(self)


def row_bytes(layer: Layer) -> int:
    """J."""
    return -(-layer.in_features // 8)


def llama_block(hidden: int, intermediate: int, key_value: int) -> list[Layer]:
    """The linear layers of a Llama block."""
    attention = [Layer(hidden, hidden), *[Layer(key_value, hidden)] * 2, Layer(hidden, hidden)]
    mlp = [Layer(intermediate, hidden)] * 2 + [Layer(hidden, intermediate)]
    return attention + mlp


def reduce_bytes(layers: Sequence[Layer], blocks: int) -> tuple[int, int, int]:
    """The three reduces per update: int64, 32 bits of each layer's mask; float32 sums of squares; int64, 2 counts."""
    count = len(layers) * blocks
    return 8 * 32 * count, 4 * blocks * sum(layer.in_features for layer in layers), 8 * 2 * count


def gather_bytes(layers: Sequence[Layer], blocks: int, processes: int) -> int:
    """Bytes of mask bits that a process sends per update under FSDP2: those of its rows, layer by layer."""
    return blocks * sum(-(-layer.out_features // processes) * row_bytes(layer) for layer in layers)


def zero3_bytes(layers: Sequence[Layer], blocks: int, bytes_a_weight: int) -> int:
    """Bytes that a process receives per update under ZeRO-3: each weight once, layer by layer."""
    return blocks * sum(layer.size for layer in layers) * bytes_a_weight


def kept_bytes(layers: Sequence[Layer], blocks: int) -> dict[str, int]:
    """Bytes that a process keeps between updates."""
    sample = [
        -(-layer.out_features // max(1, min(128, layer.out_features // 4))) * row_bytes(layer) for layer in layers
    ]
    return {
        "masks": blocks * sum(layer.mask_bytes for layer in layers),
        "statistics": blocks * sum(4 * layer.in_features + 16 for layer in layers),
        "rows of the first mask": blocks * sum(sample),
    }


@dataclass(frozen=True)
class Setup:
    """A run for which costs are computed; weights are communicated in bfloat16."""

    name: str
    layers: list[Layer]
    blocks: int
    processes: int
    tokens: int
    """Tokens per process and step."""
    link: float
    """Bytes per second that a process receives from others."""
    flops: float = 4e14
    """flop/s of a process, as reached in practice in forward and backward."""
    bandwidth: float = 3e12
    """Bytes per second of its memory."""

    @property
    def weights(self) -> int:
        return self.blocks * sum(layer.size for layer in self.layers)


SETUPS = [
    Setup("Llama-3.1-8B, 8 x 80 GB, one node", llama_block(4096, 14336, 1024), 32, 8, 8192, link=3e11),
    Setup("Llama-3.1-70B, 64 x 80 GB, 8 nodes", llama_block(8192, 28672, 1024), 80, 64, 8192, link=5e10),
]


def tables() -> str:
    """All tables, as Markdown."""
    lines: dict[str, list[str]] = {}

    def row(label: str, value: str) -> None:
        lines.setdefault(label, []).append(value)

    for s in SETUPS:
        kept = kept_bytes(s.layers, s.blocks)
        step = 6 * s.weights * s.tokens / s.flops
        # a masked copy is made in forward, in the recomputed forward, and in backward: each reads and writes 2 bytes
        masking = 3 * s.weights * (2 + 2 + 1 / 8) / s.bandwidth
        # float32 scores are written and read a few times: 40 bytes per weight
        selecting = s.weights * 40 / s.bandwidth
        reduced = sum(reduce_bytes(s.layers, s.blocks))
        sent, received = gather_bytes(s.layers, s.blocks, s.processes), zero3_bytes(s.layers, s.blocks, 2)
        fsdp2 = selecting / s.processes + (s.processes * sent + reduced) / s.link
        zero3 = selecting + received / s.link
        row("targeted weights", f"{s.weights / 1e9:.2f} G")
        row("masks", f"{kept['masks'] / 1e6:.0f} MB")
        row("statistics", f"{kept['statistics'] / 1e6:.1f} MB")
        row("kept by a process, all", f"{sum(kept.values()) / s.weights:.4f} byte per targeted weight")
        row("three reduces at an update", f"{reduced / 1e6:.1f} MB")
        row("more during an update: new masks", f"{kept['masks'] / 1e6:.0f} MB")
        row("FSDP2: gather of mask bits at an update, sent", f"{sent / 1e6:.1f} MB")
        row("the same, received", f"{s.processes * sent / 1e6:.0f} MB")
        row("ZeRO-3: weights received at an update", f"{received / 1e9:.1f} GB")
        row("FSDP2's own traffic of one step (8 bytes per weight)", f"{8 * s.weights / 1e9:.0f} GB")
        row("a step (6 x weights x tokens / 4e14 flop/s), estimate", f"{step:.2f} s")
        row("masking in each step, estimate", f"{1e3 * masking:.0f} ms, {100 * masking / step:.1f} %")
        row("an update under FSDP2, estimate", f"{1e3 * fsdp2:.0f} ms")
        row("k for updates below 1 % of the time", f"{math.ceil(100 * fsdp2 / step)}")
        row("an update under ZeRO-3, estimate", f"{1e3 * zero3:.0f} ms")
        row("k for updates below 1 % of the time, ZeRO-3", f"{math.ceil(100 * zero3 / step)}")
    return rows.table(["", *(s.name for s in SETUPS)], [[label, *values] for label, values in lines.items()])


if __name__ == "__main__":
    rows.print_or_write(tables(), PAGE, BEGIN, END)
