import torch

from sparse_train.allocation import (
    Uniform,
    divide,
)
from sparse_train.patterns import NM, Unstructured
from tests.allocation.shapes import HEAD, decoder
from tests.reference import row_mask


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
