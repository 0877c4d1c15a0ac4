"""Tables on the terminal."""

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

from sparse_train.inspection import LayerSparsity, overall_sparsity

if TYPE_CHECKING:
    from sparse_train.evaluation import ZeroShotResult


def show_pruning(details: dict[str, Any], layers: list[LayerSparsity], folder: Path) -> None:
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
        console.print(f"perplexity {found['perplexity']:.2f}: {found['data']}, windows of {found['window']}")
    console.print(_by_projection(layers))


def show_seeds(details: dict[str, Any], folder: Path) -> None:
    """Perplexity over calibration seeds."""
    console, first = Console(), details["seeds"][0]
    console.print(f"[bold]{details['model']}[/bold], written to {folder / 'seeds.json'}", highlight=False)
    _print_method(console, details, seeded=False)
    table = Table("seed", f"perplexity on {first['data']}, windows of {first['window']}, {first['tokens']} tokens")
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


def _by_projection(layers: list[LayerSparsity]) -> Table:
    groups: dict[str, list[LayerSparsity]] = defaultdict(list)
    for layer in layers:
        groups[layer.name.rsplit(".", 1)[-1]].append(layer)
    table = Table("projection", "layers", "sparsity", "pattern")
    for projection, members in groups.items():
        patterns = sorted({member.pattern for member in members})
        table.add_row(projection, str(len(members)), f"{overall_sparsity(members):.4f}", ", ".join(patterns))
    return table
