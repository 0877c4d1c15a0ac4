import logging
import os
import warnings

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from tqdm.auto import tqdm

from sparse_train.terminal.noise import kept_back

TIP = "💡 Tip: For seamless cloud logging and experiment tracking, try installing [litlogger]"
PRECISION = "Precision bf16-mixed is not supported by the model summary.  Estimated model size in MB will not be"


@pytest.fixture
def said():
    """What Lightning's logger lets through; other tests may have added handlers above it."""
    messages, logger = [], logging.getLogger("lightning.pytorch.utilities.rank_zero")
    handler, level = logging.Handler(), logger.level
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_useless_lines_are_kept_back_and_no_others(said):
    with kept_back():
        rank_zero_info(TIP)
        rank_zero_info("GPU available: False, used: False")
    rank_zero_info(TIP)  # for users of the library
    assert said == ["GPU available: False, used: False", TIP]


def test_quiet_leaves_warnings(said):
    with kept_back(quiet=True):
        rank_zero_info("GPU available: False, used: False")
        logging.getLogger("lightning.pytorch.utilities.rank_zero").warning("something is wrong")
    rank_zero_info("and on")
    assert said == ["something is wrong", "and on"]


def test_useless_warnings_are_kept_back_and_no_others():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with kept_back():
            rank_zero_warn(PRECISION, category=UserWarning)
            warnings.warn("\n    skip_none parameter was deprecated in v4.49.0", DeprecationWarning, stacklevel=1)
            warnings.warn("this one matters", UserWarning, stacklevel=1)
        rank_zero_warn(PRECISION, category=UserWarning)
    assert [str(warning.message)[:9] for warning in seen] == ["this one ", "Precision"]


@pytest.mark.parametrize(("terminal", "value"), [(False, "1"), (True, None)])
def test_bars_of_libraries_are_for_terminals(terminal, value, monkeypatch):
    monkeypatch.setattr("sparse_train.terminal.noise.bars_are_seen", lambda: terminal)
    monkeypatch.delenv("HF_DATASETS_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")  # the user's own
    with kept_back():
        assert os.environ.get("HF_DATASETS_DISABLE_PROGRESS_BARS") == value
        assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"
    assert "HF_DATASETS_DISABLE_PROGRESS_BARS" not in os.environ


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_that_ask_nobody_are_for_terminals(terminal, monkeypatch, capsys):
    monkeypatch.setattr("sparse_train.terminal.noise.bars_are_seen", lambda: terminal)
    with kept_back():
        assert list(tqdm(range(3), desc="inside")) == [0, 1, 2]
    assert ("inside" in capsys.readouterr().err) == terminal
    list(tqdm(range(3), desc="outside"))
    assert "outside" in capsys.readouterr().err
