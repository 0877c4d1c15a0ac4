"""Lightning callbacks: timing, logging and state. The mathematics is in ``sparse_train``."""

import importlib
import sys

if __name__ == "callbacks":
    # Imported as "callbacks" from the root of a checkout: return the real package, so that no class exists twice.
    sys.modules[__name__] = importlib.import_module("sparse_train.callbacks")
else:
    from sparse_train.callbacks.dynamic_pruning import DynamicPruning
    from sparse_train.callbacks.evaluation import Evaluation
    from sparse_train.callbacks.run_record import RunRecord

    __all__ = ["DynamicPruning", "Evaluation", "RunRecord"]
