"""The tables on training of docs/results.md, docs/more_results.md and README.md, and their pictures.

    python benchmarks/quality_tables.py             # print the tables that benchmarks/quality.csv gives
    python benchmarks/quality_tables.py --write     # put them into these pages, and pictures into docs/pictures/

A star marks arms for which not both a lower and a higher learning rate were tried.
"""

import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import rows
from quality_labels import (
    DISTILLATION,
    LENGTHS,
    LOW_RANK,
    MAIN,
    METHODS_70,
    ORDERS,
    REMOVED,
    SCORES,
    SCRATCH,
    SHIFT,
    STARTS,
    TAUGHT_2OF4,
    TAUGHT_70,
    UNSTRUCTURED,
    VARIANTS,
)
from quality_picture import draw
from quality_rows import Runs

ROOT = Path(__file__).parent.parent
CSV, README = ROOT / "benchmarks" / "quality.csv", ROOT / "README.md"
PAGE, MORE = ROOT / "docs" / "results.md", ROOT / "docs" / "more_results.md"
PICTURES = ROOT / "docs" / "pictures"
BEGIN, END = "<!-- quality -->", "<!-- /quality -->"
BEGIN_MASKS, END_MASKS = "<!-- first masks -->", "<!-- /first masks -->"
TEXTS = {"heldout": "held-out articles", "wikitext2": "WikiText-2", "c4": "C4"}
Sizes = Mapping[int, Runs]
"""The runs of each size of a step, in tokens."""


def by_size() -> Sizes:
    """The committed runs."""
    return {size: Runs(CSV, size) for size in (512, 1024, 2048)}


def _perplexities(values: dict[int, float]) -> str:
    if not values:
        return "not measured"
    mean = f"{statistics.mean(values.values()):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({', '.join(f'{values[seed]:.2f}' for seed in sorted(values))})"


def _change(change: tuple[float, list[float]] | None) -> str:
    if change is None:
        return ""
    mean, each = change
    shown = ", ".join(f"{value:+.1f}" for value in each)
    return f"{mean:+.1f} % ({shown})" if len(each) > 1 else f"{mean:+.1f} %"


def _first_to_last(found: dict[int, dict[str, str]]) -> str:
    """The flip rates of the first seed that has them, in percent."""
    row = next((row for row in found.values() if row["first_flip_rate"]), None)
    return " to ".join(f"{100 * float(row[f'{end}_flip_rate']):.2f} %" for end in ("first", "last")) if row else ""


def _label(arms: Mapping[str, str], arm: str) -> str:
    return f"{arms[arm]} (last run with commit {REMOVED[arm]})" if arm in REMOVED else arms[arm]


def table(runs: Runs, arms: dict[str, str], against: str | None, label: str, steps: int = 100) -> str:
    """Perplexities of arms on all texts, and the paired change against one of them on held-out articles."""
    name = f"held-out against {label}" if against else ""
    head = ["arm", "`--arm`", "lr", "seeds", *TEXTS.values(), "flip rate, first to last"]
    head += [name] if name else []
    lines = []
    for arm in arms:
        found = runs.reported(arm, steps)
        if not found:
            continue
        row = next(iter(found.values()))
        lr = "" if row["steps"] == "0" else f"{float(row['lr']):g}" + ("" if runs.has_grid(arm, steps) else " *")
        cells = [_label(arms, arm), arm, lr, ", ".join(map(str, sorted(found)))]
        cells += [_perplexities(runs.values(arm, text, steps)) for text in TEXTS]
        rises = arm.startswith(("gradual", "scratch"))  # their flips are mostly pruning
        cells += ["" if rises else _first_to_last(found)]
        if against:
            cells.append(
                "" if arm == against or row["steps"] == "0" else _change(runs.change(arm, against, steps=steps))
            )
        lines.append(cells)
    return rows.table(head, lines)


