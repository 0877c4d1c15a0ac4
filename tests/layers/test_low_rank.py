"""The product with where(mask, W + s B A, 0) against plain autograd of it, in float64."""

import pytest
import torch
from torch.nn import functional as F

from sparse_train.layers import masks
from sparse_train.layers.functional import low_rank_sum, masked_linear
from tests.layers.test_sparse_linear import saved_bytes

SCALE = 1.5


def low_rank(x, weight, mask, a, b, bias=None, **options):
    return masked_linear(x, weight, mask, bias, (a, b), **options)


def tensors(dtype=torch.float64, in_features=12, out_features=6, rank=3):
    weight = torch.randn(out_features, in_features, dtype=dtype)
    a, b = torch.randn(rank, in_features, dtype=dtype), torch.randn(out_features, rank, dtype=dtype)
    mask = torch.rand(out_features, in_features) < 0.5
    x, bias = torch.randn(2, 5, in_features, dtype=dtype), torch.randn(out_features, dtype=dtype)
    return weight, mask, [each.requires_grad_() for each in (x, a, b, bias)]


def loss_of(out):
    return (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()).sum()


@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("in_features", [12, 16])
def test_forward_and_gradients_are_those_of_the_plain_formula(straight_through, in_features):
    weight, mask, learned = tensors(in_features=in_features)
    x, a, b, bias = learned
    total = weight + SCALE * b @ a
    masked = torch.where(mask, total, 0)
    if straight_through:  # the value of the masked sum, the gradient of the sum
        masked_value = masked.detach() + (total - total.detach())
        expected_out = F.linear(x, masked_value, bias)
        grads = torch.autograd.grad(loss_of(expected_out), (a, b))
        expected = [torch.autograd.grad(loss_of(F.linear(x, masked.detach(), bias)), x)[0], *grads]
    else:
        expected_out = F.linear(x, masked, bias)
        expected = list(torch.autograd.grad(loss_of(expected_out), (x, a, b)))
    expected_bias = torch.autograd.grad(loss_of(F.linear(x, masked.detach(), bias)), bias)[0]
    out = low_rank(x, weight, masks.pack(mask), a, b, bias, scale=SCALE, straight_through=straight_through)
    torch.testing.assert_close(out, expected_out)
    for found, wanted in zip(torch.autograd.grad(loss_of(out), learned), [*expected, expected_bias], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for part, wanted in ((a, expected[1]), (b, expected[2])):  # the other one is frozen
        own = [each if each is part else each.detach() for each in (x, a, b)]
        out = low_rank(own[0], weight, masks.pack(mask), *own[1:], scale=SCALE, straight_through=straight_through)
        (alone,) = torch.autograd.grad(loss_of(out), part)
        torch.testing.assert_close(alone, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("straight_through", [True, False])
def test_nothing_of_the_size_of_the_weight_is_held_but_the_weight_and_its_mask(straight_through):
    weight, mask, (x, a, b, bias) = tensors(torch.float32, in_features=64, out_features=48, rank=2)
    packed = masks.pack(mask)
    held, _ = saved_bytes(
        lambda: low_rank(x, weight, packed, a, b, bias, scale=SCALE, straight_through=straight_through)
    )
    assert held == sum(each.untyped_storage().nbytes() for each in (x, weight, packed, a, b))


@pytest.mark.parametrize("straight_through", [True, False])
def test_autocast_computes_with_the_rounded_sum(straight_through):
    weight, mask, (x, a, b, bias) = tensors(torch.float32)
    masked = torch.where(mask, weight + SCALE * b @ a, 0).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = low_rank(x, weight, masks.pack(mask), a, b, bias, scale=SCALE, straight_through=straight_through)
        expected = F.linear(x, masked, bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.float().square().sum(), (x, a, b))  # outside autocast, as Lightning does it
    grad_x, gradient = torch.autograd.grad(expected.float().square().sum(), (x, masked))
    gradient = gradient if straight_through else torch.where(mask, gradient, 0)
    assert [each.dtype for each in grads] == [torch.float32] * 3
    torch.testing.assert_close(grads[0], grad_x, rtol=0.02, atol=0.02)
    for found, wanted in ((grads[1], SCALE * b.t() @ gradient), (grads[2], SCALE * gradient @ a.t())):
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_mixed_dtypes_without_autocast_are_refused():
    weight, mask, (x, a, b, _) = tensors(torch.float32)
    with pytest.raises(RuntimeError, match="same dtype"):
        low_rank(x.bfloat16(), weight, masks.pack(mask), a, b, scale=1.0, straight_through=True)


def test_a_weight_in_half_precision_is_summed_in_that_of_its_factors():
    weight = torch.full((1, 1), 256.0, dtype=torch.bfloat16)  # the next bfloat16 is 258
    a, b = torch.ones(1, 1), torch.full((1, 1), 1.5)
    assert low_rank_sum(weight, a, b, 1.0).item() == 258  # 257.5, rounded once
    assert low_rank_sum(weight, a, b, 0.5).item() == 256
    assert low_rank_sum(weight, a, b, 1.0).dtype == torch.bfloat16
