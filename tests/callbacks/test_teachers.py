"""A module in training beside a frozen one: which is pruned, whose forwards count, and what the log says."""

import logging

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sparse_train import MaskUpdater
from sparse_train.callbacks import DynamicPruning
from tests.callbacks.runs import trainer
from tests.conftest import shallow_llama


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


class Distilled(L.LightningModule):
    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.student = teacher.requires_grad_(False), mlp()

    def training_step(self, batch, _):
        with torch.no_grad():
            wanted = self.teacher(batch[0])
        return F.mse_loss(self.student(batch[0]), wanted)

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=0.1)


def data():
    return DataLoader(TensorDataset(torch.randn(64, 8)), batch_size=4)


class InBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(mlp() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("teacher", [mlp, InBlocks])
def test_the_student_is_pruned_and_the_teacher_stays_what_it_was(teacher, tmp_path, caplog):
    module = Distilled(teacher())
    before = [parameter.clone() for parameter in module.teacher.parameters()]
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, DynamicPruning("2:4", update_freq=4)).fit(module, data())
    assert all(map(torch.equal, before, module.teacher.parameters()))
    for i in (0, 2):
        assert ((module.student[i].weight.view(-1, 4) == 0).sum(1) == 2).all()
    first = next(record.message for record in caplog.records if record.message.startswith("DynamicPruning"))
    assert "2 layers in student" in first


def test_a_frozen_module_that_is_named_is_not_recorded_under_no_grad():
    module = Distilled(mlp())
    updater = MaskUpdater(module, "2:4", targets=["teacher", "student"], update_freq=2, total_steps=20)
    module.training_step([torch.randn(4, 8)], 0).backward()
    with pytest.raises(ValueError, match=r"teacher\.0 is a target, but no token reached it.* frozen"):
        updater.step()
    updater = MaskUpdater(module, "2:4", targets=["teacher", "student"], update_freq=2, total_steps=20)
    F.mse_loss(module.student(torch.randn(4, 8)), module.teacher(torch.randn(4, 8))).backward()  # with gradients on
    assert updater.step().sparsity == 0.5


class FreezesAtFirst(BaseFinetuning):
    """Trains the head alone, behind the callbacks' setup."""

    def freeze_before_training(self, pl_module):
        pass

    def on_fit_start(self, trainer, pl_module):
        self.freeze(pl_module.net)
        super().on_fit_start(trainer, pl_module)

    def finetune_function(self, pl_module, epoch, optimizer):
        pass


class Head(L.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net, self.head = net, mlp()

    def training_step(self, batch, _):
        return self.head(self.net(batch[0])).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


@pytest.mark.parametrize("net", [InBlocks, mlp])
def test_what_is_frozen_after_it_was_chosen_is_still_pruned(net, tmp_path):
    module = Head(net())
    chosen = {name for name, layer in module.net.named_modules() if isinstance(layer, nn.Linear)}
    trainer(tmp_path, DynamicPruning("2:4", update_freq=4), FreezesAtFirst()).fit(module, data())
    for name in chosen:
        assert ((module.net.get_submodule(name).weight.view(-1, 4) == 0).sum(1) == 2).all()


def test_the_log_of_a_language_model_names_its_blocks(tmp_path, caplog):
    class Model(Distilled):
        def __init__(self):
            super().__init__(mlp())
            self.student = shallow_llama()

        def training_step(self, batch, _):
            ids = batch[0].abs().long() + 3
            return self.student(input_ids=ids, labels=ids).loss

    with caplog.at_level(logging.INFO):
        trainer(tmp_path, DynamicPruning("2:4", update_freq=4), max_steps=4).fit(Model(), data())
    first = next(record.message for record in caplog.records if record.message.startswith("DynamicPruning"))
    assert "14 layers in student.model.layers" in first
