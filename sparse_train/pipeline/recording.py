"""Statistics between mask updates: attached to layers, shared by those with one input, summed over ranks, checked."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from sparse_train.criteria import Criterion
from sparse_train.distributed import gather_bytes, rank, sum_over_ranks, world_size
from sparse_train.layers.agreement import compare, fingerprints
from sparse_train.layers.matrices import MaskedLayer, MaskedMatrix, Recorder
from sparse_train.statistics.activations import ActivationNorm, HalvedNorm, Statistics
from sparse_train.suggestions import leave_out

_log = logging.getLogger(__name__)


def check_reached(layers: Mapping[str, MaskedMatrix], criterion: Criterion) -> None:
    """Raise ValueError if a target was not used in any forward since the last update."""
    if criterion.needs_activations:
        check_statistics(layers)
        return
    unreached = [name for name, layer in layers.items() if not layer.reached]
    if unreached and len(unreached) < len(layers):  # none reached: there has been no forward yet
        raise ValueError(
            f"{unreached[0]} is a target, but no forward reached it since the last mask update, so its mask has no "
            f"effect; masks were not changed. Leave it out with ignore=[{unreached[0]!r}]."
        )


def warn_of_unreached(layers: Mapping[str, MaskedMatrix]) -> bool:
    """Warn of a target that no forward has reached, if others were reached. Returns whether there is one."""
    unreached = [name for name, layer in layers.items() if not layer.reached]
    if not unreached or len(unreached) == len(layers):  # none reached: there has been no forward yet
        return False
    if rank() == 0:
        _log.warning(
            "%s is a target, and no forward has reached it so far: if its weight is used in another way, its mask "
            "has no effect until it is folded in at the end. Leave it out with ignore=[%r].",
            unreached[0],
            unreached[0],
        )
    return True


def warn_of_idle(layers: Mapping[str, MaskedMatrix]) -> bool:
    """Warn if no forward has used any of the layers since the last update. Returns whether that is so."""
    if any(layer.reached for layer in layers.values()):
        return False
    if rank() == 0:
        _log.warning(
            "No forward has used any of the %d masked layers since the last mask update. If a copy of the model is "
            "trained in its place, its masks do not change: build the MaskUpdater on the model that is trained.",
            len(layers),
        )
    return True


def check_statistics(layers: Mapping[str, MaskedMatrix]) -> None:
    """Raise ValueError if a layer has seen no token, or sums that are not finite."""
    seen = {name: layer.statistics for name, layer in layers.items()}
    unreached = [name for name, stats in seen.items() if stats is None or int(stats.tokens) == 0]
    if unreached:
        name, others = unreached[0], len(unreached) - 1
        more = f" The same is true of {others} more. {leave_out(unreached)}" if others else ""
        raise ValueError(
            f"{name} is a target, but no token reached it since the last mask update, so it has no activations to "
            f"score with. If the model does not use it, leave it out with ignore=[{name!r}]; if forwards happen with "
            "the model in eval mode and under no_grad, they count as evaluation and are not recorded; if few "
            "tokens reach it, such as an expert, let earlier windows count (memory above 0), with a first mask from "
            "calibration on enough tokens." + more
        )
    for name, stats in seen.items():
        if stats is not None and not bool(stats.sum_squares_I.isfinite().all()):
            feature = int((~stats.sum_squares_I.isfinite()).nonzero()[0])
            raise not_finite(f"{name} (first at feature {feature} of {len(stats.sum_squares_I)})")


def check_nothing_dropped(layers: Mapping[str, MaskedMatrix]) -> None:
    """Raise ValueError if an input was not finite: in calibration, where all of the data should count."""
    for name, layer in layers.items():
        if layer.statistics is not None and int(layer.statistics.dropped):
            raise not_finite(name)


def not_finite(where: str) -> ValueError:
    """The error for activations that are not finite."""
    return ValueError(
        f"{where}: the input activations are not finite, so Wanda scores cannot be computed; masks were not changed. "
        "Look for NaN in the data, a learning rate that is too high, or an overflow of float16."
    )


def attach(layers: Iterable[MaskedMatrix], recorder: Recorder, statistics: type[Statistics] | None) -> None:
    """Give layers a common recorder and fresh statistics of this kind; None = none."""
    for layer in layers:
        if isinstance(layer, MaskedLayer):
            layer.recorder, layer.records = recorder, True
        layer.statistics = None if statistics is None else statistics(layer.in_features, layer.weight_mask.device)


def needed_statistics(criterion: Criterion, halved: bool) -> type[ActivationNorm] | None:
    """The statistics that a criterion reads, in halves if their noise is to be estimated."""
    if not criterion.needs_activations:
        return None
    return HalvedNorm if halved else ActivationNorm


def turn_halves(layers: Iterable[MaskedMatrix]) -> None:
    """After a recorded step: record the next one in the other half, if statistics have halves."""
    for each in distinct(layers):
        if isinstance(each, HalvedNorm):
            each.turn()


def share_statistics(recorder: Recorder, layers: Sequence[MaskedMatrix]) -> bool:
    """After a forward under ``recorder.sharing``: let layers that read the same input use one statistic.

    With several ranks, only if all have found the same layers; they compare once per run.

    Returns:
        Whether there has been a forward, on any rank.
    """
    assert recorder.sharing is not None
    if not layers:
        recorder.sharing = None
        return True
    position = {layer: index for index, layer in enumerate(layers)}
    found: dict[Any, Any] = recorder.sharing.leaders()
    leaders = [position[found.get(layer, layer)] for layer in layers]
    numbers = torch.tensor([*leaders, len(found)], dtype=torch.int32, device=layers[0].weight_mask.device)
    gathered = gather_bytes(numbers.view(torch.uint8), 4 * len(numbers))
    by_rank = torch.stack([each.view(torch.int32) for each in gathered])
    agreed = (by_rank == numbers).all(0).tolist()
    for layer, leader, same in zip(layers, leaders, agreed[:-1], strict=True):
        if same and layers[leader] is not layer:
            share(layer, layers[leader])
    recorder.sharing = None
    return bool(by_rank[:, -1].any())


def share(layer: MaskedMatrix, leader: MaskedMatrix) -> None:
    """Let a layer use the statistics of another one, which records the input of both."""
    assert isinstance(layer, MaskedLayer)
    layer.statistics, layer.records = leader.statistics, False


def norms_of(layers: Mapping[str, MaskedMatrix]) -> dict[str, ActivationNorm]:
    """The norms of the layers that have some."""
    return {name: layer.statistics for name, layer in layers.items() if isinstance(layer.statistics, ActivationNorm)}


def restore(own: Mapping[str, ActivationNorm], by_rank: Sequence[Mapping[str, dict[str, torch.Tensor]]]) -> None:
    """Give each rank the norms that it saved; if the number of ranks has changed, rank 0 gets their sum."""
    same_ranks = len(by_rank) == world_size()
    for norm in own.values():
        norm.reset()
    for process, saved in enumerate(by_rank):
        if rank() == (process if same_ranks else 0):
            once = {id(own[name]): name for name in saved}  # layers that share a statistic have each saved it
            for name in once.values():
                own[name].merge_state_dict(saved[name])


def reduce_statistics(layers: Collection[MaskedMatrix]) -> None:
    """Sum the statistics of ``layers`` over ranks."""
    _agree_on_sharing(layers)
    sum_over_ranks([tensor for each in distinct(layers) for tensor in each.tensors()])


def _agree_on_sharing(layers: Collection[MaskedMatrix]) -> None:
    """Let a layer that has stopped sharing statistics on one rank stop on all of them."""
    own = [layer for layer in layers if isinstance(layer, MaskedLayer) and layer.statistics is not None]
    if world_size() == 1 or not own:
        return
    alone = torch.tensor([float(layer.records) for layer in own], device=own[0].weight_mask.device)
    sum_over_ranks([alone])
    for layer, count in zip(own, alone.tolist(), strict=True):
        if count:
            layer.record_alone()


def exchange(layers: Mapping[str, MaskedMatrix]) -> None:
    """``reduce_statistics``, and checks that ranks agree, in the same reduce.

    A target counts as reached if a forward on any rank has used it.

    Raises:
        ValueError: on every rank, if ranks hold different masks.
    """
    if world_size() == 1:
        return
    _agree_on_sharing(layers.values())
    each_once = distinct(layers.values())
    device = next(iter(layers.values())).weight_mask.device
    bits = fingerprints(layers)
    reached = torch.tensor([float(layer.reached) for layer in layers.values()], device=device)
    sum_over_ranks([*(tensor for each in each_once for tensor in each.tensors()), bits, reached])
    for layer, count in zip(layers.values(), reached.tolist(), strict=True):
        layer.reached = count > 0
    compare(layers, bits)


def distinct(layers: Iterable[MaskedMatrix]) -> list[Statistics]:
    """The statistics of layers; those that several layers share, once."""
    return list({id(layer.statistics): layer.statistics for layer in layers if layer.statistics is not None}.values())


def warn_of_padding(recorder: Recorder) -> None:
    """Warn once that a token mask did not fit an input, so that padding counts in its statistics."""
    if recorder.mask_misfit is not None and not recorder.warned:
        recorder.warned = True
        _log.warning(
            "The batch's attention_mask does not fit a layer's input of shape %s, so padding counts in its activation "
            "statistics. Override DynamicPruning.token_mask, or set MaskUpdater.token_mask, to say which tokens count; "
            "in one-shot pruning calibrate on samples without padding.",
            recorder.mask_misfit,
        )
