"""Results of commands as tables."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import get_console

from sparse_train.evaluation import ZeroShotResult
from sparse_train.inspection import LayerSparsity, by_projection, pruned
from sparse_train.patterns import PRUNED
from sparse_train.pruning.counts import sparsity_of
from sparse_train.terminal import print_table


def show_pruning(details: dict[str, Any], layers: Sequence[LayerSparsity], folder: Path) -> None:
    print(f"{details['model']} pruned to {folder}")
    stage = details["stages"][-1]
    divided = "" if stage["distribution"] == "Uniform()" else f", {stage['distribution']}"
    print(f"{stage['criterion']}, {stage['mask_structure']}{divided}")
    if data := details["calibration"]:
        size = f"{data['num_calibration_samples']} x {data['max_seq_length']} tokens"
        print(f"calibrated on {size} of {data['text']} ({data['sampling']}), seed {data['seed']}")
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in details["seconds"].items())
    print(f"sparsity of the targeted weights {details['sparsity']:.6f}; {seconds}, on {details['device']}")
    print_table(["projection", "layers", "sparsity", "pattern"], by_projection(pruned(layers)), words=(0, 3))


def show_inspection(name: str, layers: Sequence[LayerSparsity], model_bytes: int) -> None:
    """Sparsity and size of layers, and whether their zeros and shape fit 2:4 hardware; then why pruned ones do not.

    Layers of different blocks that are alike share a row. ``model_bytes`` are those of all parameters, each counted
    once.
    """

    def row(label: str, shape: str, own: Sequence[LayerSparsity], pattern: str, able: str) -> list[str]:
        size = sum(layer.dense_bytes for layer in own)
        return [label, shape, str(len(own)), f"{sparsity_of(own):.4f}", pattern, f"{size / 1e6:.2f}", able]

    def total(label: str, own: Sequence[LayerSparsity]) -> list[str]:
        return row(label, "", own, "", f"{sum(layer.misfit_2of4 is None for layer in own)}/{len(own)}")

    sparse = pruned(layers)
    alike, reasons = defaultdict[Any, list[LayerSparsity]](list), defaultdict[str, list[str]](list)
    for layer in layers:
        able = "no" if layer.misfit_2of4 else "yes"
        alike[re.sub(r"\.\d+\.", ".*.", layer.name), layer.shape, layer.pattern, able].append(layer)
        if (why_not := layer.why_not_2of4) and layer.sparsity > PRUNED:
            reasons[f"does not fit 2:4, {why_not}" if layer.misfit_2of4 else f"fits 2:4; {why_not}"].append(layer.name)
    rows = [
        row(name if len(own) > 1 else own[0].name, " x ".join(map(str, shape)), own, pattern, able)
        for (name, shape, pattern, able), own in alike.items()
    ]
    if 0 < len(sparse) < len(layers):
        rows.append(total("pruned layers", sparse))
    rows += [total("all linear layers", layers), ["the whole model", "", "", "", "", f"{model_bytes / 1e6:.2f}", ""]]
    print_table([name, "shape", "layers", "sparsity", "pattern", "MB", "fits 2:4"], rows, words=(0, 1, 4))
    for reason, names in reasons.items():
        some = ", ".join([*names[:3], f"and {len(names) - 3} more"] if len(names) > 4 else names)
        get_console().print(f"{reason}: {some}", soft_wrap=True, highlight=False, markup=False)


def show_zero_shot(result: ZeroShotResult) -> None:
    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.2f}"

    rows = [[row.task, percent(row.accuracy), percent(row.stderr), str(row.n), row.metric] for row in result.tasks]
    if len(rows) > 1:
        items = str(sum(row.n for row in result.tasks))
        rows.append([f"mean of {len(rows)}", percent(result.mean), percent(result.mean_stderr), items, ""])
    print_table(["task", "accuracy, %", "standard error", "items", "metric"], rows, words=(0, 4))
    print(result.protocol)
