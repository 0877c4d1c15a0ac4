"""The first mask of a training run, in any trainer: one-shot pruning that keeps pruned weights as shadow values."""

import logging
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from sparse_train.architecture import transformers_models
from sparse_train.arguments import describe
from sparse_train.distributed.collectives import rank, take_from_rank_0, world_size
from sparse_train.distributions import Outliers
from sparse_train.layers import masks
from sparse_train.layers.masked_layer import MaskedLayer
from sparse_train.layers.targets import layers_in_words
from sparse_train.oneshot.batches import samples_in
from sparse_train.oneshot.forwards import Batch, ForwardContext, TokenMask
from sparse_train.oneshot.walk import MemoryStore, Plan, walk
from sparse_train.pruning.config import OneShot, PruningConfig
from sparse_train.pruning.zeros import warn_of_filled

_log = logging.getLogger(__name__)


def make_first_mask(
    root: nn.Module,
    layers: Mapping[str, MaskedLayer],
    config: PruningConfig,
    *,
    batches: Callable[[int], Sequence[Batch] | None],
    context: ForwardContext,
    say: Callable[[str], None],
    progress: bool,
    token_mask: TokenMask | None = None,
) -> Outliers | None:
    """Carry out ``OneShot``: a ``FirstMaker`` once a trainer's callback has given the rest.

    Masks of ``layers``, of a model in ``root``, are set, and weights too if a solver makes them. ``batches(samples)``
    returns ``first_samples``, the same on each rank, or None if there are none that a model can read. ``say`` gets a
    line for the log before it takes long. ``token_mask`` says which tokens of a batch count, by default those that its
    ``attention_mask`` names. Returns what ``walk`` has measured for the distribution; None, and all is as before, if
    ``OneShot.needs`` are not met. After an error, the model is unchanged.
    """
    first = config.first_mask
    assert isinstance(first, OneShot)
    models, ranks = transformers_models(root, layers.values()), world_size()
    if not models or any(layer.layout.is_sharded for layer in layers.values()):
        return None
    samples = batches(first.samples)
    if samples is None or len(samples) < ranks:
        return None
    if (there := sum(map(samples_in, samples))) < first.samples and rank() == 0:
        _log.warning("The first mask reads %d of %d samples: the data has no more.", there, first.samples)
    zeros = {}
    if config.first_solver is not None:
        _check_movable(layers)
        zeros = {name: masks.pack(layer.weight_OI == 0) for name, layer in layers.items()}
    plan = Plan(
        method=first.criterion or config.criterion,
        pattern=config.pattern,
        sparsity=config.sparsity_at(0.0),
        distribution=config.distribution,
        final=config.sparsity_at(1.0),
    )
    say(f"{describe(plan.method)} makes the first mask of {layers_in_words(layers)}")
    store = MemoryStore(models[0], layers, together=plan.pattern.model_wide)
    try:
        with store.pruning_from_dense():
            outliers = walk(store, plan, samples[rank() :: ranks], progress, context, token_mask).outliers
    except Exception as error:
        error.add_note(
            "This happened while one-shot pruning made the first mask from batches of the training data. With "
            "first_mask=FirstWindow(), it comes from the first steps; a calibration_dataloader gives others."
        )
        raise
    if config.first_solver is not None:  # linear algebra may round differently on other hardware
        take_from_rank_0([t for each in layers.values() for t in (each.weight.detach(), each.weight_mask)])
        warn_of_filled(layers, {n: masks.count(zero_OJ & layers[n].weight_mask) for n, zero_OJ in zeros.items()})
    return outliers


def _check_movable(layers: Mapping[str, MaskedLayer]) -> None:
    for name, layer in layers.items():
        if layer.layout.has_masters or not layer.weight.requires_grad:
            raise ValueError(
                f"The first mask comes with other values of the kept weights, and those of {name} are frozen, or "
                "DeepSpeed would bring the old ones back from its float32 masters. Prune the model before the run "
                "(sparse-train prune), and begin with first_mask=FromZeros(); or use a criterion."
            )
