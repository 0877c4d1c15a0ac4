"""Perplexity of a causal language model on running text, with the protocol of each measurement.

A perplexity says little without its window: LLaMA-2-7B has 5.12 with 4096 tokens and 5.47 with 2048.
``perplexity`` always means token perplexity, as in the tables of papers on pruning.

Shape suffixes: T tokens of the text, W windows, L tokens per window, P tokens in front of a window, B windows of a
batch, V vocabulary.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_train.arguments import check_positive
from sparse_train.data.packing import beginning
from sparse_train.data.texts import only_texts
from sparse_train.environment import isolated_rng
from sparse_train.models.losses import IGNORED, mean_over_tokens, next_token_loss
from sparse_train.oneshot.forwards import check_ids, inference
from sparse_train.terminal import with_bar

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and how it was measured."""

    perplexity: float
    """Token perplexity: exp of the sum of all losses over ``tokens``."""
    model: str
    data: str
    split: str
    tokenizer: str
    window: int
    """Tokens per window."""
    stride: int
    """Tokens from the start of one window to the next; equal to ``window`` = no overlap (as in Wanda and SparseGPT)."""
    tokens: int
    """Tokens with a loss."""
    prefix: int
    """Tokens in front of each window, such as a beginning-of-text token; no other number here includes them."""
    computed_in: str
    """Dtype of the forward, from autocast or the weights; the loss is always float32."""

    @property
    def protocol(self) -> str:
        """How it was measured, in a sentence."""
        return (
            f"token perplexity of {self.model} on {self.data}, {self.split}: {self.tokens} tokens scored, "
            f"windows of {self.window}, stride {self.stride}, "
            + (f"{self.prefix} special token(s) in front of each, " if self.prefix else "")
            + f"tokenizer of {self.tokenizer}, "
            f"computed in {self.computed_in}, loss in float32"
        )

    @property
    def metrics(self) -> dict[str, float]:
        """For loggers."""
        return {"evaluation/perplexity": self.perplexity}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def line(self) -> str:
        """To print."""
        return f"{self.perplexity:.2f}  {self.protocol}"


def token_ids(documents: list[str], tokenizer: Any, separator: str = "\n\n") -> Tensor:
    """Documents joined by ``separator`` and tokenised as one text, with its special tokens in front: int64 (T,).

    As in the scripts of Wanda and SparseGPT, a token that the tokenizer puts in front of a text is there once.
    ``evaluate_perplexity(prefix=...)`` puts it in front of all windows.
    """
    ids = tokenizer(separator.join(only_texts(documents)), add_special_tokens=False, return_tensors="pt", verbose=False)
    return torch.cat([torch.tensor(beginning(tokenizer), dtype=torch.int64), ids["input_ids"][0]])


def check_length(ids: Tensor, window: int, max_tokens: int | None = None) -> Tensor:
    """The first ``max_tokens`` of a text. Raises ValueError if that is no whole window, or one too short for a loss."""
    check_positive("max_tokens", max_tokens)
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, got {window}: the first one has no loss.")
    ids = ids[:max_tokens]
    if len(ids) < window:
        said = f"The text has {len(ids)} tokens, fewer than one window of {window}"
        raise ValueError(f"{said}. Use a smaller window, or a split with more text.")
    return ids


def check_window(model: nn.Module, window: int, prefix: int = 0, name: str = "window") -> None:
    """Raise ValueError if windows are longer than the number of learned position embeddings.

    Computed positions (rotary) go on, at lengths that the model was not trained on: a warning. The weights of the
    model are not looked at; ``name`` is that of the user's argument.
    """
    config = getattr(model, "config", None)
    positions = getattr(getattr(config, "get_text_config", lambda: config)(), "max_position_embeddings", None)
    if positions is None or window + prefix <= positions:
        return
    said = f"{name} is {window} tokens{f' after {prefix} in front of each' if prefix else ''}, and "
    said += f"{type(model).__name__} has {positions} positions"
    embeddings = [path for path, module in model.named_modules() if isinstance(module, nn.Embedding)]
    if any(re.search(r"position[^.]*$|\bwpe$", path) for path in embeddings):
        raise ValueError(f"{said}. Use {name}={positions - prefix}.")
    _log.warning("%s: it was not made for windows of this length.", said)


def evaluate_perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    window: int = 512,
    stride: int | None = None,
    prefix: Sequence[int] = (),
    batch_size: int = 4,
    max_tokens: int | None = None,
    model_name: str = "model",
    data_name: str = "text",
    split: str = "test",
    tokenizer_name: str | None = None,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> PerplexityResult:
    """Perplexity of ``model`` on a text; can be called during training without disturbing it.

    Only whole windows count, and only tokens with at least ``window - stride`` tokens before them (without overlap: all
    except the first of a window).

    Args:
        model: returns ``.logits`` (B, L, V).
        ids: token ids of the whole text, int64 (T,).
        window: tokens per window.
        stride: tokens between starts of windows; default ``window``.
        prefix: token ids put in front of each window, without a loss and in addition to its tokens, for models that
            need a beginning-of-text token, such as Gemma.
        batch_size: windows per forward pass.
        max_tokens: use only the first tokens; None = all.
        model_name, data_name, split, tokenizer_name: for the protocol.
        autocast: compute in this dtype; the loss stays float32.
        progress: show a progress bar.

    Raises:
        ValueError: an argument is out of range, the text is too short, or model and ids do not fit together.
    """
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be from 1 to window, which is {window}, got {stride}.")
    check_positive("batch_size", batch_size)
    check_window(model, window, len(prefix))
    ids = check_length(ids, window, max_tokens)
    check_ids(model, ids)
    windows_WL = ids.unfold(0, window, stride)
    scored_WL = torch.ones_like(windows_WL, dtype=torch.bool)
    scored_WL[1:, : window - stride] = False
    scored_WL[:, 0] = False  # it has no text in front of it
    tokens = int(scored_WL.sum())

    front_WP = torch.tensor(prefix, dtype=windows_WL.dtype).expand(len(windows_WL), -1)
    inputs = torch.cat([front_WP, windows_WL], 1)
    labels = torch.cat([torch.full_like(front_WP, IGNORED), windows_WL.masked_fill(~scored_WL, IGNORED)], 1)
    batches = list(zip(inputs.split(batch_size), labels.split(batch_size), strict=True))
    device = next(model.parameters()).device
    metric = mean_over_tokens(device, sync=False)  # other processes may not be measuring: waiting for them would hang
    with undisturbed(model):
        for ids_BL, labels_BL in with_bar(batches, "perplexity", shown=progress):
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                logits_BLV = model(input_ids=ids_BL.to(device), use_cache=False).logits
            loss, count = next_token_loss(logits_BLV, labels_BL.to(device))
            metric.update(loss, weight=count)
    return PerplexityResult(
        perplexity=float(metric.compute().double().exp()),
        model=model_name,
        data=data_name,
        split=split,
        tokenizer=tokenizer_name or model_name,
        window=window,
        stride=stride,
        tokens=tokens,
        prefix=len(prefix),
        computed_in=computed_in(model, autocast),
    )


# --- what zero-shot tasks need, too -----------------------------------------------------------------------------------


def computed_in(model: nn.Module, autocast: torch.dtype | None) -> str:
    """The dtype of a forward, from autocast or the weights."""
    return str(autocast or next(model.parameters()).dtype).removeprefix("torch.")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, evaluation mode without gradients; afterwards, model and random numbers are as they were.

    Activation statistics record nothing inside. Keys and values are only cached by forwards that ask for it, such as
    ``generate``.
    """
    with isolated_rng(), inference(model, use_cache=False):
        yield
