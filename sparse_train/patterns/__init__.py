"""Where zeros may be: ``Pattern.mask``. One pattern per file, and the words that users write for them."""

from sparse_train.patterns.base import Pattern
from sparse_train.patterns.nm import NM
from sparse_train.patterns.unstructured import Group, Unstructured
from sparse_train.patterns.words import detect_pattern, group_label, parse_pattern, parse_word

__all__ = [
    "NM",
    "Group",
    "Pattern",
    "Unstructured",
    "detect_pattern",
    "group_label",
    "parse_pattern",
    "parse_word",
]
