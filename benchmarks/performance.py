"""The tables and the picture of docs/performance.md, from what benchmarks have put into benchmarks/performance.json.

python benchmarks/performance.py             # print the tables
python benchmarks/performance.py --write     # put them and the picture there
"""

import json
import sys
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import rows
import scaling

ROOT = Path(__file__).parent.parent
JSON, PAGE = ROOT / "benchmarks" / "performance.json", ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "pictures" / "growth.svg"
BEGIN, END = "<!-- performance -->", "<!-- /performance -->"
IDLE = 0.5
"""Load below which a machine counts as idle."""
BLOCKS_7B, ROWS = 32, "50 % per row"
STEPS = {10: 1.02, 1: 1.08}
"""By k, what a re-pruned step may take at most, against a dense one."""
WANTED_PEAK, WANTED_BYTES = 1.02, 0.13
Ways = dict[str, list[float]]


def spread(values: list[float], digits: int) -> str:
    """The median, and the quartiles, or of fewer than four values the lowest and the highest."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, *_, high = quantiles(values, n=4) if len(values) > 3 else (min(values), max(values))
    return f"{median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratios(slow: list[float], fast: list[float]) -> list[float]:
    """Of the times of each round."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def machine(part: dict[str, Any]) -> str:
    where = part["machine"]
    load = f"load before the run {where['load']:.1f}"
    state = "idle" if where["load"] < IDLE else "**not idle, or only just: compare ratios, not seconds**"
    name = f"{where['processor']}, {where['cores']} cores"
    return f"{name}, {where['threads']} thread(s), torch {where['torch']}; {load}: {state}.\n"


def against(found: dict[str, Ways], base: str, head: str) -> str:
    """Milliseconds of each way, and how much longer ``base`` takes in the same round."""
    lines = [
        [pattern, name, spread([1000 * each for each in times], 0), spread(ratios(ways[base], times), 1)]
        for pattern, ways in found.items()
        for name, times in ways.items()
    ]
    return rows.table(["pattern", "way", "ms", head], lines)


IN_ONE_PASS = (
    "a compiled loop that scores, selects and packs a row while it is in the cache, where numpy writes magnitudes, "
    "scores and a copy for the partition in passes of their own"
)
MASK_AND_CAST = (
    "a machine on which a dense step takes the same time twice (`dense, again`, below), to tell such ratios apart; "
    "then mask and cast in one pass, where there are three"
)
FEWER = (
    "sums of squares inside the product that reads the input (they are a third of it), and a masked weight that is "
    "made for the second forward, and not again for the zeros at the end"
)
IN_16_BITS = "forwards in bfloat16: the next line"


class Number(NamedTuple):
    """What was to be reached."""

    what: str
    wanted: float
    measured: list[float]
    closes: str = "nothing that is known: the same code has reached it in another run"
    at_most: bool = False
    unit: str = ""

    def line(self) -> list[str]:
        middle = median(self.measured)
        met = middle <= self.wanted if self.at_most else middle >= self.wanted
        wanted = f"{'at most' if self.at_most else 'at least'} {self.wanted:g}{self.unit}"
        return [
            self.what,
            wanted,
            spread(self.measured, 3 if middle < 2 else 2 if middle < 10 else 1),
            "reached" if met else self.closes,
        ]


