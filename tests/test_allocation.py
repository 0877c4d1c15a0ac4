import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sparse_train.allocation import (
    OWL,
    Explicit,
    LayerShape,
    PerBlock,
    Uniform,
    check_pattern,
    divide,
    fit_counts,
    outlier_share,
)
from sparse_train.patterns import NM, Pattern, Unstructured

from .reference import row_mask


def decoder(blocks=2, hidden=8, inner=12):
    shapes = {}
    for block in range(blocks):
        shapes[f"model.layers.{block}.self_attn.q_proj"] = LayerShape(block, hidden, hidden)
        shapes[f"model.layers.{block}.mlp.up_proj"] = LayerShape(block, inner, hidden)
        shapes[f"model.layers.{block}.mlp.down_proj"] = LayerShape(block, hidden, inner)
    return shapes


HEAD = {"lm_head": LayerShape(None, 20, 8)}
TOTAL = 2 * (64 + 96 + 96)  # weights of decoder()


def short(found):
    return {name.removeprefix("model.layers."): round(value, 6) for name, value in found.items()}


def over_all(shapes, sparsities):
    sizes = np.array([shapes[name].size for name in shapes], dtype=np.float64)
    return float((sizes * [sparsities[name] for name in shapes]).sum() / sizes.sum())


def zeros(shapes, sparsities, pattern):
    """Counted on the masks that the pattern makes of random scores."""
    return {
        name: int((~pattern.mask(torch.rand(shape.rows, shape.columns), sparsities[name])).sum())
        for name, shape in shapes.items()
    }


# --- uniform


def test_uniform_rows_prune_what_the_wanda_reference_prunes():
    shapes = decoder() | HEAD
    found = divide(Uniform(), Unstructured(), shapes, 0.3, {})
    assert found == dict.fromkeys(shapes, 0.3)
    for name, shape in shapes.items():
        scores = torch.rand(shape.rows, shape.columns)
        assert torch.equal(Unstructured().mask(scores, found[name]), row_mask(scores, 0.3))


def test_uniform_goes_with_every_pattern():
    for pattern, sparsity in ((NM(2, 4), 0.5), (Unstructured("model"), 0.6), (Unstructured("layer"), 0.6)):
        assert divide(Uniform(), pattern, HEAD, sparsity, {}) == {"lm_head": sparsity}


# --- OWL


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
    ("allocation", "sparsity", "message"),
    [
        (OWL(), 0.05, "owl_lmbda=0.08 at a sparsity of 0.05 would give blocks sparsities from -0.03 to 0.13"),
        (OWL(), 0.05, r"Make owl_lmbda at most 0\.05\."),
        (OWL(owl_lmbda=0.2), 0.9, r"from 0.7 to 1.1.*Make owl_lmbda at most 0\.09"),
        (OWL(owl_lmbda=0.3), 0.75, r"Make owl_lmbda at most 0\.2499"),  # at 0.25 the sparsest block would be empty
        (OWL(), 0.0, "owl_lmbda=0.08 at a sparsity of 0 would"),
        (OWL(), None, "OWL divides a sparsity: give one"),
        (OWL(), 60, "write 0.6"),
        (Uniform(), None, "Uniform divides a sparsity: give one"),
        (Uniform(), 1.0, "at least 0 and below 1"),
    ],
)
def test_owl_and_uniform_refuse(allocation, sparsity, message):
    with pytest.raises(ValueError, match=message):
        allocation.sparsities(decoder(), sparsity, {0: 0.03, 1: 0.01})


@given(
    shares=st.lists(st.floats(0, 1), min_size=2, max_size=8, unique=True),
    sparsity=st.floats(0.01, 0.99),
    lmbda=st.floats(0, 0.99),
)
def test_the_owl_lmbda_that_the_error_proposes_works(shares, sparsity, lmbda):
    shapes = {f"{block}": LayerShape(block, 1 + block, 4) for block in range(len(shares))}
    outliers = dict(enumerate(shares))
    try:
        found = OWL(owl_lmbda=lmbda).sparsities(shapes, sparsity, outliers)
    except ValueError as error:
        proposed = float(str(error).rpartition("at most ")[2].rstrip("."))
        assert proposed < lmbda
        found = OWL(owl_lmbda=proposed).sparsities(shapes, sparsity, outliers)
    assert all(0 <= value < 1 for value in found.values())


