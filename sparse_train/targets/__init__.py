"""Which layers are pruned."""

from sparse_train.targets.selection import Selection, select

__all__ = ["Selection", "select"]
