"""Nothing is asked of a network at run time, where no hub id is named."""

import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from sparse_train.cli.main import main

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("elsewhere", "without_pictures")]


def test_no_command_connects_anywhere(model_folder, text, text_file, monkeypatch):
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("there is no network here")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # which the tests set, and users do not
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(OSError, match="there is no network"):  # it would be seen
        socket.create_connection(("localhost", 80))
    assert asked
    asked.clear()

    options = [f"--model.model={model_folder}", f"--data.text={text}", "--data.block_size=32", "--data.batch_size=2"]
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.max_validation_blocks=2"]
    keep = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=2"]
    cpu = ["--trainer.accelerator=cpu", "--trainer.default_root_dir=run"]
    recipe = ["--config=recipes/smollm2_2of4.yaml", "--config=configs/precision/float32.yaml"]
    main(["fit", *recipe, *options, *short, *keep, *cpu, "--export=fitted"])
    main(["export", str(next(Path("run").rglob("*.ckpt"))), "exported"])
    main(["prune", "exported", "pruned", f"--text={text_file}", "--num_calibration_samples=2", "--max_seq_length=32"])
    main(["evaluate", "pruned", f"--text={text_file}", "--window=32", "--max_tokens=256"])
    main(["inspect", "pruned"])
    main(["report", "run"])
    assert not asked
