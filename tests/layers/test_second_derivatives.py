"""Gradients of gradients are refused, where they would be wrong."""

import pytest
import torch
from torch import nn

from sparse_train.layers.sparsify import sparsify


@pytest.mark.parametrize("straight_through", [False, True])
def test_a_gradient_penalty_is_refused(straight_through):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    sparsify(model, [model[0], model[2]])
    for layer in (model[0], model[2]):
        layer.straight_through = straight_through
    x = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_they_are_refused_where_only_the_last_layer_is_masked():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    sparsify(model, [model[2]])
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hessian(lambda x: model(x).sum(), torch.randn(6))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(model(torch.randn(4, 6)).sum(), model[0].weight, create_graph=True)
