import pytest
import torch

from sparse_train.activations import ActivationNorm
from sparse_train.criteria import Magnitude, Wanda
from sparse_train.patterns import Unstructured

from .reference import row_mask, wanda_scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_features", [4, 12, 20, 576])
def test_wanda_equals_the_formula_in_float64(dtype, in_features):
    weight, inputs = torch.randn(16, in_features).to(dtype), torch.randn(40, in_features)
    stats = ActivationNorm(in_features)
    stats.add(inputs)
    scores = Wanda().scores(weight, stats)
    torch.testing.assert_close(scores.double(), wanda_scores(weight, inputs), rtol=1e-6, atol=0)
    for sparsity in (0.0, 0.33, 0.5):
        reference = row_mask(weight.abs().float() * inputs.square().sum(0).sqrt(), sparsity)
        assert torch.equal(Unstructured().mask(scores, sparsity), reference)


def test_magnitude():
    weight = torch.tensor([[-2.0, 1.0, 0.0]], dtype=torch.bfloat16)
    assert Magnitude().scores(weight).tolist() == [[2.0, 1.0, 0.0]]


def test_a_zero_scores_zero_whatever_its_input():
    # why pruned weights must keep a value: a weight held at zero could never come back
    stats = ActivationNorm(3)
    stats.add(torch.full((4, 3), 1e3))
    assert Wanda().scores(torch.tensor([[0.0, 1e-9, 0.0]]), stats)[0].argmax() == 1
