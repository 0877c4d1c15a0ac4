"""Commands whose first, second, ... write fails: one line says so, and the same command then ends as undisturbed."""

import contextlib
import itertools
import os
from pathlib import Path

import pytest

from sparse_train.cli.main import main
from sparse_train.files import check_free
from tests.conftest import without_pictures
from tests.faults.disks import FULL, READ_ONLY, failing
from tests.faults.jobs import model_result

pytestmark = pytest.mark.filterwarnings("ignore")


def ends_well(command, number, code):
    """Whether there is a model; the command says in one line if the disk is full or read-only."""
    said = os.strerror(code)
    try:
        with failing(number, code):
            main(command)
    except SystemExit as end:
        said = str(end.code)
    assert os.strerror(code) in said and "\n" not in said, number
    return Path("out").exists()  # also if only the report could not be written


@pytest.fixture(scope="module")
def fit(model_folder, text_file):
    files = f'{{"class_path": "TextFiles", "init_args": {{"train": ["{text_file}"], "validation": ["{text_file}"]}}}}'
    return [
        *("fit", "--config=recipes/smollm2_2of4.yaml", "--config=configs/precision/float32.yaml"),
        *(f"--model.model={model_folder}", f"--data.text={files}", "--data.block_size=32", "--data.batch_size=2"),
        *("--data.max_validation_blocks=2", "--trainer.max_steps=4", "--trainer.default_root_dir=run"),
        *("--trainer.val_check_interval=4", "--trainer.num_sanity_val_steps=0", "--pruning.update_freq=2"),
        *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=4", "--export=out"),
    ]


@pytest.fixture(scope="module")
def fitted(fit, tmp_path_factory):
    """A folder in which ``fit`` has run."""
    folder = tmp_path_factory.mktemp("fitted")
    with contextlib.chdir(folder), without_pictures():
        main(fit)
    return folder


def in_turn():
    """The first write on a full disk, the second on a read-only one, and so on."""
    return zip(itertools.count(1), itertools.cycle([FULL, READ_ONLY]))


@pytest.mark.parametrize("command", ["prune", "export"])
def test_wherever_a_write_of_a_pruning_or_an_export_fails(command, model_folder, text_file, request, tmp_path):
    if command == "prune":
        words = ["prune", str(model_folder), "out", f"--text={text_file}", "--streaming=true"]
        words += ["--num_calibration_samples=2", "--max_seq_length=16"]
    else:
        (checkpoint,) = request.getfixturevalue("fitted").rglob("*.ckpt")
        words = ["export", str(checkpoint), "out"]
    expected = None
    for number, code in in_turn():
        folder = tmp_path / str(number)
        folder.mkdir()
        with contextlib.chdir(folder):
            ended = ends_well(words, number, code)
            if not ended:
                main(words)
        assert os.listdir(folder) == ["out"]
        expected = expected or model_result(folder)
        assert model_result(folder) == expected
        if ended:
            break
    assert number > 6


def test_wherever_a_write_of_a_training_fails(fit, fitted, tmp_path):
    with contextlib.chdir(tmp_path), without_pictures():
        number = next(number for number, code in in_turn() if ends_well(fit, number, code))
    assert number > 8
    assert model_result(tmp_path) == model_result(fitted)
    strays = [path for path in tmp_path.rglob("*") if path.name.endswith(".writing") or path.name.startswith(".out")]
    assert strays == []


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ValueError, match="cannot be written to. Choose another place"):
        check_free(tmp_path / "out")
