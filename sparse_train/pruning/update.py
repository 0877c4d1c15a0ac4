"""One update, scores -> masks, over all layers: ``update_masks``, for one-shot pruning, trainers and plain loops.

First all new masks are chosen, then all are replaced, so that an error leaves every mask unchanged, on every rank.

Shape suffixes: O out_features, I in_features, J packed mask bytes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparse_train.blocks import blocks_of
from sparse_train.criteria import Criterion, LayerContext, Wanda
from sparse_train.distributed.collectives import gather_bytes, rank, sum_over_ranks
from sparse_train.distributed.fsdp2 import rows_of
from sparse_train.distributions import LayerShape, Shapes, SparsityDistribution, outlier_share
from sparse_train.layers import masks
from sparse_train.layers.masked_layer import MaskedLayer, MaskedMatrix
from sparse_train.patterns import Pattern, Unstructured
from sparse_train.policies import MaskPolicy, Optimizers, StraightThrough
from sparse_train.pruning.recording import check_statistics


@dataclass(frozen=True)
class LayerUpdate:
    """What an update did to one layer; counts of weights."""

    size: int
    zeros: int
    """Zeros counted on the masked weights, including kept weights that happen to be zero."""
    flips: int
    """Mask entries that changed."""


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
        return sparsity_of(self.layers)

    @property
    def flip_rate(self) -> float:
        """Share of mask entries that this update changed; for the first mask, the share that it prunes."""
        return sum(layer.flips for layer in self.layers.values()) / sum(layer.size for layer in self.layers.values())

    def metrics(self) -> dict[str, float]:
        """The metrics for loggers, by name."""
        return {
            "sparsity/target": self.target_sparsity,
            "sparsity/actual": self.sparsity,
            "sparsity/flip_rate": self.flip_rate,
            "sparsity/initial_flip_rate": self.initial_flip_rate,
            "sparsity/update_seconds": self.seconds,
        }

    def layer_metrics(self) -> dict[str, float]:
        """The metrics of each layer, by name."""
        found = {f"layers/sparsity/{name}": layer.zeros / layer.size for name, layer in self.layers.items()}
        return found | {f"layers/flip_rate/{name}": layer.flips / layer.size for name, layer in self.layers.items()}


def sparsity_of(layers: Mapping[str, LayerUpdate]) -> float:
    """Share of zeros over all weights of these layers."""
    return sum(layer.zeros for layer in layers.values()) / sum(layer.size for layer in layers.values())


@dataclass(frozen=True)
class Rules:
    """What decides the masks of one update.

    Attributes:
        criterion: gives the scores, in float32, from kept and shadow values.
        pattern: selects, over one layer at a time or over all of them.
        sparsity: target over each group; a mapping by layer if layers differ.
        policy: how pruned weights come back, if they do; by default, by their score.
        optimizers: of the run.
    """

    criterion: Criterion
    pattern: Pattern
    sparsity: float | Mapping[str, float]
    policy: MaskPolicy = field(default_factory=StraightThrough)
    optimizers: Optimizers = field(default_factory=Optimizers)


@dataclass
class _Choice:
    """A new mask, before anything is changed."""

    parts: list[Tensor]
    """The packed mask, one part per process that has selected rows."""
    nonzero: int
    """Number of kept weights that are not zero."""
    finite: bool

    @property
    def keep_OJ(self) -> Tensor:
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)


@torch.no_grad()
def update_masks(layers: Mapping[str, MaskedMatrix], rules: Rules) -> dict[str, LayerUpdate]:
    """Score every layer and replace its mask; all processes must call, and all get the same masks.

    Args:
        layers: masked layers by name; with ``statistics`` if the criterion needs them.
        rules: how masks are chosen.

    Raises:
        ValueError: a layer without activations, or with non-finite activations or weights.
    """
    if rules.criterion.needs_activations:
        check_statistics(layers)
    chosen = (_choose_model_wide if rules.pattern.model_wide else _choose_by_layer)(layers, rules)
    for name, choice in chosen.items():
        if not choice.finite:
            raise ValueError(
                f"{name}: scores are not finite, because a weight is infinite or NaN, or too large for its "
                "activations; masks were not changed. Lower the learning rate, or find out where the weight got its "
                "value."
            )
    return {name: replace_mask(layer, chosen[name].keep_OJ, chosen[name].nonzero) for name, layer in layers.items()}


def replace_mask(layer: MaskedMatrix, packed_OJ: Tensor, nonzero: int) -> LayerUpdate:
    """Replace a mask by a packed one under which ``nonzero`` weights are not zero."""
    flips = masks.count_differing(layer.weight_mask, packed_OJ)
    layer.weight_mask.copy_(packed_OJ)
    return LayerUpdate(layer.size, layer.size - nonzero, flips)


# --- scores -> masks -------------------------------------------------------------------------------------------------


def _choose_by_layer(layers: Mapping[str, MaskedMatrix], rules: Rules) -> dict[str, _Choice]:
    by_rows = rules.criterion.rowwise and rules.pattern.rowwise
    sharded = {name: layer for name, layer in layers.items() if by_rows and layer.has_rows}
    sums = _column_sums(sharded, rules.criterion)
    chosen = {}
    for name, layer in layers.items():
        own = rules.sparsity[name] if isinstance(rules.sparsity, Mapping) else rules.sparsity
        with layer.read(by_rows) as (weight_OI, rows):
            scores_OI, nonzero_OJ, finite = _score(name, layer, weight_OI, rows, rules, sums.get(name), name in sharded)
        keep_OJ = nonzero_OJ
        if finite:
            keep_OJ = masks.pack(rules.policy.select(scores_OI, [name], rules.pattern, own))
        chosen[name] = _Choice([keep_OJ], masks.count(keep_OJ & nonzero_OJ), finite)
    _gather_rows(chosen, sharded)
    return chosen


def _choose_model_wide(layers: Mapping[str, MaskedMatrix], rules: Rules) -> dict[str, _Choice]:
    assert isinstance(rules.sparsity, float), "one group has one sparsity"
    chosen, scores = {}, []
    for name, layer in layers.items():
        with layer.read() as (weight_OI, rows):
            scores_OI, nonzero_OJ, finite = _score(name, layer, weight_OI, rows, rules)
        scores.append(scores_OI)
        chosen[name] = _Choice([nonzero_OJ], 0, finite)
    if all(choice.finite for choice in chosen.values()):
        as_row = torch.cat([score.reshape(1, -1) for score in scores], dim=1)
        keep = rules.policy.select(as_row, layers, rules.pattern, rules.sparsity)
        parts = keep.split([score.numel() for score in scores], dim=1)
        for choice, score, part in zip(chosen.values(), scores, parts, strict=True):
            keep_OJ = masks.pack(part.view_as(score))
            choice.nonzero, choice.parts = masks.count(keep_OJ & choice.keep_OJ), [keep_OJ]
    return chosen


def _score(
    name: str,
    layer: MaskedMatrix,
    weight_OI: Tensor,
    rows: slice,
    rules: Rules,
    column_sums_I: Tensor | None = None,
    by_rows: bool = False,
) -> tuple[Tensor, Tensor, bool]:
    """Scores of these rows for selection; which weights would not be zero if kept, packed; if scores are finite."""
    stats = layer.statistics if rules.criterion.needs_activations else None
    state = rules.optimizers.state_of(layer, by_rows) if isinstance(layer, MaskedLayer) else {}
    context = LayerContext(weight_OI, stats, name, layer.weight_mask[rows], state, column_sums_I)
    scores_OI = rules.criterion.scores(context).float()
    if scores_OI.shape != weight_OI.shape:
        raise ValueError(
            f"{rules.criterion} gave scores of shape {tuple(scores_OI.shape)} for a weight of shape "
            f"{tuple(weight_OI.shape)}: a criterion returns a score for each weight (Criterion.scores)."
        )
    # if the sum is finite, all scores are, and it is ten times faster to check; it may overflow with finite scores
    finite = bool(scores_OI.sum().isfinite()) or bool(scores_OI.isfinite().all())
    if stats is not None and bool((stats.sum_squares_I == 0).any()):
        # A feature that is always zero makes its scores 0. Weights that are already zero are then pruned first, so that
        # pruning twice gives the same result as pruning once.
        scores_OI = scores_OI.masked_fill(weight_OI == 0, -torch.inf)
    scores_OI = rules.policy.scores(scores_OI, context)
    nonzero_OI = weight_OI != 0
    if rules.policy.regrowth == "from zero":
        nonzero_OI &= context.keep_OI
    return scores_OI, masks.pack(nonzero_OI), finite


# --- rows of several processes (FSDP2) -------------------------------------------------------------------------------


def _column_sums(layers: Mapping[str, MaskedMatrix], criterion: Criterion) -> dict[str, Tensor]:
    """What scores need from the rows of other processes, for all layers in one reduce."""
    found = {}
    for name, layer in layers.items():
        with layer.read(by_rows=True) as (weight_OI, _):
            sums_I = criterion.column_sums(weight_OI)
        if sums_I is None:
            return {}
        found[name] = sums_I
    sum_over_ranks(list(found.values()))
    return found


def _gather_rows(chosen: Mapping[str, _Choice], layers: Mapping[str, MaskedMatrix]) -> None:
    """Combine the rows that processes have chosen: one gather of mask bits, with a count for each layer."""
    if not layers:
        return
    device = next(iter(layers.values())).weight_mask.device
    counts = [chosen[name].nonzero if chosen[name].finite else -1 for name in layers]
    header = torch.tensor(counts, dtype=torch.int64, device=device).view(torch.uint8)
    own = torch.cat([header, *(chosen[name].keep_OJ.reshape(-1) for name in layers)])
    widths = {name: layer.weight_mask.shape[1] for name, layer in layers.items()}
    rows = {name: rows_of(0, layer.out_features).stop for name, layer in layers.items()}  # the maximum
    gathered = gather_bytes(own, len(header) + sum(rows[name] * widths[name] for name in layers))
    found = torch.stack([each[: len(header)].clone().view(torch.int64) for each in gathered])
    for index, name in enumerate(layers):
        chosen[name].finite = bool((found[:, index] >= 0).all())
        chosen[name].nonzero = int(found[:, index].sum())
        chosen[name].parts = []  # replaced by views of the gathered bytes, concatenated later, one layer at a time
    for process, each in enumerate(gathered):
        start = len(header)
        for name, layer in layers.items():
            here = rows_of(process, layer.out_features)
            size = (here.stop - here.start) * widths[name]
            chosen[name].parts.append(each[start : start + size].view(-1, widths[name]))
            start += size


# --- counts ----------------------------------------------------------------------------------------------------------


def measure(layers: Mapping[str, MaskedMatrix]) -> dict[str, LayerUpdate]:
    """Count the zeros of masked layers, without changing anything; if rows are sharded, with one reduce."""
    counts, sharded = [], []
    for layer in layers.values():
        with layer.read(by_rows=True) as (weight_OI, rows):
            counts.append(masks.count(masks.pack(weight_OI != 0) & layer.weight_mask[rows]))
        sharded.append(layer.has_rows)
    if any(sharded):
        device = next(iter(layers.values())).weight_mask.device
        mine = [n if part or rank() == 0 else 0 for n, part in zip(counts, sharded, strict=True)]
        total = torch.tensor(mine, dtype=torch.int64, device=device)
        sum_over_ranks([total])
        counts = total.tolist()
    return {
        name: LayerUpdate(layer.size, layer.size - n, 0)
        for (name, layer), n in zip(layers.items(), counts, strict=True)
    }


def check_masks(layers: Mapping[str, MaskedMatrix], pattern: Pattern, sparsity: float | Mapping[str, float]) -> None:
    """Raise ValueError if the masks of layers do not follow this pattern and sparsity, over all or of each."""
    # With the mask itself as the scores, the pattern selects the mask if it has the right count in every group.
    found = [layer.unpacked_mask() for layer in layers.values()]
    if pattern.model_wide:
        found = [torch.cat([mask.reshape(1, -1) for mask in found], dim=1)]
    for mask, name in zip(found, layers, strict=False):
        own = sparsity[name] if isinstance(sparsity, Mapping) else sparsity
        if not torch.equal(pattern.mask(mask.float(), own), mask):
            raise ValueError(
                f"The model has masks already, and those of {name} are not {pattern} at a sparsity of {own:g}, "
                "which this run starts with (if layers are to differ, give it the distribution, too). Squash the model "
                "first to begin with new masks; to resume a run, pass its state (MaskUpdater(..., state=...)); to "
                "train with these masks unchanged, leave updater or callback out, and squash the model at the end."
            )


def mask_shares(layers: Mapping[str, MaskedMatrix], pattern: Pattern) -> dict[str, float]:
    """The sparsity of each layer's mask, for which the pattern would prune as many."""
    return {name: _mask_share(layer, pattern) for name, layer in layers.items()}


