import pytest

from sparse_train.allocation import (
    PerBlock,
)
from tests.allocation.shapes import HEAD, decoder


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
            "sparsities of the blocks give 0.5 over all weights, in conflict with sparsity=0.6",
        ),
        ([0.4, 0.6], decoder(), -0.5, "at least 0 and below 1"),
    ],
)
def test_per_block_refuses(blocks, shapes, sparsity, message):
    with pytest.raises(ValueError, match=message):
        PerBlock(blocks).sparsities(shapes, sparsity, {})
