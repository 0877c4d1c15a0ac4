import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_train.distributions import OWL, Explicit, LayerShape, check_pattern, round_up
from sparse_train.patterns import NM, Pattern, Unstructured
from tests.distributions.shapes import HEAD, decoder, divide, zeros

ROWS, LAYER = Unstructured("row"), Unstructured("layer")


def test_counts_by_hand():
    shapes = {"a": LayerShape(0, 4, 10), "b": LayerShape(1, 4, 10), "c": LayerShape(2, 8, 10)}
    wanted = {"a": 0.46, "b": 0.5, "c": 0.0}
    found = round_up(shapes, wanted, ROWS)
    assert found == {"a": 0.55, "b": 0.55, "c": 0.0} and zeros(shapes, found, ROWS) == {"a": 20, "b": 20, "c": 0}
    assert zeros(shapes, round_up(shapes, wanted, LAYER), LAYER) == {"a": 19, "b": 20, "c": 0}


def test_whole_counts_stay_whatever_floats_make_of_them():
    # 100 * 0.29 is 28.999999999999996, and 100 * 0.55 is 55.00000000000001
    shapes = {"a": LayerShape(0, 3, 100), "b": LayerShape(1, 3, 100)}
    assert zeros(shapes, round_up(shapes, {"a": 0.29, "b": 0.55}, ROWS), ROWS) == {"a": 87, "b": 165}


def test_a_layer_never_loses_everything():
    shapes = {"a": LayerShape(0, 5, 1), "b": LayerShape(0, 1, 2)}
    found = round_up(shapes, {"a": 0.9, "b": 0.999999999}, ROWS)
    assert found["a"] == 0.0 and found["b"] == 0.75 and zeros(shapes, found, ROWS) == {"a": 0, "b": 1}


@given(
    blocks=st.integers(2, 8),
    hidden=st.integers(8, 40),
    inner=st.integers(8, 60),
    sparsity=st.floats(0.3, 0.7),
    pattern=st.sampled_from([ROWS, LAYER]),
    seed=st.integers(0, 99),
)
def test_no_layer_misses_its_sparsity_by_a_weight_a_group_and_the_model_is_not_denser(
    blocks, hidden, inner, sparsity, pattern, seed
):
    shapes = decoder(blocks, hidden, inner) | HEAD
    outliers = dict(enumerate(np.random.default_rng(seed).random(blocks)))
    pruned = zeros(shapes, divide(OWL(), pattern, shapes, sparsity, outliers), pattern)
    for name, share in OWL().sparsities(shapes, sparsity, outliers).items():
        size, step = shapes[name].size, shapes[name].rows if pattern == ROWS else 1
        assert -1e-3 <= pruned[name] - share * size < step
    assert sum(pruned.values()) >= sparsity * sum(shape.size for shape in shapes.values()) - 1e-3


def test_a_pattern_of_ones_own_gets_its_sparsities():
    class Mine(Pattern):
        def mask(self, scores_OI, sparsity):
            raise NotImplementedError

    assert set(divide(Explicit({"model": 0.33}), Mine(), decoder(), 0.33, {}).values()) == {0.33}


@pytest.mark.parametrize("distribution", [OWL(), Explicit({"up_proj": 0.5})])
def test_patterns_that_leave_nothing_to_divide(distribution):
    name = type(distribution).__name__
    with pytest.raises(ValueError, match=f"2:4 has one sparsity, 0.5, in every layer: {name} cannot change that"):
        check_pattern(distribution, NM(2, 4))
    with pytest.raises(ValueError, match=f"already divides the sparsity: {name} cannot.*Use Unstructured"):
        check_pattern(distribution, Unstructured("model"))
    check_pattern(distribution, ROWS)
    check_pattern(distribution, LAYER)