def tuning_table(runs: Runs, arms: Iterable[str]) -> str:
    """Validation perplexity of arms at every learning rate that was tried."""
    tried = {arm: runs.tuning(arm) for arm in arms if runs.tuning(arm)}
    rates = sorted({lr for each in tried.values() for lr in each})
    lines = []
    for arm, each in tried.items():
        cells = [f"{float(each[lr]['validation']):.2f}" if lr in each else "" for lr in rates]
        cells = [f"**{cell}**" if lr == runs.lr(arm) else cell for lr, cell in zip(rates, cells, strict=True)]
        lines.append([arm, *cells])
    return rows.table(["`--arm`", *(f"{lr:g}" for lr in rates)], lines)


def methods(runs: Runs, arms: Mapping[str, str], against: str) -> str:
    """Validation perplexity of arms at the best learning rate that was tried, from the lowest on."""
    tried = {arm: tuned for arm in arms if (tuned := runs.tuning(arm))}
    best = {arm: min(float(row["validation"]) for row in tuned.values()) for arm, tuned in tried.items()}
    lines = []
    for arm in sorted(best, key=lambda arm: best[arm]):
        change = "" if arm == against else f"{100 * (best[arm] / best[against] - 1):+.1f} %"
        rates = ", ".join(f"{lr:g}" for lr in sorted(tried[arm]))
        lines.append([_label(arms, arm), arm, f"{best[arm]:.2f}", change, f"{runs.lr(arm):g}", rates])
    return rows.table(["method", "`--arm`", "validation articles", f"against {against}", "lr", "tried"], lines)


def other_rates(runs: Runs) -> str:
    """Runs at learning rates other than those of the tables above."""
    head = ["`--arm`", "lr", "steps", "seeds", *TEXTS.values()]
    lines = []
    for (arm, steps, lr), found in sorted(runs.at_other_rates().items()):
        values = [{seed: float(row[text]) for seed, row in found.items() if row[text]} for text in TEXTS]
        cells = [arm, f"{lr:g}", str(steps), ", ".join(map(str, sorted(found))), *map(_perplexities, values)]
        lines.append(cells)
    return rows.table(head, lines)


def lengths(runs: Runs) -> str:
    """Perplexity on held-out articles after other numbers of steps of 2048 tokens."""
    steps = [n for n in (100, 300, 1000) if any(runs.values(arm, "heldout", n) for arm in LENGTHS)]
    compared = [n for n in steps if runs.values("dense", "heldout", n)]
    head = ["`--arm`", *(f"{n} steps" for n in steps), *(f"over dense, {n} steps" for n in compared)]
    lines = []
    for arm in LENGTHS:
        if any(runs.values(arm, "heldout", n) for n in steps[1:]):
            over = [runs.change(arm, "dense", steps=n) if arm != "dense" else None for n in compared]
            values = [runs.values(arm, "heldout", n) for n in steps]
            cells = [_perplexities(each) if each else "" for each in values]
            cells += [f"{1 + each[0] / 100:.2f}" if each else "" for each in over]
            lines.append([arm, *cells])
    return rows.table(head, lines)


def longer(runs: Sizes, arms: dict[str, str], baseline: str, word: str, *steps: int, size: int = 512) -> list[str]:
    """A table for each length."""
    parts = []
    for each in steps:
        words = f"{each:,} steps" if size == 512 else f"{each:,} steps of {size:,} tokens"
        parts += [f"After {words}, {size * each:,} tokens:\n", table(runs[size], arms, baseline, word, steps=each)]
    return parts


