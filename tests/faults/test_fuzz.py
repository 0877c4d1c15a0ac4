"""A hundred command lines with mistakes at random; ``python -m tests.faults.fuzz 10000`` tries more."""

from tests.faults.fuzz import faults


def test_mistakes_at_random_end_with_a_message_and_no_traceback():
    assert list(faults(range(100))) == []
