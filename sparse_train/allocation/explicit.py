"""Sparsities by name."""

import re
from dataclasses import dataclass

from sparse_train.allocation.base import Allocation, Outliers, Shapes, check_agreement, mean_sparsity
from sparse_train.arguments import check_sparsity
from sparse_train.suggestions import did_you_mean


@dataclass(frozen=True)
class Explicit(Allocation):
    """Sparsities by name; layers that are not named share what is left of the model-wide sparsity.

    Args:
        layers: sparsity by target: a layer's full name, the name of a module around it ("model.layers.0"), the last
            part or parts of its name ("down_proj", "mlp.down_proj"), or "re:" and a regular expression matched from
            the start of the name.
    """

    layers: dict[str, float]

    def __post_init__(self) -> None:
        for target, value in self.layers.items():
            check_sparsity(f"The sparsity of {target!r}", value)

    def sparsities(self, shapes: Shapes, sparsity: float | None, outliers: Outliers) -> dict[str, float]:
        named = self._named(shapes)
        unnamed = [name for name in shapes if name not in named]
        if not unnamed:
            check_agreement("the layers", sparsity, mean_sparsity(shapes, named))
            return {name: named[name] for name in shapes}
        if sparsity is None:
            raise ValueError(
                f"{len(unnamed)} of {len(shapes)} layers are not given a sparsity ({unnamed[0]} is the first), so "
                "the model-wide sparsity is needed: give it, or name every layer."
            )
        check_sparsity("sparsity", sparsity)
        total = sum(shape.size for shape in shapes.values())
        share = sum(shapes[name].size * value for name, value in named.items()) / total
        rest = (sparsity - share) * total / sum(shapes[name].size for name in unnamed)
        if not -1e-12 <= rest < 1:
            raise ValueError(
                f"A sparsity of {sparsity:g} cannot be met: the named layers' zeros are {share:.4g} of all weights, so "
                f"the other {len(unnamed)} layers would need a sparsity of {rest:.4g} (at least 0 and below 1). Change "
                "the sparsity or those of the named layers."
            )
        return {name: named.get(name, max(0.0, rest)) for name in shapes}

    def _named(self, shapes: Shapes) -> dict[str, float]:
        said_by: dict[str, str] = {}
        for target, value in self.layers.items():
            hits = [name for name in shapes if _names(target, name)]
            if not hits:
                parts = {tail for name in shapes for tail in _heads_and_tails(name)}
                raise ValueError(
                    f"{target!r} is not the name of a targeted layer." + did_you_mean(target, sorted(parts))
                )
            for name in hits:
                other = said_by.setdefault(name, target)
                if self.layers[other] != value:
                    raise ValueError(
                        f"{name} is given two sparsities: {self.layers[other]:g} by {other!r} and {value:g} by "
                        f"{target!r}. Narrow one of them, for example to the full name or with re:."
                    )
        return {name: self.layers[target] for name, target in said_by.items()}


def _names(target: str, name: str) -> bool:
    if target.startswith("re:"):
        try:
            return re.match(target[3:], name) is not None
        except re.error as error:
            raise ValueError(f"{target!r} is not a regular expression: {error}.") from error
    return target in _heads_and_tails(name)


def _heads_and_tails(name: str) -> list[str]:
    """The names that match a layer: its full name, and for each dot in it the part before and the part after."""
    parts = name.partition("[")[0].split(".")  # the number of a fused expert is not part of its layer's name
    cuts = range(1, len(parts))
    return [name, ".".join(parts), *(".".join(parts[:i]) for i in cuts), *(".".join(parts[i:]) for i in cuts)]
