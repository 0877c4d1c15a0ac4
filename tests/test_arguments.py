"""Numbers of numpy and torch are what was written, wherever they are given."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from sparse_train import Constant, Magnitude, MaskUpdater, prune
from sparse_train.arguments import to_python_number


def half(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "given",
    [np.float16(0.7), np.float32(0.7), np.float64(0.7), np.array(0.7, np.float32), torch.tensor(0.7), half(0.7), 0.7],
    ids=lambda given: f"{type(given).__name__}_{getattr(given, 'dtype', '')}",
)
def test_a_float_is_the_shortest_decimal(given):
    found = to_python_number(given)
    assert (found, type(found)) == (0.7, float)


def test_other_numbers_and_other_things_are_as_they_are():
    assert type(to_python_number(np.int64(7))) is int
    assert to_python_number(torch.tensor(7)) == 7
    assert to_python_number(torch.tensor(1 / 3, dtype=torch.float64)) == 1 / 3
    assert math.isnan(to_python_number(torch.tensor(math.nan)))
    assert to_python_number("0.7") == "0.7"
    several = torch.ones(2)
    assert to_python_number(several) is several


@pytest.mark.parametrize("number", [float, np.float32, np.float64, torch.tensor, half])
def test_one_shot_and_in_training_it_is_the_same_count(number):
    sparsity, model = number(0.7), nn.Sequential(nn.Linear(640, 1))
    prune(model, None, "unstructured", sparsity, criterion=Magnitude(), targets=["0"])
    assert int((model[0].weight == 0).sum()) == 448
    for given in (
        {"sparsity": sparsity},
        {"schedule": Constant(sparsity)},
        {"schedule": Constant(0.7), "sparsity": sparsity},  # which do not contradict each other
    ):
        model = nn.Sequential(nn.Linear(640, 1))
        updater = MaskUpdater(model, "unstructured", criterion=Magnitude(), targets=["0"], total_steps=9, **given)
        assert updater.sparsity == 0.7
        assert int((updater.layers["0"].masked_weight() == 0).sum()) == 448
