"""Distributions that need no data: by name, and the same everywhere."""

import pytest
import torch

from sparse_train.distributions import Explicit, Uniform
from sparse_train.patterns import NM, Unstructured
from tests.distributions.shapes import HEAD, decoder, divide, over_all, short
from tests.reference import row_mask


@pytest.mark.parametrize(
    ("target", "hits"),
    [
        ("model.layers.0.mlp.up_proj", ["0.mlp.up_proj"]),
        ("model.layers.1", ["1.self_attn.q_proj", "1.mlp.up_proj", "1.mlp.down_proj"]),
        ("layers.1.mlp", ["1.mlp.up_proj", "1.mlp.down_proj"]),
        ("down_proj", ["0.mlp.down_proj", "1.mlp.down_proj"]),
        ("self_attn", [f"{block}.self_attn.q_proj" for block in range(12)]),
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


def test_explicit_may_leave_nothing_and_the_last_name_counts():
    found = Explicit({"model.layers.0.mlp.up_proj": 0.1, "up_proj": 0.8}).sparsities(decoder(), 0.3, {})
    assert short(found)["0.mlp.down_proj"] == 0.0 and short(found)["0.mlp.up_proj"] == 0.8
    assert set(Explicit({}).sparsities(decoder(), 0.3, {}).values()) == {0.3}


def test_explicit_with_every_layer_named():
    everything = Explicit({"model.layers.0": 0.4, "model.layers.1": 0.6})
    for sparsity in (0.5, 0.5009):
        found = everything.sparsities(decoder(), sparsity, {})
        assert list(found) == list(decoder()) and list(found.values()) == [0.4] * 3 + [0.6] * 3


@pytest.mark.parametrize(
    ("layers", "sparsity", "message"),
    [
        ({"up_proj": 0.9}, 0.3, "named layers' zeros are 0.3375 of all weights.*need a sparsity of -0.06"),
        ({"up_proj": 0.1}, 0.9, "named layers' zeros are 0.0375 of all weights.*need a sparsity of 1.38"),
        ({"model.layers.0": 0.0}, 0.5, "need a sparsity of 1"),
        ({"model": 0.5}, 0.502, "0.502 cannot be met.*0.5 of all weights, and there are no others"),
        ({"up_prj": 0.5}, 0.5, "'up_prj' is not the name of a targeted layer. Did you mean .*'up_proj'"),
        ({"roj": 0.5}, 0.5, "'roj' is not the name"),
        ({"re:layers": 0.5}, 0.5, "'re:layers' is not the name"),
        ({"re:(": 0.5}, 0.5, r"'re:\(' is not a regular expression"),
    ],
)
def test_explicit_refuses(layers, sparsity, message):
    with pytest.raises(ValueError, match=message):
        Explicit(layers).sparsities(decoder(), sparsity, {})


def test_values_outside_the_range_are_refused_at_once():
    with pytest.raises(ValueError, match="The sparsity of 'up_proj' must be at least 0 and below 1.*got 1"):
        Explicit({"q_proj": 0.5, "up_proj": 1.0})
    with pytest.raises(ValueError, match="must be at least 0.*For 50 % write 0.5"):
        Explicit({"up_proj": 50})
    with pytest.raises(ValueError, match="got nan"):
        Explicit({"up_proj": float("nan")})


def test_uniform_rows_prune_what_the_wanda_reference_prunes():
    shapes = decoder() | HEAD
    found = divide(Uniform(), Unstructured(), shapes, 0.3, {})
    for name, shape in shapes.items():
        scores = torch.rand(shape.rows, shape.columns)
        assert torch.equal(Unstructured().mask(scores, found[name]), row_mask(scores, 0.3))


def test_uniform_goes_with_every_pattern():
    for pattern, sparsity in ((NM(2, 4), 0.5), (Unstructured("model"), 0.6), (Unstructured("layer"), 0.6)):
        assert divide(Uniform(), pattern, HEAD, sparsity, {}) == {"lm_head": sparsity}
