"""Keep a language model at a target sparsity while it trains, by recomputing Wanda scores along the way.

Names of this module are imported when they are first used, so that ``import sparse_train`` and ``sparse-train --help``
take no time. That needs only torch and numpy; Lightning, transformers and the rest are imported where they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_train.criteria import RIA, Criterion, LayerContext, Magnitude, Wanda, WandaCumulative
    from sparse_train.distributions import OWL, Explicit, SparsityDistribution, Uniform
    from sparse_train.inspection import summary
    from sparse_train.layers.mask_lora import MaskLoRA, add_mask_lora, merge_mask_lora
    from sparse_train.layers.masked_layer import SparseLinear, sparse_layers
    from sparse_train.layers.sparsify import sparsify, sparsify_like, squash
    from sparse_train.models.checkpoints import load_from_checkpoint
    from sparse_train.oneshot.permutation import permute
    from sparse_train.oneshot.prune import prune
    from sparse_train.patterns import NM, Pattern, Unstructured
    from sparse_train.policies import Dormant, Fixed, MaskPolicy, Regrow, StraightThrough
    from sparse_train.pruning.config import FirstMask, FirstWindow, FromZeros, OneShot, PruningConfig
    from sparse_train.pruning.counts import UpdateReport
    from sparse_train.pruning.updater import MaskUpdater
    from sparse_train.pruning.zeros import keep_zeros
    from sparse_train.schedules import Constant, Cubic, Linear, Schedule
    from sparse_train.solvers import IHT, Solver, SparseGPT

__version__ = "0.1.0"

__all__ = [
    "IHT",
    "NM",
    "OWL",
    "RIA",
    "Constant",
    "Criterion",
    "Cubic",
    "Dormant",
    "Explicit",
    "FirstMask",
    "FirstWindow",
    "Fixed",
    "FromZeros",
    "LayerContext",
    "Linear",
    "Magnitude",
    "MaskLoRA",
    "MaskPolicy",
    "MaskUpdater",
    "OneShot",
    "Pattern",
    "PruningConfig",
    "Regrow",
    "Schedule",
    "Solver",
    "SparseGPT",
    "SparseLinear",
    "SparsityDistribution",
    "StraightThrough",
    "Uniform",
    "Unstructured",
    "UpdateReport",
    "Wanda",
    "WandaCumulative",
    "add_mask_lora",
    "keep_zeros",
    "load_from_checkpoint",
    "merge_mask_lora",
    "permute",
    "prune",
    "sparse_layers",
    "sparsify",
    "sparsify_like",
    "squash",
    "summary",
]

if not TYPE_CHECKING:  # type checkers read the imports above
    _MODULES = (
        "criteria",
        "distributions",
        "inspection",
        "layers.mask_lora",
        "layers.masked_layer",
        "layers.sparsify",
        "models.checkpoints",
        "oneshot.permutation",
        "oneshot.prune",
        "patterns",
        "policies",
        "pruning.config",
        "pruning.counts",
        "pruning.updater",
        "pruning.zeros",
        "schedules",
        "solvers",
    )

    def __getattr__(name: str) -> Any:
        """The object of a public name, from the first module that has it."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        modules = (vars(import_module(f"{__name__}.{module}")) for module in _MODULES)
        globals()[name] = value = next(names[name] for names in modules if name in names)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
