"""The tables and the picture of docs/results.md on training, and README's table, made from benchmarks/quality.csv.

    python benchmarks/quality_tables.py             # print them
    python benchmarks/quality_tables.py --write     # put them into docs/results.md, README.md and docs/pictures/

An arm is reported at the learning rate with the lowest perplexity on validation articles among its tuning rows, where
it stands between two others; a star marks those that are run at another rate, or without such a grid. Seeds of tuning
rows are not reported, and nothing is chosen on others.
"""

import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import rows
from quality_labels import DISTILLATION, LENGTHS, LOW_RANK, MAIN, SCORES, SCRATCH, SHIFT, STARTS, UNSTRUCTURED, VARIANTS

ROOT = Path(__file__).parent.parent
CSV, PAGE, README = ROOT / "benchmarks" / "quality.csv", ROOT / "docs" / "results.md", ROOT / "README.md"
PICTURE = ROOT / "docs" / "pictures" / "quality.svg"
BEGIN, END = "<!-- quality -->", "<!-- /quality -->"
TUNING_STEPS = "50"
TEXTS = {"heldout": "held-out articles", "wikitext2": "WikiText-2", "c4": "C4"}
STATIC = ("static", "static_ste")
ONESHOT = ("none", "oneshot_magnitude", "oneshot_wanda", "oneshot_sparsegpt")
UNPRUNED = ("none", "dense")


