"""Gradients of gradients through masked layers, against plain autograd of the same model masked by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparse_train.layers.sparsify import sparsify


class ByHand(nn.Linear):
    """A masked layer in plain operations; pruned weights get the gradient of their masked self, or none."""

    def forward(self, x):
        masked = torch.where(self.mask, self.weight, 0)
        if self.straight_through:
            masked = self.weight + (masked - self.weight).detach()
        return F.linear(x, masked, self.bias)


def pair(straight_through, masked=(0, 2)):
    """A network with masked layers, and the same one masked by hand, in float64."""
    ours = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    theirs = copy.deepcopy(ours)
    layers = [ours[i] for i in masked]
    sparsify(ours, layers)
    for i in masked:
        mask = torch.rand_like(ours[i].weight) < 0.5
        ours[i].set_mask(mask)
        ours[i].straight_through = straight_through
        theirs[i].__class__, theirs[i].mask, theirs[i].straight_through = ByHand, mask, straight_through
    return ours, theirs


def penalty_gradients(model, x, of_weights):
    """Gradients of a loss with a penalty on the size of its gradient by inputs, or by weights."""
    x = x.clone().requires_grad_()
    loss = model(x).cos().sum()
    by = list(model.parameters()) if of_weights else [x]
    penalty = sum(each.square().sum() for each in torch.autograd.grad(loss, by, create_graph=True))
    return torch.autograd.grad(loss + penalty, [x, *model.parameters()])


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("masked", [(0, 2), (0,), (2,)], ids=["both", "first only", "last only"])
@pytest.mark.parametrize("of_weights", [False, True], ids=["by inputs", "by weights"])
def test_a_gradient_penalty_is_that_of_the_model_masked_by_hand(straight_through, masked, of_weights):
    ours, theirs = pair(straight_through, masked)
    x = torch.randn(4, 6, dtype=torch.float64)
    found, expected = (penalty_gradients(model, x, of_weights) for model in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    pruned = found[1 if 0 in masked else 3][~theirs[masked[0]].mask]
    assert bool(pruned.any()) == straight_through


@pytest.mark.parametrize("straight_through", [False, True])
def test_the_penalty_of_one_layer_alone(straight_through):
    """The gradient that arrives there is a constant."""
    layer = nn.Linear(6, 5).double()
    sparsify(layer, [layer])
    mask = torch.rand(5, 6) < 0.5
    layer.set_mask(mask)
    layer.straight_through = straight_through
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    expected = 2 * 4 * torch.where(mask, layer.weight, 0).detach().sum(0).expand(5, 6)
    torch.testing.assert_close(layer.weight.grad, expected if straight_through else torch.where(mask, expected, 0))


def test_the_hessian_is_that_of_the_model_masked_by_hand():
    ours, theirs = pair(straight_through=False)
    x = torch.randn(6, dtype=torch.float64)
    found, expected = (torch.autograd.functional.hessian(lambda x, m=m: m(x).sum(), x) for m in (ours, theirs))
    assert found.any()
    torch.testing.assert_close(found, expected)


def test_under_autocast_second_derivatives_are_refused():
    ours, _ = pair(straight_through=False)
    ours, x = ours.float(), torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x).sum()
    with pytest.raises(RuntimeError, match="Disable autocast around the forward"):
        torch.autograd.grad(out, x, create_graph=True)
    torch.autograd.grad(ours(x).sum(), x, create_graph=True)
