import math

import pytest

from sparse_train import PruningConfig
from sparse_train.schedules import Cubic, Linear, Timing


def timing(total_steps=100, first_from_window=False, **settings) -> Timing:
    return PruningConfig(**settings).timing(total_steps, has_masks=not first_from_window)


def updates(t: Timing, steps: int = 100) -> list[int]:
    return [step for step in range(steps + 1) if t.is_update(step)]


def test_defaults():
    assert updates(timing()) == [0, 10, 20, 30, 40, 50, 60, 70, 75]


def test_whole_steps():
    assert updates(timing(start_step=3, end_step=20, update_freq=5)) == [3, 8, 13, 18, 20]
    assert updates(timing(start_step=0.25, end_step=1.0, update_freq=50)) == [25, 75, 100]


def test_shares_are_those_of_decimal_numbers():
    ends = [timing(end_step=percent / 100, update_freq=100).end_step for percent in range(101)]
    assert ends == list(range(101))  # 0.58 * 100 is a little less than 58
    assert timing(update_freq=100, window=0.07).window == 7  # and 0.07 * 100 a little more than 7


def test_a_first_mask_from_a_window_waits_for_it():
    assert updates(timing(first_from_window=True))[:3] == [5, 15, 25]
    assert updates(timing(first_from_window=True, start_step=20))[:2] == [20, 30]
    assert updates(timing(first_from_window=True, total_steps=6, end_step=0.1)) == [5]


def test_a_run_shorter_than_its_window_still_ends_sparse():
    assert updates(timing(first_from_window=True, total_steps=3)) == [3]
    assert updates(timing(first_from_window=True, total_steps=None, end_step=30)) == [5, 15, 25, 30]


def test_recorded_steps_are_the_window_before_each_update():
    t = timing(update_freq=10, window=3, end_step=20)
    assert [step for step in range(30) if t.recorded_for(step)] == [7, 8, 9, 17, 18, 19]
    assert all(timing(window=1.0).recorded_for(step) for step in range(75))
    assert not any(timing(window=1.0).recorded_for(step) for step in range(75, 100))


def test_next_update_and_progress():
    t = timing(start_step=10, end_step=30)
    assert [t.next_update(step) for step in (0, 9, 10, 25, 29, 30, 40)] == [10, 10, 20, 30, 30, None, None]
    assert [t.progress(step) for step in (0, 10, 20, 30, 99)] == [0, 0, 0.5, 1, 1]
    assert timing(end_step=0).progress(0) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 11}, "window must be from 1 to update_freq"),
        ({"window": 0.0}, "window as a share"),
        ({"start_step": -1}, "start_step as a number of steps"),
        ({"start_step": 1.5}, "start_step as a share of the run must be from 0 to 1, got 1.5"),
        ({"total_steps": None}, "end_step=0.75 is a share of the run, whose length is not known"),
        ({"total_steps": math.inf}, "whose length is not known"),
        ({"total_steps": 0}, "total_steps is the number of optimizer steps of the run, at least 1, got 0"),
        ({"start_step": 200, "end_step": 300}, "start_step .200. lies after the end of the run .100 steps."),
        ({"start_step": 50, "end_step": 20}, "end_step .20. must not lie before the first update, start_step .50."),
        ({"first_from_window": True, "end_step": 3}, "it needs 5 steps of activations"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(ValueError, match=message):
        timing(**changes)


def test_schedules():
    assert [Linear(0.8, 0.2).sparsity(p) for p in (0, 0.5, 1)] == pytest.approx([0.2, 0.5, 0.8])
    # Zhu and Gupta, equation 1
    assert [Cubic(0.8).sparsity(p) for p in (0, 0.25, 0.5, 1)] == pytest.approx([0, 0.8 - 0.8 * 0.75**3, 0.7, 0.8])
    with pytest.raises(ValueError, match="final_sparsity must be at least 0"):
        Cubic(1.0)
