import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_train.distributions import OWL, Explicit, LayerShape, PerBlock, check_pattern, fit_counts
from sparse_train.patterns import NM, Pattern, Unstructured
from tests.distributions.shapes import HEAD, TOTAL, decoder, divide, over_all, zeros

ROWS, LAYER = Unstructured("row"), Unstructured("layer")


def test_counts_by_hand():
    shapes = {"a": LayerShape(0, 4, 10), "b": LayerShape(1, 4, 10), "c": LayerShape(2, 8, 10)}
    # rows want 4.6, 5.2 and 5.1 of 10: rounded down 4, 5, 5, that is 76 of the 80 zeros; "a" loses most, and is 4
    found = fit_counts(shapes, {"a": 0.46, "b": 0.52, "c": 0.51}, ROWS, 0.5)
    assert zeros(shapes, found, ROWS) == {"a": 20, "b": 20, "c": 40}
    assert found == {"a": 0.55, "b": 0.55, "c": 0.55}
    # whole layers lose less than one weight each: 18.4, 20.8 and 40.8
    assert zeros(shapes, fit_counts(shapes, {"a": 0.46, "b": 0.52, "c": 0.51}, LAYER, 0.5), LAYER) == {
        "a": 18,
        "b": 21,
        "c": 41,
    }


def test_whole_counts_stay_whatever_floats_make_of_them():
    # 100 * 0.29 is 28.999999999999996
    shapes = {"a": LayerShape(0, 3, 100), "b": LayerShape(1, 3, 100)}
    for sparsity in (0.145, 0.144, 0.146):  # the user's total may differ a little from that of the layers
        found = fit_counts(shapes, {"a": 0.29, "b": 0.0}, ROWS, sparsity)
        assert zeros(shapes, found, ROWS) == {"a": 87, "b": 0} and found["b"] == 0.0
    assert zeros(shapes, fit_counts(shapes, {"a": 0.29, "b": 0.0}, ROWS, 0.14), ROWS)["a"] == 87


def test_the_largest_remainders_go_up_first():
    # rows want 4.9 and 4.3 of 10; 3.9 zeros are missing: one more a row of "a" leaves 0.9, of "b" it would be -0.1
    shapes = {"b": LayerShape(0, 4, 10), "a": LayerShape(0, 3, 10)}
    wanted = {"b": 0.43, "a": 0.49}
    assert zeros(shapes, fit_counts(shapes, wanted, ROWS, over_all(shapes, wanted)), ROWS) == {"b": 16, "a": 15}


def test_a_layer_never_loses_everything():
    shapes = {"a": LayerShape(0, 5, 1), "b": LayerShape(0, 1, 2)}
    found = fit_counts(shapes, {"a": 0.9, "b": 0.999999999}, ROWS, 0.92)
    assert found["a"] == 0.0 and found["b"] == 0.75 and zeros(shapes, found, ROWS) == {"a": 0, "b": 1}


layer_shapes = st.builds(LayerShape, st.none(), st.integers(1, 12), st.integers(1, 40))
layers_with_shares = st.lists(
    st.tuples(layer_shapes, st.one_of(st.just(0.0), st.floats(0, 1, exclude_max=True))), min_size=1, max_size=8
)


@given(layers=layers_with_shares, pattern=st.sampled_from([ROWS, LAYER]))
def test_counts_are_exact_and_no_change_comes_nearer(layers, pattern):
    shapes = {str(i): shape for i, (shape, _) in enumerate(layers)}
    wanted = {str(i): share for i, (_, share) in enumerate(layers)}
    target = over_all(shapes, wanted)
    found = fit_counts(shapes, wanted, pattern, target)
    pruned = zeros(shapes, found, pattern)
    off = sum(pruned.values()) - target * sum(shape.size for shape in shapes.values())
    for name, shape in shapes.items():
        members, step = (shape.columns, shape.rows) if pattern == ROWS else (shape.size, 1)
        assert 0 <= found[name] < 1
        assert found[name] == 0 or wanted[name] > 0
        assert pruned[name] % step == 0
        count, exact = pruned[name] // step, members * wanted[name]
        assert abs(count - exact) < 1 + 1e-5  # the whole count below or above, nothing else
        assert int(members * found[name]) == count
        if abs(exact - round(exact)) > 1e-5:
            other = step if count < exact else -step
            if count + 1 < members or other < 0:
                assert abs(off) <= abs(off + other) + 1e-6
                assert abs(off) <= step / 2 + 1e-3 or off * other > 0


@given(
    blocks=st.integers(2, 8),
    hidden=st.integers(8, 40),
    inner=st.integers(8, 60),
    sparsity=st.floats(0.3, 0.7),
    pattern=st.sampled_from([ROWS, LAYER]),
    seed=st.integers(0, 99),
)
def test_owl_meets_the_sparsity_to_half_a_step_of_one_layer(blocks, hidden, inner, sparsity, pattern, seed):
    shapes = decoder(blocks, hidden, inner) | HEAD
    shares = np.random.default_rng(seed).random(blocks)
    found = divide(OWL(), pattern, shapes, sparsity, dict(enumerate(shares)))
    total = sum(shape.size for shape in shapes.values())
    off = abs(sum(zeros(shapes, found, pattern).values()) - sparsity * total)
    # rounding down everywhere would miss it by up to a step of every layer
    assert off <= (max(hidden, inner, HEAD["lm_head"].rows) / 2 if pattern == ROWS else 0.5) + 1e-3


def test_named_layers_with_whole_counts_are_not_moved_for_the_total():
    found = divide(Explicit({"up_proj": 0.5, "q_proj": 0.0}), ROWS, decoder(), 0.31, {})
    pruned = zeros(decoder(), found, ROWS)
    assert [pruned[name] for name in decoder() if "up_proj" in name] == [48, 48]
    assert [pruned[name] for name in decoder() if "q_proj" in name] == [0, 0]
    assert abs(sum(pruned.values()) - 0.31 * TOTAL) <= 4  # half a step of down_proj, which has 8 rows


def test_without_a_model_wide_sparsity_the_layers_own_is_met():
    found = divide(PerBlock([0.33, 0.47]), LAYER, decoder(), None, {})
    assert sum(zeros(decoder(), found, LAYER).values()) == round(0.4 * TOTAL)


def test_a_pattern_of_ones_own_gets_its_sparsities():
    class Mine(Pattern):
        def mask(self, scores_OI, sparsity):
            raise NotImplementedError

    assert set(divide(PerBlock([0.33, 0.47]), Mine(), decoder(), None, {}).values()) == {0.33, 0.47}


@pytest.mark.parametrize("distribution", [OWL(), Explicit({"up_proj": 0.5}), PerBlock([0.5, 0.5])])
def test_patterns_that_leave_nothing_to_divide(distribution):
    name = type(distribution).__name__
    with pytest.raises(ValueError, match=f"2:4 has one sparsity, 0.5, in every layer: {name} cannot change that"):
        check_pattern(distribution, NM(2, 4))
    with pytest.raises(ValueError, match=f"already divides the sparsity: {name} cannot.*Use Unstructured"):
        check_pattern(distribution, Unstructured("model"))
    check_pattern(distribution, ROWS)
    check_pattern(distribution, LAYER)
