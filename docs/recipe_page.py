"""docs/recipes.md, made from the head comments of recipes/ and configs/.

python docs/recipe_page.py             # print it
python docs/recipe_page.py --write     # put it into docs/recipes.md
"""

import re
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "recipes.md"
INTRODUCTION = """\
# Recipes

<!-- made by docs/recipe_page.py from the head comments of recipes/ and configs/ -->

A recipe describes a whole run. `--config` finds these files from any folder. It may be given several times, and later
files win, so give an overlay after its recipe. `pruning` has the arguments of `DynamicPruning`; without it, or with
`--pruning null`, a run is dense (a later `--pruning.KEY` then starts from the default settings). A list of other
callbacks takes the place of the one before; `--trainer.callbacks+` adds to it. Options override keys
(`--trainer.max_steps 50`), wherever they stand, and `--print_config` prints all of them. Measured numbers are in the
head comment of a recipe. Copy a file to make your own.
"""
OVERLAYS = {
    "model": "Overlays: models",
    "data": "Overlays: text to train on",
    "precision": "Overlays: precision",
    "strategy": "Overlays: many processes",
    "calibration": "Overlays of prune: calibration text",
    "perplexity": "Overlays of evaluate: text",
}


def page() -> str:
    """The whole page, as Markdown."""
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    trained = [path for path in recipes if "\ntrainer:" in path.read_text()]
    parts = {"Training": trained, "One-shot pruning": [path for path in recipes if path not in trained]}
    for folder, title in OVERLAYS.items():
        parts[title] = sorted((ROOT / "configs" / folder).glob("*.yaml"))
    return "\n".join([INTRODUCTION, *(_part(title, paths) for title, paths in parts.items())])


def _part(title: str, paths: list[Path]) -> str:
    return "\n".join([f"## {title}\n", *map(_section, paths)])


def _section(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    return "\n".join([f"### {name}\n", *_paragraphs(_head(path), name)])


def _head(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").removeprefix(" ") for line in lines[:count]]


def _paragraphs(head: list[str], name: str) -> list[str]:
    """Indented lines are commands; the rest is text, without the option that is already in the heading."""
    text = re.sub(rf":?\s+--config {re.escape(name)}$", ".", "\n".join(head)).replace("..", ".")
    text = re.sub(r"\bdocs/(\w+)\.md", r"[\1](\1.md)", text)
    found = []
    for is_command, group in groupby(text.splitlines(), lambda line: line.startswith("  ")):
        lines = [line.removeprefix("  ") if is_command else line for line in group if line.strip()]
        if lines:
            found.append("\n".join([*_mark(lines), "```bash", *lines, "```\n"] if is_command else [*lines, ""]))
    return found


def _mark(lines: list[str]) -> list[str]:
    """What these commands need that tests do not have."""
    if lines[0].startswith("torchrun"):
        return ["<!-- needs: nodes -->"]
    return ["<!-- needs: gpu -->"] if any(" configs/strategy/" in line for line in lines) else []


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page())
    else:
        print(page())
