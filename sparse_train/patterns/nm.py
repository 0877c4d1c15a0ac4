"""``NM``: N kept of every M consecutive inputs, such as 2:4.

Shape suffixes: O out_features, I in_features.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparse_train.patterns.base import Pattern
from sparse_train.patterns.top_k import keep_highest


@dataclass(frozen=True)
class NM(Pattern):
    """N **kept** in every M consecutive inputs of one output: 2:4 for the hardware, 4:8 as also used in the papers.

    Other tools count the N **pruned** (llm-compressor, the Wanda and SparseGPT scripts); their 1:4 is 3:4 here.
    """

    n: int
    m: int

    rowwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m or self.m < 2:
            raise ValueError(
                f"N:M keeps N of every M weights, so 1 <= N <= M and M >= 2 must hold, got {self.n}:{self.m}."
            )

    @property
    def sparsity(self) -> float:
        """The share of zeros at the full pattern, 1 - N / M."""
        return 1 - self.n / self.m

    def mask(self, scores_OI: Tensor, sparsity: float) -> Tensor:
        # A schedule goes through whole kept counts (4:4, 3:4, 2:4) and never exceeds its target sparsity.
        pruned = int(sparsity * self.m + 1e-6)
        assert pruned <= self.m - self.n, (sparsity, self)
        return keep_highest(scores_OI.reshape(-1, self.m), self.m - pruned).view_as(scores_OI)

    def check_layer(self, name: str, in_features: int) -> None:
        if in_features % self.m:
            raise ValueError(
                f"{self.n}:{self.m} needs in_features divisible by {self.m}, but {name} has {in_features}. "
                f"Leave the layer dense with ignore=[{name!r}], or use another pattern."
            )

    def check_target(self, sparsity: float) -> None:
        if abs(sparsity - self.sparsity) > 1e-6:
            raise ValueError(
                f"{self.n}:{self.m} is a sparsity of {self.sparsity:g}, in conflict with {sparsity:g}. Leave sparsity "
                f'out, make {self.sparsity:g} the schedule\'s final_sparsity, or use "unstructured".'
            )