def numbers(parts: dict[str, Any]) -> list[Number]:
    """Of what has been measured."""
    found: list[Number] = []
    if part := parts.get("selection"):
        wanted = {"selection": {ROWS: 46, "2:4": 17}, "update": {ROWS: 25, "2:4": 12}}
        for kind, name in ((kind, name) for kind, of in wanted.items() for name in of):
            faster = ratios(part[kind][name]["reference"], part[kind][name]["ours"])
            found.append(Number(f"the reference / {kind}, {name}", wanted[kind][name], faster, IN_ONE_PASS))
        for name in (ROWS, "2:4") if "model_7b" in part else ():
            times = [BLOCKS_7B * each for each in part["model_7b"]["block"][name]]
            found.append(Number(f"update of a LLaMA-7B, {name}", 20, times, IN_ONE_PASS, at_most=True, unit=" s"))
    if part := parts.get("step"):
        times = part["seconds"]
        for k, limit in STEPS.items():
            own = ratios(rows.steps_of_a_run(times, k), times["dense"])
            closes = f"{MASK_AND_CAST}; and {IN_ONE_PASS}" if k == 1 else MASK_AND_CAST
            found.append(Number(f"re-pruned step, k = {k} / dense step", limit, own, closes, at_most=True))
        for name, limit in (("re-pruned, distilled", 1.7), ("distilled", 1.7), ("cached teacher", 1.25)):
            own = ratios(times[name], times["dense"])
            found.append(Number(f"step, {name} / dense step", limit, own, at_most=True))
        if part["peaks"]:
            dense, (peak, count) = part["peaks"]["dense"][0], part["peaks"]["re-pruned"]
            allowed = round(WANTED_PEAK + WANTED_BYTES * count / dense, 3)
            found.append(Number("peak memory, re-pruned / dense", allowed, [peak / dense], at_most=True))
    if part := parts.get("oneshot"):
        whole = {name: [times["whole"] for times in each] for name, each in part["seconds"].items()}
        without = {n: [t["whole"] - t.get("forward", 0) for t in each] for n, each in part["seconds"].items()}
        plain, theirs = "Wanda, plain procedure", "llm-compressor"
        pairs = [("Wanda", plain, 2), ("Wanda", f"Wanda, {theirs}", 2.5), ("SparseGPT", f"SparseGPT, {theirs}", 2)]
        pruning = ratios(without[plain], without["Wanda, ours"])
        found.append(Number("one-shot without forwards: plain procedure / Wanda, ours", 8, pruning, FEWER))
        for method, slow, limit in pairs:
            for ending, closes in {"": IN_16_BITS, ", autocast": FEWER}.items():
                own, said = f"{method}, ours{ending}", f"one-shot: {slow} / {method}, ours"
                said += " with forwards in bfloat16, the other in float32" if ending else ", both in float32"
                if slow in whole:
                    found.append(Number(said, limit, ratios(whole[slow], whole[own]), closes))
    if part := parts.get("start"):
        for (name, times), limit in zip(part["seconds"].items(), (0.5, 2), strict=True):
            found.append(Number(f"`{name}`", limit, times, at_most=True, unit=" s"))
    return found


def selection(part: dict[str, Any]) -> list[str]:
    parts = ["## Selecting, and an update\n", machine(part)]
    parts += [
        f"Selection alone, {part['shape']}, float32:\n",
        against(part["selection"], "reference", "reference / this"),
    ]
    parts += ["A whole update of the same layer:\n", against(part["update"], "reference", "reference / this")]
    if whole := part.get("model_7b"):
        lines = [
            [name, spread([BLOCKS_7B * each for each in times], 1), "" if name.startswith("a copy") else "20 s"]
            for name, times in whole["block"].items()
        ]
        parts += [
            f"An update of the layers of a LLaMA-7B ({whole['weights'] / 1e9:.1f} G random float32 weights). One block "
            f"of {BLOCKS_7B} is in memory, and is timed:\n",
            rows.table(["pattern", f"s, times {BLOCKS_7B}", "wanted"], lines),
        ]
    return parts


