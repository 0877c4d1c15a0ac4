"""One-shot pruning: one walk over decoder blocks, of a model in memory or of a checkpoint on disk."""

from sparse_train.oneshot.forwards import Batch
from sparse_train.oneshot.prune import prune, prune_checkpoint
from sparse_train.oneshot.walk import Method, OneshotReport, Plan

__all__ = ["Batch", "Method", "OneshotReport", "Plan", "prune", "prune_checkpoint"]
