import pytest
import torch

from sparse_train import prune
from sparse_train.criteria import RIA, Criterion, LayerContext, Magnitude, Wanda, WandaCumulative
from sparse_train.patterns import Unstructured
from sparse_train.statistics import ActivationNorm
from tests import reference
from tests.conftest import tiny_llama
from tests.reference import row_mask, wanda_scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_features", [4, 12, 20, 576])
def test_wanda_equals_the_formula_in_float64(dtype, in_features):
    weight, inputs = torch.randn(16, in_features).to(dtype), torch.randn(40, in_features)
    stats = ActivationNorm(in_features)
    stats.add(inputs)
    scores = Wanda().scores(LayerContext(weight, stats))
    torch.testing.assert_close(scores.double(), wanda_scores(weight, inputs), rtol=1e-6, atol=0)
    for sparsity in (0.0, 0.33, 0.5):
        reference = row_mask(weight.abs().float() * inputs.square().sum(0).sqrt(), sparsity)
        assert torch.equal(Unstructured().mask(scores, sparsity), reference)


def test_magnitude():
    weight = torch.tensor([[-2.0, 1.0, 0.0]], dtype=torch.bfloat16)
    assert Magnitude().scores(LayerContext(weight)).tolist() == [[2.0, 1.0, 0.0]]


def test_a_zero_scores_zero_whatever_its_input():
    # why pruned weights must keep a value: a weight held at zero could never come back
    stats = ActivationNorm(3)
    stats.add(torch.full((4, 3), 1e3))
    assert Wanda().scores(LayerContext(torch.tensor([[0.0, 1e-9, 0.0]]), stats))[0].argmax() == 1


def test_ria_equals_the_formula():
    weight, inputs = torch.randn(16, 32), torch.randn(50, 32)
    stats = ActivationNorm(32)
    stats.add(inputs)
    for a in (0.5, 1.0):
        expected = reference.ria_scores(weight, inputs, a)
        assert torch.allclose(RIA(a).scores(LayerContext(weight, stats)).double(), expected, rtol=1e-5)
    assert RIA() == RIA(0.5)  # as in the paper
    weight[3], weight[:, 5] = 0, 0  # an empty row and an empty column: 0, not NaN
    assert RIA().scores(LayerContext(weight, stats)).isfinite().all()


class _Faulty(Criterion):
    def __init__(self, scores):
        self._scores = scores

    def scores(self, layer):
        return self._scores(layer)


@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda layer: layer.weight_OI.abs()[:, :1], r"scores of shape \(32, 1\) for a weight of shape \(32, 32\)"),
        (lambda layer: layer.weight_OI.abs() * layer.norm_I, "needs_activations = True"),
    ],
)
def test_what_a_criterion_of_ones_own_gets_wrong(structure, scores, message):
    sparsity = None if structure == "2:4" else 0.5
    with pytest.raises((ValueError, AssertionError), match=message):
        prune(tiny_llama(), mask_structure=structure, sparsity=sparsity, criterion=_Faulty(scores))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
def test_scores_of_other_dtypes_are_taken_as_float32(structure, dtype):
    ours, theirs = tiny_llama(), tiny_llama()
    sparsity = None if structure == "2:4" else 0.5
    prune(
        ours,
        mask_structure=structure,
        sparsity=sparsity,
        criterion=_Faulty(lambda layer: layer.weight_OI.abs().to(dtype)),
    )
    expected = _Faulty(lambda layer: layer.weight_OI.abs().to(dtype).float())
    prune(theirs, mask_structure=structure, sparsity=sparsity, criterion=expected)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])


def test_the_cumulative_variant_sums_in_float64():
    layer = LayerContext(torch.randn(4, 8192), ActivationNorm(8192))
    layer.stats.add(torch.randn(4, 8192))
    scores, order = Wanda().scores(layer).double().sort(dim=1, stable=True)
    expected = torch.empty_like(scores).scatter(1, order, scores.cumsum(1) / scores.sum(1, keepdim=True))
    found = WandaCumulative().scores(layer).double()
    torch.testing.assert_close(found, expected, rtol=7e-8, atol=0)  # rounded to float32 once


def test_the_cumulative_variant_equals_bisection():
    weight, inputs = torch.randn(40, 64), torch.randn(50, 64)
    stats = ActivationNorm(64)
    stats.add(inputs)
    mask = Unstructured("layer").mask(WandaCumulative().scores(LayerContext(weight, stats)), 0.5)
    expected = reference.cumulative_mask(reference.wanda_scores(weight, inputs), 0.5)
    assert (mask != expected).sum() <= 2  # bisection stops between two weights; the count here is exact
    assert int((~mask).sum()) == mask.numel() // 2
    assert len(set((~mask).sum(1).tolist())) > 1  # rows differ
    rows = Unstructured("row").mask(WandaCumulative().scores(LayerContext(weight, stats)), 0.5)
    assert torch.equal(rows, Unstructured("row").mask(Wanda().scores(LayerContext(weight, stats)), 0.5))
