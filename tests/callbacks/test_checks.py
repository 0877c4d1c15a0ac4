"""Runs in which masks would not do what they are asked for."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

from sparse_train import Cubic
from sparse_train.callbacks import DynamicPruning
from sparse_train.callbacks.checks import check_fit
from tests.callbacks.runs import InInit, loader, trainer, zeros

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*does not have many workers.*")


class ByHand(InInit):
    """Steps once every four batches; with torch's optimizer, past Lightning, where ``past``."""

    automatic_optimization = False
    past = False

    def training_step(self, batch, index):
        optimizer = self.optimizers(use_pl_optimizer=not self.past)
        self.manual_backward(self.net(**batch).loss)
        if index % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("settings", [{}, {"start_step": 0.5, "end_step": 10}])
def test_shares_of_a_run_that_is_optimized_by_hand_are_refused(settings, tmp_path):
    name = "start_step" if settings else "end_step"
    with pytest.raises(ValueError, match=f"{name}=0.*is a share of the run, whose length is not known"):
        trainer(tmp_path, DynamicPruning("2:4", **settings)).fit(ByHand(), loader())


def test_optimized_by_hand_whole_steps_are_those_of_the_optimizer(tmp_path):
    pruning, model = DynamicPruning("unstructured", schedule=Cubic(0.5), update_freq=2, end_step=8), ByHand()
    trainer(tmp_path, pruning, max_steps=-1, max_epochs=2).fit(model, loader())
    assert pruning.updater.steps == 10
    assert pruning.updater.timing.end_step == 8
    assert zeros(model) == 0.5


def test_steps_that_nobody_sees_are_said(tmp_path):
    model = ByHand()
    model.past = True
    with pytest.warns(UserWarning, match="No optimizer step was seen"):
        trainer(tmp_path, DynamicPruning("2:4", end_step=8), max_steps=-1, max_epochs=1).fit(model, loader())


def test_a_best_checkpoint_that_may_be_a_denser_one_is_said(tmp_path, recwarn):
    best = ModelCheckpoint(tmp_path, monitor="loss", every_n_train_steps=4)
    rising = DynamicPruning("unstructured", schedule=Cubic(0.5), update_freq=2)
    trainer(tmp_path, rising, best, max_steps=4).fit(InInit(), loader())
    assert any("with the best loss, and the sparsity of this run rises" in str(each.message) for each in recwarn)
    recwarn.clear()
    best = ModelCheckpoint(tmp_path, monitor="loss", every_n_train_steps=4)
    trainer(tmp_path, DynamicPruning("2:4", update_freq=2), best, max_steps=4).fit(InInit(), loader())
    assert not any("the sparsity of this run rises" in str(each.message) for each in recwarn)


def test_flat_shards_are_refused():
    flat = SimpleNamespace(strategy=FSDPStrategy(), callbacks=[])
    with pytest.raises(ValueError, match='strategy="fsdp" is FSDP1.*ModelParallelStrategy'):
        check_fit(flat, squash=True)


def test_masks_that_processes_would_not_bring_back_are_refused(tmp_path):
    forked = DDPStrategy(start_method="fork", process_group_backend="gloo")
    settings = {"strategy": forked, "devices": 2, "max_steps": 4, "logger": False}
    pruning = DynamicPruning("2:4", squash=False)
    with pytest.raises(Exception, match="squash=False keeps masks after fit"):  # torch names the process that raised
        L.Trainer(**settings, accelerator="cpu", default_root_dir=tmp_path, callbacks=[pruning]).fit(InInit(), loader())
