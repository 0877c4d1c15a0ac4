"""``transformers.Trainer`` under DDP: two processes make the masks of one, and resume where they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from sparse_train import sparse_layers
from sparse_train.distributed.collectives import rank, world_size
from sparse_train.integrations.transformers import SparseTrainerCallback
from tests.conftest import shallow_llama
from tests.integrations.runs import Tokens
from tests.integrations.test_callback import ExactAfterEveryStep
from tests.ranks import launch


def train(folder: Path, resume: bool = False) -> dict[str, Any]:
    pruning, exact = SparseTrainerCallback("2:4", update_freq=4, end_step=1.0, squash=False), ExactAfterEveryStep()
    arguments = TrainingArguments(
        str(folder),
        max_steps=9,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2 // world_size(),
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        save_steps=5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    run = Trainer(model=shallow_llama(), args=arguments, train_dataset=Tokens(), callbacks=[pruning, exact])
    run.train(resume_from_checkpoint=str(folder / "checkpoint-5") if resume else None)
    assert exact.checked == (4 if resume else 9)
    assert len(sparse_layers(run.model)) == 14
    assert pruning.updater.report().initial_flip_rate > 0
    return dict(run.model.state_dict())


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    return folder, launch.run(train, folder)


def test_two_processes_make_the_masks_of_one(ddp, tmp_path):
    alone = launch.alone(train, tmp_path)
    for state in ddp[1]:
        for name, value in alone.items():
            if name.endswith("weight_mask"):
                assert torch.equal(state[name], value), name
            else:
                torch.testing.assert_close(state[name], value, msg=name)


def train_apart(folder: Path) -> dict[str, Any]:
    return train(folder / f"node{rank()}")


def test_processes_without_a_common_disk_write_checkpoints(tmp_path):
    assert len(launch.run(train_apart, tmp_path)) == 2


def test_a_resumed_run_is_the_uninterrupted_one_on_every_rank(ddp):
    folder, whole = ddp
    again = launch.run(train, folder, resume=True)
    for state in again:
        assert all(torch.equal(state[name], value) for name, value in whole[0].items())
