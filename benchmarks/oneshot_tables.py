"""The tables of docs/results.md on one-shot pruning, made from benchmarks/oneshot.csv.

python benchmarks/oneshot_tables.py             # print them
python benchmarks/oneshot_tables.py --write     # put them into docs/results.md
"""

import statistics
from collections import defaultdict
from pathlib import Path

import rows

ROOT = Path(__file__).parent.parent
CSV, PAGE = ROOT / "benchmarks" / "oneshot.csv", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- oneshot -->", "<!-- /oneshot -->"
STRUCTURES = {"unstructured": "50 %", "4:8": "4:8", "2:4": "2:4"}
METHODS = {
    "magnitude_layer": "magnitude, per layer (the paper's baseline)",
    "magnitude": "magnitude, per row",
    "wanda": "Wanda",
    "wanda_variant": "Wanda, cumulative variant",
    "ria": "RIA, a = 0.5, per row",
    "ria_layer": "RIA, a = 0.5, per layer (as its code does)",
    "sparsegpt": "SparseGPT",
    "iht": "IHT",
    "iht_asymmetric": "IHT, asymmetric, with dampening_frac 0.1",
}
GROUPS = {"row": "output row", "layer": "layer", "model": "model"}


def tables(path: Path = CSV) -> str:
    """All tables, as Markdown."""
    everything = rows.read(path)
    measured = [row for row in everything if row["model"].endswith("bfloat16 weights")]
    if len({(row["window"], row["tokens"]) for row in measured}) > 1:
        raise ValueError(f"{path} has rows of several windows or numbers of tokens: not one table.")
    found: dict[tuple[str, str, int], dict[int, float]] = defaultdict(dict)
    for row in measured:
        samples = int(row["samples"])
        found[row["method"], row["structure"], samples][int(row["seed"])] = float(row["perplexity"])
    parts = [_methods(found, measured), _groups(found), _samples(found), _precisions(everything)]
    return "\n".join(part for part in parts if part)


def _cell(values: dict[int, float] | None) -> str:
    if not values:
        return "not measured"
    mean = statistics.mean(values.values())
    if len(values) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {statistics.stdev(values.values()):.2f} ({len(values)} seeds)"


def _methods(found: dict[tuple[str, str, int], dict[int, float]], measured: list[dict[str, str]]) -> str:
    dense = next(float(row["perplexity"]) for row in measured if row["method"] == "dense")
    lines = [["dense", f"{dense:.2f}", "", ""]]
    for method, label in METHODS.items():
        samples = 0 if method.startswith("magnitude") else 64
        cells = [_cell(found.get((method, structure, samples))) for structure in STRUCTURES]
        if method in ("magnitude_layer", "ria_layer", "wanda_variant"):  # N:M has groups of its own
            cells[1:] = ["as Wanda" if method == "wanda_variant" else "as per row"] * 2
        lines.append([label, *cells])
    return rows.table(["method", *STRUCTURES.values()], lines)


def _groups(found: dict[tuple[str, str, int], dict[int, float]]) -> str:
    lines = []
    for method, samples in (("magnitude", 0), ("wanda", 64)):
        names = [method if group == "row" else f"{method}_{group}" for group in GROUPS]
        cells = [_cell(found.get((name, "unstructured", samples))) for name in names]
        lines.append([method, *cells])
    return rows.table(["50 %, compared within", *GROUPS.values()], lines)


def _samples(found: dict[tuple[str, str, int], dict[int, float]]) -> str:
    counts = sorted(samples for method, structure, samples in found if (method, structure) == ("wanda", "unstructured"))
    cells = [_cell({0: found["wanda", "unstructured", count][0]}) for count in counts]
    head = ["Wanda at 50 %, calibration samples (seed 0)", *map(str, counts)]
    return rows.table(head, [["perplexity", *cells]])


def _precisions(everything: list[dict[str, str]]) -> str:
    """Wanda on float32 weights, calibrated in float32 and under autocast."""
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in everything:
        if row["model"].endswith("float32 weights"):
            found[row["structure"], row["autocast"]][int(row["seed"])] = float(row["perplexity"])
    lines = []
    for structure in dict.fromkeys(structure for structure, _ in found):
        plain, cast = found[structure, ""], found[structure, "bfloat16"]
        changes = [f"{100 * (cast[seed] / plain[seed] - 1):+.2f} %" for seed in sorted(plain.keys() & cast.keys())]
        lines.append([STRUCTURES[structure], _cell(plain), _cell(cast), ", ".join(changes)])
    head = ["Wanda on float32 weights", "calibrated in float32", "calibrated in bfloat16", "change, each seed"]
    return rows.table(head, lines) if found else ""


if __name__ == "__main__":
    rows.print_or_write(tables(), PAGE, BEGIN, END)
