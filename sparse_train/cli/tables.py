"""Results of commands as tables."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sparse_train.inspection import LayerSparsity, by_projection, overall_sparsity, pruned
from sparse_train.report import Run, closing
from sparse_train.terminal import print_table

if TYPE_CHECKING:
    from sparse_train.evaluation import ZeroShotResult


def show_pruning(details: dict[str, Any], layers: Sequence[LayerSparsity], folder: Path) -> None:
    """Results of one-shot pruning."""
    seconds, stages = details["seconds"], details["stages"]
    print(f"{details['model']} pruned to {folder}")
    _print_method(details)
    target = stages[0]["wanted_sparsity"]  # None for a distribution with values of its own
    wanted = "" if target is None else f" (wanted {target:g})"
    print(
        f"sparsity of the targeted weights {details['sparsity']:.6f}{wanted}; forwards {seconds['forwards']:.1f} s, "
        f"pruning {seconds['pruning']:.1f} s, all {seconds['all']:.1f} s, on {details['device']}"
    )
    if found := details.get("perplexity"):
        print(f"token perplexity {found['perplexity']:.2f}: {found['data']}, windows of {found['window']}")
    print_table(["projection", "layers", "sparsity", "pattern"], by_projection(layers), words=(0, 3))


def show_seeds(details: dict[str, Any], folder: Path) -> None:
    """Perplexity over calibration seeds."""
    first = details["seeds"][0]
    print(f"{details['model']}, written to {folder / 'seeds.json'}")
    _print_method(details, seeded=False)
    print(f"token perplexity on {first['data']}, windows of {first['window']}, {first['tokens']} tokens")
    rows = [[str(row["seed"]), f"{row['perplexity']:.3f}"] for row in details["seeds"]]
    rows += [[name, f"{details[key]:.3f}"] for name, key in _SPREAD.items()]
    print_table(["seed", "perplexity"], rows)


_SPREAD = {"mean": "mean", "standard deviation": "standard_deviation"}


def _print_method(details: dict[str, Any], seeded: bool = True) -> None:
    for stage in details["stages"]:
        divided = "" if stage["distribution"] == "Uniform()" else f", {stage['distribution']}"
        print(f"{stage['criterion']}, {stage['mask_structure']}{divided}")
    if data := details["calibration"]:
        seed = f", seed {data['seed']}" if seeded else ""
        size = f"{data['num_calibration_samples']} x {data['max_seq_length']} tokens"
        print(f"calibrated on {size} of {data['text']} ({data['sampling']}){seed}")


def show_inspection(
    name: str, layers: Sequence[LayerSparsity], model_bytes: int, console: Console | None = None
) -> None:
    """Sparsity, size and 2:4 hardware of every layer.

    Args:
        name: of the model.
        layers: of the model.
        model_bytes: bytes of all parameters, each counted once.
        console: where to print; default: stdout.
    """

    def total(label: str, own: Sequence[LayerSparsity]) -> list[str]:
        able = sum(layer.why_not_2of4 is None for layer in own)
        size = sum(layer.dense_bytes for layer in own)
        return [label, "", f"{overall_sparsity(own):.4f}", "", f"{size / 1e6:.2f}", f"{able}/{len(own)}"]

    rows = [
        [
            layer.name,
            " x ".join(map(str, layer.shape)),
            f"{layer.sparsity:.4f}",
            layer.pattern,
            f"{layer.dense_bytes / 1e6:.2f}",
            "yes" if layer.why_not_2of4 is None else "no",
        ]
        for layer in layers
    ]
    found = pruned(layers)
    if 0 < len(found) < len(layers):
        rows.append(total(f"{len(found)} pruned layers", found))
    rows += [total("all linear layers", layers), ["the whole model", "", "", "", f"{model_bytes / 1e6:.2f}", ""]]
    console = console or Console()
    print_table([name, "shape", "sparsity", "pattern", "MB", "2:4 GPU"], rows, words=(0, 1, 3), console=console)
    reasons: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        if layer.why_not_2of4 is not None:
            reasons[layer.why_not_2of4].append(layer.name)
    for reason, names in reasons.items():
        some = ", ".join([*names[:3], f"and {len(names) - 3} more"] if len(names) > 4 else names)
        console.print(f"not on a 2:4 GPU, {reason}: {some}", soft_wrap=True, highlight=False, markup=False)


def show_run(run: Run) -> None:
    """The model before training and at the end, as the report of a run begins."""
    print_table(*closing([run]))
    took, peak = (
        timedelta(seconds=round(run.facts["seconds"])),
        run.facts["peak_device_bytes"] or run.facts["peak_bytes"],
    )
    print(f"{took} of training, peak memory {peak / 2**30:.2f} GiB")


def show_zero_shot(result: "ZeroShotResult") -> None:
    """Accuracy on each task, in percent with its standard error, and the mean."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.2f}"

    rows = [[row.task, percent(row.accuracy), percent(row.stderr), str(row.n), row.metric] for row in result.tasks]
    if len(rows) > 1:
        items = str(sum(row.n for row in result.tasks))
        rows.append([f"mean of {len(rows)}", percent(result.mean), percent(result.mean_stderr), items, ""])
    print_table(["task", "accuracy, %", "standard error", "items", "metric"], rows, words=(0, 4))
    print(result.protocol)
