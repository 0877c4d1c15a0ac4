"""Numbers of numpy and torch mean the same wherever they are given; names are those that a user means."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from sparse_train import Constant, Magnitude, MaskUpdater, prune
from sparse_train.arguments import leave_out, named, to_python_number


def test_numbers_become_those_of_python_and_other_things_stay():
    assert type(to_python_number(np.float32(0.5))) is float
    assert type(to_python_number(torch.tensor(0.5, dtype=torch.bfloat16))) is float
    assert type(to_python_number(np.int64(7))) is int
    assert to_python_number(torch.tensor(7)) == 7
    assert to_python_number(torch.tensor(1 / 3, dtype=torch.float64)) == 1 / 3
    assert math.isnan(to_python_number(torch.tensor(math.nan)))
    assert to_python_number("0.7") == "0.7"
    several = torch.ones(2)
    assert to_python_number(several) is several


@pytest.mark.parametrize("number", [float, np.float32, torch.tensor])
def test_one_shot_and_in_training_it_is_the_same_count(number):
    sparsity, model = number(0.7), nn.Sequential(nn.Linear(640, 1))
    prune(model, None, "unstructured", sparsity, criterion=Magnitude(), targets=["0"])
    count = int((model[0].weight == 0).sum())
    assert count in (447, 448)  # 0.7 in float32 is a little less
    for given in (
        {"sparsity": sparsity},
        {"schedule": Constant(sparsity)},
        {"schedule": Constant(sparsity), "sparsity": sparsity},  # which do not contradict each other
    ):
        model = nn.Sequential(nn.Linear(640, 1))
        updater = MaskUpdater(model, "unstructured", criterion=Magnitude(), targets=["0"], total_steps=9, **given)
        assert type(updater.sparsity) is float
        assert int((updater.layers["0"].masked_weight() == 0).sum()) == count


def test_what_is_left_out_is_named_by_its_last_name_and_not_by_a_number_or_peft():
    names = ["a.q_proj", "b.q_proj", "a.down_proj.base_layer", "net.0"]
    assert leave_out(names).endswith("ignore=['q_proj', 'down_proj', 'net.0'].")
    assert {name for text in ("q_proj", "down_proj", "net.0") for name in named(text, names)} == {*names}
