"""Token and word perplexity of a causal language model on running text, with the protocol of each measurement.

Two protocols are mixed in the literature (LLaMA-2-7B has 5.12 with windows of 4096 and 5.47 with 2048), so a perplexity
without its window says little. ``perplexity`` always means token perplexity, as in the tables of papers on pruning.
Word perplexity, exp of the same losses per word, can be compared between tokenizers and is always called that.

Shape suffixes: W windows, L tokens per window, P tokens in front of a window.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_train.arguments import check_positive
from sparse_train.data.special_tokens import beginning
from sparse_train.evaluation.undisturbed import check_autocast, undisturbed
from sparse_train.layers.blocks import vocabulary_of
from sparse_train.models.losses import mean_over_tokens, next_token_loss, perplexity
from sparse_train.terminal.progress import bar

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PerplexityProtocol:
    """How a perplexity was measured."""

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
    words: int | None = None
    """Words that begin in tokens with a loss (see ``word_starts``); None = not counted."""

    def __str__(self) -> str:
        return (
            f"token perplexity of {self.model} on {self.data}, {self.split}: {self.tokens} tokens scored, "
            f"windows of {self.window}, stride {self.stride}, "
            + (f"{self.prefix} special token(s) in front of each, " if self.prefix else "")
            + f"tokenizer of {self.tokenizer}, "
            f"computed in {self.computed_in}, loss in float32"
        )


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and how it was measured."""

    perplexity: float
    """Token perplexity: exp of the sum of all losses over ``protocol.tokens``."""
    protocol: PerplexityProtocol
    word_perplexity: float | None = None
    """exp of the same sum over ``protocol.words``; None if words were not counted."""

    def as_dict(self) -> dict[str, Any]:
        return {"perplexity": self.perplexity, "word_perplexity": self.word_perplexity, **asdict(self.protocol)}

    def lines(self) -> list[str]:
        """The lines to print, one for each perplexity."""
        shown = [f"{self.perplexity:.2f}  {self.protocol}"]
        if self.word_perplexity is not None:
            words = f"{self.protocol.words} words that begin in the scored tokens"
            shown.append(f"{self.word_perplexity:.2f}  word perplexity: the same losses over {words}")
        return shown


def token_ids(documents: list[str], tokenizer: Any, separator: str = "\n\n") -> Tensor:
    """Documents joined by ``separator`` and tokenised as one text, with its special tokens in front: (tokens,).

    As in the scripts of Wanda and SparseGPT: if the tokenizer puts a token in front of a text, it is there once, and
    later windows begin in the middle of the text. ``evaluate_perplexity(prefix=...)`` puts it in front of all windows.
    """
    ids = tokenizer(separator.join(documents), add_special_tokens=False, return_tensors="pt", verbose=False)
    return torch.cat([torch.tensor(beginning(tokenizer), dtype=torch.int64), ids["input_ids"][0]])


