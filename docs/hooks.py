"""Hooks of mkdocs: what pages need in addition to Markdown."""

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Removes the "::" before examples of docstrings, which is for ``help()``; a page shows a block of code.

    Marks options of commands, which a browser would break after their hyphens.
    """
    return re.sub(r"(?<=[\s>])--[\w.]+", r'<span class="option">\g<0></span>', html.replace("<p>::</p>\n", ""))
