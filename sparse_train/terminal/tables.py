"""Tables on stdout: with frames in a terminal, without frames in files and pipes."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.table import Column, Table

from sparse_train.inspection import InspectedLayer, LayerSparsity, by_projection, overall_sparsity, pruned, sizes

if TYPE_CHECKING:
    from sparse_train.evaluation import ZeroShotResult

_WIDTH = 110
_WIDE = 1000
"""Wide enough that no line is broken in a file."""


def console_for(least: int = 0) -> Console:
    """stdout, with at least ``least`` columns, because a narrower console would cut off numbers."""
    console = Console()
    return Console(width=max(least, console.width) if console.is_terminal else _WIDE)


def _table(console: Console, *columns: Column | str, title: str | None = None) -> Table:
    return Table(*columns, title=title, title_justify="left", box=HEAVY_HEAD if console.is_terminal else None)


def show_pruning(details: dict[str, Any], layers: Sequence[LayerSparsity], folder: Path) -> None:
    """Results of one-shot pruning."""
    seconds, console = details["seconds"], console_for()
    console.print(f"[bold]{details['model']}[/bold] pruned to {folder}", highlight=False)
    _print_method(console, details)
    stages = details["stages"]
    wanted = stages[0]["wanted_sparsity"] if len(stages) == 1 else None
    console.print(
        f"sparsity of the targeted weights {details['sparsity']:.6f}"
        + (f" (wanted {wanted:g})" if wanted is not None else "")
        + f"; forwards {seconds['forwards']:.1f} s, pruning {seconds['pruning']:.1f} s, all {seconds['all']:.1f} s, "
        f"on {details['device']}"
    )
    if found := details.get("perplexity"):
        console.print(f"token perplexity {found['perplexity']:.2f}: {found['data']}, windows of {found['window']}")
    table = _table(console, "projection", _right("layers"), _right("sparsity"), "pattern")
    for row in by_projection(layers):
        table.add_row(*row)
    console.print(table)


def show_seeds(details: dict[str, Any], folder: Path) -> None:
    """Perplexity over calibration seeds."""
    console, first = console_for(), details["seeds"][0]
    console.print(f"[bold]{details['model']}[/bold], written to {folder / 'seeds.json'}", highlight=False)
    _print_method(console, details, seeded=False)
    where = f"{first['data']}, windows of {first['window']}, {first['tokens']} tokens"
    table = _table(console, "seed", f"token perplexity on\n{where}")
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


def show_inspection(
    name: str, layers: Sequence[InspectedLayer], model_bytes: int, console: Console | None = None
) -> None:
    """Sparsity, size and 2:4 hardware of every layer.

    Args:
        name: of the model.
        layers: of the model.
        model_bytes: bytes of all parameters, each counted once.
        console: where to print; default: stdout.
    """
    console = console or console_for(_WIDTH)
    sparsity, size, packed_size, on_gpu = map(_right, ("sparsity", "MB", "packed", "2:4 GPU"))
    table = _table(console, "layer", "shape", sparsity, "pattern", size, packed_size, on_gpu, title=name)
    for layer in layers:
        table.add_row(
            layer.name,
            " x ".join(map(str, layer.shape)),
            f"{layer.sparsity:.4f}",
            layer.pattern,
            _mb(layer.dense_bytes),
            _mb(layer.packed_bytes),
            "yes" if layer.why_not_2of4 is None else "no",
        )
    table.add_section()
    able = sum(layer.why_not_2of4 is None for layer in layers)
    (dense, packed), share = sizes(layers), f"{able}/{len(layers)}"
    found = pruned(layers)
    if 0 < len(found) < len(layers):
        table.add_row(f"{len(found)} pruned layers", "", f"{overall_sparsity(found):.4f}", "", "", "", "")
    table.add_row("all linear layers", "", f"{overall_sparsity(layers):.4f}", "", _mb(dense), _mb(packed), share)
    # packing saves bytes only in these layers
    table.add_row("the whole model", "", "", "", _mb(model_bytes), _mb(model_bytes - dense + packed), "")
    console.print(table)
    reasons: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        if layer.why_not_2of4 is not None:
            reasons[layer.why_not_2of4].append(layer.name)
    for reason, names in reasons.items():
        some = ", ".join([*names[:3], f"and {len(names) - 3} more"] if len(names) > 4 else names)
        console.print(f"not on a 2:4 GPU, {reason}: {some}", highlight=False, markup=False)


def show_zero_shot(result: "ZeroShotResult") -> None:
    """Accuracy on each task, in percent with its standard error, and the mean."""
    console = console_for()
    table = _table(console, "task", _right("accuracy, %"), _right("standard error"), "metric", _right("items"))
    for row in result.tasks:
        table.add_row(row.task, f"{100 * row.accuracy:.2f}", _percent(row.stderr), row.metric, str(row.n))
    if len(result.tasks) > 1:
        table.add_section()
        items = str(sum(row.n for row in result.tasks))
        table.add_row(
            f"mean of {len(result.tasks)}", f"{100 * result.mean:.2f}", _percent(result.mean_stderr), "", items
        )
    console.print(table)
    console.print(str(result.protocol), highlight=False, markup=False)


def _percent(stderr: float | None) -> str:
    return "" if stderr is None else f"{100 * stderr:.2f}"


def _right(name: str) -> Column:
    return Column(name, justify="right")


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"
