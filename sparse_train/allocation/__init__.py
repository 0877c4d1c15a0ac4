"""How a model-wide sparsity is divided among layers: one class per file, and ``divide``, which all callers use."""

from sparse_train.allocation.base import Allocation, LayerShape, Outliers, Shapes
from sparse_train.allocation.division import check_pattern, divide, fit_counts, scale
from sparse_train.allocation.explicit import Explicit
from sparse_train.allocation.owl import OWL, outlier_share
from sparse_train.allocation.per_block import PerBlock
from sparse_train.allocation.uniform import Uniform

__all__ = [
    "OWL",
    "Allocation",
    "Explicit",
    "LayerShape",
    "Outliers",
    "PerBlock",
    "Shapes",
    "Uniform",
    "check_pattern",
    "divide",
    "fit_counts",
    "outlier_share",
    "scale",
]
