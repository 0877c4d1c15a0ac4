"""One-shot pruning: ``prune`` leaves true zeros; its core, ``set_initial_masks``, also makes masks for training."""

from sparse_train.oneshot.engine import Method
from sparse_train.oneshot.forwards import Batch
from sparse_train.oneshot.pruning import OneshotReport, prune, resolve, set_initial_masks

__all__ = ["Batch", "Method", "OneshotReport", "prune", "resolve", "set_initial_masks"]
