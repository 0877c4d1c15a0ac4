"""Tables on the terminal."""

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparse_train.inspection import LayerSparsity, overall_sparsity


def show_pruning(details: dict[str, Any], layers: list[LayerSparsity], folder: Path) -> None:
    """What one-shot pruning did."""
    seconds = details["seconds"]
    console = Console()
    console.print(f"[bold]{details['model']}[/bold] pruned to {folder}", highlight=False)
    console.print(f"{details['criterion']}, {details['mask_structure']}, calibrated on {details['calibration']}")
    console.print(
        f"sparsity of the targeted weights {details['sparsity']:.4f}; forwards {seconds['forwards']:.1f} s, "
        f"pruning itself {seconds['pruning']:.1f} s, all {seconds['all']:.1f} s"
    )
    console.print(_by_projection(layers))


def show_inspection(name: str, layers: list[LayerSparsity], as_json: bool) -> None:
    """Sparsity of every layer."""
    if as_json:
        rows = [{**asdict(layer), "sparsity": layer.sparsity} for layer in layers]
        print(json.dumps({"model": name, "sparsity": overall_sparsity(layers), "layers": rows}))
        return
    table = Table("layer", "shape", "sparsity", "pattern", title=name)
    for layer in layers:
        table.add_row(layer.name, " x ".join(map(str, layer.shape)), f"{layer.sparsity:.4f}", layer.pattern)
    table.add_section()
    table.add_row("all linear layers", "", f"{overall_sparsity(layers):.4f}", "")
    Console().print(table)


def _by_projection(layers: list[LayerSparsity]) -> Table:
    groups: dict[str, list[LayerSparsity]] = defaultdict(list)
    for layer in layers:
        groups[layer.name.rsplit(".", 1)[-1]].append(layer)
    table = Table("projection", "layers", "sparsity", "pattern")
    for projection, members in groups.items():
        patterns = sorted({member.pattern for member in members})
        table.add_row(projection, str(len(members)), f"{overall_sparsity(members):.4f}", ", ".join(patterns))
    return table
