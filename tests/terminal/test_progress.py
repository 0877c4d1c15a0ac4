import re

import pytest

from sparse_train import Magnitude, prune
from sparse_train.terminal.drawn import DrawnProgress
from sparse_train.terminal.progress import bar
from tests.conftest import tiny_llama


@pytest.fixture
def terminal(monkeypatch):
    """stderr as a terminal of 100 columns."""
    monkeypatch.setattr("sparse_train.terminal.progress.bars_are_seen", lambda: True)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")


def text(shown):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)


def test_a_bar_says_how_far_it_is(terminal, capsys):
    with bar("pruning", shown=True) as drawn:
        drawn.set_total(4)
        drawn.advance()
        drawn.note("block 1/2, sparsity 0.5000")
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"pruning .* 1/4 .*left", text(err))
    assert "block 1/2, sparsity 0.5000" in text(err)


def test_one_shot_pruning_shows_blocks_and_sparsity(terminal, capsys, ids):
    prune(tiny_llama(), ids, "2:4", progress=True)
    shown = text(capsys.readouterr().err)
    assert "20/20" in shown  # each of 3 blocks recorded, and two of them passed on, with four batches
    assert "block 3/3, sparsity 0.5000" in shown


@pytest.mark.parametrize("shown", [True, False])
def test_nothing_is_drawn_elsewhere(shown, capsys, ids, monkeypatch):
    monkeypatch.setattr("sparse_train.terminal.progress.bars_are_seen", lambda: not shown)
    prune(tiny_llama(), ids, "2:4", progress=shown)
    with bar("nothing", shown=shown) as drawn:
        drawn.set_total(2)
        drawn.advance()
        drawn.note("note")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("stays", [True, False])
def test_a_bar_that_stays_is_not_wiped_away(stays, terminal, capsys):
    with DrawnProgress(stays) as progress:
        progress.add_task("training", total=2, completed=2)
        progress.note = "loss 1.0"
    shown = capsys.readouterr().err
    assert "loss 1.0" in shown
    assert shown.endswith("\x1b[2K") != stays  # which wipes a line


def test_pruning_without_data_draws_nothing(terminal, capsys):
    prune(tiny_llama(), criterion=Magnitude(), progress=True)
    assert capsys.readouterr() == ("", "")


def test_elsewhere_there_is_a_line_a_minute(capsys, ids, monkeypatch):
    prune(tiny_llama(), ids, "2:4", progress=True)
    assert capsys.readouterr() == ("", "")  # it takes no minute
    monkeypatch.setattr("sparse_train.terminal.progress._SECONDS_BETWEEN_LINES", 0.0)
    prune(tiny_llama(), ids, "2:4", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "pruning: 1/20 forwards"
    assert re.fullmatch(r"pruning: 20/20 forwards, block \d/3, sparsity 0.\d{4}", err.splitlines()[-1])
