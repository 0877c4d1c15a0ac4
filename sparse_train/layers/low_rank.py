"""The product with ``where(mask, W + s B A, 0)`` and the gradients of its low-rank factors.

Shape suffixes: T tokens, O out_features, I in_features, R rank, J packed mask bytes = ceil(I / 8).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparse_train.layers import masks


def low_rank_sum(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """``W + scale * B A`` (O, I), a new tensor of the weight's dtype, summed in the wider of the two dtypes."""
    dtype = torch.promote_types(weight_OI.dtype, a_RI.dtype)
    total_OI = torch.addmm(weight_OI.to(dtype), b_OR.to(dtype), a_RI.to(dtype), alpha=scale)
    return total_OI.to(weight_OI.dtype)


class _MaskedLowRank(torch.autograd.Function):
    """Saves x, weight, factors and packed mask; the masked sum is recomputed in backward, as in ``functional``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        mask_OJ: Tensor,
        a_RI: Tensor,
        b_OR: Tensor,
        bias_O: Tensor | None,
        scale: float,
        straight_through: bool,
    ) -> Tensor:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        if not autocast and x.dtype != weight_OI.dtype:
            raise RuntimeError(f"input is {x.dtype} and weight is {weight_OI.dtype}; they must have the same dtype")
        ctx.x_dtype, ctx.scale, ctx.straight_through = x.dtype, scale, straight_through
        ctx.has_bias = bias_O is not None
        x = x.to(dtype)
        ctx.save_for_backward(x, weight_OI, mask_OJ, a_RI, b_OR)
        with torch.autocast(device, enabled=False):  # the sum in full precision, so that a merge writes the same values
            masked_OI = masks.apply(low_rank_sum(weight_OI, a_RI, b_OR, scale), mask_OJ, dtype)
            return F.linear(x, masked_OI, None if bias_O is None else bias_O.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI, mask_OJ, a_RI, b_OR = ctx.saved_tensors
        grad_x = grad_a_RI = grad_b_OR = grad_bias_O = None
        _, _, _, wants_a, wants_b, wants_bias, _, _ = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            grad = grad.to(x.dtype)
            grad_TO, x_TI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
            if ctx.needs_input_grad[0]:
                masked_OI = masks.apply(low_rank_sum(weight_OI, a_RI, b_OR, ctx.scale), mask_OJ, x.dtype)
                grad_x = grad.matmul(masked_OI).to(ctx.x_dtype)
            if ctx.straight_through:  # the gradient of the sum is a product that never has to be computed as a whole
                if wants_a:
                    grad_a_RI = ctx.scale * grad_TO.mm(b_OR.to(x.dtype)).t().mm(x_TI).to(a_RI.dtype)
                if wants_b:
                    grad_b_OR = ctx.scale * grad_TO.t().mm(x_TI.mm(a_RI.to(x.dtype).t())).to(b_OR.dtype)
            elif wants_a or wants_b:
                sum_OI = masks.apply(grad_TO.t().mm(x_TI), mask_OJ).to(a_RI.dtype)
                grad_a_RI = ctx.scale * b_OR.t().mm(sum_OI) if wants_a else None
                grad_b_OR = ctx.scale * sum_OI.mm(a_RI.t()) if wants_b else None
            if ctx.has_bias and wants_bias:
                grad_bias_O = grad_TO.sum(0)
        return grad_x, None, None, grad_a_RI, grad_b_OR, grad_bias_O, None, None


def masked_low_rank_linear(
    x: Tensor,
    weight_OI: Tensor,
    mask_OJ: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    bias_O: Tensor | None = None,
    *,
    scale: float,
    straight_through: bool,
) -> Tensor:
    """``F.linear(x, where(mask, W + scale * B A, 0), bias)``, where A and B learn and W does not.

    Args:
        x: (..., I).
        weight_OI: frozen, kept and shadow values; it gets no gradient.
        mask_OJ: packed mask, see ``sparse_train.layers.masks``.
        a_RI, b_OR: the factors; both of the same dtype.
        bias_O: (O,) or None.
        scale: multiplies the product of the factors.
        straight_through: A and B learn from the gradient of the whole masked sum, including pruned entries; if False,
            only from that of kept entries, which is the exact gradient of the loss.

    Under autocast, computes in the autocast dtype, forward and backward; otherwise x and weight must agree.
    """
    output: Tensor = _MaskedLowRank.apply(  # type: ignore[no-untyped-call]
        x, weight_OI, mask_OJ, a_RI, b_OR, bias_O, scale, straight_through
    )
    return output
