"""The settings of a run: from what users write, on the command line and in YAML, and as data."""

import json
from pathlib import Path

import jsonargparse
import pytest

from sparse_train import (
    IHT,
    RIA,
    Constant,
    Cubic,
    Dormant,
    FirstWindow,
    Fixed,
    FromZeros,
    Magnitude,
    MaskPolicy,
    MaskUpdater,
    OneShot,
    PruningConfig,
    Regrow,
    SparseGPT,
    StraightThrough,
    Unstructured,
    Wanda,
    WandaCumulative,
)
from sparse_train.callbacks import DynamicPruning
from sparse_train.integrations.transformers import SparseTrainerCallback
from sparse_train.patterns import NM
from sparse_train.pruning.resuming import check_same_settings


def test_defaults():
    found = PruningConfig()
    assert (found.pattern, found.resolved_schedule) == (NM(2, 4), Constant(0.5))
    assert (found.criterion, found.policy, found.first_mask) == (Wanda(), StraightThrough(), OneShot())
    assert PruningConfig(criterion=None, policy=None, distribution=None) == found


@pytest.mark.parametrize("driver", [DynamicPruning, SparseTrainerCallback, MaskUpdater])
def test_all_that_drive_a_run_take_the_settings_and_know_no_others(driver, llama):
    settings = {"criterion": Magnitude(), "update_freq": 3, "policy": Dormant(), "end_step": 7}
    more = {"model": llama} if driver is MaskUpdater else {}
    by_name = driver(**more, mask_structure="1:4", **settings)
    config = PruningConfig("1:4", **settings)
    assert by_name.config == config
    assert driver(**more, config=config).config is config if driver is not MaskUpdater else True
    with pytest.raises(TypeError, match="no setting 'upate_freq'. Did you mean 'update_freq'"):
        driver(**more, upate_freq=5)
    for both in ({"update_freq": 5}, {"update_freq": 10}, {"mask_structure": "2:4"}):
        with pytest.raises(ValueError, match="config or settings, not both"):
            driver(**more, config=config, **both)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"update_freq": 0}, "update_freq is the number of steps between mask updates, at least 1, got 0"),
        ({"update_freq": 2.5}, "update_freq .* got 2.5"),
        ({"norm_decay": 1.5}, "norm_decay is the factor"),
        ({"norm_decay": None}, "norm_decay is the factor"),
        ({"criterion": SparseGPT()}, r"such as Wanda\(\), got SparseGPT.* It prunes in one shot, "),
        ({"criterion": Wanda}, r"Write Wanda\(\)"),
        ({"policy": Regrow}, r"Write Regrow\(\)"),
        ({"first_mask": FirstWindow}, r"Write FirstWindow\(\)"),
        ({"first_mask": SparseGPT()}, r"first_mask is an object such as OneShot"),
        ({"schedule": 0.5}, "schedule is an object such as Cubic"),
        ({"sparsity": 0.7}, "2:4"),
        ({"mask_structure": "unstructured"}, "needs a sparsity"),
        ({"mask_structure": "unstructured", "sparsity": 1.5}, "at least 0 and below 1"),
        ({"mask_structure": "unstructured", "sparsity": "0.5"}, "a number such as 0.5, got '0.5'"),
    ],
)
def test_mistakes_are_found_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        DynamicPruning(**settings)


def test_mistakes_in_a_first_mask_are_found_at_construction():
    for samples in (0, None):
        with pytest.raises(ValueError, match=f"OneShot.samples is a whole number, at least 1, got {samples}"):
            OneShot(samples=samples)
    with pytest.raises(ValueError, match=r"Write Magnitude\(\)"):
        OneShot(Magnitude)
    with pytest.raises(ValueError, match=r"OneShot.criterion is an object such as Wanda"):
        OneShot(Fixed())
    with pytest.raises(ValueError, match="IHT cannot compare over the whole model"):
        PruningConfig(Unstructured("model"), 0.5, first_mask=OneShot(IHT()))


