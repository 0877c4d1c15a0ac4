"""From sparsities to whole counts that meet the model-wide sparsity."""

from collections.abc import Mapping
from types import MappingProxyType

from sparse_train.allocation.base import Allocation, Outliers, Shapes, mean_sparsity
from sparse_train.allocation.uniform import Uniform
from sparse_train.patterns import NM, Pattern, Unstructured

_ROUNDING = 1e-6  # of a count: differences below this are float rounding


def divide(
    allocation: Allocation,
    pattern: Pattern,
    shapes: Shapes,
    sparsity: float | None,
    outliers: Outliers,
    final: float | None = None,
) -> dict[str, float]:
    """The sparsity to pass to ``pattern.mask`` for each layer; arguments and errors as in ``Allocation.sparsities``.

    Uniform sparsities stay unchanged: rows prune ``int(I * sparsity)``, as in the Wanda reference. Others are rounded
    so that the sparsity over all weights is met, see ``fit_counts``.

    Args:
        final: for masks on the way to this sparsity: it is what the allocation divides, see ``scale``.
    """
    check_pattern(allocation, pattern)
    if isinstance(allocation, Uniform):
        return allocation.sparsities(shapes, sparsity, outliers)
    if final is not None and sparsity is not None:
        return scale(shapes, allocation.sparsities(shapes, final, outliers), pattern, sparsity, final)
    found = allocation.sparsities(shapes, sparsity, outliers)
    return fit_counts(shapes, found, pattern, mean_sparsity(shapes, found) if sparsity is None else sparsity)


def scale(
    shapes: Shapes,
    sparsities: Mapping[str, float],
    pattern: Pattern,
    sparsity: float,
    final: float,
    least: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, float]:
    """Layers' sparsities when the model is at ``sparsity``, in proportion to those at ``final``; then ``fit_counts``.

    An allocation that is asked for each sparsity on the way might not be able to divide it: the range of OWL is fixed,
    so its densest block would need a sparsity below zero.
    """
    if sparsity > final:
        raise ValueError(f"The final sparsity, {final:g}, is what is divided: {sparsity:g} must not be above it.")
    if not final:
        return dict.fromkeys(sparsities, 0.0)
    scaled = sparsities if sparsity == final else {name: value * sparsity / final for name, value in sparsities.items()}
    return fit_counts(shapes, scaled, pattern, sparsity, least)


def check_pattern(allocation: Allocation, pattern: Pattern) -> None:
    """Raise ValueError if the pattern leaves an allocation nothing to divide."""
    if isinstance(allocation, Uniform) or not (pattern.model_wide or isinstance(pattern, NM)):
        return
    if isinstance(pattern, NM):
        reason = f"{pattern.n}:{pattern.m} has one sparsity, {pattern.sparsity:g}, in every layer"
    else:
        reason = f"{pattern} compares over the whole model, so it already divides the sparsity"
    raise ValueError(
        f"{reason}: {type(allocation).__name__} cannot change that. Use Unstructured() or "
        'Unstructured(group="layer"), or the allocation Uniform().'
    )


def fit_counts(
    shapes: Shapes,
    sparsities: Mapping[str, float],
    pattern: Pattern,
    sparsity: float,
    least: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, float]:
    """Round sparsities to whole counts so that the zeros of all layers are as near to ``sparsity`` as counts allow.

    Rounding down in every group, as patterns do, would miss the model-wide sparsity by up to one weight per row. So
    each layer prunes, in all its rows, either the count below its sparsity or the one above; layers that lose most by
    rounding down are rounded up first. A layer whose sparsity is a whole count keeps it, as does one at 0.

    Args:
        least: sparsities that layers must not fall below.

    Returns:
        ``(count + 0.5) / members``, for which ``int(members * that)`` is always the count. A user-defined pattern
        rounds by its own rules, and gets the sparsities unchanged.
    """
    if not isinstance(pattern, Unstructured) or pattern.model_wide:
        return dict(sparsities)
    members: dict[str, int] = {}  # weights per group
    steps: dict[str, int] = {}  # weights of the layer that are pruned by one more in each group
    counts: dict[str, int] = {}
    remainders: dict[str, float] = {}  # for layers that can be rounded up
    for name, shape in shapes.items():
        members[name], steps[name] = (shape.columns, shape.rows) if pattern.group == "row" else (shape.size, 1)
        exact = members[name] * sparsities[name]
        counts[name] = min(int(exact + _ROUNDING), members[name] - 1)
        lowest = int(members[name] * least.get(name, 0.0) + _ROUNDING)
        if lowest > counts[name]:
            counts[name] = lowest
        elif exact - counts[name] > _ROUNDING and counts[name] + 1 < members[name]:
            remainders[name] = exact - counts[name]
    missing = sparsity * sum(shape.size for shape in shapes.values())
    missing -= sum(counts[name] * steps[name] for name in shapes)

    raised: set[str] = set()
    order = sorted(remainders, key=lambda name: -remainders[name])
    for name in order:
        if abs(missing - steps[name]) < abs(missing):
            raised.add(name)
            missing -= steps[name]
    while order:  # until changing no single layer comes nearer
        change, name = min(
            ((-steps[n] if n in raised else steps[n], n) for n in order), key=lambda c: abs(missing - c[0])
        )
        if abs(missing - change) >= abs(missing):
            break
        raised ^= {name}
        missing -= change
    counts |= {name: counts[name] + 1 for name in raised}
    return {name: (count + 0.5) / members[name] if count else 0.0 for name, count in counts.items()}
