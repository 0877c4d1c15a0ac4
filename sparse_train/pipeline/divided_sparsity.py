"""``DividedSparsity``: how a run's sparsity is divided among layers, by an ``Allocation``.

Shape suffixes: O out_features, I in_features.
"""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from sparse_train.allocation import Allocation, LayerShape, Shapes, Uniform, outlier_share, scale
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

    The allocation divides the final sparsity once. Before, layers have a part of their sparsity in proportion.

    Args:
        model: holds the layers, in decoder blocks or not.
        layers: masked layers by name.
        allocation: how sparsity is divided.
        pattern: selects within a layer.
        final: sparsity of the model at the end.

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
    ) -> None:
        self._layers, self._allocation, self._pattern, self._final = layers, allocation, pattern, final
        self._shapes = _shapes(model, layers)
        self.by_layer: dict[str, float] = {}
        """The sparsity of each layer at the final one; empty if all are equal, or before outliers are known."""
        self.come_with_first_masks = allocation.needs_outliers
        """Whether they can only be told from activations, or from masks that exist."""
        if not isinstance(allocation, Uniform) and not self.come_with_first_masks:
            self.by_layer = allocation.sparsities(self._shapes, final, {})

    def at(self, sparsity: float) -> float | dict[str, float]:
        """The sparsity of each layer when that of the model is this; one number if they are equal."""
        return self._scaled(sparsity, {})

    def after_masks(self, sparsity: float) -> float | dict[str, float]:
        """The same for the next update: no layer gets denser by rounding when the model does not."""
        if not self.by_layer:
            return sparsity
        now = self._of_masks()
        one_more = max(shape.rows for shape in self._shapes.values()) / self._size  # pruned weight in each row
        return self._scaled(sparsity, now if self._mean(now) <= sparsity + one_more else {})

    def _scaled(self, sparsity: float, least: Mapping[str, float]) -> float | dict[str, float]:
        if not self.by_layer:
            assert not self.come_with_first_masks, "outliers are not known yet"
            return sparsity
        return scale(self._shapes, self.by_layer, self._pattern, sparsity, self._final, least)

    def measure_outliers(self) -> None:
        """Divide by the outliers in the activations that are recorded, of dense layers."""
        blocks: dict[int, list[MaskedMatrix]] = {}
        for name, shape in self._shapes.items():
            if shape.block is not None:
                blocks.setdefault(shape.block, []).append(self._layers[name])
        outliers = {block: share_of_outliers(layers, self._allocation) for block, layers in blocks.items()}
        self.by_layer = self._allocation.sparsities(self._shapes, self._final, outliers)

    def read_masks(self, sparsity: float) -> None:
        """If only masks tell, take the division from those that the layers have, of a model at this sparsity.

        Raises:
            ValueError: the masks are at another sparsity.
        """
        if not self.come_with_first_masks or not sparsity:
            return
        now = self._of_masks()
        rounding = 1 / min(shape.columns for shape in self._shapes.values())  # rows prune whole counts
        if abs(self._mean(now) - sparsity) > max(_NEAR, rounding):
            raise ValueError(
                f"The masks of the model are at a sparsity of {self._mean(now):.4g}, and this run starts at "
                f"{sparsity:g}. Squash the model first to begin with new masks."
            )
        self.by_layer = {name: share * self._final / sparsity for name, share in now.items()}

    def forget_masks(self) -> None:
        """Undo ``read_masks``."""
        if self.come_with_first_masks:
            self.by_layer = {}

    def _of_masks(self) -> dict[str, float]:
        return {name: self._of_mask(layer) for name, layer in self._layers.items()}

    def _of_mask(self, layer: MaskedMatrix) -> float:
        if isinstance(self._pattern, Unstructured) and self._pattern.group == "row":
            # zeros that a model has had before pruning make some rows sparser than the pattern
            return int((~layer.unpacked_mask()).sum(1).min()) / layer.in_features
        return 1 - masks.count(layer.weight_mask) / (layer.in_features * layer.out_features)

    def _mean(self, sparsities: Mapping[str, float]) -> float:
        return sum(self._shapes[name].size * share for name, share in sparsities.items()) / self._size

    @property
    def _size(self) -> int:
        return sum(shape.size for shape in self._shapes.values())

    def in_words(self) -> str:
        """How layers differ; nothing if they do not."""
        if not self.by_layer:
            return f"divided by {describe(self._allocation)} with the first masks" if self.come_with_first_masks else ""
        return f"{min(self.by_layer.values()):.3f} to {max(self.by_layer.values()):.3f} by layer"

    def state_dict(self) -> dict[str, float]:
        return self.by_layer if self.come_with_first_masks else {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        if self.come_with_first_masks:
            self.by_layer = dict(state)


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
