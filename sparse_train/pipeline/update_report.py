"""What an update did: ``LayerUpdate``, and ``UpdateReport`` over all layers."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerUpdate:
    """What an update did to one layer; counts of weights."""

    size: int
    zeros: int
    """Zeros counted on the masked weights, including kept weights that happen to be zero."""
    flips: int
    """Mask entries that changed."""
    agreed_flips: int | None = None
    """Flips that each half of the window also makes alone; None if halves were not compared."""


@dataclass(frozen=True)
class UpdateReport:
    """What an update did."""

    step: int
    target_sparsity: float
    layers: Mapping[str, LayerUpdate]
    initial_flip_rate: float
    """Share of mask entries that differ from the first mask, on every 128th row, but at least four rows per layer."""
    seconds: float

    @property
    def sparsity(self) -> float:
        """Share of zeros among the targeted weights, counted on the weights."""
        return sum(layer.zeros for layer in self.layers.values()) / self._size

    @property
    def flip_rate(self) -> float:
        """Share of mask entries that this update changed; for the first mask, the share that it prunes."""
        return sum(layer.flips for layer in self.layers.values()) / self._size

    @property
    def flip_agreement(self) -> float | None:
        """Share of the flips that each half of the window also makes alone; None = not compared, or no flips."""
        agreed = [layer.agreed_flips for layer in self.layers.values() if layer.agreed_flips is not None]
        flips = sum(layer.flips for layer in self.layers.values())
        return sum(agreed) / flips if agreed and flips else None

    def metrics(self) -> dict[str, float]:
        """The metrics for loggers, by name."""
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
