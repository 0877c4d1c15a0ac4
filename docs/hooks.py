"""Of mkdocs: what pages need beside Markdown."""

from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings open their examples with "::", for ``help()``; in a page the block of code says it."""
    return html.replace("<p>::</p>\n", "")
