"""Tables on the terminal."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

from sparse_train.inspection import InspectedLayer, LayerSparsity, by_projection, overall_sparsity

if TYPE_CHECKING:
    from sparse_train.evaluation import ZeroShotResult

_WIDTH = 110


def show_pruning(details: dict[str, Any], layers: Sequence[LayerSparsity], folder: Path) -> None:
    """What one-shot pruning did."""
    seconds, console = details["seconds"], Console()
    console.print(f"[bold]{details['model']}[/bold] pruned to {folder}", highlight=False)
    _print_method(console, details)
    wanted = details["stages"][-1]["wanted_sparsity"]
    console.print(
        f"sparsity of the targeted weights {details['sparsity']:.6f}"
        + (f" (wanted {wanted:g})" if wanted is not None else "")
        + f"; forwards {seconds['forwards']:.1f} s, pruning {seconds['pruning']:.1f} s, all {seconds['all']:.1f} s"
    )
    if found := details.get("perplexity"):
        console.print(f"token perplexity {found['perplexity']:.2f}: {found['data']}, windows of {found['window']}")
    console.print(_by_projection(layers))


def show_seeds(details: dict[str, Any], folder: Path) -> None:
    """Perplexity over calibration seeds."""
    console, first = Console(), details["seeds"][0]
    console.print(f"[bold]{details['model']}[/bold], written to {folder / 'seeds.json'}", highlight=False)
    _print_method(console, details, seeded=False)
    where = f"{first['data']}, windows of {first['window']}, {first['tokens']} tokens"
    table = Table("seed", f"token perplexity on\n{where}")
    for row in details["seeds"]:
        table.add_row(str(row["seed"]), f"{row['perplexity']:.3f}")
    table.add_section()
    table.add_row("mean", f"{details['mean']:.3f}")
    table.add_row("standard deviation", f"{details['standard_deviation']:.3f}")
    console.print(table)


def _print_method(console: Console, details: dict[str, Any], seeded: bool = True) -> None:
    for stage in details["stages"]:
        allocation = "" if stage["allocation"] == "Uniform()" else f", {stage['allocation']}"
        console.print(f"{stage['criterion']}, {stage['mask_structure']}{allocation}", highlight=False)
    for note in details["notes"]:
        console.print(f"[yellow]not honoured:[/yellow] {note}", highlight=False)
    if data := details["calibration"]:
        seed = f", seed {data['seed']}" if seeded else ""
        size = f"{data['num_calibration_samples']} x {data['max_seq_length']} tokens"
        console.print(f"calibrated on {size} of {data['text']} ({data['sampling']}){seed}", highlight=False)


def show_inspection(name: str, layers: Sequence[InspectedLayer], as_json: bool) -> None:
    """Sparsity, size and 2:4 hardware of every layer."""
    dense, packed = sum(layer.dense_bytes for layer in layers), sum(layer.packed_bytes for layer in layers)
    if as_json:
        rows = [_as_dict(layer) for layer in layers]
        total = {"sparsity": overall_sparsity(layers), "dense_bytes": dense, "packed_bytes": packed}
        print(json.dumps({"model": name, **total, "layers": rows}))
        return
    table = Table("layer", "shape", "sparsity", "pattern", "MB", "packed", "2:4 GPU", title=name)
    for layer in layers:
        table.add_row(
            layer.name,
            " x ".join(map(str, layer.shape)),
            f"{layer.sparsity:.4f}",
            layer.pattern,
            f"{layer.dense_bytes / 1e6:.2f}",
            f"{layer.packed_bytes / 1e6:.2f}",
            "yes" if layer.why_not_2of4 is None else "no",
        )
    table.add_section()
    able = sum(layer.why_not_2of4 is None for layer in layers)
    sizes = f"{dense / 1e6:.2f}", f"{packed / 1e6:.2f}"
    table.add_row("all linear layers", "", f"{overall_sparsity(layers):.4f}", "", *sizes, f"{able}/{len(layers)}")
    reasons: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        if layer.why_not_2of4 is not None:
            reasons[layer.why_not_2of4].append(layer.name)
    console = Console(width=max(_WIDTH, Console().width))  # a narrower one would cut the numbers off
    console.print(table)
    for reason, names in reasons.items():
        some = ", ".join([*names[:3], "..."] if len(names) > 3 else names)
        console.print(f"not on a 2:4 GPU, {reason}: {some}", highlight=False)


def _as_dict(layer: InspectedLayer) -> dict[str, Any]:
    return {
        **asdict(layer),
        "dtype": str(layer.dtype).removeprefix("torch."),
        "sparsity": layer.sparsity,
        "dense_bytes": layer.dense_bytes,
        "packed_bytes": layer.packed_bytes,
        "runs_on_2of4_hardware": layer.why_not_2of4 is None,
        "why_not_2of4": layer.why_not_2of4,
    }


def show_zero_shot(result: "ZeroShotResult") -> None:
    """Accuracy on each task, in per cent with its standard error, and the mean."""
    table = Table(
        "task", Column("accuracy, %", justify="right"), Column("standard error", justify="right"), "metric", "items"
    )
    for row in result.tasks:
        table.add_row(row.task, f"{100 * row.accuracy:.2f}", _percent(row.stderr), row.metric, str(row.n))
    if len(result.tasks) > 1:
        table.add_section()
        items = str(sum(row.n for row in result.tasks))
        table.add_row(
            f"mean of {len(result.tasks)}", f"{100 * result.mean:.2f}", _percent(result.mean_stderr), "", items
        )
    console = Console()
    console.print(table)
    console.print(str(result.protocol), highlight=False, markup=False)


def _percent(stderr: float | None) -> str:
    return "" if stderr is None else f"{100 * stderr:.2f}"


def _by_projection(layers: Sequence[LayerSparsity]) -> Table:
    table = Table("projection", "layers", "sparsity", "pattern")
    for row in by_projection(layers):
        table.add_row(*row)
    return table