def test_owl_needs_blocks_and_sensible_numbers():
    with pytest.raises(ValueError, match="no targeted layer is in one. Use Uniform"):
        OWL().sparsities(HEAD, 0.5, {})
    for wrong in ({"owl_m": 0}, {"owl_m": float("nan")}, {"owl_lmbda": -0.1}, {"owl_lmbda": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} .*got"):
            OWL(**wrong)
    assert OWL.needs_outliers and not any(cls.needs_outliers for cls in (Uniform, Explicit, PerBlock))


def test_outlier_share_by_hand():
    # ten scores of sum 20: above 3 times their mean, 6, is only the 10; equal to it does not count
    layers = [torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([[6.0, 1.0, 1.0], [1.0, 1.0, 0.0]])]
    assert outlier_share([lambda layer=layer: layer for layer in layers], 3.0) == 0.1
    assert outlier_share([lambda: layers[0]], 3.0) == 0.25  # mean 2.5: the threshold is the layers' common one
    assert outlier_share([], 5.0) == 0.0
    assert outlier_share([lambda: torch.zeros(2, 3)], 5.0) == 0.0


@pytest.mark.parametrize("owl_m", [1.0, 3.0, 5.0, 7.5])
def test_outlier_share_equals_the_papers_code(owl_m):
    scores = [torch.randn(shape).abs() * torch.rand(shape[1]).pow(4) for shape in ((30, 20), (50, 20), (20, 50))]
    share = outlier_share((lambda layer=layer: layer for layer in scores), owl_m)
    assert share == pytest.approx(papers_outlier_ratio(scores, owl_m) / 100, abs=1e-12)
    assert outlier_share([lambda layer=layer: 1000 * layer for layer in scores], owl_m) == pytest.approx(
        share, abs=1e-3
    )


def test_outlier_share_holds_one_layer_at_a_time_and_asks_twice():
    asked = []

    def give(index):
        asked.append(index)
        return torch.rand(2, 3)

    outlier_share((lambda index=index: give(index) for index in range(3)), 5.0)
    assert asked == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_outlier_share_refuses_infinities(wrong):
    with pytest.raises(ValueError, match="infinite or NaN"):
        outlier_share([lambda: torch.ones(2, 2), lambda: torch.tensor([[1.0, wrong]])], 5.0)


# --- by name


@pytest.mark.parametrize(
    ("target", "hits"),
    [
        ("model.layers.0.mlp.up_proj", ["0.mlp.up_proj"]),
        ("model.layers.1", ["1.self_attn.q_proj", "1.mlp.up_proj", "1.mlp.down_proj"]),
        ("model.layers.1.mlp", ["1.mlp.up_proj", "1.mlp.down_proj"]),
        ("down_proj", ["0.mlp.down_proj", "1.mlp.down_proj"]),
        ("mlp.down_proj", ["0.mlp.down_proj", "1.mlp.down_proj"]),
        (r"re:.*\.1\..*_proj", ["1.self_attn.q_proj", "1.mlp.up_proj", "1.mlp.down_proj"]),
        (r"re:model\.layers\.0\.mlp", ["0.mlp.up_proj", "0.mlp.down_proj"]),
    ],
)
def test_explicit_forms_of_a_name(target, hits):
    shapes = decoder(12)  # "model.layers.1" is not "model.layers.11"
    found = short(Explicit({target: 0.0}).sparsities(shapes, 0.1, {}))
    if target.endswith("down_proj"):
        hits = [f"{block}.mlp.down_proj" for block in range(12)]
    assert [name for name, value in found.items() if value == 0] == hits


def test_explicit_by_hand():
    # up_proj is 192 of 512 weights; 0.5 of all is 256, of which it gives 144: 112 of the other 320 remain
    found = Explicit({"up_proj": 0.75}).sparsities(decoder(), 0.5, {})
    assert short(found) == {
        "0.self_attn.q_proj": 0.35,
        "0.mlp.up_proj": 0.75,
        "0.mlp.down_proj": 0.35,
        "1.self_attn.q_proj": 0.35,
        "1.mlp.up_proj": 0.75,
        "1.mlp.down_proj": 0.35,
    }
    assert over_all(decoder(), found) == pytest.approx(0.5, abs=1e-12)


def test_explicit_may_leave_nothing_and_may_repeat_itself():
    found = Explicit({"up_proj": 0.8, "model.layers.0.mlp.up_proj": 0.8}).sparsities(decoder(), 0.3, {})
    assert short(found)["0.mlp.down_proj"] == 0.0
    assert set(Explicit({}).sparsities(decoder(), 0.3, {}).values()) == {0.3}


def test_explicit_with_every_layer_named():
    everything = Explicit({"model.layers.0": 0.4, "model.layers.1": 0.6})
    for sparsity in (None, 0.5, 0.5009):
        found = everything.sparsities(decoder(), sparsity, {})
        assert list(found) == list(decoder()) and list(found.values()) == [0.4] * 3 + [0.6] * 3


@pytest.mark.parametrize(
    ("layers", "sparsity", "message"),
    [
        ({"up_proj": 0.9}, 0.3, "named layers' zeros are 0.3375 of all weights.*need a sparsity of -0.06"),
        ({"up_proj": 0.1}, 0.9, "named layers' zeros are 0.0375 of all weights.*need a sparsity of 1.38"),
        ({"up_proj": 0.5}, None, "4 of 6 layers have no sparsity.*q_proj is the first.*model-wide sparsity is needed"),
        ({"up_proj": 0.5}, 1.0, "at least 0 and below 1"),
        ({"model": 0.5}, 0.502, "make 0.5 over all weights, in conflict with sparsity=0.502. Leave sparsity out"),
        ({"up_prj": 0.5}, 0.5, "'up_prj' is not the name of a targeted layer. Did you mean .*'up_proj'"),
        ({"layers.0": 0.5}, 0.5, "'layers.0' is not the name of a targeted layer. Did you mean .*'model.layers.0'"),
        ({"mlp": 0.5}, 0.5, "'mlp' is not the name"),
        ({"roj": 0.5}, 0.5, "'roj' is not the name"),
        ({"re:layers": 0.5}, 0.5, "'re:layers' is not the name"),
        ({"re:(": 0.5}, 0.5, "'re:\\(' is not a regular expression"),
        (
            {"up_proj": 0.5, "model.layers.1": 0.25},
            0.5,
            "layers.1.mlp.up_proj is given two sparsities: 0.5 by 'up_proj' and 0.25 by 'model.layers.1'",
        ),
    ],
)
def test_explicit_refuses(layers, sparsity, message):
    with pytest.raises(ValueError, match=message):
        Explicit(layers).sparsities(decoder(), sparsity, {})


def test_values_outside_the_range_are_refused_at_once():
    with pytest.raises(ValueError, match="The sparsity of 'up_proj' must be at least 0 and below 1.*got 1"):
        Explicit({"q_proj": 0.5, "up_proj": 1.0})
    with pytest.raises(ValueError, match=r"blocks\[1\] must be at least 0.*For 50 % write 0.5"):
        PerBlock([0.5, 50])
    with pytest.raises(ValueError, match="got nan"):
        PerBlock([float("nan")])


# --- by block


def test_per_block():
    for sparsity in (None, 0.4, 0.4009):
        found = PerBlock([0.3, 0.5]).sparsities(decoder(), sparsity, {})
        assert list(found) == list(decoder()) and list(found.values()) == [0.3] * 3 + [0.5] * 3


def test_per_block_values_go_by_index():
    shapes = {name: shape for name, shape in decoder(3).items() if shape.block != 1}
    assert list(PerBlock([0.1, 0.2, 0.3]).sparsities(shapes, None, {}).values()) == [0.1] * 3 + [0.3] * 3


@pytest.mark.parametrize(
    ("blocks", "shapes", "sparsity", "message"),
    [
        ([0.5], decoder(), None, "PerBlock has 1 sparsities, but the targeted layers are in 2 decoder blocks"),
        ([0.5] * 3, decoder(), None, "has 3 sparsities, but .* in 2 decoder"),
        ([0.5] * 2, decoder() | HEAD, None, r"outside the decoder blocks: lm_head. Leave them .* ignore=\['lm_head'\]"),
        (
            [0.4, 0.6],
            decoder(),
            0.6,
            "sparsities of the blocks make 0.5 over all weights, in conflict with sparsity=0.6",
        ),
        ([0.4, 0.6], decoder(), -0.5, "at least 0 and below 1"),
    ],
)
def test_per_block_refuses(blocks, shapes, sparsity, message):
    with pytest.raises(ValueError, match=message):
        PerBlock(blocks).sparsities(shapes, sparsity, {})


# --- counts

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


@pytest.mark.parametrize("allocation", [OWL(), Explicit({"up_proj": 0.5}), PerBlock([0.5, 0.5])])
def test_patterns_that_leave_nothing_to_divide(allocation):
    name = type(allocation).__name__
    with pytest.raises(ValueError, match=f"2:4 has one sparsity, 0.5, in every layer: {name} cannot change that"):
        divide(allocation, NM(2, 4), decoder(), 0.5, {0: 0.1, 1: 0.2})
    with pytest.raises(ValueError, match=f"divides by itself: {name} cannot.*Use Unstructured"):
        divide(allocation, Unstructured("model"), decoder(), 0.5, {0: 0.1, 1: 0.2})
    check_pattern(allocation, ROWS)
    check_pattern(allocation, LAYER)
