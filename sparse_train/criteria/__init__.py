"""What a weight is worth: ``Criterion.scores``. One method per file; larger = keep."""

from sparse_train.criteria.base import Criterion
from sparse_train.criteria.magnitude import Magnitude
from sparse_train.criteria.random import Random
from sparse_train.criteria.ria import RIA
from sparse_train.criteria.wanda import Wanda, WandaCumulative

__all__ = ["RIA", "Criterion", "Magnitude", "Random", "Wanda", "WandaCumulative"]
