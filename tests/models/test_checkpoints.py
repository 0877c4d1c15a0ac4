"""Checkpoints that are not there; those of each engine are read in tests/ranks."""

import pytest

from sparse_train.models.checkpoints import read_checkpoint


def test_checkpoints_beside_one_that_is_not_there_are_named(tmp_path):
    (tmp_path / "epoch=0-step=50.ckpt").write_text("")
    with pytest.raises(ValueError, match=r"step=100.ckpt: it does not exist. There are epoch=0-step=50.ckpt in"):
        read_checkpoint(tmp_path / "epoch=0-step=100.ckpt")


def test_a_folder_that_no_engine_wrote(tmp_path):
    with pytest.raises(ValueError, match="is a folder that neither FSDP2 nor DeepSpeed wrote"):
        read_checkpoint(tmp_path)
