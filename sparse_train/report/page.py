"""One self-contained HTML page from plain blocks: paragraphs, tables, pictures, code."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from sparse_train.files import replacing


@dataclass(frozen=True)
class Table:
    """The first column names the rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    """Number of leading columns with words, aligned left; the others hold numbers."""


@dataclass(frozen=True)
class Picture:
    """A drawing in SVG, in which "currentColor" is the colour of the page's text."""

    caption: str
    alt: str
    """What it shows, for readers who cannot see it."""
    svg: str


@dataclass(frozen=True)
class Code:
    """Preformatted text."""

    text: str


Block = str | Table | Picture | Code
"""A string is a paragraph."""


def write_page(path: Path, title: str, lead: Sequence[Block], sections: Mapping[str, Sequence[Block]]) -> Path:
    """Write the page: ``lead``, then the sections by title, except empty ones. Returns ``path``."""
    links, parts = [], []
    for heading, blocks in sections.items():
        if blocks:
            anchor, name = re.sub(r"\W+", "-", heading.lower()), html.escape(heading)
            links.append(f'<a href="#{anchor}">{name}</a>')
            parts += [f'<h2 id="{anchor}">{name}</h2>', *map(_block, blocks)]
    text = _TEMPLATE.substitute(
        title=html.escape(title),
        style=_STYLE,
        lead="\n".join(map(_block, lead)),
        links=" &middot; ".join(links),
        sections="\n".join(parts),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return path


def _block(block: Block) -> str:
    match block:
        case Table():
            return _table(block)
        case Picture():
            drawing = f'<div role="img" aria-label="{html.escape(block.alt)}">{block.svg}</div>'
            return f"<figure>{drawing}<figcaption>{html.escape(block.caption)}</figcaption></figure>"
        case Code():
            return f"<pre>{html.escape(block.text.strip())}</pre>"
        case _:
            return f"<p>{html.escape(block)}</p>"


def _table(table: Table) -> str:
    def row(tag: str, texts: Sequence[str]) -> str:
        cells = [
            f"<{tag}{' class=words' if column < table.words else ''}>{html.escape(text)}</{tag}>"
            for column, text in enumerate(texts)
        ]
        return f"<tr>{''.join(cells)}</tr>"

    head, body = row("th", table.columns), "\n".join(row("td", texts) for texts in table.rows)
    return f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


_TEMPLATE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<header>
<h1>$title</h1>
$lead
<nav>$links</nav>
</header>
<main>
$sections
</main>
</body>
</html>
""")

_STYLE = """\
:root { --ink: #1d1d1f; --soft: #5f6368; --line: #d9dbde; --paper: #ffffff; --code: #f5f6f7; --link: #0b5cad; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e6; --soft: #a0a4a9; --line: #3a3d41; --paper: #16181b; --code: #1f2226; --link: #7db7f5; }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 52rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .8rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p { margin: .7rem 0; }
nav { font-size: .9rem; margin-top: 1.2rem; }
a { color: var(--link); text-decoration: none; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
.words { text-align: left; }
th { color: var(--soft); font-weight: 600; }
figure { margin: 1.4rem 0; break-inside: avoid; }
svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .88rem; color: var(--soft); margin-top: .4rem; }
pre { font: .8rem/1.5 ui-monospace, monospace; background: var(--code); padding: .9rem 1rem; overflow-x: auto; }
@media print { nav { display: none; } body { max-width: none; padding: 0; } pre { white-space: pre-wrap; } }
"""
