"""Two hundred steps of the long run; ``python -m tests.faults.long`` makes 20,000."""

from tests.faults.long import watched


def test_nothing_grows_and_norms_do_not_drift():
    found = watched(200)
    assert 0 < found.drift < 1e-5
    for name in ("objects", "open files", "threads"):
        assert found.slopes[name][0] < 100, name  # what every step or update leaves behind is a thousand
