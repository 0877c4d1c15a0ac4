import io
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console
from tqdm import tqdm

from sparse_train import Magnitude, prune
from sparse_train.terminal import bars_are_seen, print_table, with_bar
from tests.conftest import tiny_llama


@pytest.fixture
def terminal(monkeypatch):
    """stderr as a terminal of 100 columns, without bars that an error in another test has left open."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    monkeypatch.setattr("sparse_train.terminal.bars_are_seen", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")


def test_lines_are_written_where_bars_of_libraries_are_disabled():
    code = (
        "from sparse_train import terminal as t; t.SECONDS_BETWEEN_LINES = 0; list(t.with_bar([1, 2], 'x', shown=True))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TQDM_DISABLE": "1"}, capture_output=True, text=True
    )
    assert "x: 2/2" in ran.stderr


def test_a_bar_says_how_far_it_is_and_is_wiped_away(terminal, capsys):
    assert list(with_bar(range(4), "pruning", shown=True)) == [0, 1, 2, 3]
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"pruning: .* 0/4 ", err)
    assert err.endswith("\r")


def test_one_shot_pruning_shows_blocks(terminal, capsys, ids):
    prune(tiny_llama(), ids, "2:4", progress=True)
    assert "pruning: " in capsys.readouterr().err


@pytest.mark.parametrize("seen", [True, False])
def test_nothing_is_drawn_where_none_is_wanted(seen, capsys, ids, monkeypatch):
    monkeypatch.setattr("sparse_train.terminal.bars_are_seen", lambda: seen)
    prune(tiny_llama(), ids, "2:4", progress=False)
    prune(tiny_llama(), criterion=Magnitude(), progress=True)  # takes no data, and no time
    assert capsys.readouterr() == ("", "")


def test_elsewhere_there_is_a_line_a_minute_without_carriage_returns(capsys, ids, monkeypatch):
    prune(tiny_llama(), ids, "2:4", progress=True)
    assert capsys.readouterr() == ("", "")  # it takes no minute
    monkeypatch.setattr("sparse_train.terminal.SECONDS_BETWEEN_LINES", 0.0)
    prune(tiny_llama(), ids, "2:4", progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err
    assert re.fullmatch("pruning: 3/3, 00:00 left", err.splitlines()[-1])


def test_bars_are_for_terminals(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert bars_are_seen()
    monkeypatch.setenv("TERM", "dumb")
    assert not bars_are_seen()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    assert not bars_are_seen()


def test_tables_have_frames_in_a_terminal_and_whole_lines_in_a_file(capsys, monkeypatch):
    long = "model.layers.0.self_attn.q_proj" * 5
    print_table(["layer", "sparsity"], [[long, "0.5000"], ["[red]", "1"]])
    out = capsys.readouterr().out
    assert f" {long} " in out and "[red]" in out and not re.search(r"[\x1b\u2500-\u259f]", out)
    console = Console(force_terminal=True, width=60, file=io.StringIO())
    monkeypatch.setattr("rich._console", console)
    print_table(["layer", "sparsity"], [[long, "0.5000"]])
    framed = console.file.getvalue()
    assert "\u2503" in framed
    assert "".join(re.findall(r"[\w.]+", framed.partition("\u2529")[2])).replace("0.5000", "") == long
