"""Checkpoints that are not there; those of each engine are read in tests/ranks."""

import pytest
import torch

from sparse_train.models.checkpoints import read_checkpoint


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
