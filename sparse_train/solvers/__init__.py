"""Methods that move the weights they keep: ``Solver.solve``. One method per file."""

from sparse_train.solvers.base import Solver
from sparse_train.solvers.sparsegpt import SparseGPT

__all__ = ["Solver", "SparseGPT"]
