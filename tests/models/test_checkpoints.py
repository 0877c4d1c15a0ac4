"""Checkpoints that are not there; those of each engine are read in tests/ranks."""

import os
import random

import pytest
import torch

from sparse_train.models.checkpoints import check_runs_no_code, newest_checkpoint, read_checkpoint
from tests.conftest import shallow_llama


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"step=100.ckpt: it does not exist"):
        read_checkpoint(tmp_path / "epoch=0-step=100.ckpt")


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "notes.txt").write_text("some notes")
    with pytest.raises(ValueError, match=r"notes.txt is not a checkpoint of a training run, or is not complete"):
        read_checkpoint(tmp_path / "notes.txt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt is not a checkpoint of a training run, which has a state_dict"):
        read_checkpoint(tmp_path / "weights.pt")


def test_a_folder_that_no_engine_wrote(tmp_path):
    with pytest.raises(ValueError, match="is a folder that neither FSDP2 nor DeepSpeed wrote"):
        read_checkpoint(tmp_path)


def test_the_newest_checkpoint_is_a_file_or_a_folder_anywhere_below(tmp_path):
    with pytest.raises(ValueError, match=f"no last checkpoint: {tmp_path} .*no .*ckpt inside"):
        newest_checkpoint(tmp_path)
    for second, name in enumerate(["version_10/a.ckpt", "version_2/b.ckpt", "version_9/c.txt"]):
        path = tmp_path / name
        path.parent.mkdir()
        path.mkdir() if second == 1 else path.touch()
        os.utime(path, (second, second))
    assert newest_checkpoint(tmp_path) == tmp_path / "version_2/b.ckpt"
    os.utime(tmp_path / "version_10/a.ckpt", (5, 5))
    assert newest_checkpoint(tmp_path) == tmp_path / "version_10/a.ckpt"


def test_a_file_that_is_cut_off_anywhere_is_refused_by_name(tmp_path):
    path = tmp_path / "epoch=0-step=4.ckpt"
    torch.save({"state_dict": shallow_llama().state_dict(), "global_step": 4, "pytorch-lightning_version": "2.6"}, path)
    check_runs_no_code(path)
    whole = path.read_bytes()
    for length in [0, 1, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 97)]:
        path.write_bytes(whole[:length])
        for read in (check_runs_no_code, read_checkpoint):
            with pytest.raises(ValueError, match="step=4.ckpt .*is not complete"):
                read(path)


def test_a_file_that_lightning_did_not_write_is_not_resumed_from(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt is not a checkpoint of a training run"):
        check_runs_no_code(tmp_path / "other.ckpt")