def step(part: dict[str, Any]) -> list[str]:
    found: Ways = part["seconds"]
    kinds = {name: times for name, times in found.items() if not name.startswith("update")}
    for k in STEPS:
        name = f"re-pruned, k = {k}, with its share of updates"
        kinds[name] = rows.steps_of_a_run(found, k)
    lines = [[name, spread(times, 2), spread(ratios(times, found["dense"]), 3)] for name, times in kinds.items()]
    lines += [
        [name, spread(found[key], 2), spread(ratios(found[key], found["dense"]), 3)]
        for name, key in (("an update", "update"), ("an update of ModelPruning", "update of ModelPruning"))
    ]
    parts = ["## A training step\n", machine(part), f"{part['model']}, 2:4, {len(found['dense'])} rounds:\n"]
    parts.append(rows.table(["what", "s", "against the dense step of its round"], lines))
    means = [f"{ratio:.3f} ± {error:.3f} at k = {k}" for k in STEPS for ratio, error in [rows.mean_of_a_run(found, k)]]
    parts.append(f"In means over all rounds, against all dense steps, a re-pruned one takes {' and '.join(means)}.\n")
    if part["peaks"]:
        dense, (peak, count) = part["peaks"]["dense"][0], part["peaks"]["re-pruned"]
        lines = [[n, f"{b / 2**20:.0f}", f"{b / dense:.3f}x"] for n, (b, _) in part["peaks"].items()]
        allowed = (WANTED_PEAK * dense + WANTED_BYTES * count) / dense
        parts += [
            "Peak resident memory of a process (`VmHWM`) that takes three such steps, with an update after each:\n",
            rows.table(["run", "MiB", "against dense"], lines),
            f"Wanted: {WANTED_PEAK}x and {WANTED_BYTES} byte for each of {count / 1e6:.0f} M targeted weights, which "
            f"is {allowed:.3f}x; the re-pruned run has {(peak - dense) / count:+.2f} byte a targeted weight.\n",
        ]
    if times := part.get("masking"):
        lines = [[name, spread(each, 3)] for name, each in times.items()]
        parts += [
            "What a re-pruned step computes beside a dense one: it masks the weights of all layers, where "
            "autocast alone would cast them to bfloat16. Processor time of one thread:\n",
            rows.table(["weights of all layers", "s"], lines),
        ]
    profiles = part.get("profile", {})
    lines = [
        [name, f"`{operator}`", str(calls), f"{100 * share:.0f} %"]
        for name, events in profiles.items()
        for operator, calls, share in events["top"]
    ]
    if lines:
        summed = [f"{name}, {each['sum']:.2f} of {each['wall']:.2f} s" for name, each in profiles.items()]
        parts += [
            "Where the time goes, by own time, one run of each: operators by `torch.profiler`, which does not see "
            "numpy; the sums of squares in a recorded step, and an update, by `cProfile` in one thread:\n",
            rows.table(["of", "operator or function", "calls", "share"], lines),
            f"All of them together, and the time on the clock: {'; '.join(summed)}.\n",
        ]
    return parts


def oneshot(part: dict[str, Any]) -> list[str]:
    found: dict[str, list[dict[str, float]]] = part["seconds"]
    plain = found["Wanda, plain procedure"]
    lines = []
    for name, each in found.items():
        cells = [""] * 4
        if all("forward" in times for times in each):
            pruning, of_plain = ([times["whole"] - times["forward"] for times in some] for some in (each, plain))
            cells = [spread([times[part] for times in each], 1) for part in ("forward", "statistics")]
            cells += [spread(pruning, 1), spread(ratios(of_plain, pruning), 2)]
        whole, of_plain = ([times["whole"] for times in some] for some in (each, plain))
        lines.append([name, *cells, spread(whole, 1), spread(ratios(of_plain, whole), 2)])
    without = "without forwards, with statistics"
    head = ["what", "forwards, s", "statistics, s", f"{without}, s", "plain / this", "whole, s", "plain / this"]
    return ["## One-shot pruning\n", machine(part), f"{part['title']}, float32 weights:\n", rows.table(head, lines)]


def streaming(part: dict[str, Any]) -> list[str]:
    return ["## One-shot pruning, streamed\n", machine(part), streamed(part)]


def streamed(part: dict[str, Any]) -> str:
    rest = part["seconds"] - part["forwards"] - part["pruning"]
    cells = [(part["peak"] - part["before"]) / 2**20, part["before"] / 2**20]
    cells += [part[name] for name in ("seconds", "forwards", "pruning")]
    head = ["peak, MiB (wanted: 1024)", "interpreter and libraries, MiB", "whole, s", "forwards, s", "pruning, s"]
    return (
        f"{part['method']}, 2:4, {part['tokens']} tokens; a Llama of {part['checkpoint'] / 2**30:.2f} GiB of random "
        f"float32 weights in {part['blocks']} blocks. Peak resident memory above that of the interpreter:\n\n"
        + rows.table([*head, "rest: disk, s"], [[f"{cell:.0f}" for cell in (*cells, rest)]])
    )


