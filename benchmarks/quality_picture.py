"""The picture of docs/results.md and README: one dot per seed."""

import statistics
from pathlib import Path

import matplotlib
from quality_labels import DISTILLATION, MAIN, SCORES, STARTS, VARIANTS
from quality_rows import Runs

matplotlib.use("Agg")
from matplotlib import pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "quality"
ONESHOT = ("none", "oneshot_magnitude", "oneshot_wanda", "oneshot_sparsegpt")


def draw(runs: Runs, out: Path) -> None:
    """One dot per seed for each trained arm at 2:4, on held-out articles."""
    scored = {arm: f"re-pruned by {label.removeprefix('Wanda, ')}" for arm, label in SCORES.items()}
    variants = {arm: f"re-pruned, {label}" for arm, label in VARIANTS.items()}
    starts = {arm: label.removeprefix("from the dense model, ") for arm, label in STARTS.items()}
    starts = {arm: label if arm.startswith("static") else f"re-pruned, {label}" for arm, label in starts.items()}
    words = {**starts, **DISTILLATION, **variants, **scored, **MAIN}
    means = {arm: mean for arm in words if arm not in ONESHOT and (mean := runs.mean(arm))}
    middle = statistics.median(means.values())
    order = sorted((arm for arm in means if 0.75 < means[arm] / middle < 1.33), key=lambda arm: -means[arm])
    beyond = "; ".join(f"{words[arm].partition(':')[0]} {means[arm]:.2f}" for arm in sorted(means.keys() - set(order)))
    figure, axes = plt.subplots(figsize=(11, 0.32 * len(order) + 1.1), layout="constrained")
    for height, arm in enumerate(order):
        values = list(runs.values(arm, "heldout").values())
        colour = "#7f7f7f" if "static" in arm or "gradual" in arm else "#1f77b4"
        axes.plot(values, [height] * len(values), "o", color=colour, alpha=0.75)
        label = f"{statistics.mean(values):.2f} (n = {len(values)})"
        axes.annotate(label, (max(values), height), (6, -3), textcoords="offset points")
    axes.set_yticks(range(len(order)), [words[arm] for arm in order])
    outside = f"\nfar outside: {beyond}" if beyond else ""
    figure.supxlabel(f"token perplexity, held-out Wikipedia articles (lower is better){outside}", fontsize=10)
    figure.suptitle("2:4, 100 steps of 2048 tokens; dot = seed; means; axis cut; blue = masks change", fontsize=10)
    shown = [value for arm in order for value in runs.values(arm, "heldout").values()]
    width = max(shown) - min(shown)
    axes.set_xlim(min(shown) - 0.1 * width, max(shown) + 0.5 * width)  # room for the numbers
    axes.margins(y=0.1)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(out, metadata={"Date": None})
