"""Hooks of mkdocs: what pages need in addition to Markdown."""

from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Removes the "::" before examples of docstrings, which is for ``help()``; a page shows a block of code."""
    return html.replace("<p>::</p>\n", "")
