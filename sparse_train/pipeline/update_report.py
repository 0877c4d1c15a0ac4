"""What an update did: ``LayerUpdate``, and ``UpdateReport`` over all layers."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerUpdate:
    """What an update did to one layer; counts of weights."""

    size: int
    zeros: int
    """Counted on the masked weights, so kept weights that happen to be zero are in it."""
    flips: int
    """Mask entries that changed."""
    agreed_flips: int | None = None
    """Those of them that either half of the window makes by itself; None where they were not compared."""


@dataclass(frozen=True)
class UpdateReport:
    """What an update did."""

    step: int
    target_sparsity: float
    layers: Mapping[str, LayerUpdate]
    initial_flip_rate: float
    """Share of mask entries that differ from the first mask, measured on every 128th row, four of a layer at least."""
    seconds: float

    @property
    def sparsity(self) -> float:
        """Share of zeros among the targeted weights, counted on the weights."""
        return sum(layer.zeros for layer in self.layers.values()) / self._size

    @property
    def flip_rate(self) -> float:
        """Share of mask entries that this update changed; of the first mask, the share it prunes."""
        return sum(layer.flips for layer in self.layers.values()) / self._size

    @property
    def flip_agreement(self) -> float | None:
        """Share of the flips that either half of the window makes by itself; None: not compared, or no flips."""
        agreed = [layer.agreed_flips for layer in self.layers.values() if layer.agreed_flips is not None]
        flips = sum(layer.flips for layer in self.layers.values())
        return sum(agreed) / flips if agreed and flips else None

    def metrics(self) -> dict[str, float]:
        """What loggers get, under the names that they show."""
        metrics = {
            "sparsity/target": self.target_sparsity,
            "sparsity/actual": self.sparsity,
            "sparsity/flip_rate": self.flip_rate,
            "sparsity/initial_flip_rate": self.initial_flip_rate,
            "sparsity/update_seconds": self.seconds,
        }
        if self.flip_agreement is not None:
            metrics["sparsity/flip_agreement"] = self.flip_agreement
        return metrics

    @property
    def _size(self) -> int:
        return sum(layer.size for layer in self.layers.values())
