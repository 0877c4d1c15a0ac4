"""Token perplexity of a causal language model on running text, with the protocol beside every number.

Two protocols are mixed in the literature (LLaMA-2-7B is 5.12 at windows of 4096 and 5.47 at 2048), so a perplexity
without its window says little.

Shape suffixes: W windows, L tokens a window.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from sparse_train.evaluation.undisturbed import undisturbed
from sparse_train.losses import next_token_loss, perplexity
from sparse_train.progress import bar


@dataclass(frozen=True)
class PerplexityProtocol:
    """How a perplexity was measured."""

    model: str
    data: str
    split: str
    tokenizer: str
    window: int
    """Tokens a forward sees."""
    stride: int
    """Tokens from the start of one window to the next; equal to ``window``: no overlap (as Wanda and SparseGPT)."""
    tokens: int
    """Tokens with a loss."""
    computed_in: str
    """Dtype of the forward, by autocast or of the weights; the loss is float32 always."""

    def __str__(self) -> str:
        return (
            f"token perplexity of {self.model} on {self.data}, {self.split}: {self.tokens} tokens scored, "
            f"windows of {self.window}, stride {self.stride}, tokenizer of {self.tokenizer}, "
            f"computed in {self.computed_in}, loss in float32"
        )


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and how it was measured."""

    perplexity: float
    protocol: PerplexityProtocol

    def as_dict(self) -> dict[str, Any]:
        return {"perplexity": self.perplexity, **asdict(self.protocol)}


def token_ids(documents: list[str], tokenizer: Any, separator: str = "\n\n") -> Tensor:
    """Documents joined by ``separator`` and tokenised as one text without special tokens: (tokens,)."""
    ids = tokenizer(separator.join(documents), add_special_tokens=False, return_tensors="pt", verbose=False)
    result: Tensor = ids["input_ids"][0]
    return result


def evaluate_perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    window: int = 512,
    stride: int | None = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
    model_name: str = "model",
    data_name: str = "text",
    split: str = "test",
    tokenizer_name: str | None = None,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> PerplexityResult:
    """Perplexity of ``model`` on a text; training that it stands in is not disturbed.

    Only whole windows count, and a token only where it has ``window - stride`` tokens before it (with no overlap: all
    but the first of a window).

    Args:
        model: returns ``.logits`` (B, L, V).
        ids: token ids of the whole text, (tokens,).
        window: tokens a forward.
        stride: tokens between starts of windows; default ``window``.
        batch_size: windows a forward.
        max_tokens: read only the first ones; None reads all.
        model_name, data_name, split, tokenizer_name: for the protocol.
        autocast: compute in this dtype; the loss stays float32.
        progress: show a progress bar.

    Raises:
        ValueError: a window below 2, a stride outside 1 to window, or less text than one window.
    """
    stride = stride or window
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(f"window must be at least 2 and stride from 1 to window, got {window} and {stride}.")
    ids = ids[:max_tokens]
    if len(ids) < window:
        raise ValueError(f"The text has {len(ids)} tokens, fewer than one window of {window}. Take a smaller window.")
    windows_WL = ids.unfold(0, window, stride)
    labels_WL = windows_WL.clone()
    labels_WL[1:, : window - stride] = -100
    device = next(model.parameters()).device
    # where there are other processes, they may be measuring nothing, and would be waited for
    metric, tokens = MeanMetric(sync_on_compute=False).to(device), 0
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
        model_name, data_name, split, tokenizer_name or model_name, window, stride, tokens, dtype
    )
    return PerplexityResult(perplexity(metric.compute()), protocol)
