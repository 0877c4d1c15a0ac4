"""``Unstructured``: zeros anywhere, compared within a row, a layer or the model.

Shape suffixes: O out_features, I in_features.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparse_train.patterns.base import Pattern
from sparse_train.patterns.top_k import keep_highest

Group = Literal["row", "layer", "model"]
"""Which weights an unstructured pattern compares with each other."""


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Zeros anywhere, compared within each output ``row`` (Wanda's group), the ``layer`` or the whole ``model``.

    Prunes ``int(n * sparsity)`` of a group of n, as the Wanda reference does in its rows.
    """

    group: Group = "row"

    @property
    def model_wide(self) -> bool:  # type: ignore[override]
        return self.group == "model"

    @property
    def rowwise(self) -> bool:  # type: ignore[override]
        return self.group == "row"

    def mask(self, scores_OI: Tensor, sparsity: float) -> Tensor:
        grouped = scores_OI if self.group == "row" else scores_OI.reshape(1, -1)
        members = grouped.shape[1]
        return keep_highest(grouped, members - int(members * sparsity)).view_as(scores_OI)
