"""``masked_linear``: the product with ``where(mask, weight, 0)`` and its gradient.

Shape suffixes: T tokens, O out_features, I in_features, J packed mask bytes = ceil(I / 8).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparse_train.layers import masks


class _MaskedLinear(torch.autograd.Function):
    """``F.linear(x, where(mask, weight, 0), bias)`` that saves weight, packed mask and, if the weight is trained,
    x, but no masked copy.

    The masked weight is recomputed in backward: saving it would hold a second model between forward and backward
    (under FSDP2 or ZeRO-3, the whole gathered one).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, mask_OJ: Tensor, bias_O: Tensor | None, straight_through: bool
    ) -> Tensor:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        if not autocast and x.dtype != weight_OI.dtype:
            raise RuntimeError(f"input is {x.dtype} and weight is {weight_OI.dtype}; they must have the same dtype")
        ctx.x_dtype, ctx.straight_through, ctx.has_bias = x.dtype, straight_through, bias_O is not None
        ctx.device_type, ctx.dtype = device, dtype
        x = x.to(dtype)
        # of a frozen weight, the gradient does not need the input, which a dense layer would not hold either
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight_OI, mask_OJ)
        with torch.autocast(device, enabled=False):
            return F.linear(x, masks.apply(weight_OI, mask_OJ, dtype), None if bias_O is None else bias_O.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI, mask_OJ = ctx.saved_tensors
        grad_x = grad_weight_OI = grad_bias_O = None
        with torch.autocast(ctx.device_type, enabled=False):  # in case the caller runs backward inside autocast
            grad = grad.to(ctx.dtype)
            grad_TO = grad.reshape(-1, grad.shape[-1])
            if ctx.needs_input_grad[0]:
                grad_x = grad.matmul(masks.apply(weight_OI, mask_OJ, ctx.dtype)).to(ctx.x_dtype)
            if ctx.needs_input_grad[1]:
                grad_weight_OI = grad_TO.t().mm(x.reshape(-1, x.shape[-1])).to(weight_OI.dtype)
                if not ctx.straight_through:
                    grad_weight_OI = masks.apply(grad_weight_OI, mask_OJ)
            if ctx.has_bias and ctx.needs_input_grad[3]:
                grad_bias_O = grad_TO.sum(0)
        return grad_x, grad_weight_OI, None, grad_bias_O, None


def masked_linear(
    x: Tensor, weight_OI: Tensor, mask_OJ: Tensor, bias_O: Tensor | None = None, *, straight_through: bool = True
) -> Tensor:
    """``F.linear(x, where(mask, weight, 0), bias)``, with a choice of gradient for pruned weights.

    Args:
        x: (..., I).
        weight_OI: dense parameter, kept and shadow values.
        mask_OJ: packed mask, see ``sparse_train.layers.masks``.
        bias_O: (O,) or None.
        straight_through: pruned weights get the gradient of their masked self (Bengio et al., arXiv 1308.3432;
            Zhou et al., arXiv 2102.04010, section 3), or, if False, zero.

    Under autocast, computes in the autocast dtype, forward and backward; otherwise all dtypes must agree.
    """
    output: Tensor = _MaskedLinear.apply(x, weight_OI, mask_OJ, bias_O, straight_through)  # type: ignore[no-untyped-call]
    return output
