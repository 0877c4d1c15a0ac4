"""What every criterion, with every pattern, on every dtype, must do. A new one joins by being in its table."""

import pytest
import torch

from sparse_train.criteria import RIA, Criterion, LayerContext, Magnitude, Wanda, WandaCumulative
from sparse_train.patterns import NM, Pattern, Unstructured
from sparse_train.policies import Dormant, Fixed, MaskPolicy, Regrow, StraightThrough
from sparse_train.schedules import Constant, Cubic, Linear, Schedule
from sparse_train.statistics import ActivationNorm

CRITERIA = [Magnitude(), Wanda(), WandaCumulative(), RIA()]
PATTERNS = [
    (Unstructured("row"), 0.5),
    (Unstructured("row"), 0.33),
    (Unstructured("row"), 0.0),
    (Unstructured("layer"), 0.6),
    (Unstructured("model"), 0.6),
    (NM(1, 4), 0.75),
    (NM(2, 4), 0.5),
    (NM(4, 8), 0.5),
]
POLICIES = [
    Fixed(),
    Dormant(),
    StraightThrough(),
    StraightThrough(srste_decay=0.01),
    Regrow(),
]
SCHEDULES = [Constant(0.5), Linear(0.5), Cubic(0.6, 0.1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def concrete(base):
    ours = {cls for cls in base.__subclasses__() if cls.__module__.startswith("sparse_train")}
    return {each for cls in ours for each in concrete(cls) or {cls}}


@pytest.mark.parametrize(
    ("base", "table"), [(Criterion, CRITERIA), (Pattern, PATTERNS), (MaskPolicy, POLICIES), (Schedule, SCHEDULES)]
)
def test_every_class_is_in_its_table(base, table):
    members = {type(entry[0] if isinstance(entry, tuple) else entry) for entry in table}
    assert concrete(base) == members


@pytest.fixture
def stats():
    norm = ActivationNorm(32)
    norm.add(torch.randn(10, 32))
    return norm


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS, ids=lambda p: repr(p))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_and_masks(criterion, pattern, sparsity, dtype, stats):
    weight = torch.randn(8, 32).to(dtype)
    before = weight.clone()
    scores = criterion.scores(LayerContext(weight, stats))
    assert scores.dtype == torch.float32
    assert scores.shape == weight.shape
    assert (scores >= 0).all()
    mask = pattern.mask(scores, sparsity)
    assert mask.dtype == torch.bool
    assert mask.shape == weight.shape
    assert torch.equal(weight, before)
    assert torch.equal(mask, pattern.mask(scores.clone(), sparsity))  # no chance in it
    if not isinstance(pattern, NM):
        size = 32 if pattern.group == "row" else weight.numel()
        assert ((~mask).reshape(-1, size).sum(1) == int(size * sparsity)).all()
    else:
        assert (mask.reshape(-1, pattern.m).sum(1) == pattern.n).all()
    # what is kept is worth at least what is pruned, in each group
    size = {"row": 32, "layer": 256, "model": 256}[pattern.group] if not isinstance(pattern, NM) else pattern.m
    lowest_kept = scores.masked_fill(~mask, torch.inf).reshape(-1, size).min(1).values
    highest_pruned = scores.masked_fill(mask, -torch.inf).reshape(-1, size).max(1).values
    assert (lowest_kept >= highest_pruned).all()
    # pruning what is pruned changes nothing
    again = criterion.scores(LayerContext(torch.where(mask, weight, 0), stats))
    if (again[mask] > 0).all():
        assert torch.equal(pattern.mask(again, sparsity), mask)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedules_rise_to_their_final_sparsity(schedule):
    values = [schedule.sparsity(step / 20) for step in range(21)]
    assert all(0 <= value < 1 for value in values)
    assert values == sorted(values)
    assert values[-1] == schedule.final_sparsity
