"""The page about training runs: results, curves, masks, costs, and everything needed to repeat the runs."""

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template

from sparse_train.arguments import as_call
from sparse_train.files import replacing
from sparse_train.report.figures import curves
from sparse_train.report.runs import Run, closing, collect

_TEMPLATE = Path(__file__).with_name("page.html")


def write_run_report(
    folders: Sequence[str | Path], out: str | Path | None = None, *, title: str | None = None, lead: Sequence[str] = ()
) -> Path:
    """Write ``report.html``, which loads nothing and runs no script; returns it.

    Args:
        folders: of the runs, see ``collect``.
        out: folder to write to; default: that of the run; for several runs, ``report`` in the current folder.
        title: of the page; default: the names of the runs.
        lead: HTML of what stands first, such as a script's own ``table``.

    Raises:
        ValueError: a folder without a run, see ``collect``.
    """
    runs = collect(folders)
    if out is None:
        out = runs[0].folder if len(runs) == 1 else "report"
    title = title or f"Sparse training: {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}"
    parts = [*lead, *_summary(runs)]
    recipes = [f"{paragraph(run.name)}<pre>{html.escape(run.recipe.strip())}</pre>" for run in runs if run.recipe]
    sections = {
        "Perplexity and loss": _learning(runs),
        "Evaluation": _evaluation(runs),
        "Masks": _masks(runs),
        "Time, settings and machine": [_side_by_side(runs, _costs), paragraph(_COSTS)],
        "Recipe": recipes,
    }
    for heading, blocks in sections.items():
        if any(blocks):
            parts += [f"<h2>{heading}</h2>", *filter(None, blocks)]
    path = Path(out) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        page = Template(_TEMPLATE.read_text(encoding="utf-8"))
        beside.write_text(page.substitute(title=html.escape(title), body="\n".join(parts)), encoding="utf-8")
    return path


# --- results ---------------------------------------------------------------------------------------------------------


def _summary(runs: Sequence[Run]) -> list[str]:
    notes = [
        "Perplexity and loss are those on the run's validation text. Sparsity is the share of zeros among the targeted "
        "weights, counted on the weights. Flips are mask entries that updates changed since the first mask."
    ]
    for run in runs:
        if not run.facts["finished"]:
            notes.append(f"{_of(run, runs)}not ended, or cut off: the last record is of step {run.facts['step']:,}.")
    return [table(*closing(runs), words=min(len(runs), 2)), *map(paragraph, notes)]


def _learning(runs: Sequence[Run]) -> list[str]:
    perplexity = [(run.name, "", run.validation("perplexity")) for run in runs]
    training = [(run.name, "training", run.training_loss()) for run in runs]
    validation = [(run.name, "validation", run.validation("loss")) for run in runs]
    levels: dict[float, str] = {}
    for run in runs:
        for state in run.before[:1]:
            if state.perplexity is not None:
                levels.setdefault(state.perplexity, _of(run, runs) + state.name)
    text = "Perplexity on the validation text; at step 0, after the first mask."
    return [
        curves(text, perplexity, "perplexity", levels=levels, log=True),
        curves("Loss in training (one batch each) and in validation.", training + validation, "loss"),
    ]


def _evaluation(runs: Sequence[Run]) -> list[str]:
    def last(run: Run) -> dict[str, str]:
        return {name: f"{value:.4f} at step {step:,}" for name, (step, value) in run.evaluations().items()}

    protocols = dict.fromkeys(protocol for run in runs for protocol in run.facts["protocols"])
    return [_side_by_side(runs, last), *map(paragraph, protocols)] if any(map(last, runs)) else []


def _masks(runs: Sequence[Run]) -> list[str]:
    flips = [(run.name, "", run.flips()) for run in runs]
    since_first = [(run.name, "", run.curve("sparsity/initial_flip_rate")) for run in runs]
    target = [(run.name, "target", run.curve("sparsity/target")) for run in runs]
    counted = [(run.name, "counted", run.curve("sparsity/actual")) for run in runs]
    gradual = any(len({value for _, value in points}) > 1 for _, _, points in target)
    text = "Mask entries that an update changed, as a share of the targeted weights; without the first mask."
    return [
        curves(text, flips, "flip rate, %"),
        curves("Entries that differ from the first mask, in every 128th row.", since_first, "initial flip rate, %"),
        curves("Sparsity over the run.", target + counted, "sparsity, %") if gradual else "",
    ]


# --- facts -----------------------------------------------------------------------------------------------------------

_COSTS = (
    "Time is that of training, with validations. An update scores weights and selects masks; recording activations for "
    "it counts as part of the training steps. Tokens include padding."
)


def _costs(run: Run) -> dict[str, str]:
    seconds, tokens = run.facts["seconds"], run.facts["tokens"]
    updating = sum(value for step, value in run.curve("sparsity/update_seconds") if step > 0)
    about = {name: fact for name, fact in run.facts["about"].items() if fact not in (None, [])}
    return {
        "wall time": f"{seconds:,.1f} s",
        "of it in mask updates": f"{updating:,.1f} s ({updating / seconds:.1%})" if seconds else "",
        "tokens trained on": f"{tokens:,}",
        "tokens per second": f"{tokens / seconds:,.0f}" if seconds else "",
        **{name: f"{fact:,.6g}" if isinstance(fact, float) else as_call(fact) for name, fact in about.items()},
    }


# --- HTML ------------------------------------------------------------------------------------------------------------


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Of HTML; the first ``words`` columns are aligned left."""

    def row(tag: str, texts: Sequence[str]) -> str:
        kinds = [" class=words" if column < words else "" for column in range(len(texts))]
        cells = [f"<{tag}{kind}>{html.escape(text)}</{tag}>" for kind, text in zip(kinds, texts, strict=True)]
        return f"<tr>{''.join(cells)}</tr>\n"

    body = "".join(row("td", texts) for texts in rows)
    return f'<div class="wide"><table>\n{row("th", columns)}{body}</table></div>'


def _side_by_side(runs: Sequence[Run], facts: Callable[[Run], Mapping[str, str]]) -> str:
    """A row per fact and a column per run; facts that no run has are left out."""
    by_run = [facts(run) for run in runs]
    names = dict.fromkeys(name for each in by_run for name, text in each.items() if text)
    columns = ["", *(run.name for run in runs)] if len(runs) > 1 else ["", "value"]
    return table(columns, [[name, *(each.get(name, "") for each in by_run)] for name in names], words=len(columns))


def _of(run: Run, runs: Sequence[Run]) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""
