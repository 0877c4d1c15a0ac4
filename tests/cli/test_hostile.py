"""Checkpoints from strangers: a command in one is never run, whatever reads it."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from sparse_train.cli.main import main
from sparse_train.files import replacing, written_whole
from sparse_train.model_folders import INDEX
from sparse_train.models.checkpoints import check_runs_no_code, read_checkpoint
from tests.conftest import tiny_llama

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("elsewhere")]
RAN = Path("ran")  # what the command leaves


class Command:
    """What is unpickled runs a command of the shell."""

    def __reduce__(self):
        return os.system, (f"touch {RAN}",)


def torch_file(path):
    torch.save({"state_dict": {"w": torch.zeros(2)}, "x": Command()}, path)


def old_torch_file(path):
    torch.save({"state_dict": {"w": torch.zeros(2)}, "x": Command()}, path, _use_new_zipfile_serialization=False)


def pickled(path):
    path.write_bytes(pickle.dumps({"state_dict": {}, "x": Command()}))


def plain_fsdp2(path):
    path.mkdir()
    torch.save({"callbacks": {}}, path / "meta.pt")
    dcp.save({"state_dict.w": torch.arange(3.0), "lr": 0.1}, checkpoint_id=path, no_dist=True)


def fsdp2_metadata(path):
    plain_fsdp2(path)
    (path / ".metadata").write_bytes(pickle.dumps({"x": Command()}))


def fsdp2_beside(path):
    plain_fsdp2(path)
    torch_file(path / "meta.pt")


def fsdp2_value(path):
    path.mkdir()
    torch.save({"callbacks": {}}, path / "meta.pt")
    dcp.save({"state_dict.w": torch.zeros(2), "lr": Command()}, checkpoint_id=path, no_dist=True)


def deepspeed(path):
    (path / "checkpoint").mkdir(parents=True)
    torch.save({"module": {}}, path / "checkpoint/mp_rank_00_model_states.pt")
    torch_file(path / "checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt")


def deepspeed_model(path):
    deepspeed(path)
    torch_file(path / "checkpoint/mp_rank_00_model_states.pt")


WHOLE_FILES = [torch_file, old_torch_file, pickled]
FOLDERS = [fsdp2_metadata, fsdp2_beside, deepspeed, deepspeed_model]


def refused(command):
    with pytest.raises(SystemExit) as end:
        main(command)
    message = str(end.value.code)  # a text, with which Python exits with code 1
    assert isinstance(end.value.code, str) and "\n" not in message
    assert message.startswith(f"sparse-train {command[0]}: ") and "x.ckpt" in message
    assert not RAN.exists()
    return message


@pytest.mark.parametrize("write", [*WHOLE_FILES, *FOLDERS])
def test_export_runs_nothing(write):
    write(Path("x.ckpt"))
    message = refused(["export", "x.ckpt", "out"])
    assert "would call posix.system" in message or write is pickled
    assert not Path("out").exists()


@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize("write", [torch_file, old_torch_file])
def test_resuming_runs_nothing(command, write, model_folder, text):
    write(Path("x.ckpt"))
    recipe = "--config=recipes/smollm2_2of4.yaml"
    options = [f"--model.model={model_folder}", f"--data.text={text}", "--trainer.accelerator=cpu"]
    refused([command, recipe, "--config=configs/precision/float32.yaml", *options, "--ckpt_path=x.ckpt"])


@pytest.mark.parametrize("write", [*FOLDERS, fsdp2_value])
def test_checkpoints_of_engines_are_looked_at_before_the_engine_reads_them(write):
    write(Path("x.ckpt"))
    with pytest.raises(ValueError, match=r"would call posix.system"):
        check_runs_no_code("x.ckpt")
    assert not RAN.exists()


def test_what_torch_writes_of_a_distributed_checkpoint_is_read():
    plain_fsdp2(Path("x.ckpt"))
    assert torch.equal(read_checkpoint("x.ckpt")["state_dict"]["w"], torch.arange(3.0))


def test_an_index_does_not_lead_out_of_its_folder():
    model = tiny_llama(num_hidden_layers=1)
    model.save_pretrained("private")
    model.config.save_pretrained("x.ckpt")
    inside = dict.fromkeys(model.state_dict(), "../private/model.safetensors")
    Path("x.ckpt", INDEX).write_text(json.dumps({"metadata": {}, "weight_map": inside}))
    assert "which is outside its folder" in refused(["inspect", "x.ckpt"])


def test_a_link_where_something_is_written_is_not_followed():
    Path("mine").mkdir()
    Path("mine/file").write_text("mine")
    Path(".run.json.writing").symlink_to("mine/file")
    with replacing(Path("run.json")) as beside:
        beside.write_text("new")
    assert Path("mine/file").read_text() == "mine" and Path("run.json").read_text() == "new"
    Path("mine/file").unlink()
    Path("out").symlink_to("mine")
    with pytest.raises(ValueError, match="out exists already"), written_whole(Path("out")):
        pass
