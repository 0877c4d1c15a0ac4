import pytest
import torch

from sparse_train import Magnitude, MaskUpdater
from sparse_train.patterns import NM, Unstructured
from sparse_train.schedules import Constant, Cubic, Linear, pattern_and_schedule


def test_sparsity_only_rises_and_ends_where_it_should():
    for schedule in (Linear, Cubic):
        with pytest.raises(ValueError, match=r"Sparsity rises: init_sparsity \(0.6\)"):
            schedule(0.3, 0.6)
        assert schedule(0.45, 0.1).sparsity(1.0) == 0.45
        assert schedule(0.7, 0.2).sparsity(0.0) == 0.2  # of 10 weights, 0.7 - 0.5 would prune one


@pytest.mark.parametrize("schedule", [Linear(0.85, 0.2, ramp=0.3), Cubic(0.85, 0.2, ramp=0.3)])
def test_behind_the_ramp_sparsity_stays(schedule):
    whole = type(schedule)(0.85, 0.2)
    for progress in (0.0, 0.1, 0.2, 0.29):
        assert schedule.sparsity(progress) == pytest.approx(whole.sparsity(progress / 0.3))
    assert [schedule.sparsity(progress) for progress in (0.3, 0.5, 1.0)] == [0.85] * 3
    with pytest.raises(ValueError, match="ramp is the share of the way .* got 0"):
        type(schedule)(0.5, ramp=0)


def test_behind_the_ramp_masks_of_the_full_pattern_are_renewed(llama, ids):
    updater = MaskUpdater(
        llama, "2:4", schedule=Cubic(0.5, ramp=0.5), criterion=Magnitude(), update_freq=2, total_steps=12, end_step=12
    )
    kept = []
    for step in range(12):
        llama(input_ids=ids[step % 4])
        with torch.no_grad():
            for layer in updater.layers.values():
                layer.weight_OI.normal_()
        report = updater.step()
        if report is not None:
            kept.append((report.step, round(4 * (1 - report.sparsity)), report.flip_rate > 0))
    assert kept == [(2, 3, True), (4, 3, True), (6, 2, True), (8, 2, True), (10, 2, True), (12, 2, True)]


def test_a_sparsity_is_a_schedule_and_none_contradicts_another():
    assert pattern_and_schedule("2:4", None, None) == (NM(2, 4), Constant(0.5))
    assert pattern_and_schedule("unstructured", None, Cubic(0.6)) == (Unstructured("row"), Cubic(0.6))
    with pytest.raises(ValueError, match=r"sparsity=0.5 is in conflict with the schedule, which ends at 0.6"):
        pattern_and_schedule("unstructured", 0.5, Cubic(0.6))
    with pytest.raises(ValueError, match="2:4 is a sparsity of 0.5, in conflict with 0.6"):
        pattern_and_schedule("2:4", None, Cubic(0.6))
