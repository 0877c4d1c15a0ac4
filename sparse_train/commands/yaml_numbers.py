"""Let recipes write ``mask_structure: 2:4`` without quotes: YAML 1.1 reads that as 124, a number in base 60."""

import re
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]
from jsonargparse import get_loader, set_loader

_BARE_N_OF_M = re.compile(r"((?:^|[:\-,\[{])[ \t]+|^)(\d+:\d+)(?=[ \t]*(?:$|[,}\]]|[ \t]#))", re.MULTILINE)


def install() -> None:
    """Make jsonargparse's YAML loader, and so every ``--config``, read N:M as text."""
    load = get_loader("yaml")
    if getattr(load, "reads_n_of_m", False):
        return

    def loader(stream: str) -> Any:
        return load(_BARE_N_OF_M.sub(r'\1"\2"', stream))

    loader.reads_n_of_m = True  # type: ignore[attr-defined]
    set_loader("yaml", loader, exceptions=(yaml.YAMLError,))
