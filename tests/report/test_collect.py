import json
from pathlib import Path

import pytest

from sparse_train.report.collect import HISTORY, collect, without_homes

START = {"kind": "start", "step": 0, "seconds": 0.0, "pruning": None}


def leave(folder, *records):
    folder.mkdir(parents=True)
    (folder / HISTORY).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_names_are_as_short_as_they_can_be(tmp_path):
    a, b = leave(tmp_path / "a" / "version_0", START), leave(tmp_path / "b" / "version_0", START)
    assert [run.name for run in collect([a, b])] == ["a", "b"]
    again = leave(tmp_path / "a" / "version_1", START)
    assert [run.name for run in collect([a, again])] == ["a/version_0", "a/version_1"]
    other = leave(tmp_path / "x" / "a" / "version_0", START)
    assert [run.name for run in collect([again, other])] == ["a/version_1", "a/version_0"]
    assert len({run.name for run in collect([a, other])}) == 2


def test_the_folder_above_will_do_where_it_holds_one_run(tmp_path):
    leave(tmp_path / "run" / "version_0", START)
    assert collect([tmp_path / "run"])[0].folder == tmp_path / "run" / "version_0"
    assert collect([tmp_path])[0].folder == tmp_path / "run" / "version_0"
    leave(tmp_path / "run" / "version_1", START)
    with pytest.raises(ValueError, match="holds 2 runs"):
        collect([tmp_path / "run"])


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], "There is no run to report"),
        (["missing"], "There is no folder"),
        (["empty"], f"has no {HISTORY}"),
        (["good", "good"], "is named twice"),
        (["garbage"], "line 1 is not a record of a run"),
        (["headless"], "has no start of a run"),
    ],
)
def test_what_cannot_be_read_is_said(folders, message, tmp_path):
    (tmp_path / "empty").mkdir()
    leave(tmp_path / "good", START)
    leave(tmp_path / "headless", {"kind": "end", "step": 1, "seconds": 1.0})
    (leave(tmp_path / "garbage", START) / HISTORY).write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match=message):
        collect([tmp_path / folder for folder in folders])


def test_a_line_cut_in_the_middle_is_left_out_at_the_end_only(tmp_path):
    folder = leave(tmp_path / "run", START, {"kind": "train", "step": 3, "seconds": 1.5, "metrics": {}})
    text = (folder / HISTORY).read_text()
    (folder / HISTORY).write_text(text + '{"kind": "train", "st')
    assert collect([folder])[0].steps == 3
    (folder / HISTORY).write_text('{"kind": "train", "st\n' + text)
    with pytest.raises(ValueError, match="line 1 is not a record"):
        collect([folder])


def test_home_folders_are_not_shown():
    assert without_homes(f"path: {Path.home()}/data/a.txt") == "path: ~/data/a.txt"
    assert without_homes("- /home/jane/runs\n- '/Users/joe/x'\n") == "- ~/runs\n- '~/x'\n"
    assert without_homes("runs/home/jane: /data/home") == "runs/home/jane: /data/home"