def tables(sizes: Sizes) -> str:
    """The tables behind the findings, as Markdown."""
    runs, short = sizes[2048], sizes[512]
    parts = [
        "### 2:4 at equal tokens\n",
        "Where rates differ, a part of a change is the rate's: [by rate](choosing.md#which-learning-rate).\n",
        table(runs, MAIN, "static", "the kept mask"),
        "### Unstructured 70 %\n",
        table(runs, UNSTRUCTURED, "static_70", "the kept mask"),
        "### Distillation\n",
        table(runs, DISTILLATION, "dynamic", "re-pruned, no teacher"),
        "### Unstructured 70 % with a teacher, after 51,200 tokens\n",
        "100 steps of 512 tokens, with the untouched dense model as teacher.\n",
        table(short, TAUGHT_70, "static_70_distill", "the kept mask"),
        *longer(sizes, TAUGHT_70, "static_70_distill", "the kept mask", 200, 300),
        "### 2:4 with a teacher, in steps of 512 tokens\n",
        "After 100 steps, of kept masks alone:\n",
        table(short, TAUGHT_2OF4, "static_distill", "the kept mask"),
        *longer(sizes, TAUGHT_2OF4, "static_iht_distill", "IHT's mask, kept", 400, 1200),
        *longer(sizes, TAUGHT_2OF4, "static_iht_distill", "IHT's mask, kept", 200, size=1024),
        "Runs of both sections at other learning rates:\n",
        other_rates(short),
        "### Other methods with a teacher, after 25,600 tokens\n",
        "50 steps of 512 tokens, seed 0, with the same teacher, tokens and order of data, each at the best of the "
        "learning rates that were tried.\n",
        "70 % unstructured:\n",
        methods(short, METHODS_70, "dynamic_dormant_70_distill"),
        "2:4:\n",
        methods(short, TAUGHT_2OF4, "static_distill"),
        "### Which score decides in training\n",
        "All runs start from the same first mask, of one-shot Wanda; k = 10. All are at 2e-4, but magnitude is at its "
        "best rate.\n",
        table(runs.at(2e-4), SCORES, "dynamic_frozen_norms", "norms of the first mask"),
        "### Training on another text than the first mask\n",
        "Trained on the Python standard library, and calibrated on Wikipedia unless an arm says Python; held-out is "
        "held-out source code.\n",
        table(runs, SHIFT, "static_shift", "Wanda's mask, kept"),
        "### Longer runs\n",
        lengths(runs),
    ]
    return "\n".join(parts)


def more_tables(sizes: Sizes) -> str:
    """The tables of docs/more_results.md: settings that gained little, other beginnings, other learning rates."""
    runs, short = sizes[2048], sizes[512]
    every = (MAIN, SCORES, VARIANTS, STARTS, DISTILLATION, SHIFT, UNSTRUCTURED, LOW_RANK, SCRATCH)
    arms = dict.fromkeys(arm for each in every for arm in each)
    parts = [
        "### Margins, decay, when to stop\n",
        "Each arm is the default with one change, which is its name. All are at 2e-4, but `Dormant` is at its best "
        "rate.\n",
        table(runs.at(2e-4), VARIANTS, "dynamic", "the default"),
        "### From a model that was pruned before\n",
        "The pruned weights of such a model are zeros; the other arms still hold their former values.\n",
        table(runs, STARTS, "dynamic", "from the dense model"),
        "### Permuted channels, untrained\n",
        table(runs, ORDERS, None, ""),
        "### Fine-tuning a pruned model: low-rank and full\n",
        "r 8 on q and v, as in the paper's Table 6.\n",
        table(runs, LOW_RANK, None, ""),
        "### From scratch\n",
        "A Llama of 17 million weights on 614,400 tokens: smoke runs that show that it works, not how good it is.\n",
        table(runs, SCRATCH, "scratch_dense", "dense", steps=300),
        "### At other learning rates\n",
        "Runs of arms that the tables show at another learning rate.\n",
        other_rates(runs),
        "### How learning rates were chosen\n",
        "Perplexity on validation articles (first 32,768 tokens), seed 0; the best of each row is bold.\n",
        tuning_table(runs, arms),
        "In steps of 512 tokens:\n",
        tuning_table(short, [*METHODS_70, *TAUGHT_2OF4]),
    ]
    return "\n".join(parts)


class Pair(NamedTuple):
    """A row of README's table: a mask that is kept, and one that is re-pruned every 10 steps."""

    target: str
    first_mask: str
    static: str
    moving: str
    tokens_a_step: int = 2048
    steps: int = 100


PAIRS = [
    Pair("2:4", "Wanda", "static", "dynamic"),
    Pair("2:4", "IHT", "static_iht", "dynamic_iht"),
    Pair("70 %", "Wanda", "static_70", "dynamic_70"),
    Pair("70 %", "IHT", "static_iht_70", "dynamic_iht_70"),
    Pair("2:4, with a teacher", "Wanda", "static_distill", "dynamic_distill"),
    Pair("2:4, with a teacher", "IHT", "static_iht_distill", "dynamic_iht_distill"),
    Pair(
        "70 %, with a teacher, 153,600 tokens",
        "Wanda (`Dormant`)",
        "static_70_distill",
        "dynamic_dormant_70_distill",
        512,
        300,
    ),
    Pair("70 %, with a teacher, 153,600 tokens", "IHT", "static_iht_70_distill", "dynamic_iht_70_distill", 512, 300),
]


