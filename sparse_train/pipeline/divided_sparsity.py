"""``DividedSparsity``: how a run's sparsity is divided among layers, by an ``Allocation``.

Shape suffixes: O out_features, I in_features.
"""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from sparse_train.allocation import Allocation, LayerShape, Outliers, Shapes, Uniform, outlier_share, scale
from sparse_train.criteria import Criterion, Wanda
from sparse_train.description import describe
from sparse_train.layers import masks, sharding
from sparse_train.layers.blocks import block_lists
from sparse_train.layers.matrices import MaskedMatrix
from sparse_train.patterns import Pattern, Unstructured
from sparse_train.statistics.activations import ActivationNorm

_NEAR = 5e-3  # by how much the zeros of a model that was pruned before may miss a sparsity


def check_outliers(allocation: Allocation, criterion: Criterion) -> None:
    """Raise ValueError if an allocation needs activations, and none are recorded."""
    if allocation.needs_outliers and not criterion.needs_activations:
        raise ValueError(
            f"{allocation} reads activations, and {criterion} does not, so that none are recorded. Use Wanda(), or an "
            "allocation by name, Explicit or PerBlock."
        )


class DividedSparsity:
    """The sparsity of each layer, at every sparsity of the model.

    The allocation divides the final sparsity, once; on the way to it, layers have theirs in proportion. If it needs
    outliers, they are given, or measured when the first masks are made (``measure_outliers``). A model that has masks
    already keeps the division that they have (``read_masks``), and a resumed run that of its checkpoint.

    Args:
        model: holds the layers, in decoder blocks or not.
        layers: masked layers by name.
        allocation: how sparsity is divided.
        pattern: selects within a layer.
        final: sparsity of the model at the end.
        outliers: ``outlier_share`` of each block of the dense model, if known.

    Raises:
        ValueError: what the allocation refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, MaskedMatrix],
        allocation: Allocation,
        pattern: Pattern,
        final: float,
        outliers: Outliers | None = None,
    ) -> None:
        self._layers, self._allocation, self._pattern, self._final = layers, allocation, pattern, final
        self._shapes = _shapes(model, layers)
        self.final_shares: dict[str, float] | None = None
        """The sparsity of each layer at the end; None if all are equal, or not known before the first masks."""
        self._uniform = isinstance(allocation, Uniform)
        if self._uniform:
            return
        if outliers is not None or not allocation.needs_outliers:
            self.final_shares = allocation.sparsities(self._shapes, final, outliers or {})
        elif all(shape.block is None for shape in self._shapes.values()):
            allocation.sparsities(self._shapes, final, {})  # which has no outliers then, and says so

    @property
    def known(self) -> bool:
        """False if the division has to wait for outliers, or for masks."""
        return self._uniform or self.final_shares is not None

    def at(self, sparsity: float) -> float | dict[str, float]:
        """The sparsity of each layer when that of the model is this; one number if they are equal."""
        return self._scaled(sparsity, {})

    def for_next_update(self, sparsity: float) -> float | dict[str, float]:
        """The same for an update: no layer gets denser by rounding while the model does not."""
        if self._uniform or not sparsity:
            return sparsity
        now = self._shares_of_masks()
        rounding = max(shape.rows for shape in self._shapes.values()) / self._size  # one weight more in each row
        return self._scaled(sparsity, now if self._mean(now) <= sparsity + rounding else {})

    def _scaled(self, sparsity: float, least: Mapping[str, float]) -> float | dict[str, float]:
        if self._uniform or not sparsity:
            return sparsity
        assert self.final_shares is not None, "the division is not known yet"
        return scale(self._shapes, self.final_shares, self._pattern, sparsity, self._final, least)

    def measure_outliers(self) -> None:
        """Divide by the outliers in the activations that are recorded, of dense layers."""
        blocks: dict[int, list[MaskedMatrix]] = {}
        for name, shape in self._shapes.items():
            if shape.block is not None:
                blocks.setdefault(shape.block, []).append(self._layers[name])
        outliers = {block: share_of_outliers(layers, self._allocation) for block, layers in blocks.items()}
        self.final_shares = self._allocation.sparsities(self._shapes, self._final, outliers)

    def read_masks(self, sparsity: float) -> None:
        """If the division is not known, take it from the masks that the layers have, of a model at this sparsity.

        Raises:
            ValueError: the masks are at another sparsity, or the division cannot be kept up to the final one.
        """
        if self.known or not sparsity:
            return
        now = self._shares_of_masks()
        rounding = 1 / min(shape.columns for shape in self._shapes.values())  # rows prune whole counts
        if abs(self._mean(now) - sparsity) > max(_NEAR, rounding):
            raise ValueError(
                f"The masks of the model are at a sparsity of {self._mean(now):.4g}, and this run starts at "
                f"{sparsity:g}. Squash the model first to begin with new masks."
            )
        if self._final != sparsity:
            now = {name: share * self._final / sparsity for name, share in now.items()}
        highest = max(now, key=lambda name: now[name])
        if now[highest] >= 1:
            raise ValueError(
                f"The masks of the model, at a sparsity of {sparsity:g}, are divided so that {highest} would need one "
                f"of {now[highest]:.4g} at {self._final:g}, and it must be below 1. Give MaskUpdater the outliers "
                "(OneshotReport.outliers), or start at the final sparsity."
            )
        self.final_shares = now

    def forget_masks(self) -> None:
        """Undo ``read_masks``."""
        if self._allocation.needs_outliers:
            self.final_shares = None

    def _shares_of_masks(self) -> dict[str, float]:
        return {name: self._share_of_mask(layer) for name, layer in self._layers.items()}

    def _share_of_mask(self, layer: MaskedMatrix) -> float:
        if isinstance(self._pattern, Unstructured) and self._pattern.group == "row":
            # zeros that a model has had before pruning make some rows sparser than the pattern
            return int((~layer.unpacked_mask()).sum(1).min()) / layer.in_features
        size = layer.in_features * layer.out_features
        pruned = size - masks.count(layer.weight_mask)
        # a user-defined pattern may round down; half a weight more keeps it from losing one to float rounding
        return pruned / size if isinstance(self._pattern, Unstructured) or not pruned else (pruned + 0.5) / size

    def _mean(self, shares: Mapping[str, float]) -> float:
        return sum(self._shapes[name].size * share for name, share in shares.items()) / self._size

    @property
    def _size(self) -> int:
        return sum(shape.size for shape in self._shapes.values())

    def in_words(self) -> str:
        """How layers differ; nothing if they do not."""
        if self._uniform:
            return ""
        if self.final_shares is None:
            return f"divided by {describe(self._allocation)} with the first masks"
        return f"{min(self.final_shares.values()):.3f} to {max(self.final_shares.values()):.3f} by layer"

    def state_dict(self) -> dict[str, float] | None:
        return self.final_shares if self._allocation.needs_outliers else None  # otherwise it follows from the settings

    def load_state_dict(self, state: Mapping[str, float] | None) -> None:
        if state is not None:
            self.final_shares = dict(state)


def _shapes(model: nn.Module, layers: Mapping[str, MaskedMatrix]) -> Shapes:
    """Size and decoder block of each layer."""
    candidates = [
        {id(module): index for index, block in enumerate(blocks) for module in block.modules()}
        for blocks in block_lists(model).values()
    ]
    block_of = max(candidates, key=lambda found: sum(id(layer) in found for layer in layers.values()), default={})
    return {n: LayerShape(block_of.get(id(m)), m.out_features, m.in_features) for n, m in layers.items()}


def share_of_outliers(layers: Iterable[MaskedMatrix], allocation: Allocation) -> float:
    """``outlier_share`` of the Wanda scores of one block's layers, which have norms of their inputs."""

    def scores_of(layer: MaskedMatrix) -> Callable[[], Tensor]:
        def scores_OI() -> Tensor:
            assert isinstance(layer.statistics, ActivationNorm)
            with sharding.weights(layer, by_rows=False) as (weight_OI, _):
                return Wanda().scores(weight_OI, layer.statistics)

        return scores_OI

    return outlier_share([scores_of(layer) for layer in layers], allocation.owl_m)  # type: ignore[attr-defined]
