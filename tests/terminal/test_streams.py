import json
import sys

import pytest

from sparse_train.terminal.streams import bars_are_seen, dumps, stdout_for_json, take_json


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--json"], (True, [])),
        (["--a=1", "--json", "--b", "2"], (True, ["--a=1", "--b", "2"])),
        (["--json", "true", "--b"], (True, ["--b"])),
        (["--json", "false"], (False, [])),
        (["--json=true"], (True, [])),
        (["--json=false"], (False, [])),
        (["--json=maybe", "--jsn"], (False, ["--json=maybe", "--jsn"])),  # for the parser to refuse
        (["true"], (False, ["true"])),
    ],
)
def test_json_is_taken_off_the_options(options, expected):
    assert take_json(options) == expected


def test_stdout_holds_the_object_alone(capsys):
    with stdout_for_json(True) as write:
        print("chatter")
        write({"a": 1})
        print("more")
    assert capsys.readouterr() == ('{"a": 1}\n', "chatter\nmore\n")


def test_after_an_error_stdout_is_itself_and_empty(capsys):
    stdout = sys.stdout

    def fail():
        with stdout_for_json(True) as write:
            write({"a": 1})
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert sys.stdout is stdout
    assert capsys.readouterr().out == ""


def test_without_json_nothing_is_moved(capsys):
    with stdout_for_json(False) as write:
        print("text")
        write({"a": 1})
    assert capsys.readouterr() == ("text\n", "")


def test_numbers_that_json_does_not_know_are_null():
    text = dumps({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": -float("inf")}, "e": ("f", 2)})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.5],
        "c": {"d": None},
        "e": ["f", 2],
    }


def test_bars_are_for_terminals(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert bars_are_seen()
    monkeypatch.setenv("TERM", "dumb")
    assert not bars_are_seen()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    assert not bars_are_seen()
