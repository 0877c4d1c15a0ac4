"""Patterns as users write them, and their names: "unstructured", "2:4".

Shape suffixes: O out_features, I in_features.
"""

import re

import torch
from torch import Tensor

from sparse_train.arguments import check_sparsity, to_python_number
from sparse_train.description import describe
from sparse_train.patterns.base import Pattern
from sparse_train.patterns.nm import NM
from sparse_train.patterns.unstructured import Group, Unstructured


def parse_pattern(mask_structure: str | Pattern, sparsity: float | None, group: Group = "row") -> tuple[Pattern, float]:
    """The pattern and its final sparsity from what users write.

    Args:
        mask_structure: "unstructured", "N:M" with N **kept** (as in "2:4"), or a ``Pattern``.
        sparsity: share of zeros; required for unstructured patterns, implied by N:M.
        group: the group in which "unstructured" compares weights.

    Raises:
        ValueError: not a known word or N:M; a sparsity that is outside [0, 1), missing, or in conflict with N:M.
    """
    pattern = parse_word(mask_structure, group)
    if sparsity is not None:
        check_sparsity("sparsity", sparsity)
        sparsity = float(to_python_number(sparsity))
        pattern.check_target(sparsity)
        return pattern, sparsity
    if isinstance(pattern, NM):
        return pattern, pattern.sparsity
    raise ValueError(f"{pattern} needs a sparsity: the share of weights that are zero, such as sparsity=0.5.")


def parse_word(word: str | Pattern, group: Group) -> Pattern:
    """The pattern of a word, or the pattern itself."""
    if isinstance(word, Pattern):
        return word
    if word == "unstructured":
        return Unstructured(group)
    if match := re.fullmatch(r"(\d+):(\d+)", str(word)):
        return NM(int(match[1]), int(match[2]))
    raise ValueError(
        f'mask_structure must be "unstructured" or "N:M" with N kept of every M (such as "2:4"), got {_shown(word)}.'
        + (" In YAML put quotes around it: 2:4 without them is a number in base 60." if isinstance(word, int) else "")
    )


def _shown(word: object) -> str:
    return repr(word) if isinstance(word, (str, int, float)) else f"a {type(word).__name__}"


def group_label(pattern: Pattern) -> str:
    """The name of a pattern in tables and file names: "2:4", "unstructured", "unstructured (layer)"."""
    if isinstance(pattern, NM):
        return f"{pattern.n}:{pattern.m}"
    if isinstance(pattern, Unstructured):
        return "unstructured" if pattern.group == "row" else f"unstructured ({pattern.group})"
    return describe(pattern)


def detect_pattern(nonzero_OI: Tensor) -> str:
    """The tightest pattern that the zeros of a weight follow: "1:4", "2:4", "4:8", "3:4", "unstructured" or "dense"."""
    if bool(nonzero_OI.all()):
        return "dense"
    for n, m in ((1, 4), (2, 4), (4, 8), (3, 4)):
        if nonzero_OI.shape[1] % m == 0 and int(nonzero_OI.reshape(-1, m).sum(1, dtype=torch.int32).max()) <= n:
            return f"{n}:{m}"
    return "unstructured"
