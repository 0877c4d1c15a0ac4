"""``Recorder``: which forwards and which tokens count in the statistics of layers, and what is padding."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_train.statistics import LastSums

_log = logging.getLogger(__name__)


@dataclass
class Recorder:
    """State that all masked layers of a model share while activations are recorded."""

    when: Literal["never", "training", "always"] = "never"
    """In "training", forwards with autograd on count; in train mode, those that entered the model with it on count, or
    all of a model that ``enter`` does not hear of. Calibration uses "always"."""
    enters_with_autograd: bool = True
    """Whether autograd was on when the running forward entered the model. In a layer it can be off although the model
    trains: reentrant checkpointing turns it off for the first forward, the one that counts."""
    token_mask: Tensor | None = None
    """Which tokens of the current batch count (B, L); None = all."""
    told: bool = False
    """Whether ``token_mask`` is set from outside; if not, ``read_padding`` sets it."""
    last: LastSums = field(default_factory=LastSums)
    """Reused by layers that read the same tensor."""
    two_texts: bool = False
    """Whether the model reads two, as an encoder-decoder does: see ``reads_two_texts``."""
    misfit: tuple[str, Tensor] | None = None
    """What a token mask does not fit, a shape or more words, and that mask, for a single warning."""
    warned: bool = False
    is_paused: bool = False

    def wants(self, training: bool) -> bool:
        """Whether a forward of a layer in this mode is recorded."""
        trains = torch.is_grad_enabled() or (training and self.enters_with_autograd)
        return not self.is_paused and (self.when == "always" or (self.when == "training" and trains))

    def enter(self, model: nn.Module, positional: tuple[Any, ...]) -> None:
        """A pre-hook of a model's forward: text generated in train mode is not trained on."""
        self.enters_with_autograd = torch.is_grad_enabled()

    def token_mask_for(self, x: Tensor) -> Tensor | None:
        """The token mask of an input (..., I); None if there is none, or if it does not fit."""
        mask = self.token_mask
        if mask is None:
            return None
        # an entry for every token of (B, L, I) or (B * L, I)
        if mask.shape != x.shape[:-1] and (x.dim() != 2 or mask.numel() != len(x)):
            self.misfit = self.misfit or (f"{tuple(x.shape)}", mask)
            return None
        if mask.device != x.device:
            mask = self.token_mask = mask.to(x.device)
        return mask

    def note_misfit(self, shape: str, mask: Tensor) -> None:
        """Remember a token mask that does not fit, rather one with padding than one of ones."""
        if self.misfit is None or bool(self.misfit[1].all()):
            self.misfit = shape, mask

    def read_padding(self, model: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """A pre-hook of a model's forward: padding is what its argument ``attention_mask`` says."""
        if not self.told:
            self.token_mask = self.padding_of(keywords)

    def padding_of(self, batch: Any) -> Tensor | None:
        """``batch["attention_mask"]``; None, and a note for a warning, if it is not known which inputs it is for: in a
        model that reads two texts, and inside a nested batch."""
        named = batch if isinstance(batch, Mapping) else {}
        mask = named.get("attention_mask")
        for part in batch if isinstance(batch, (list, tuple)) else named.values():
            if isinstance(part, Mapping) and isinstance(part.get("attention_mask"), Tensor):
                self.note_misfit("(a part of a nested batch)", part["attention_mask"])
        if self.two_texts and isinstance(mask, Tensor):
            self.note_misfit("(tokens of the other text, I)", mask)
            return None
        return mask if isinstance(mask, Tensor) else None

    def warn_of_padding(self) -> None:
        """Warn once that a token mask did not fit an input, so that padding, if there was any, counts."""
        if self.misfit is None or self.warned:
            return
        (shape, mask), self.misfit = self.misfit, None
        if not bool(mask.all()):
            self.warned = True
            _log.warning(
                "The batch's attention_mask does not fit a layer's input of shape %s, so padding counts in its "
                "activation statistics. Override DynamicPruning.token_mask, or set MaskUpdater.token_mask, to say "
                "which tokens count; in one-shot pruning calibrate on samples without padding.",
                shape,
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside this context, nothing is recorded."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before


def reads_two_texts(model: nn.Module, layers: Iterable[Any]) -> bool:
    """Whether any of ``layers`` is part of an encoder-decoder model, whose batches have a mask for one of two texts."""
    wanted = set(layers)
    configs = ((module, getattr(module, "config", None)) for module in model.modules())
    two_texts = (module for module, config in configs if getattr(config, "is_encoder_decoder", False) is True)
    return any(wanted & set(module.modules()) for module in two_texts)
