"""``masked_linear``: the product with ``where(mask, weight, 0)``, or ``where(mask, W + s B A, 0)``, and its gradients.

Shape suffixes: T tokens, O out_features, I in_features, R rank, J packed mask bytes = ceil(I / 8).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_train.layers import masks


def low_rank_sum(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """``W + scale * B A`` (O, I), a new tensor of the weight's dtype, summed in the wider of the two dtypes."""
    dtype = torch.promote_types(weight_OI.dtype, a_RI.dtype)
    total_OI = torch.addmm(weight_OI.to(dtype), b_OR.to(dtype), a_RI.to(dtype), alpha=scale)
    return total_OI.to(weight_OI.dtype)


class _MaskedLinear(torch.autograd.Function):
    """Holds between forward and backward what a dense layer holds, and the packed mask.

    Under autocast, both hold the weight as it was cast: here the masked one, for each call (of a dense weight that
    several calls share, autocast keeps one). Otherwise the masked weight is made again in backward: to hold it would
    take a second model (under FSDP2 or ZeRO-3, the whole gathered one).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        mask_OJ: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor | None,
        b_OR: Tensor | None,
        scale: float,
        straight_through: bool,
    ) -> Tensor:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        if not autocast and x.dtype != weight_OI.dtype:
            raise RuntimeError(f"input is {x.dtype} and weight is {weight_OI.dtype}; they must have the same dtype")
        ctx.x_dtype, ctx.device_type, ctx.dtype = x.dtype, device, dtype
        ctx.scale, ctx.straight_through = scale, straight_through
        ctx.weight_dtype, ctx.cast = weight_OI.dtype, dtype != weight_OI.dtype
        x = x.to(dtype)
        # of a frozen weight, the gradient does not need the input, which a dense layer would not hold either
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        with torch.autocast(device, enabled=False):  # factors are summed in full precision, as a merge sums them
            masked_OI = _masked(weight_OI, mask_OJ, a_RI, b_OR, scale, dtype)
            held_OI = masked_OI if ctx.cast else weight_OI
            ctx.save_for_backward(
                x if trained else None, held_OI if ctx.needs_input_grad[0] else None, mask_OJ, a_RI, b_OR
            )
            product = F.linear(x, masked_OI, None if bias_O is None else bias_O.to(dtype))
            # with a bias it may be a view, which autograd would not let the caller change in place (ReLU(inplace=True))
            return product if product.is_nested else torch.ops.aten._unsafe_view(product, product.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a second derivative will be asked for
            raise RuntimeError("Masked layers have no second derivative (create_graph=True).")
        x, held_OI, mask_OJ, a_RI, b_OR = ctx.saved_tensors
        wants_x, wants_weight, _, wants_bias, wants_a, wants_b, _, _ = ctx.needs_input_grad
        grad_x = grad_weight_OI = grad_bias_O = grad_a_RI = grad_b_OR = None
        with torch.autocast(ctx.device_type, enabled=False):  # in case the caller runs backward inside autocast
            grad = grad.to(ctx.dtype)
            grad_TO = grad.reshape(-1, grad.shape[-1])
            if wants_x:
                masked_OI = held_OI if ctx.cast else _masked(held_OI, mask_OJ, a_RI, b_OR, ctx.scale, ctx.dtype)
                grad_x = grad.matmul(masked_OI).to(ctx.x_dtype)
            if wants_weight:
                grad_weight_OI = grad_TO.t().mm(x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype)
                if not ctx.straight_through:
                    grad_weight_OI = masks.apply(grad_weight_OI, mask_OJ)
            if wants_a or wants_b:
                grad_a_RI, grad_b_OR = _grad_of_factors(ctx, grad_TO, x.reshape(-1, x.shape[-1]), mask_OJ, a_RI, b_OR)
            if wants_bias:
                grad_bias_O = grad_TO.sum(0)
        return grad_x, grad_weight_OI, None, grad_bias_O, grad_a_RI, grad_b_OR, None, None


def _masked(
    weight_OI: Tensor, mask_OJ: Tensor, a_RI: Tensor | None, b_OR: Tensor | None, scale: float, dtype: torch.dtype
) -> Tensor:
    total_OI = weight_OI if a_RI is None or b_OR is None else low_rank_sum(weight_OI, a_RI, b_OR, scale)
    return masks.apply(total_OI, mask_OJ, dtype)


def _grad_of_factors(
    ctx: Any, grad_TO: Tensor, x_TI: Tensor, mask_OJ: Tensor, a_RI: Tensor, b_OR: Tensor
) -> tuple[Tensor, Tensor]:
    if ctx.straight_through:  # the gradient of the sum is a product that never has to be computed as a whole
        grad_a_RI = grad_TO.mm(b_OR.to(x_TI.dtype)).t().mm(x_TI).to(a_RI.dtype)
        grad_b_OR = grad_TO.t().mm(x_TI.mm(a_RI.to(x_TI.dtype).t())).to(b_OR.dtype)
    else:
        sum_OI = masks.apply(grad_TO.t().mm(x_TI), mask_OJ).to(a_RI.dtype)
        grad_a_RI, grad_b_OR = b_OR.t().mm(sum_OI), sum_OI.mm(a_RI.t())
    return ctx.scale * grad_a_RI, ctx.scale * grad_b_OR


def read_elsewhere(loss: Tensor, parameters: Iterable[Tensor]) -> set[int]:
    """Ids of those parameters that a loss also depends on in another way than by ``masked_linear``.

    From the graph of autograd. What a compiled part reads, or one that is frozen or without gradients, is not seen.
    """
    wanted, elsewhere = set(map(id, parameters)), set()
    seen, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        elsewhere |= {id(getattr(node, "variable", None))} & wanted
        edges = [following for following, _ in node.next_functions]
        if isinstance(node, _MaskedLinear._backward_cls):
            del edges[1]  # the weight
        elif "Compiled" in node.name():
            edges = [each for each in edges if not hasattr(each, "variable")]
        nodes += edges
    return elsewhere


def masked_linear(
    x: Tensor,
    weight_OI: Tensor,
    mask_OJ: Tensor,
    bias_O: Tensor | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    straight_through: bool = True,
) -> Tensor:
    """``F.linear(x, where(mask, weight, 0), bias)``, with a choice of gradient for pruned weights.

    ``factors``, A (R, I) and B (O, R) of one dtype, are a low-rank adapter inside the mask: the weight is then
    ``W + scale * B A``, where A and B learn and W, which must be frozen, does not. With ``straight_through``, pruned
    weights get the gradient of their masked self (Bengio et al., arXiv 1308.3432; Zhou et al., arXiv 2102.04010,
    section 3), and factors that of the whole masked sum; otherwise zero, and that of kept entries: the exact gradient
    of the loss. Under autocast, computes in its dtype, forward and backward; otherwise all dtypes must agree.
    """
    a_RI, b_OR = factors or (None, None)
    return _MaskedLinear.apply(x, weight_OI, mask_OJ, bias_O, a_RI, b_OR, scale, straight_through)  # type: ignore[no-untyped-call]