def _mask_share(layer: MaskedMatrix, pattern: Pattern) -> float:
    if isinstance(pattern, Unstructured) and pattern.group == "row":
        # zeros that a model has had before pruning make some rows sparser than the pattern
        return int((~layer.unpacked_mask()).sum(1).min()) / layer.in_features
    pruned = layer.size - masks.count(layer.weight_mask)
    # a user-defined pattern may round down; half a weight more keeps it from losing one to float rounding
    return pruned / layer.size if isinstance(pattern, Unstructured) or not pruned else (pruned + 0.5) / layer.size


# --- for distributions -----------------------------------------------------------------------------------------------


def shapes_of(model: nn.Module, layers: Mapping[str, MaskedMatrix]) -> Shapes:
    """Size and decoder block of each layer."""
    blocks = blocks_of(model, layers.values())
    block_of = {id(module): index for index, block in enumerate(blocks) for module in block.modules()}
    return {n: LayerShape(block_of.get(id(m)), m.out_features, m.in_features) for n, m in layers.items()}


def measure_outliers(
    shapes: Shapes, layers: Mapping[str, MaskedMatrix], distribution: SparsityDistribution
) -> dict[int, float]:
    """``outlier_share`` of each block, by the Wanda scores of its dense layers, which have norms of their inputs."""
    blocks: dict[int, list[MaskedMatrix]] = {}
    for name, shape in shapes.items():
        if shape.block is not None:
            blocks.setdefault(shape.block, []).append(layers[name])
    return {block: share_of_outliers(own, distribution) for block, own in blocks.items()}


def share_of_outliers(layers: Iterable[MaskedMatrix], distribution: SparsityDistribution) -> float:
    """``outlier_share`` of the Wanda scores of one block's layers."""

    def scores_OI(layer: MaskedMatrix) -> Tensor:
        with layer.read() as (weight_OI, _):
            return Wanda().scores(LayerContext(weight_OI, layer.statistics))

    own_scores = [lambda layer=layer: scores_OI(layer) for layer in layers]
    return outlier_share(own_scores, distribution.owl_m)
