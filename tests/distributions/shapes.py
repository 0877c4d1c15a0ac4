"""Shapes of small decoders, and what is counted on them."""

import numpy as np
import torch

from sparse_train.distributions import Division, LayerShape


def decoder(blocks=2, hidden=8, inner=12):
    shapes = {}
    for block in range(blocks):
        shapes[f"model.layers.{block}.self_attn.q_proj"] = LayerShape(block, hidden, hidden)
        shapes[f"model.layers.{block}.mlp.up_proj"] = LayerShape(block, inner, hidden)
        shapes[f"model.layers.{block}.mlp.down_proj"] = LayerShape(block, hidden, inner)
    return shapes


HEAD = {"lm_head": LayerShape(None, 20, 8)}


def divide(distribution, pattern, shapes, sparsity, outliers):
    return Division(distribution, shapes, pattern, sparsity, outliers).at(sparsity)


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
