"""The pictures of docs/results.md, one for each finding: a bar is a mean, a dot is a seed."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib
from quality_rows import Runs

matplotlib.use("Agg")
from matplotlib import pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "quality"
KEPT, MOVED, OTHER = "#8c8c8c", "#1f77b4", "#c9b47f"
TEXTS = {"heldout": "unseen articles", "c4": "C4"}


class Panel(NamedTuple):
    """Perplexities of some arms on one text."""

    title: str
    arms: dict[str, tuple[str, str]]
    """The label and colour of each arm, from top to bottom."""
    text: str = "heldout"
    steps: int = 100
    tokens_a_step: int = 2048


def on_both(title: str, static: str, moved: str, tokens_a_step: int = 2048) -> list[Panel]:
    """A kept mask and one that moves, on unseen articles and on C4."""
    arms = {static: ("kept", KEPT), moved: ("re-pruned", MOVED)}
    return [Panel(f"{title}, {words}", arms, text, tokens_a_step=tokens_a_step) for text, words in TEXTS.items()]


WITH_OR_WITHOUT = {
    "static": ("kept", KEPT),
    "dynamic": ("re-pruned", MOVED),
    "static_distill": ("kept, teacher", KEPT),
    "dynamic_distill": ("re-pruned, teacher", MOVED),
}
TRAINED = {
    "dense": ("dense", OTHER),
    "static_distill": ("2:4, kept, teacher", KEPT),
    "dynamic_distill": ("2:4, re-pruned, teacher", MOVED),
}


def scores(suffix: str) -> dict[str, tuple[str, str]]:
    return {
        f"dynamic_magnitude{suffix}": ("magnitude", OTHER),
        f"dynamic_frozen_norms{suffix}": ("Wanda, first norms", OTHER),
        f"dynamic{suffix}": ("Wanda, running norms", MOVED),
    }


BEGUN_2OF4 = {
    "static_distill": ("Wanda, kept", KEPT),
    "static_sparsegpt_distill": ("SparseGPT, kept", KEPT),
    "static_iht_distill": ("IHT, kept", MOVED),
}
BEGUN_70 = {
    "static_70_distill": ("Wanda, kept", KEPT),
    "dynamic_dormant_70_distill": ("Wanda, re-pruned", KEPT),
    "static_iht_70_distill": ("IHT, kept", MOVED),
    "dynamic_iht_70_distill": ("IHT, re-pruned", MOVED),
}
SHIFTED = {
    "static_shift": ("Wanda, kept", KEPT),
    "dynamic_shift": ("Wanda, re-pruned", MOVED),
    "static_iht_shift": ("IHT, kept", KEPT),
    "dynamic_iht_shift": ("IHT, re-pruned", MOVED),
}
FIT = {"static_iht_python": ("IHT, kept", KEPT), "dynamic_iht_python": ("IHT, re-pruned", MOVED)}
FIGURES = {
    "shift": [Panel("calibrated on Wikipedia", SHIFTED), Panel("calibrated on Python code", FIT)],
    "moving": [*on_both("2:4", "static", "dynamic"), *on_both("70 %", "static_70", "dynamic_70")],
    "taught": [
        *on_both("2:4", "static_distill", "dynamic_distill"),
        *on_both("70 %", "static_70_distill", "dynamic_dormant_70_distill", 512),
    ],
    "teacher": [Panel(f"2:4, {words}", WITH_OR_WITHOUT, text) for text, words in TEXTS.items()],
    "scores": [Panel("2:4", scores("")), Panel("70 %", scores("_70"))],
    "starts": [
        Panel(f"{target}, {words}", arms, text, tokens_a_step=512)
        for target, arms in (("2:4", BEGUN_2OF4), ("70 %", BEGUN_70))
        for text, words in TEXTS.items()
    ],
    "lengths": [
        Panel("after 100 steps", {**TRAINED, "static_iht_distill": ("2:4 from IHT, kept, teacher", KEPT)}),
        Panel("after 300 steps", TRAINED, steps=300),
    ],
}


def draw(runs: Mapping[int, Runs], folder: Path) -> None:
    """Write each picture as ``finding_NAME.svg``; ``runs`` are those of each size of a step."""
    for name, panels in FIGURES.items():
        one_text = len({panel.text for panel in panels}) == 1
        size = (11, 0.42 * len(panels[0].arms) + 0.8)
        figure, all_axes = plt.subplots(1, len(panels), figsize=size, sharex=one_text)
        for axes, panel in zip(all_axes, panels, strict=True):
            of_size = runs[panel.tokens_a_step]
            bars(axes, panel, of_size.at(2e-4) if name == "scores" else of_size)
        figure.set_layout_engine("constrained")
        figure.savefig(folder / f"finding_{name}.svg", metadata={"Date": None})
        plt.close(figure)


def bars(axes: plt.Axes, panel: Panel, runs: Runs) -> None:
    """Draw a panel."""
    for height, (arm, (_, colour)) in enumerate(panel.arms.items()):
        values = list(runs.values(arm, panel.text, panel.steps).values())
        mean = statistics.mean(values)
        axes.barh(height, mean, 0.7, color=colour)
        axes.plot(values, [height] * len(values), "o", color="black", markersize=3)
        axes.annotate(f"{mean:.2f}", (max(values), height), (4, -3), textcoords="offset points", fontsize=9)
    axes.set_yticks(range(len(panel.arms)), [label for label, _ in panel.arms.values()], fontsize=9)
    axes.invert_yaxis()
    axes.set_title(panel.title, fontsize=10)
    axes.margins(x=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xticks([])
