import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from sparse_train import sparsify
from sparse_train.distributions import OWL, Explicit, LayerShape, Uniform
from sparse_train.pruning.update import outlier_share
from sparse_train.statistics import ActivationNorm
from tests.distributions.shapes import HEAD, decoder, over_all


def papers_sparsities(ratios, sparsity, lmbda):
    """luuyin/OWL, lib/prune_all.py: the densities of blocks from their outlier ratios in percent."""
    ratios = np.array(ratios, dtype=np.float64)
    scaled = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * lmbda * 2)
    return 1 - (scaled - np.mean(scaled) + (1 - sparsity))


def papers_outlier_ratio(scores, threshold):
    """The same file: percent of a block's concatenated scores above threshold times their mean."""
    flat = np.concatenate([layer.double().numpy().ravel() for layer in scores])
    return float((flat > np.mean(flat) * threshold).sum()) / flat.size * 100


def test_owl_by_hand():
    # scaled to 0, 0.08, 0.16, of mean 0.08: the block in the middle keeps the model-wide sparsity
    found = OWL().sparsities(decoder(3), 0.7, {0: 0.03, 1: 0.02, 2: 0.01})
    assert [found[f"model.layers.{block}.mlp.up_proj"] for block in range(3)] == pytest.approx([0.62, 0.7, 0.78])
    assert found["model.layers.0.self_attn.q_proj"] == found["model.layers.0.mlp.down_proj"]


@given(
    ratios=st.lists(st.floats(0, 20), min_size=2, max_size=40),
    sparsity=st.floats(0.2, 0.8),
    lmbda=st.floats(0, 0.09),
)
def test_owl_equals_the_papers_code_where_blocks_have_one_size(ratios, sparsity, lmbda):
    assume(max(ratios) - min(ratios) > 1e-6)
    shapes = {f"{block}": LayerShape(block, 3, 5) for block in range(len(ratios))}
    found = OWL(owl_lmbda=lmbda).sparsities(shapes, sparsity, {b: ratio / 100 for b, ratio in enumerate(ratios)})
    np.testing.assert_allclose([found[name] for name in shapes], papers_sparsities(ratios, sparsity, lmbda), atol=1e-9)


@given(
    blocks=st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=12),
    outside=st.integers(0, 3),
    sparsity=st.floats(0.2, 0.8),
)
def test_owl_meets_the_sparsity_over_all_weights_of_unequal_blocks(blocks, outside, sparsity):
    shapes = {f"{block}": LayerShape(block, rows, 7) for block, (rows, _) in enumerate(blocks)}
    shapes |= {f"head{i}": LayerShape(None, 30, 30) for i in range(outside)}
    found = OWL().sparsities(shapes, sparsity, {block: share for block, (_, share) in enumerate(blocks)})
    assert over_all(shapes, found) == pytest.approx(sparsity, abs=1e-9)
    assert all(found[f"head{i}"] == sparsity for i in range(outside))
    inside = [found[f"{block}"] for block in range(len(blocks))]
    assert max(inside) - min(inside) <= 0.16 + 1e-9
    by_share = np.argsort([share for _, share in blocks], kind="stable")
    assert (np.diff(np.array(inside)[by_share]) <= 1e-12).all()  # more outliers, denser


def test_owl_with_equal_shares_or_one_block_is_uniform():
    assert set(OWL().sparsities(decoder() | HEAD, 0.6, {0: 0.02, 1: 0.02}).values()) == {0.6}
    assert set(OWL().sparsities(decoder(1), 0.0, {0: 0.02}).values()) == {0.0}
    assert set(OWL(owl_lmbda=0).sparsities(decoder(), 0.6, {0: 0.02, 1: 0.01}).values()) == {0.6}


def test_owl_looks_only_at_blocks_with_layers():
    shapes = decoder(3)
    for name in [name for name in shapes if ".1." in name]:
        del shapes[name]
    without = OWL().sparsities(shapes, 0.7, {0: 0.03, 2: 0.01})
    assert OWL().sparsities(shapes, 0.7, {0: 0.03, 1: 0.0, 2: 0.01}) == without


@pytest.mark.parametrize(
    ("distribution", "sparsity", "message"),
    [
        (OWL(), 0.05, "owl_lmbda=0.08 at a sparsity of 0.05 would give blocks sparsities from -0.03 to 0.13"),
        (OWL(owl_lmbda=0.2), 0.9, r"from 0.7 to 1.1.*Make owl_lmbda smaller"),
        (OWL(owl_lmbda=0.25), 0.75, "from 0.5 to 1, which must"),  # the sparsest block would be empty
        (OWL(), 0.0, "owl_lmbda=0.08 at a sparsity of 0 would"),
    ],
)
def test_owl_and_uniform_refuse(distribution, sparsity, message):
    with pytest.raises(ValueError, match=message):
        distribution.sparsities(decoder(), sparsity, {0: 0.03, 1: 0.01})


def test_owl_needs_blocks_and_sensible_numbers():
    with pytest.raises(ValueError, match="no targeted layer is in one. Use Uniform"):
        OWL().sparsities(HEAD, 0.5, {})
    for wrong in ({"owl_m": 0}, {"owl_m": float("nan")}, {"owl_lmbda": -0.1}, {"owl_lmbda": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} .*got"):
            OWL(**wrong)
    assert OWL(owl_m=3).outliers_above == 3 and Uniform().outliers_above is None is Explicit({}).outliers_above


def matrices(weights):
    """Layers whose Wanda scores are their weights: each input feature has norm 1."""
    layers = nn.ModuleList(nn.Linear(weight.shape[1], len(weight), bias=False) for weight in weights)
    sparsify(layers, layers)
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data.copy_(weight)
        layer.statistics = ActivationNorm(layer.in_features)
        layer.statistics.add(torch.ones(1, layer.in_features))
    return list(layers)


def test_outlier_share_by_hand():
    # ten scores of sum 20: above 3 times their mean, 6, is only the 10; equal to it does not count
    layers = matrices([torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([[6.0, 1.0, 1.0], [1.0, 1.0, 0.0]])])
    assert outlier_share(layers, 3.0) == 0.1
    assert outlier_share(layers[:1], 3.0) == 0.25  # mean 2.5: the threshold is the layers' common one
    assert outlier_share(matrices([torch.zeros(2, 3)]), 5.0) == 0.0


@pytest.mark.parametrize("owl_m", [1.0, 5.0])
def test_outlier_share_equals_the_papers_code(owl_m):
    scores = [torch.randn(shape).abs() * torch.rand(shape[1]).pow(4) for shape in ((30, 20), (50, 20), (20, 50))]
    share = outlier_share(matrices(scores), owl_m)
    assert share == pytest.approx(papers_outlier_ratio(scores, owl_m) / 100, abs=1e-12)


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_outlier_share_refuses_infinities(wrong):
    with pytest.raises(ValueError, match="infinite or NaN"):
        outlier_share(matrices([torch.ones(2, 2), torch.tensor([[1.0, wrong]])]), 5.0)


def test_a_block_may_stay_dense():
    shapes = {f"{block}.fc": LayerShape(block, 4, 8) for block in range(2)}
    assert OWL(owl_lmbda=0.25).sparsities(shapes, 0.25, {0: 0.0, 1: 1.0}) == {"0.fc": 0.5, "1.fc": 0.0}
