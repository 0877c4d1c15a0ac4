"""Keep a language model at a target sparsity while it trains, by recomputing Wanda scores along the way.

``import sparse_train`` needs only torch; Lightning, transformers and the rest are imported when they are used.
"""

from sparse_train.allocation import OWL, Allocation, Explicit, PerBlock, Uniform
from sparse_train.criteria import RIA, Criterion, Magnitude, Random, Wanda, WandaCumulative
from sparse_train.layers.mask_lora import MaskLoRA, add_mask_lora, merge_mask_lora
from sparse_train.layers.sparse_linear import SparseLinear, sparse_layers
from sparse_train.layers.sparsify import sparsify, sparsify_like, squash
from sparse_train.oneshot import prune
from sparse_train.patterns import NM, Pattern, Unstructured
from sparse_train.pipeline.existing_zeros import keep_zeros
from sparse_train.pipeline.policies import Dormant, Fixed, MaskPolicy, StraightThrough
from sparse_train.pipeline.regrow import Regrow
from sparse_train.pipeline.schedules import Constant, Cubic, Linear, Schedule
from sparse_train.pipeline.update_report import UpdateReport
from sparse_train.pipeline.updater import MaskUpdater
from sparse_train.solvers import Solver, SparseGPT

__version__ = "0.1.0"

__all__ = [
    "NM",
    "OWL",
    "RIA",
    "Allocation",
    "Constant",
    "Criterion",
    "Cubic",
    "Dormant",
    "Explicit",
    "Fixed",
    "Linear",
    "Magnitude",
    "MaskLoRA",
    "MaskPolicy",
    "MaskUpdater",
    "Pattern",
    "PerBlock",
    "Random",
    "Regrow",
    "Schedule",
    "Solver",
    "SparseGPT",
    "SparseLinear",
    "StraightThrough",
    "Uniform",
    "Unstructured",
    "UpdateReport",
    "Wanda",
    "WandaCumulative",
    "add_mask_lora",
    "keep_zeros",
    "merge_mask_lora",
    "prune",
    "sparse_layers",
    "sparsify",
    "sparsify_like",
    "squash",
]
