"""Where zeros may be: ``Pattern.mask`` turns scores and a sparsity into a mask with exact counts; the words for it.

Shape suffixes: O out_features, I in_features.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparse_train.arguments import check_sparsity, describe, leave_out, to_python_number
from sparse_train.selection import keep_highest

Group = Literal["row", "layer", "model"]
"""Which weights an unstructured pattern compares with each other."""


class Pattern(ABC):
    """Selects within groups of weights that are compared with each other."""

    model_wide: ClassVar[bool] = False
    """Whether the group is the whole model; ``mask`` then gets the scores of all layers as one row."""
    rowwise: ClassVar[bool] = False
    """Whether groups lie within rows, so that each process can select in the rows that it holds (FSDP2)."""

    @abstractmethod
    def mask(self, scores_OI: Tensor, sparsity: float) -> Tensor:
        """Bool mask (O, I), True = kept, from float32 scores that are finite (or -inf: pruned first).

        Every group keeps exactly its count; among equal scores the lower index is pruned first.
        """

    def check_layer(self, name: str, in_features: int) -> None:
        """Raise ValueError if a layer with this many inputs cannot have the pattern."""

    def check_target(self, sparsity: float) -> None:
        """Raise ValueError if this final sparsity contradicts the pattern."""


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
            raise ValueError(f"N:M keeps N of every M weights: 1 <= N <= M and M >= 2, got {self.n}:{self.m}.")

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
                f"{self.n}:{self.m} needs in_features divisible by {self.m}, but {name} has {in_features}. Use another "
                f"pattern, or leave such layers dense. {leave_out([name])}"
            )

    def check_target(self, sparsity: float) -> None:
        if abs(sparsity - self.sparsity) > 1e-6:
            raise ValueError(
                f"{self.n}:{self.m} is a sparsity of {self.sparsity:g}, in conflict with {sparsity:g}. Leave sparsity "
                f'out, make {self.sparsity:g} the schedule\'s final_sparsity, or use "unstructured".'
            )


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Zeros anywhere, ``int(n * sparsity)`` of n: in each ``row`` (Wanda's group), each ``layer``, or the ``model``.

    As in the Wanda reference, the product is that of floats: of 100, a sparsity of 0.29 prunes 28.
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


def sparsity_for(count: int, members: int) -> float:
    """The sparsity at which exactly ``count`` of a group are pruned: half a weight more, which ``int`` drops again."""
    return min((count + 0.5) / members, 1.0) if count else 0.0


def parse_pattern(mask_structure: str | Pattern, sparsity: float | None, group: Group = "row") -> tuple[Pattern, float]:
    """The pattern and its final sparsity from what users write.

    Args:
        mask_structure: "unstructured", "N:M" with N **kept** (as in "2:4"), or a ``Pattern``.
        sparsity: share of zeros; required for unstructured patterns, implied by N:M.
        group: the group in which "unstructured" compares weights.
    """
    pattern = parse_word(mask_structure, group)
    if sparsity is not None:
        check_sparsity("sparsity", sparsity)
        sparsity = float(to_python_number(sparsity))
        pattern.check_target(sparsity)
        return pattern, sparsity
    if isinstance(pattern, NM):
        return pattern, pattern.sparsity
    raise ValueError(f"{pattern} needs a sparsity: the share of weights that are zero, such as sparsity=0.5.")


def parse_word(word: str | Pattern, group: Group) -> Pattern:
    if isinstance(word, Pattern):
        return word
    if word == "unstructured":
        return Unstructured(group)
    if match := re.fullmatch(r"(\d+):(\d+)", str(word)):
        return NM(int(match[1]), int(match[2]))
    shown = repr(word) if isinstance(word, (str, int, float)) else f"a {type(word).__name__}"
    raise ValueError(
        f'mask_structure must be "unstructured" or "N:M" with N kept of every M (such as "2:4"), got {shown}.'
        + (" In YAML put quotes around it: 2:4 without them is a number in base 60." if isinstance(word, int) else "")
    )


def group_label(pattern: Pattern) -> str:
    """The name of a pattern in tables and file names: "2:4", "unstructured", "unstructured (layer)"."""
    if isinstance(pattern, NM):
        return f"{pattern.n}:{pattern.m}"
    if isinstance(pattern, Unstructured):
        return "unstructured" if pattern.group == "row" else f"unstructured ({pattern.group})"
    return describe(pattern)


PRUNED = 0.15
"""A matrix, or a model, with a larger share of zeros was pruned. Dense ones that were rounded to 4 bits have up to 0.12
(GGUF's Q4_0)."""


def detect_pattern(nonzero_OI: Tensor) -> str:
    """The tightest common pattern that the zeros of a weight follow, such as "2:4"; or "unstructured", or "dense"."""
    if bool(nonzero_OI.all()):
        return "dense"
    for n, m in ((1, 4), (2, 4), (4, 8), (8, 16), (3, 4)):
        if nonzero_OI.shape[1] % m == 0 and int(nonzero_OI.reshape(-1, m).sum(1, dtype=torch.int32).max()) <= n:
            return f"{n}:{m}"
    return "unstructured"