def growth(part: dict[str, Any]) -> list[str]:
    base = middle(part["sizes"])
    lines = [
        [
            *(str(each[name]) for name in ("width", "blocks", "tokens")),
            spread(each["seconds"]["dense"], 2),
            spread([1000 * update for update in each["seconds"]["update"]], 0),
            *(f"{rows.ratio_of_a_run(each['seconds'], k):.3f}" for k in (10, 1)),
        ]
        for each in part["sizes"]
    ]
    return [
        "## How the cost grows\n",
        machine(part),
        "Llamas of random weights, 2:4, bfloat16 autocast; one size at a time differs from "
        f"{base['width']} wide, {base['blocks']} blocks, {base['tokens']} tokens a step; "
        f"{len(base['seconds']['dense'])} rounds. Against the dense step:\n",
        "![Cost of re-pruning against width, blocks, tokens, k and processes](pictures/growth.svg)\n",
        rows.table(["width", "blocks", "tokens", "dense step, s", "an update, ms", "k = 10", "k = 1"], lines),
        "The panel on the right is computed, not measured: what a process receives at an update of a Llama-3.1-8B, by "
        "the formulas of [scaling](scaling.md).\n",
    ]


def middle(sizes: list[dict[str, Any]]) -> dict[str, Any]:
    """The size from which all others differ in one number."""
    names = ("width", "blocks", "tokens")
    return max(sizes, key=lambda size: sum(size[name] == other[name] for other in sizes for name in names))


def draw_growth(part: dict[str, Any], out: Path) -> None:
    """How much longer a re-pruned step takes than a dense one, against each number that grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "growth"
    base, ks = middle(part["sizes"]), (1, 2, 5, 10, 20, 50, 100)
    figure, (*all_axes, computed) = plt.subplots(1, 5, figsize=(13.5, 2.6), layout="constrained")
    for axes in all_axes[1:]:
        axes.sharey(all_axes[0])
        axes.tick_params(labelleft=False)
    for axes, name in zip(all_axes, ("width", "blocks", "tokens"), strict=False):
        others = [each for each in ("width", "blocks", "tokens") if each != name]
        sizes = [size for size in part["sizes"] if all(size[other] == base[other] for other in others)]
        sizes.sort(key=lambda size: size[name])
        for k in (1, 10):
            ratios = [rows.ratio_of_a_run(size["seconds"], k) for size in sizes]
            axes.plot([size[name] for size in sizes], ratios, "o-", label=f"k = {k}")
        axes.set_xscale("log", base=2)
        axes.set_xlabel(name if name != "tokens" else "tokens a step")
    all_axes[3].plot(ks, [rows.ratio_of_a_run(base["seconds"], k) for k in ks], "o-", color="black")
    all_axes[3].set_xscale("log")
    all_axes[3].set_xlabel("k, steps between updates")
    all_axes[0].set_ylabel("step, re-pruned / dense")
    all_axes[0].legend()
    for axes in all_axes:
        axes.axhline(1, color="grey", linewidth=0.8)
    draw_processes(computed)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.savefig(out, metadata={"Date": None})


def draw_processes(axes: Any) -> None:
    """What a process receives at an update, by the formulas of docs/scaling.md."""
    setup, counts = scaling.SETUPS[0], [2**i for i in range(1, 7)]
    size = setup.layers, setup.blocks
    reduced, zero3 = sum(scaling.reduce_bytes(*size)), scaling.zero3_bytes(*size, 2)
    kinds = {
        "ZeRO-3": [zero3 + reduced for _ in counts],
        "FSDP2": [each * scaling.gather_bytes(*size, each) + reduced for each in counts],
        "DDP": [reduced for _ in counts],
    }
    for name, received in kinds.items():
        axes.plot(counts, [each / 1e6 for each in received], "--", label=name)
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="processes", ylabel="MB received, computed")
    axes.legend(loc="center right")


def tables(path: Path = JSON) -> str:
    """All tables, as Markdown."""
    parts = json.loads(path.read_text())
    made = {"selection": selection, "step": step, "growth": growth, "oneshot": oneshot, "streaming": streaming}
    lines = [
        "## Wanted, and measured\n",
        rows.table(["what", "wanted", "measured", "what would close it"], [each.line() for each in numbers(parts)]),
    ]
    lines += [line for name, show in made.items() if name in parts for line in show(parts[name])]
    lines += [f"Not measured yet: {name}.\n" for name in made if name not in parts]
    return "\n".join(lines)


if __name__ == "__main__":
    rows.print_or_write(tables(), PAGE, BEGIN, END)
    if "--write" in sys.argv and (part := json.loads(JSON.read_text()).get("growth")):
        draw_growth(part, PICTURE)