def test_a_run_that_continues_another_has_the_same_settings():
    saved = json.loads(json.dumps(PruningConfig().as_data()))  # plain data
    check_same_settings(saved, PruningConfig(ignore=["lm_head"], first_mask=FirstWindow()).as_data())
    check_same_settings(PruningConfig(norm_decay=1).as_data(), PruningConfig(norm_decay=1.0).as_data())
    others = [
        {"mask_structure": "4:8"},
        {"update_freq": 5},
        {"norm_decay": 0.5},
        {"end_step": 0.5},
        {"window": 1},
        {"policy": StraightThrough(srste_decay=0.1)},
        {"policy": Dormant()},
        {"criterion": Magnitude()},
    ]
    for changes in others:
        with pytest.raises(ValueError, match="Resume with the same setting"):
            check_same_settings(saved, PruningConfig(**changes).as_data())


# --- jsonargparse ----------------------------------------------------------------------------------------------------


class Counting(MaskPolicy):
    """A policy of a user's own, with an argument."""

    def __init__(self, limit: int = 1):
        self.limit = limit


def parsed(*arguments, yaml=""):
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(DynamicPruning, "pruning")
    parser.add_argument("--config", action="config")
    if yaml:
        Path("run.yaml").write_text(yaml)
        arguments = ("--config", "run.yaml", *arguments)
    return parser.instantiate_classes(parser.parse_args(list(arguments))).pruning.config


@pytest.mark.parametrize("by_path", [False, True])
def test_recipes_name_classes(by_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy, first = ("sparse_train.Dormant", "sparse_train.FirstWindow") if by_path else ("Dormant", "FirstWindow")
    found = parsed(yaml=f"pruning:\n  policy: {policy}\n  first_mask: {first}\n  update_freq: 3\n")
    expected = PruningConfig(policy=Dormant(), first_mask=FirstWindow(), update_freq=3)
    assert found.as_data() == expected.as_data()
    found = parsed(
        "--pruning.update_freq=7",
        yaml="""
pruning:
  mask_structure: unstructured
  sparsity: 0.6
  first_mask:
    class_path: OneShot
    init_args:
      samples: 3
      criterion:
        class_path: RIA
        init_args: {a: 0.25}
  policy:
    class_path: StraightThrough
    init_args: {srste_decay: 0.001}
""",
    )
    assert found.first_mask == OneShot(RIA(0.25), 3)
    assert found.policy == StraightThrough(0.001)
    assert (found.update_freq, found.sparsity) == (7, 0.6)


def test_the_defaults_of_recipes_are_those_of_the_class():
    found = parsed()
    assert found.as_data() == PruningConfig().as_data()
    assert type(found.policy) is StraightThrough and type(found.first_mask) is OneShot
    assert parsed("--pruning.first_mask=FromZeros").first_mask == FromZeros()
    assert parsed("--pruning.first_mask=null").first_mask is None
    assert type(parsed("--pruning.policy=MaskPolicy").policy) is MaskPolicy


def test_recipes_name_a_policy_of_a_users_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yaml = "pruning:\n  policy:\n    class_path: tests.pruning.test_config.Counting\n    init_args: {limit: 3}\n"
    found = parsed(yaml=yaml).policy
    assert isinstance(found, Counting) and found.limit == 3


def test_the_word_unstructured_compares_what_the_criterion_says():
    assert PruningConfig("unstructured", 0.5).pattern == Unstructured("row")
    assert PruningConfig("unstructured", 0.5, criterion=WandaCumulative()).pattern == Unstructured("layer")
    rising = PruningConfig("unstructured", schedule=Cubic(0.5), criterion=WandaCumulative())
    assert rising.pattern == Unstructured("layer")
    assert PruningConfig(Unstructured("row"), 0.5, criterion=WandaCumulative()).pattern == Unstructured("row")
