"""Selecting masks: ours against the reference implementation, for one layer of LLaMA-7B's size; ratios from one run.

    python benchmarks/selection.py

The reference (github.com/locuslab/wanda, lib/prune.py) sorts whole rows for unstructured masks, and loops over groups
of columns for N:M; both are reimplemented here.
"""

import time
from collections.abc import Callable

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparse_train import NM, Unstructured


def reference_rows(scores_OI: Tensor, sparsity: float) -> Tensor:
    pruned = torch.zeros_like(scores_OI, dtype=torch.bool)
    order = torch.sort(scores_OI, dim=-1, stable=True)[1]
    pruned.scatter_(1, order[:, : int(scores_OI.shape[1] * sparsity)], True)
    return ~pruned


def reference_groups(scores_OI: Tensor, pruned_in_group: int, group: int) -> Tensor:
    pruned = torch.zeros_like(scores_OI, dtype=torch.bool)
    for start in range(0, scores_OI.shape[1], group):
        part = scores_OI[:, start : start + group]
        pruned.scatter_(1, start + torch.topk(part, pruned_in_group, dim=1, largest=False)[1], True)
    return ~pruned


def best_of(run: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    """Shortest of several runs, in milliseconds: the time when nothing else disturbs the machine."""
    times, result = [], run()
    for _ in range(repeats):
        began = time.perf_counter()
        result = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return min(times), result


def main(out_features: int = 4096, in_features: int = 11008, repeats: int = 3, device: str = "cpu") -> None:
    """Print the table.

    Args:
        out_features: rows.
        in_features: columns.
        repeats: number of runs of each measurement; the shortest counts.
        device: cpu or cuda.
    """
    torch.manual_seed(0)
    scores = (torch.randn(out_features, in_features).abs() * (torch.rand(in_features) + 0.1)).to(device)
    cases: list[tuple[str, str, Callable[[], Tensor], Callable[[], Tensor]]] = [
        ("50 % per row", "at least 15", lambda: reference_rows(scores, 0.5), lambda: Unstructured().mask(scores, 0.5)),
        ("2:4", "at least 8", lambda: reference_groups(scores, 2, 4), lambda: NM(2, 4).mask(scores, 0.5)),
        ("4:8", "", lambda: reference_groups(scores, 4, 8), lambda: NM(4, 8).mask(scores, 0.5)),
    ]
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    table = Table(
        "pattern",
        "reference, ms",
        "ours, ms",
        "ratio",
        "wanted",
        "masks that differ",
        title=f"{out_features} x {in_features}, float32, {where}, torch {torch.__version__}",
    )
    for name, wanted, reference, ours in cases:
        slow, expected = best_of(reference, repeats)
        fast, mask = best_of(ours, repeats)
        differing = int((mask != expected).sum())
        note = f"{differing}" + (" (ties: topk's order is arbitrary)" if differing else "")
        table.add_row(name, f"{slow:.0f}", f"{fast:.0f}", f"{slow / fast:.1f}", wanted, note)
    Console(width=120).print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
