"""One update, scores -> masks, over all layers: ``update_masks``, for one-shot pruning, trainers and plain loops.

First all new masks are chosen, then all are replaced, so that an error leaves every mask unchanged, on every rank.

Shape suffixes: O out_features, I in_features, J packed mask bytes.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from sparse_train.architecture import decoder_blocks
from sparse_train.criteria import Criterion, LayerContext, Wanda
from sparse_train.distributed.collectives import gather_rows
from sparse_train.distributions import LayerShape, Shapes
from sparse_train.layers import masks
from sparse_train.layers.masked_layer import MaskedLayer, MaskedMatrix
from sparse_train.patterns import Pattern
from sparse_train.policies import MaskPolicy, Optimizers, StraightThrough
from sparse_train.pruning.counts import LayerUpdate, sum_counts
from sparse_train.pruning.norms import check_statistics
from sparse_train.selection import in_threads, row_chunks


@dataclass(frozen=True)
class Rules:
    """What decides the masks of one update."""

    criterion: Criterion
    pattern: Pattern
    sparsities: Mapping[str, float]
    """The sparsity of each layer, in each of its groups."""
    policy: MaskPolicy = field(default_factory=StraightThrough)
    """The default selects by the scores alone, as one-shot pruning does."""
    optimizers: Optimizers = field(default_factory=Optimizers)

    @property
    def by_rows(self) -> bool:
        """Whether rows can be chosen without the others. Where this is so, a process chooses in the rows that it holds
        (``rows_are_divided``, FSDP2) and gathers the masks, and a CPU chooses chunk by chunk."""
        return self.criterion.rowwise and self.pattern.rowwise and self.policy.rowwise


@dataclass(frozen=True)
class _Choice:
    """A new mask, or that of some rows, before anything is changed."""

    keep_OJ: Tensor
    nonzero: int
    """Number of kept weights that are not zero; of a sharded layer, at first only those of this process."""
    bad: int
    """Number of chunks with scores that are not finite; of a sharded layer, at first only those of this process."""


@torch.no_grad()
def update_masks(layers: Mapping[str, MaskedMatrix], rules: Rules) -> dict[str, LayerUpdate]:
    """Score every layer and replace its mask; all processes must call, and all get the same masks."""
    if rules.criterion.needs_activations:
        check_statistics(layers)
    if rules.pattern.model_wide:
        chosen = _choose_model_wide(layers, rules)
    else:
        chosen = {name: choice for some in _portions(layers, rules) for name, choice in _choose(some, rules).items()}
    if rules.by_rows:
        counts = sum_counts(layers, {name: [each.nonzero, each.bad] for name, each in chosen.items()})
        chosen = {name: _Choice(chosen[name].keep_OJ, *own) for name, own in counts.items()}
    for name, choice in chosen.items():
        if choice.bad:
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


PORTION = 1 << 24
"""Weights of layers whose masks threads choose at a time: many layers of a small model, or one of a large one."""


def _portions(layers: Mapping[str, MaskedMatrix], rules: Rules) -> Iterator[dict[str, MaskedMatrix]]:
    """On the CPU and by rows, layers of at most ``PORTION`` weights in sum; else each layer alone."""
    on_cpu = all(layer.weight_mask.device.type == "cpu" for layer in layers.values())
    most = PORTION if rules.by_rows and on_cpu else 0
    portion: dict[str, MaskedMatrix] = {}
    for name, layer in layers.items():
        if portion and sum(each.size for each in portion.values()) + layer.size > most:
            yield portion
            portion = {}
        portion[name] = layer
    yield portion


def _choose(layers: Mapping[str, MaskedMatrix], rules: Rules) -> dict[str, _Choice]:
    """The masks of layers, each for itself. By rows, each process chooses in those that it holds, and counts those."""

    def choose(chunk: LayerContext) -> _Choice:
        scores_OI, nonzero_OI, finite = _score(chunk, rules)
        nonzero_OJ = masks.pack(nonzero_OI)
        if not finite:
            return _Choice(nonzero_OJ, 0, 1)  # no mask: update_masks raises before it reads one
        keep_OI = rules.policy.select(scores_OI, [chunk.name], rules.pattern, rules.sparsities[chunk.name])
        keep_OJ = masks.pack(keep_OI)
        return _Choice(keep_OJ, masks.count(keep_OJ & nonzero_OJ), 0)

    chosen: dict[str, list[_Choice]] = {name: [] for name in layers}
    with ExitStack() as stack:
        chunks = [each for n, layer in layers.items() for each in stack.enter_context(_chunks(n, layer, rules))]
        for chunk, choice in zip(chunks, in_threads(choose, chunks), strict=True):
            chosen[chunk.name].append(choice)
    return {name: _join(layers[name], choices, rules) for name, choices in chosen.items()}


def _join(layer: MaskedMatrix, choices: list[_Choice], rules: Rules) -> _Choice:
    """The choice for a layer, from those for chunks of its rows."""
    keep_OJ = choices[0].keep_OJ
    if len(choices) > 1:  # on the CPU, by numpy, which leaves no threads of OpenMP spinning beside those of in_threads
        keep_OJ = torch.from_numpy(np.concatenate([choice.keep_OJ.numpy() for choice in choices]))
    whole_OJ = gather_rows(keep_OJ, layer.out_features) if rules.by_rows and layer.rows_are_divided else keep_OJ
    return _Choice(whole_OJ, sum(each.nonzero for each in choices), sum(each.bad for each in choices))


def _choose_model_wide(layers: Mapping[str, MaskedMatrix], rules: Rules) -> dict[str, _Choice]:
    """The masks of layers that are compared with each other."""
    scores, nonzero, bad = [], [], {}
    for name, layer in layers.items():
        with _chunks(name, layer, rules) as (whole,):
            scores_OI, nonzero_OI, finite = _score(whole, rules)
        scores.append(scores_OI)
        nonzero.append(masks.pack(nonzero_OI))
        bad[name] = int(not finite)
    if any(bad.values()):  # no masks, as in _choose
        return {name: _Choice(nonzero[0], 0, own) for name, own in bad.items()}
    row = torch.cat([scores_OI.reshape(1, -1) for scores_OI in scores], dim=1)
    mask = rules.policy.select(row, layers, rules.pattern, rules.sparsities[next(iter(layers))])
    parts = mask.split([scores_OI.numel() for scores_OI in scores], dim=1)
    keep = [masks.pack(part.view_as(scores_OI)) for part, scores_OI in zip(parts, scores, strict=True)]
    named = zip(layers, keep, nonzero, strict=True)
    return {name: _Choice(keep_OJ, masks.count(keep_OJ & nonzero_OJ), 0) for name, keep_OJ, nonzero_OJ in named}


@contextmanager
def _chunks(name: str, layer: MaskedMatrix, rules: Rules) -> Iterator[list[LayerContext]]:
    """A layer as criterion and policy see it: by rows, those of this process, in chunks that stay in the cache."""
    stats = layer.statistics if rules.criterion.needs_activations else None
    state = rules.optimizers.state_of(layer, rules.by_rows) if isinstance(layer, MaskedLayer) else {}
    with layer.read(rules.by_rows) as (weight_OI, rows):
        mask_OJ, parts = layer.weight_mask[rows], [slice(None)]
        if rules.by_rows and weight_OI.device.type == "cpu" and len(weight_OI):  # a process may hold no rows
            parts = row_chunks(*weight_OI.shape)
        yield [
            LayerContext(weight_OI[part], stats, name, mask_OJ[part], {key: each[part] for key, each in state.items()})
            for part in parts
        ]


def _score(layer: LayerContext, rules: Rules) -> tuple[Tensor, Tensor, bool]:
    """Scores for selection; which weights would not be zero if kept; whether all scores are finite."""
    weight_OI = layer.weight_OI
    scores_OI = rules.criterion.scores(layer).float()
    if scores_OI.shape != weight_OI.shape:
        raise ValueError(
            f"{rules.criterion} gave scores of shape {tuple(scores_OI.shape)} for a weight of shape "
            f"{tuple(weight_OI.shape)}: a criterion returns a score for each weight (Criterion.scores)."
        )
    # if the sum is finite, all scores are, and it is ten times faster to check; it may overflow with finite scores
    finite = math.isfinite(float(scores_OI.sum())) or bool(scores_OI.isfinite().all())
    if layer.stats is not None and bool((layer.stats.sum_squares_I == 0).any()):
        # A feature that is always zero makes its scores 0. Weights that are already zero are then pruned first, so that
        # pruning twice gives the same result as pruning once.
        scores_OI = scores_OI.masked_fill(weight_OI == 0, -torch.inf)
    nonzero_OI = weight_OI.bool()  # several times as fast as != 0 on a CPU
    if rules.policy.regrowth == "from zero":
        nonzero_OI &= layer.keep_OI
    return rules.policy.scores(scores_OI, layer), nonzero_OI, finite


# --- for distributions -----------------------------------------------------------------------------------------------


def shapes_of(model: nn.Module, layers: Mapping[str, MaskedMatrix]) -> Shapes:
    """Size and decoder block of each layer."""
    blocks = decoder_blocks(model, layers.values())
    block_of = {id(module): index for index, block in enumerate(blocks) for module in block.modules()}
    return {n: LayerShape(block_of.get(id(m)), m.out_features, m.in_features) for n, m in layers.items()}


def measure_outliers(shapes: Shapes, layers: Mapping[str, MaskedMatrix], above: float) -> dict[int, float]:
    """``outlier_share`` of each decoder block."""
    blocks = sorted({shape.block for shape in shapes.values() if shape.block is not None})
    inside = {block: [layers[name] for name, shape in shapes.items() if shape.block == block] for block in blocks}
    return {block: outlier_share(own, above) for block, own in inside.items()}


def outlier_share(layers: Collection[MaskedMatrix], above: float) -> float:
    """The share of a block's Wanda scores above this multiple of their mean, over all weights of its dense layers.

    Scores are computed twice, so that only those of one layer are held at a time.
    """

    def each_scores() -> Iterator[Tensor]:
        for layer in layers:
            with layer.read() as (weight_OI, _):
                yield Wanda().scores(LayerContext(weight_OI, layer.statistics))

    size = sum(layer.size for layer in layers)
    total = sum(float(scores_OI.sum(dtype=torch.float64)) for scores_OI in each_scores())
    if not math.isfinite(total):
        raise ValueError(f"The sum of a block's scores is {total}: its weights or its inputs are infinite or NaN.")
    return sum(int((scores_OI > above * total / size).sum()) for scores_OI in each_scores()) / size
