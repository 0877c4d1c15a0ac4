"""The next-token loss, in float32.

Shape suffixes: B batch, L sequence length, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""transformers' label of positions without a loss."""


def next_token_loss(logits_BLV: Tensor, labels_BL: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of each token given those before it.

    Args:
        logits_BLV: any float dtype; the loss is computed in float32 (in bfloat16 perplexity shifts by percents).
        labels_BL: the token ids themselves (shifted here), ``ignore_index`` where there is no loss.

    Returns:
        Mean loss (float32 scalar, nats a token) and the number of tokens in it (int64 scalar).
    """
    labels = labels_BL[:, 1:].reshape(-1)
    logits = logits_BLV[:, :-1].reshape(-1, logits_BLV.shape[-1])
    tokens = (labels != ignore_index).sum()
    loss = F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum")
    return loss / tokens.clamp(min=1), tokens


def perplexity(mean_loss: Tensor) -> float:
    """exp of a mean loss in nats a token."""
    return float(torch.exp(mean_loss.double()))
