"""Re-pruning in ``transformers.Trainer``. Imports transformers."""

from sparse_train.trainer.callback import SparseTrainerCallback

__all__ = ["SparseTrainerCallback"]
