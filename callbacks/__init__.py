"""Lightning callbacks: timing, logging and state; the mathematics is in ``sparse_train``."""

import importlib
import sys

if __name__ == "callbacks":
    # Imported bare from the root of a checkout: hand out the real package, so that there is one class and not two.
    sys.modules[__name__] = importlib.import_module("sparse_train.callbacks")
else:
    from sparse_train.callbacks.dynamic_pruning import DynamicPruning
    from sparse_train.callbacks.evaluation import Evaluation
    from sparse_train.callbacks.run_history import RunHistory

    __all__ = ["DynamicPruning", "Evaluation", "RunHistory"]