class Start(NamedTuple):
    """A row of the first finding's table: arms that begin with the mask of Wanda, SparseGPT and IHT; "" = none."""

    setting: str
    arms: tuple[str, str, str]
    tokens_a_step: int = 2048
    steps: int = 100


_KEPT_70 = ("static_70_distill", "static_sparsegpt_70_distill", "static_iht_70_distill")
FIRST_MASKS = [
    Start("2:4, untrained", ("oneshot_wanda", "oneshot_sparsegpt", "oneshot_iht")),
    Start("2:4, kept", ("static", "", "static_iht")),
    Start("2:4, re-pruned", ("dynamic", "dynamic_sparsegpt", "dynamic_iht")),
    Start("2:4 with a teacher, kept", ("static_distill", "static_sparsegpt_distill", "static_iht_distill"), 512),
    Start("2:4 with a teacher, kept", ("static_distill", "", "static_iht_distill")),
    Start("2:4 with a teacher, re-pruned", ("dynamic_distill", "", "dynamic_iht_distill")),
    Start("70 %, untrained", ("oneshot_wanda_70", "oneshot_sparsegpt_70", "oneshot_iht_70")),
    Start("70 %, kept", ("static_70", "", "static_iht_70")),
    Start("70 %, re-pruned", ("dynamic_70", "", "dynamic_iht_70")),
    Start("70 % with a teacher, kept", _KEPT_70, 512, 300),
    Start("70 % with a teacher, re-pruned", ("dynamic_dormant_70_distill", "", "dynamic_iht_70_distill"), 512, 300),
]


def first_masks(sizes: Sizes) -> str:
    """Perplexity on held-out articles / C4 by what made the first mask, each arm at its best learning rate."""
    lines = []
    for setting, arms, tokens_a_step, steps in FIRST_MASKS:
        of_size = sizes[tokens_a_step]
        tokens = 0 if arms[0].startswith("oneshot") else tokens_a_step * steps
        cells = [setting, f"{tokens:,}"]
        for arm in arms:
            means = [of_size.mean(arm, text, steps) for text in ("heldout", "c4")]
            cells.append("" if None in means else " / ".join(f"{mean:.2f}" for mean in means))
        lines.append(cells)
    return rows.table(["", "tokens", "Wanda", "SparseGPT", "IHT"], lines)


def headline(sizes: Sizes) -> str:
    """README's table: re-pruning against a kept mask, each at its best learning rate; held-out articles / C4."""
    lines = []
    for target, first_mask, static, moving, tokens_a_step, steps in PAIRS:
        of_size = sizes[tokens_a_step]
        means = [[of_size.mean(arm, text, steps) for text in ("heldout", "c4")] for arm in (static, moving)]
        cells = ["not measured" if None in each else " / ".join(f"{mean:.2f}" for mean in each) for each in means]
        change, on_c4 = (of_size.change(moving, static, text, steps) for text in ("heldout", "c4"))
        cells += ["", ""] if change is None or on_c4 is None else [_change(change), _change(on_c4)]
        lines.append([target, first_mask, *cells])
    return rows.table(["target", "first mask", "kept", "re-pruned", "change", "change on C4"], lines)


def main() -> None:
    """Print or write."""
    sizes = by_size()
    made = {PAGE: tables(sizes), MORE: more_tables(sizes), README: headline(sizes)}
    if "--write" not in sys.argv:
        print("\n".join([*made.values(), first_masks(sizes)]))
        return
    draw(sizes, PICTURES)
    for page, shown in made.items():
        rows.show(page, BEGIN, END, shown)
    rows.show(PAGE, BEGIN_MASKS, END_MASKS, first_masks(sizes))


if __name__ == "__main__":
    main()