class Runs:
    """The rows of a CSV file, asked by arm.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._rows = rows.read(path)
        self._chosen_on = {row["seed"] for row in self._rows if row["tuning"] == "True"}

    def tuning(self, arm: str) -> dict[float, dict[str, str]]:
        """The tuning row of each learning rate that was tried."""
        found = [row for row in self._rows if row["arm"] == arm and row["tuning"] == "True"]
        return {float(row["lr"]): row for row in found if row["steps"] == TUNING_STEPS}

    def lr(self, arm: str) -> float | None:
        """The learning rate with the lowest validation perplexity; None where none was tried."""
        tried = self.tuning(arm)
        return min(tried, key=lambda lr: float(tried[lr]["validation"])) if tried else None

    def has_grid(self, arm: str) -> bool:
        """Whether the arm was run at its best rate, and both a larger and a smaller one were tried."""
        tried, best, run = self.tuning(arm), self.lr(arm), self.reported(arm)
        at_best = all(float(row["lr"]) == best for row in run.values())
        return best is not None and at_best and min(tried) < best < max(tried)

    def reported(self, arm: str, steps: int = 100) -> dict[int, dict[str, str]]:
        """The row of each seed that chose nothing: at the best learning rate, or else at the one with most seeds."""
        found = [row for row in self._rows if row["arm"] == arm and row["tuning"] == "False"]
        found = [row for row in found if row["steps"] in ("0", str(steps))]
        found = [row for row in found if row["steps"] == "0" or row["seed"] not in self._chosen_on]
        if not found:
            return {}
        rates = [float(row["lr"]) for row in found]
        best = self.lr(arm) if self.lr(arm) in rates else max(rates, key=rates.count)
        return {int(row["seed"]): row for row in found if float(row["lr"]) == best}

    def values(self, arm: str, text: str, steps: int = 100) -> dict[int, float]:
        """Perplexity of each seed."""
        return {seed: float(row[text]) for seed, row in self.reported(arm, steps).items() if row[text]}

    def mean(self, arm: str, text: str = "heldout", steps: int = 100) -> float | None:
        """Mean perplexity over seeds."""
        values = self.values(arm, text, steps)
        return statistics.mean(values.values()) if values else None

    def best(self, arms: Iterable[str]) -> str | None:
        """Of the arms that were run, the lowest on validation articles, which are not reported.

        By their tuning rows where all of them have some, otherwise by the runs that are reported on other texts.
        """
        run = [arm for arm in arms if self.reported(arm)]
        rows = {arm: list(self.tuning(arm).values()) for arm in run}
        if all(rows.values()):
            found = {arm: min(float(row["validation"]) for row in rows[arm]) for arm in run}
        else:
            found = {arm: statistics.mean(self.values(arm, "validation").values()) for arm in run}
        return min(found, key=lambda arm: found[arm]) if found else None

    def change(self, arm: str, other: str, text: str = "heldout", steps: int = 100) -> tuple[float, list[float]] | None:
        """Mean and each of the paired changes of perplexity, in per cent of ``other``, over the seeds of both."""
        ours, theirs = self.values(arm, text, steps), self.values(other, text, steps)
        paired = [100 * (ours[seed] / theirs[seed] - 1) for seed in sorted(ours.keys() & theirs.keys())]
        return (statistics.mean(paired), paired) if paired else None


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


def _first_to_last(found: dict[int, dict[str, str]], key: str, digits: int) -> str:
    """Of the first seed that has it, in per cent."""
    row = next((row for row in found.values() if row[f"first_{key}"]), None)
    return " to ".join(f"{100 * float(row[f'{end}_{key}']):.{digits}f} %" for end in ("first", "last")) if row else ""


def table(runs: Runs, arms: dict[str, str], against: str | None, label: str, steps: int = 100) -> str:
    """Perplexities of arms on all texts, and the paired change against one of them on held-out articles."""
    name = f"held-out against {label}" if against else ""
    halved = any(row["first_flip_agreement"] for arm in arms for row in runs.reported(arm, steps).values())
    head = ["arm", "`--arm`", "lr", "seeds", *TEXTS.values(), "flip rate, first to last"]
    head += [*(["of these not noise"] if halved else []), *([name] if name else [])]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for arm, words in arms.items():
        found = runs.reported(arm, steps)
        if not found:
            continue
        row = next(iter(found.values()))
        lr = "" if row["steps"] == "0" else f"{float(row['lr']):g}" + ("" if runs.has_grid(arm) else " *")
        cells = [words, arm, lr, ", ".join(map(str, sorted(found)))]
        cells += [_perplexities(runs.values(arm, text, steps)) for text in TEXTS]
        rises = arm.startswith(("gradual", "scratch"))  # there flips are pruning
        cells += ["" if rises else _first_to_last(found, "flip_rate", 2)]
        cells += [_first_to_last(found, "flip_agreement", 0)] if halved else []
        if against:
            cells.append(
                "" if arm == against or row["steps"] == "0" else _change(runs.change(arm, against, steps=steps))
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "Not measured yet."


def tuning_table(runs: Runs) -> str:
    """Validation perplexity of every arm at every learning rate that was tried."""
    arms = dict.fromkeys(
        [*MAIN, *SCORES, *VARIANTS, *STARTS, *DISTILLATION, *SHIFT, *UNSTRUCTURED, *LOW_RANK, *SCRATCH]
    )
    tried = {arm: runs.tuning(arm) for arm in arms if runs.tuning(arm)}
    rates = sorted({lr for each in tried.values() for lr in each})
    lines = [f"| `--arm` | {' | '.join(f'{lr:g}' for lr in rates)} |", "| --- " * (len(rates) + 1) + "|"]
    for arm, each in tried.items():
        cells = [f"{float(each[lr]['validation']):.2f}" if lr in each else "" for lr in rates]
        cells = [f"**{cell}**" if lr == runs.lr(arm) else cell for lr, cell in zip(rates, cells, strict=True)]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reached(runs: Runs) -> str:
    """What the project set out to reach, and what the rows say."""
    static = runs.best(STATIC) or "static"
    static_70 = runs.best(("static_70", "static_ste_70")) or "static_70"
    text = "heldout"
    changes = [
        ("2:4, re-pruned against the better static arm", "dynamic", static, text, "-3 %"),
        ("70 %, the same", "dynamic_70", static_70, text, "-5 %"),
        ("re-pruned, untouched teacher against none, C4", "dynamic_distill", "dynamic", "c4", "-10 %"),
        ("re-pruned, fine-tuned teacher against none, C4", "dynamic_distill_tuned", "dynamic", "c4", "-10 %"),
        (
            "re-pruned, fine-tuned teacher against none, in domain",
            "dynamic_distill_tuned",
            "dynamic",
            text,
            "not higher",
        ),
        ("static mask, untouched teacher against none, C4", "static_distill", "static", "c4", "-10 %"),
        ("static mask, fine-tuned teacher against none, C4", "static_distill_tuned", "static", "c4", "-10 %"),
        (
            "static mask, fine-tuned teacher against none, in domain",
            "static_distill_tuned",
            "static",
            text,
            "not higher",
        ),
        ("running norms against magnitude, both re-pruned", "dynamic", "dynamic_magnitude", text, "lower"),
        ("running norms against those of the first mask", "dynamic", "dynamic_frozen_norms", text, "-1 %"),
        (
            "the same, calibrated on Wikipedia, trained on Python",
            "dynamic_shift",
            "dynamic_frozen_norms_shift",
            text,
            "more than that",
        ),
    ]
    lines = ["| perplexity of | wanted | measured (each seed) | seeds |", "| --- " * 4 + "|"]
    for words, arm, other, text, wanted in changes:
        change = runs.change(arm, other, text)
        star = "" if runs.has_grid(arm) and runs.has_grid(other) else " *"
        seeds = len(change[1]) if change else 0
        lines.append(f"| {words} | {wanted} | {_change(change) + star if change else 'not measured'} | {seeds or ''} |")
    arms = {**MAIN, **SCORES, **VARIANTS, **STARTS, **DISTILLATION}
    best = runs.best(arm for arm in arms if arm not in UNPRUNED and runs.has_grid(arm))
    for steps in (100, 300):
        change = runs.change(best, "dense", steps=steps) if best else None
        star = "" if runs.has_grid("dense") else " *"
        ratio = f"{1 + change[0] / 100:.2f} ({best}){star}" if change else "not measured"
        wanted, seeds = "1.35" if steps == 300 else "", len(change[1]) if change else ""
        words = f"the best 2:4 arm of those with learning rates of their own, over dense fine-tuning, {steps} steps"
        lines.append(f"| {words} | {wanted} | {ratio} | {seeds} |")
        if change := runs.change("dynamic_distill_tuned", "dense", steps=steps):
            ratio, seeds = f"{1 + change[0] / 100:.2f} *", len(change[1])
            lines.append(f"| fine-tuned teacher, over dense fine-tuning, {steps} steps | | {ratio} | {seeds} |")
    return "\n".join(lines)


def lengths(runs: Runs) -> str:
    """Perplexity on held-out articles after other numbers of steps, at the learning rates of those of 100."""
    steps = (100, 300)
    head = ["`--arm`", *(f"{n} steps" for n in steps), *(f"over dense, {n} steps" for n in steps)]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for arm in LENGTHS:
        if runs.values(arm, "heldout", 300):
            over = [runs.change(arm, "dense", steps=n) if arm != "dense" else None for n in steps]
            cells = [_perplexities(runs.values(arm, "heldout", n)) for n in steps]
            cells += [f"{1 + each[0] / 100:.2f}" if each else "" for each in over]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "Not measured yet."


def tables(path: Path = CSV) -> str:
    """All tables, as Markdown."""
    runs = Runs(path)
    static = runs.best(STATIC)
    parts = [
        reached(runs),
        "",
        "### 2:4 at equal tokens\n",
        table(runs, MAIN, static, "the better static arm"),
        "\n![Perplexity of each arm on held-out articles, a dot a seed](pictures/quality.svg)\n",
        "### Which score decides in training\n",
        "All from the same first mask, one-shot Wanda's; k = 10.\n",
        table(runs, SCORES, "dynamic_frozen_norms", "norms of the first mask"),
        "\n### Margins, decay, when to stop\n",
        "Each is the default but for what it says.\n",
        table(runs, VARIANTS, "dynamic", "the default"),
        "\n### From a model that was pruned before\n",
        "Its pruned weights are zeros, where the other arms still hold what they were.\n",
        table(runs, STARTS, "dynamic", "from the dense model"),
        "\n### Another text than the first mask was made on\n",
        "Calibrated on Wikipedia, trained on the Python standard library; held-out is held-out source code.\n",
        table(runs, SHIFT, "dynamic_frozen_norms_shift", "norms of the first mask"),
        "\n### Distillation\n",
        table(runs, DISTILLATION, "dynamic", "re-pruned, no teacher"),
        "\n### Longer runs\n",
        lengths(runs),
        "\n### Unstructured 70 %\n",
        table(runs, UNSTRUCTURED, runs.best(("static_70", "static_ste_70")), "the better static arm"),
        "\n### Fine-tuning a pruned model: low-rank and full\n",
        "r 8 on q and v, as in the paper's Table 6.\n",
        table(runs, LOW_RANK, None, ""),
        "\n### From scratch\n",
        "A Llama of 17 million weights on 614,400 tokens: smoke runs that show it works, not what it is worth.\n",
        table(runs, SCRATCH, "scratch_dense", "dense", steps=300),
        "\n### How learning rates were chosen\n",
        "Perplexity on validation articles (first 32,768 tokens), seed 0; the best of each grid is bold.\n",
        tuning_table(runs),
    ]
    return "\n".join(parts) + "\n"


def headline(path: Path = CSV) -> str:
    """README's table: the main arms on held-out articles."""
    runs = Runs(path)
    lines = ["| SmolLM2-135M-Instruct, dequantised from Q4_1 | held-out Wikipedia | C4 |", "| --- " * 3 + "|"]
    chosen = {
        **MAIN,
        "static_distill": "static, distilled from the dense model",
        "dynamic_distill": "re-pruned, distilled from the dense model",
    }
    for arm in ("static_ste", "oneshot_sparsegpt", "dynamic_k50", "dynamic_k1"):
        del chosen[arm]  # in docs/results.md
    for arm, words in chosen.items():
        if runs.reported(arm):
            cells = [_perplexities(runs.values(arm, text)) for text in ("heldout", "c4")]
            lines.append(f"| {f'**{words}**' if arm.startswith('dynamic') else words} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(path: Path = CSV, out: Path = PICTURE) -> None:
    """A dot a seed for each trained arm at 2:4, on held-out articles."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "quality"
    from matplotlib import pyplot as plt

    runs = Runs(path)
    scored = {arm: f"re-pruned by {label.removeprefix('Wanda, ')}" for arm, label in SCORES.items()}
    variants = {arm: f"re-pruned every 10 steps, {label}" for arm, label in VARIANTS.items()}
    starts = {arm: label.removeprefix("from the dense model, ") for arm, label in STARTS.items()}
    starts = {arm: label if arm.startswith("static") else f"re-pruned, {label}" for arm, label in starts.items()}
    words = {**starts, **DISTILLATION, **variants, **scored, **MAIN}
    means = {arm: mean for arm in words if arm not in ONESHOT and (mean := runs.mean(arm))}
    middle = statistics.median(means.values())
    order = sorted((arm for arm in means if 0.75 < means[arm] / middle < 1.33), key=lambda arm: -means[arm])
    beyond = "; ".join(f"{words[arm].partition(':')[0]} {means[arm]:.2f}" for arm in sorted(means.keys() - set(order)))
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(order) + 1.1), layout="constrained")
    for height, arm in enumerate(order):
        values = list(runs.values(arm, "heldout").values())
        colour = "#7f7f7f" if "static" in arm or "gradual" in arm else "#1f77b4"
        axes.plot(values, [height] * len(values), "o", color=colour, alpha=0.75)
        label = f"{statistics.mean(values):.2f} (n = {len(values)})"
        axes.annotate(label, (max(values), height), (6, -3), textcoords="offset points")
    axes.set_yticks(range(len(order)), [words[arm] for arm in order])
    outside = f"\nfar outside: {beyond}" if beyond else ""
    figure.supxlabel(f"token perplexity, held-out Wikipedia articles (lower is better){outside}", fontsize=10)
    figure.suptitle("2:4, 100 steps of 2048 tokens, a dot a seed, means; axis cut; blue = masks change", fontsize=10)
    shown = [value for arm in order for value in runs.values(arm, "heldout").values()]
    width = max(shown) - min(shown)
    axes.set_xlim(min(shown) - 0.1 * width, max(shown) + 0.5 * width)  # room for the numbers
    axes.margins(y=0.1)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Print or write."""
    if "--write" not in sys.argv:
        print(tables())
        print(headline())
        return
    draw()
    rows.show(PAGE, BEGIN, END, tables())
    rows.show(README, BEGIN, END, headline())


if __name__ == "__main__":
    main()
