"""Selecting masks, and whole updates: ours against the reference and torch, at LLaMA-7B's sizes; ratios from one run.

    python benchmarks/selection.py
    python benchmarks/selection.py --out benchmarks/performance.json

The reference (github.com/locuslab/wanda, lib/prune.py) sorts whole rows for unstructured masks, and loops over groups
of columns for N:M; both are reimplemented here. All ways of one table take turns. An update is more than selection:
ours reads weights and norms, scores, selects, writes the bits of the mask, and counts zeros and flips; the reference
scores and selects.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import performance
import rows
import torch
from jsonargparse import auto_cli
from scaling import llama_block
from torch import Tensor, nn

from sparse_train import NM, Unstructured, Wanda
from sparse_train.layers.sparsify import sparsify
from sparse_train.patterns import Pattern
from sparse_train.pruning.update import Rules, update_masks
from sparse_train.statistics import ActivationNorm

BLOCKS_7B = 32


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


def by_topk(scores_OI: Tensor, kept: int, group: int) -> Tensor:
    parts = scores_OI.view(-1, group)
    mask = torch.zeros_like(parts, dtype=torch.bool)
    return mask.scatter_(1, parts.topk(kept, dim=1, sorted=False)[1], True).view_as(scores_OI)


def by_kthvalue(scores_OI: Tensor, kept: int, group: int) -> Tensor:
    parts = scores_OI.view(-1, group)
    return (parts > parts.kthvalue(group - kept, dim=1, keepdim=True)[0]).view_as(scores_OI)


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each way in each round, after one that warms up; and what each returned."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        results = {}
        for name, run in ways.items():
            began = time.perf_counter()
            results[name] = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found[name].append(time.perf_counter() - began)
    return {name: times[1:] for name, times in found.items()}, results


def masked_block(shapes_OI: list[tuple[int, int]], device: str) -> dict[str, Any]:
    """Masked layers with random weights and statistics."""
    module = nn.ModuleList(nn.Linear(i, o, bias=False, device=device) for o, i in shapes_OI)
    sparsify(module, list(module))
    for layer in module:
        layer.statistics = ActivationNorm(layer.in_features, device)
        layer.statistics.add(torch.randn(64, layer.in_features, device=device))
    return dict(module.named_children())


def update(layers: dict[str, Any], pattern: Pattern) -> Any:
    return update_masks(layers, Rules(Wanda(), pattern, dict.fromkeys(layers, 0.5)))


def main(
    out_features: int = 4096,
    in_features: int = 11008,
    rounds: int = 5,
    device: str = "cpu",
    model_7b: bool = True,
    out: str | None = None,
) -> None:
    """Print the tables.

    Args:
        out_features: rows.
        in_features: columns.
        rounds: of one run of each way.
        device: cpu or cuda.
        model_7b: also time an update of the layers of a LLaMA-7B, of which one block is in memory.
        out: JSON file for the seconds.
    """
    torch.manual_seed(0)
    shape = f"{out_features} x {in_features}"
    scores = (torch.randn(out_features, in_features).abs() * (torch.rand(in_features) + 0.1)).to(device)
    layers = masked_block([(out_features, in_features)], device)
    weight_OI, norms = layers["0"].weight.detach(), layers["0"].statistics
    half = in_features // 2
    patterns: dict[str, tuple[Pattern, Callable[[Tensor], Tensor], int, int]] = {
        "50 % per row": (Unstructured(), partial(reference_rows, sparsity=0.5), in_features - half, in_features),
        "2:4": (NM(2, 4), partial(reference_groups, pruned_in_group=2, group=4), 2, 4),
        "4:8": (NM(4, 8), partial(reference_groups, pruned_in_group=4, group=8), 4, 8),
    }
    selection, updates = {}, {}
    for name, (pattern, reference, kept, group) in patterns.items():
        ways: dict[str, Callable[[], Any]] = {
            "reference": partial(reference, scores),
            "torch.topk": partial(by_topk, scores, kept, group),
            "torch.kthvalue": partial(by_kthvalue, scores, kept, group),
            "ours": partial(pattern.mask, scores, 0.5),
            "a copy of the scores": scores.clone,
        }
        selection[name], masks = in_turns(ways, rounds)
        differing = int((masks["ours"] != masks["reference"]).sum())
        print(
            f"{name}: {differing} entries of the masks differ" + ", ties: topk's order is arbitrary" * bool(differing)
        )

        def metric(reference: Callable[[Tensor], Tensor] = reference) -> Tensor:
            return reference(weight_OI.abs() * norms.norm_I.reshape(1, -1))

        steps = {
            "reference": metric,
            "ours": partial(update, layers, pattern),
            "a copy of the weights": weight_OI.clone,
        }
        updates[name], _ = in_turns(steps, rounds)
    found: dict[str, Any] = {"shape": shape, "selection": selection, "update": updates}
    if model_7b:
        block = masked_block([(each.out_features, each.in_features) for each in llama_block(4096, 11008, 4096)], device)
        ways = {name: partial(update, block, patterns[name][0]) for name in ("50 % per row", "2:4")}
        ways["a copy of the weights"] = lambda: [layer.weight.clone() for layer in block.values()]
        times, _ = in_turns(ways, 2)
        found["model_7b"] = {"weights": BLOCKS_7B * sum(layer.size for layer in block.values()), "block": times}
    print("\n".join(performance.selection(rows.record(out, "selection", found))))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
