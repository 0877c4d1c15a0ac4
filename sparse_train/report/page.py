"""One page from plain blocks: self-contained HTML, and Markdown with pictures as separate files."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template


@dataclass(frozen=True)
class Table:
    """The first column names the rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    """Number of leading columns with words, aligned left; the others hold numbers."""


@dataclass(frozen=True)
class Picture:
    """A PNG, drawn for light and for dark pages; Markdown and print use the light one."""

    name: str
    """Name of its file, without suffix."""
    caption: str
    alt: str
    """What it shows, for readers who cannot see it."""
    light: bytes
    dark: bytes


@dataclass(frozen=True)
class Code:
    """Preformatted text."""

    text: str
    language: str = ""


Block = str | Table | Picture | Code
"""A string is a paragraph."""

_PICTURES = "report_pictures"
"""Folder next to the page."""


@dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report: ``lead`` is between the title and the sections."""

    title: str
    lead: Sequence[Block]
    sections: Sequence[Section]


def write_page(page: Page, folder: Path) -> Path:
    """Write ``report.html``, ``report.md`` and the pictures of the latter to ``folder``; returns the HTML file."""
    (folder / _PICTURES).mkdir(parents=True, exist_ok=True)
    for block in [*page.lead, *(block for section in page.sections for block in section.blocks)]:
        if isinstance(block, Picture):
            (folder / _PICTURES / f"{block.name}.png").write_bytes(block.light)
    (folder / "report.md").write_text(to_markdown(page), encoding="utf-8")
    path = folder / "report.html"
    path.write_text(to_html(page), encoding="utf-8")
    return path


# --- Markdown --------------------------------------------------------------------------------------------------------


def to_markdown(page: Page) -> str:
    """The page as Markdown; pictures are separate files."""
    parts = [f"# {page.title}", *map(_markdown_block, page.lead)]
    for section in page.sections:
        parts += [f"## {section.title}", *map(_markdown_block, section.blocks)]
    return "\n\n".join(parts) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _markdown_block(block: Block) -> str:
    match block:
        case Table():
            return markdown_table(block.columns, block.rows)
        case Picture():
            return f"![{block.alt}]({_PICTURES}/{block.name}.png)\n\n*{block.caption}*"
        case Code():
            return f"```{block.language}\n{block.text.strip()}\n```"
        case _:
            return block


# --- HTML ------------------------------------------------------------------------------------------------------------


def to_html(page: Page) -> str:
    """The page as one HTML file that loads nothing from elsewhere and runs no script."""
    anchors = [re.sub(r"\W+", "-", section.title.lower()) for section in page.sections]
    links = " &middot; ".join(
        f'<a href="#{anchor}">{html.escape(section.title)}</a>'
        for anchor, section in zip(anchors, page.sections, strict=True)
    )
    sections = "\n".join(
        f'<section id="{anchor}">\n<h2>{html.escape(section.title)}</h2>\n{_html_blocks(section.blocks)}\n</section>'
        for anchor, section in zip(anchors, page.sections, strict=True)
    )
    return _TEMPLATE.substitute(
        title=html.escape(page.title), style=_STYLE, lead=_html_blocks(page.lead), links=links, sections=sections
    )


def _html_blocks(blocks: Sequence[Block]) -> str:
    return "\n".join(map(_html_block, blocks))


def _html_block(block: Block) -> str:
    match block:
        case Table():
            return _html_table(block)
        case Picture():
            return (
                f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_data(block.dark)}">'
                f'<img alt="{html.escape(block.alt)}" src="{_data(block.light)}"></picture>'
                f"<figcaption>{html.escape(block.caption)}</figcaption></figure>"
            )
        case Code():
            return f"<pre>{html.escape(block.text.strip())}</pre>"
        case _:
            return f"<p>{html.escape(block)}</p>"


def _html_table(table: Table) -> str:
    def cell(column: int, text: str, scope: str) -> str:
        side = ' class="words"' if column < table.words else ""
        tag, scope = ("th", f' scope="{scope}"') if scope == "col" or column == 0 else ("td", "")
        return f"<{tag}{scope}{side}>{html.escape(text)}</{tag}>"

    def row(texts: Sequence[str], scope: str) -> str:
        return "<tr>" + "".join(cell(column, text, scope) for column, text in enumerate(texts)) + "</tr>"

    body = "\n".join(row(texts, "row") for texts in table.rows)
    head = row(table.columns, "col")
    return f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _data(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


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
@media (prefers-color-scheme: dark) {
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
th:first-child { padding-left: 0; }
.words { text-align: left; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: normal; }
figure { margin: 1.4rem 0; }
img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: .88rem; color: var(--soft); margin-top: .4rem; }
pre { font: .8rem/1.5 ui-monospace, monospace; background: var(--code); padding: .9rem 1rem; overflow-x: auto; }
@media (max-width: 40rem) {
  body { padding: 1.2rem .8rem 2rem; }
  th, td { padding: .3rem .5rem; }
}
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --code: #fff; --link: #000; }
  @page { margin: 1.6cm; }
  body { max-width: none; padding: 0; font-size: 11pt; }
  nav { display: none; }
  td { overflow-wrap: anywhere; }
  figure, table, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  pre { white-space: pre-wrap; border: 1px solid var(--line); }
}
"""