def check_window(model: nn.Module, window: int, prefix: int = 0, name: str = "window") -> None:
    """Raise ValueError if windows are longer than the number of learned position embeddings.

    If positions are computed (rotary), longer windows work, but at lengths that the model was not trained on: a
    warning.

    Args:
        model: its weights are not looked at.
        window: tokens per window.
        prefix: tokens in front of each window, which take positions, too.
        name: of the user's argument.
    """
    config = getattr(model, "config", None)
    positions = getattr(config.get_text_config() if config is not None else None, "max_position_embeddings", None)
    if positions is None or window + prefix <= positions:
        return
    named = {name.rpartition(".")[2]: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    if any("position" in name or name == "wpe" for name in named):
        raise ValueError(
            f"{name} is {window} tokens{f' after {prefix} in front of each' if prefix else ''}, and "
            f"{type(model).__name__} has {positions} positions. Use {name}={positions - prefix}."
        )
    _log.warning(
        "Windows of %d tokens are longer than the %d positions that %s says it was made for (max_position_embeddings).",
        window + prefix,
        positions,
        type(model).__name__,
    )


def check_length(ids: Tensor, window: int) -> None:
    """Raise ValueError if a window is too short to have a loss, or longer than the text."""
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, got {window}: the first one has no loss.")
    if len(ids) < window:
        raise ValueError(f"The text has {len(ids)} tokens, fewer than one window of {window}. Use a smaller window.")


def _check_ids(model: nn.Module, ids: Tensor) -> None:
    known, largest = vocabulary_of(model), int(ids.max())
    if known is not None and largest >= known:
        raise ValueError(
            f"The text has token ids up to {largest}, and {type(model).__name__} has embeddings for 0 to {known - 1}. "
            "Is the tokenizer that of another model?"
        )


def evaluate_perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    words: Tensor | None = None,
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
        ids: token ids of the whole text, (tokens,).
        words: number of words that begin in each token, from ``word_starts``, (tokens,); None = no word perplexity.
        window: tokens per window.
        stride: tokens between starts of windows; default ``window``.
        prefix: token ids put in front of each window, without a loss and in addition to its tokens, for models that
            need a beginning-of-text token, such as Gemma. The same tokens are scored with and without it.
        batch_size: windows per forward pass.
        max_tokens: use only the first tokens; None = all.
        model_name, data_name, split, tokenizer_name: for the protocol.
        autocast: compute in this dtype; the loss stays float32.
        progress: show a progress bar.

    Raises:
        ValueError: a window below 2 or longer than the model's learned positions, a stride outside 1 to window, less
            text than one window, words of another text, ids that the model has no embeddings for, or a dtype that
            autocast does not know.
    """
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be from 1 to window, which is {window}, got {stride}.")
    check_positive("batch_size", batch_size)
    if max_tokens is not None:
        check_positive("max_tokens", max_tokens)
    if words is not None and words.shape != ids.shape:
        raise ValueError(
            f"words must have a count for each token of ids, {tuple(ids.shape)}, got {tuple(words.shape)}. "
            "Call word_starts with the documents, tokenizer and separator of token_ids."
        )
    check_autocast(autocast)
    check_window(model, window, len(prefix))
    ids = ids[:max_tokens]
    check_length(ids, window)
    _check_ids(model, ids)
    windows_WL = ids.unfold(0, window, stride)
    labels_WL = windows_WL.clone()
    labels_WL[1:, : window - stride] = -100
    labels_WL[:, 0] = -100  # it has no text in front of it
    begun = 0  # the first token of a window has no loss
    if words is not None:
        words_WL = words[:max_tokens].unfold(0, window, stride)
        begun = int(words_WL[:, 1:][labels_WL[:, 1:] != -100].sum())
    front_P = torch.tensor(prefix, dtype=windows_WL.dtype).expand(len(windows_WL), -1)
    windows_WL = torch.cat([front_P, windows_WL], 1)
    labels_WL = torch.cat([torch.full_like(front_P, -100), labels_WL], 1)
    device = next(model.parameters()).device
    # other processes may not be measuring, and waiting for them would hang
    metric, tokens = mean_over_tokens(device, sync=False), 0
    batches = list(zip(windows_WL.split(batch_size), labels_WL.split(batch_size), strict=True))
    with undisturbed(model), bar("perplexity", shown=progress) as drawn:
        drawn.set_total(len(batches))
        for ids_BL, labels_BL in batches:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                logits_BLV = model(input_ids=ids_BL.to(device), use_cache=False).logits
            loss, count = next_token_loss(logits_BLV, labels_BL.to(device))
            metric.update(loss, weight=count)
            tokens += int(count)
            drawn.advance()
    dtype = str(autocast or next(model.parameters()).dtype).removeprefix("torch.")
    protocol = PerplexityProtocol(
        model_name,
        data_name,
        split,
        tokenizer_name or model_name,
        window,
        stride,
        tokens,
        len(prefix),
        dtype,
        None if words is None else begun,
    )
    loss = metric.compute().double()
    return PerplexityResult(perplexity(loss), protocol, perplexity(loss * tokens / begun) if begun else None)
