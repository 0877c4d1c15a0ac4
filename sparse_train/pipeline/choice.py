"""``choose`` computes the new masks of all layers, before anything is changed.

Shape suffixes: O out_features, I in_features, J packed mask bytes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_train.criteria import Criterion
from sparse_train.distributed import gather_bytes, sum_over_ranks
from sparse_train.layers import masks, sharding
from sparse_train.layers.matrices import MaskedMatrix
from sparse_train.patterns import Pattern
from sparse_train.pipeline.margins import NO_MARGIN, Margin, standard_error
from sparse_train.pipeline.policies import MaskPolicy, only_kept
from sparse_train.pipeline.regrow import Growth, regrow
from sparse_train.statistics.activations import ActivationNorm, HalvedNorm


@dataclass(frozen=True)
class Rules:
    """What decides the masks of one update.

    Attributes:
        criterion: gives the scores, in float32, from kept and shadow values.
        pattern: selects, over one layer at a time or over all of them.
        sparsity: target over each group; a mapping by layer if layers differ.
        policy: how pruned weights come back, if they do.
        shadow_factor: multiplies the values of pruned weights before they are scored.
        margin: the advantage of kept weights.
        growth: gradients by which weights come back.
        half: score with only this half of the statistics.
    """

    criterion: Criterion
    pattern: Pattern
    sparsity: float | Mapping[str, float]
    policy: MaskPolicy
    shadow_factor: float = 1.0
    margin: Margin = NO_MARGIN
    growth: Growth | None = None
    half: int | None = None

    def mask(self, scores_OI: Tensor, sparsity: float, names: Iterable[str]) -> Tensor:
        """The mask of candidates with these scores, from one named layer, or from several as one row."""
        gradients = self.growth.scores(names) if self.growth is not None else None
        if self.growth is None or gradients is None:
            return self.pattern.mask(scores_OI, sparsity)
        return regrow(scores_OI, gradients.view_as(scores_OI), self.pattern, sparsity, self.growth.fraction)


@dataclass(frozen=True)
class Candidates:
    """The input of selection.

    Attributes:
        scores_OI: -inf = pruned first; those of kept weights include the margin, if there is one.
        nonzero_OJ: which weights would not be zero if they were kept, packed.
        finite: whether the criterion's scores are finite.
    """

    scores_OI: Tensor
    nonzero_OJ: Tensor
    finite: bool


@dataclass
class Choice:
    """A new mask, before anything is changed."""

    parts: list[Tensor]
    """The packed mask, one part per process that has selected rows."""
    nonzero: int
    """Number of kept weights that are not zero."""
    finite: bool = True

    @property
    def keep_OJ(self) -> Tensor:
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)


def choose(layers: Mapping[str, MaskedMatrix], rules: Rules) -> dict[str, Choice]:
    """A new mask for each layer; all processes must call, and all get the same masks."""
    return (_select_model_wide if rules.pattern.model_wide else _select_by_layer)(layers, rules)


def agreed_flips(
    layers: Mapping[str, MaskedMatrix], chosen: Mapping[str, Choice], rules: Rules
) -> dict[str, int] | None:
    """How many of the chosen flips each half of the statistics would also have made alone, by layer.

    None if there are no two halves, because one has seen no token.
    """
    norms = [layer.statistics for layer in layers.values()]
    if not all(isinstance(norm, HalvedNorm) and all(int(half.tokens) for half in norm.halves) for norm in norms):
        return None
    # no error can be estimated from one half
    margin = replace(rules.margin, noise_margin=0.0)
    halves = [choose(layers, replace(rules, margin=margin, half=half)) for half in (0, 1)]
    found = {}
    for name, layer in layers.items():
        new_OJ = chosen[name].keep_OJ
        others_OJ = (halves[0][name].keep_OJ ^ new_OJ) | (halves[1][name].keep_OJ ^ new_OJ)
        found[name] = masks.count((layer.weight_mask ^ new_OJ) & ~others_OJ)
    return found


def _select_by_layer(layers: Mapping[str, MaskedMatrix], rules: Rules) -> dict[str, Choice]:
    by_rows = rules.criterion.rowwise and rules.pattern.rowwise
    by_process = {n: layer for n, layer in layers.items() if by_rows and sharding.is_dtensor(layer.weight_OI)}
    sums = _column_sums(by_process, rules)
    chosen = {}
    for name, layer in layers.items():
        own = rules.sparsity[name] if isinstance(rules.sparsity, Mapping) else rules.sparsity
        with sharding.weights(layer, by_rows) as (weight_OI, rows):
            weight_OI = _decayed(weight_OI, layer, rows, rules)
            found = _score_candidates(layer, weight_OI, rows, rules, sums.get(name))
        keep_OJ = masks.pack(rules.mask(found.scores_OI, own, [name])) if found.finite else found.nonzero_OJ
        chosen[name] = Choice([keep_OJ], masks.count(keep_OJ & found.nonzero_OJ), found.finite)
    _complete(chosen, by_process)
    return chosen


def _column_sums(layers: Mapping[str, MaskedMatrix], rules: Rules) -> dict[str, Tensor]:
    """What scores need from the rows of other processes, for all layers in one reduce."""
    found = {}
    for name, layer in layers.items():
        with sharding.weights(layer, by_rows=True) as (weight_RI, rows):
            sums_I = rules.criterion.column_sums(_decayed(weight_RI, layer, rows, rules))
        if sums_I is None:
            return {}
        found[name] = sums_I
    sum_over_ranks(list(found.values()))
    return found


def _select_model_wide(layers: Mapping[str, MaskedMatrix], rules: Rules) -> dict[str, Choice]:
    assert isinstance(rules.sparsity, float), "one group has one sparsity"
    chosen, scores = {}, []
    for name, layer in layers.items():
        with sharding.weights(layer, by_rows=False) as (weight_OI, rows):
            weight_OI = _decayed(weight_OI, layer, rows, rules)
            found = _score_candidates(layer, weight_OI, rows, rules)
        scores.append(found.scores_OI)
        chosen[name] = Choice([found.nonzero_OJ], 0, found.finite)
    if all(choice.finite for choice in chosen.values()):
        keep = rules.mask(torch.cat([score.reshape(1, -1) for score in scores], dim=1), rules.sparsity, layers)
        parts = keep.split([score.numel() for score in scores], dim=1)
        for choice, score, part in zip(chosen.values(), scores, parts, strict=True):
            keep_OJ = masks.pack(part.view_as(score))
            choice.nonzero, choice.parts = masks.count(keep_OJ & choice.keep_OJ), [keep_OJ]
    return chosen


def _complete(chosen: Mapping[str, Choice], layers: Mapping[str, MaskedMatrix]) -> None:
    """Combine the rows that processes have chosen: one gather of mask bits, with a count for each layer."""
    if not layers:
        return
    device = next(iter(layers.values())).weight_mask.device
    counts = [chosen[name].nonzero if chosen[name].finite else -1 for name in layers]
    header = torch.tensor(counts, dtype=torch.int64, device=device).view(torch.uint8)
    own = torch.cat([header, *(chosen[name].keep_OJ.reshape(-1) for name in layers)])
    widths = {name: layer.weight_mask.shape[1] for name, layer in layers.items()}
    rows = {name: sharding.rows_of(0, layer.out_features).stop for name, layer in layers.items()}  # the maximum
    gathered = gather_bytes(own, len(header) + sum(rows[name] * widths[name] for name in layers))
    found = torch.stack([each[: len(header)].clone().view(torch.int64) for each in gathered])
    for index, name in enumerate(layers):
        chosen[name].finite = bool((found[:, index] >= 0).all())
        chosen[name].nonzero = int(found[:, index].sum())
        chosen[name].parts = []  # replaced by views of the gathered bytes, concatenated later, one layer at a time
    for process, each in enumerate(gathered):
        start = len(header)
        for name, layer in layers.items():
            here = sharding.rows_of(process, layer.out_features)
            size = (here.stop - here.start) * widths[name]
            chosen[name].parts.append(each[start : start + size].view(-1, widths[name]))
            start += size


def _decayed(weight_RI: Tensor, layer: MaskedMatrix, rows: slice, rules: Rules) -> Tensor:
    if rules.shadow_factor == 1:
        return weight_RI
    return torch.where(layer.unpacked_mask()[rows], weight_RI, weight_RI * rules.shadow_factor)


def _scores(
    criterion: Criterion, weight_OI: Tensor, stats: ActivationNorm | None, column_sums_I: Tensor | None
) -> Tensor:
    try:
        if column_sums_I is None:
            scores_OI = criterion.scores(weight_OI, stats)
        else:
            scores_OI = criterion.scores_of_rows(weight_OI, stats, column_sums_I)
    except (AttributeError, TypeError) as error:
        if stats is None:
            raise ValueError(
                f"{criterion} failed, and was given stats=None: {error}. A criterion that reads activation norms says "
                "so with needs_activations = True in its class."
            ) from error
        raise
    if not isinstance(scores_OI, Tensor) or scores_OI.shape != weight_OI.shape:
        given = f"shape {tuple(scores_OI.shape)}" if isinstance(scores_OI, Tensor) else type(scores_OI).__name__
        raise ValueError(
            f"{criterion} gave {given} as scores of a weight of shape {tuple(weight_OI.shape)}: a criterion returns a "
            "float32 score for each weight (Criterion.scores)."
        )
    return scores_OI.float()


def _score_candidates(
    layer: MaskedMatrix, weight_OI: Tensor, rows: slice, rules: Rules, column_sums_I: Tensor | None = None
) -> Candidates:
    """Score these rows of a layer. The scores include margin and policy, so that only the pattern has to select."""
    by_score = rules.policy.comes_back == "by score"
    keep_OI = layer.unpacked_mask()[rows] if rules.margin or not by_score else None
    stats = _statistics(layer, rules)
    scores_OI = _scores(rules.criterion, weight_OI, stats, column_sums_I)
    finite = _all_finite(scores_OI)
    if stats is not None and bool((stats.sum_squares_I == 0).any()):
        # A feature that is always zero makes its scores 0. Weights that are already zero are then pruned first, so that
        # pruning twice gives the same result as pruning once.
        scores_OI = scores_OI.masked_fill(weight_OI == 0, -torch.inf)
    if rules.margin:
        assert keep_OI is not None
        error_OI = (
            standard_error(rules.criterion, weight_OI, stats, column_sums_I) if rules.margin.noise_margin else None
        )
        scores_OI = rules.margin.apply(scores_OI, keep_OI, error_OI)
    if not by_score:
        assert keep_OI is not None
        scores_OI = only_kept(scores_OI, keep_OI)
    nonzero_OI = weight_OI != 0
    if rules.policy.comes_back == "by gradient":
        assert keep_OI is not None
        nonzero_OI &= keep_OI  # weights that come back start at zero
    return Candidates(scores_OI, masks.pack(nonzero_OI), finite)


def _statistics(layer: MaskedMatrix, rules: Rules) -> ActivationNorm | None:
    """The statistics of a layer's input that the criterion reads."""
    if not rules.criterion.needs_activations:
        return None
    stats = layer.statistics
    assert stats is None or isinstance(stats, ActivationNorm)
    if rules.half is None:
        return stats
    assert isinstance(stats, HalvedNorm)
    return stats.alone(rules.half)


def _all_finite(scores_OI: Tensor) -> bool:
    # if the sum is finite, all scores are, and it is ten times faster to check; it may overflow with finite scores
    return bool(scores_OI.sum().isfinite()) or bool(scores_OI.isfinite().all())
