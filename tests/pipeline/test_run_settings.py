"""What a run is asked to do, from what users write; each mistake by itself is tested where its rule is."""

import dataclasses
import inspect

import pytest

from sparse_train import (
    Constant,
    Cubic,
    Magnitude,
    MaskPolicy,
    MaskUpdater,
    Regrow,
    SparseGPT,
    StraightThrough,
    Wanda,
    WandaCumulative,
)
from sparse_train.callbacks import DynamicPruning
from sparse_train.patterns import NM, Unstructured
from sparse_train.pipeline.run_settings import RunSettings, check_settings
from sparse_train.trainer import SparseTrainerCallback


def settings(mask_structure="2:4", sparsity=None, schedule=None, criterion=None, policy=None, **changes):
    others = {
        "allocation": None,
        "targets": None,
        "ignore": (),
        "update_freq": 10,
        "start_step": 0,
        "end_step": 0.75,
        "window": 0.5,
        "memory": 1.0,
        "hysteresis": 0.0,
        "noise_margin": 0.0,
        "flip_agreement": False,
    }
    return RunSettings.resolve(mask_structure, sparsity, schedule, criterion, policy, **(others | changes))


def test_defaults():
    found = settings()
    assert (found.mask_structure, found.schedule) == (NM(2, 4), Constant(0.5))
    assert (found.criterion, found.policy) == (Wanda(), StraightThrough())
    assert found.first_sparsity == 0.5
    assert not found.margin
    assert not found.halved


@pytest.mark.parametrize("driver", [DynamicPruning, SparseTrainerCallback, MaskUpdater])
def test_all_that_drive_a_run_take_them_with_the_same_defaults(driver):
    own = {name: each.default for name, each in inspect.signature(driver).parameters.items()}
    theirs = {name: each.default for name, each in inspect.signature(DynamicPruning).parameters.items()}
    for name in [field.name for field in dataclasses.fields(RunSettings)] + ["sparsity"]:
        assert own[name] == theirs[name], name


class Grows(MaskPolicy):
    comes_back = "by gradient"


def test_only_regrow_brings_weights_back_by_their_gradient():
    with pytest.raises(ValueError, match="which only Regrow can do"):
        settings(policy=Grows())
    assert settings(policy=Regrow()).policy == Regrow()


def test_the_word_unstructured_compares_what_the_criterion_says():
    assert settings("unstructured", 0.5).mask_structure == Unstructured("row")
    assert settings("unstructured", 0.5, criterion=WandaCumulative()).mask_structure == Unstructured("layer")
    assert settings("unstructured", None, Cubic(0.5), WandaCumulative()).mask_structure == Unstructured("layer")
    in_full = settings(Unstructured("row"), 0.5, criterion=WandaCumulative())
    assert in_full.mask_structure == Unstructured("row")


def test_the_first_sparsity_is_none_where_masks_come_later():
    assert settings(schedule=Cubic(0.5)).first_sparsity == 0.0
    assert settings(start_step=10).first_sparsity == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"update_freq": 0}, "update_freq is the number of steps between mask updates, at least 1, got 0"),
        ({"memory": 2.0}, "memory is the factor"),
        ({"memory": "frozen", "criterion": Magnitude()}, "nothing to keep"),
        ({"hysteresis": -1.0}, "hysteresis is the share"),
        ({"hysteresis": 0.1, "policy": Regrow()}, "has no effect with Regrow"),
        ({"criterion": SparseGPT()}, "has no scores for re-pruning. Give it as initial_criterion"),
        ({"criterion": Wanda}, r"Write Wanda\(\)"),
        ({"policy": Regrow}, r"Write Regrow\(\)"),
        ({"sparsity": 0.7}, "2:4"),
    ],
)
def test_what_cannot_be_is_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_a_run_that_continues_another_has_the_same():
    check_settings(settings().as_strings(), settings(ignore=["lm_head"]).as_strings())
    check_settings(settings().as_strings() | {"layers": "21 targets"}, settings().as_strings())
    check_settings(settings(memory=1).as_strings(), settings(memory=1.0).as_strings())
    others = [{"mask_structure": "4:8"}, {"update_freq": 5}, {"memory": 0.5}, {"hysteresis": 0.1}, {"end_step": 0.5}]
    for changes in others:
        with pytest.raises(ValueError, match="Resume with the same setting"):
            check_settings(settings().as_strings(), settings(**changes).as_strings())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"update_freq": 2.5}, "number of steps between mask updates, a whole number, got 2.5"),
        ({"schedule": 0.5}, r"schedule is an object such as Cubic"),
        ({"schedule": Cubic}, r"schedule is an object such as Cubic"),
        ({"mask_structure": "unstructured", "sparsity": "0.5"}, "a number such as 0.5, got '0.5'"),
    ],
)
def test_settings_of_the_wrong_kind(llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskUpdater(llama, **({"mask_structure": "2:4", "total_steps": 10} | arguments))
