"""Several fits, and evaluations between them, with one callback or one trainer."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from sparse_train import Cubic, Magnitude, SparseLinear, sparse_layers
from sparse_train.callbacks import DynamicPruning
from tests.callbacks.runs import InInit, Interrupt, Tokens, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_the_callback_can_be_used_for_a_second_fit(tmp_path):
    pruning = DynamicPruning("2:4", criterion=Magnitude(), update_freq=4)
    for _ in range(2):
        model = InInit()
        trainer(tmp_path, pruning, max_steps=5).fit(model, loader())
        assert pruning.updater.steps == 5
        assert (model.net.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5
        assert not isinstance(model.net.model.layers[0].mlp.up_proj, SparseLinear)


def test_a_second_fit_continues_after_a_validation_that_has_loaded_a_checkpoint(tmp_path):
    states = []
    for ckpt_path in (None, tmp_path / "end.ckpt"):
        model, pruning = InInit(), DynamicPruning("2:4", update_freq=4, squash=False)
        run = trainer(tmp_path, pruning)
        run.fit(model, loader())
        run.save_checkpoint(tmp_path / "end.ckpt")
        run.validate(model, DataLoader(Tokens(), batch_size=4), ckpt_path=ckpt_path, verbose=False, weights_only=False)
        run.fit_loop.epoch_loop.max_steps = 24
        run.fit(model, loader())
        assert pruning.updater.steps == 24
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])  # also the masks, which are frozen


def test_validation_leaves_nothing_behind_for_the_next_fit(tmp_path):
    path = tmp_path / "middle.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, DynamicPruning("2:4"), Interrupt(6, path)).fit(InInit(), loader())
    pruning, data = DynamicPruning("2:4"), DataLoader(Tokens(), batch_size=4)
    run = trainer(tmp_path, pruning)
    run.validate(InInit(), data, ckpt_path=path, verbose=False, weights_only=False)
    run.fit(InInit(), loader())
    assert pruning.updater.steps == 12


def test_a_fit_that_goes_on_without_a_checkpoint_goes_on_with_its_schedule(tmp_path):
    model = InInit()
    pruning = DynamicPruning("unstructured", schedule=Cubic(0.7), end_step=20, update_freq=4, squash=False)
    run = trainer(tmp_path, pruning, max_steps=10)
    run.fit(model, loader())
    before = pruning.updater.sparsity
    run.fit_loop.epoch_loop.max_steps = 20
    run.fit(model, loader())
    assert pruning.updater.steps == 20
    assert before < pruning.updater.sparsity == 0.7


class Norms(L.Callback):
    """What is known of inputs as training begins and ends."""

    def __init__(self):
        self.began, self.ended = [], []

    def _norms(self, module):
        return {name: layer.statistics.norm_I.clone() for name, layer in sparse_layers(module).items()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in (0, 10):
            self.began.append(self._norms(pl_module))

    def on_train_end(self, trainer, pl_module):
        self.ended.append(self._norms(pl_module))


def test_a_fit_that_goes_on_remembers_what_the_one_before_has_seen(tmp_path):
    model, norms = InInit(), Norms()
    run = trainer(tmp_path, DynamicPruning("2:4", end_step=20, update_freq=4, squash=False), norms, max_steps=10)
    run.fit(model, loader())
    assert all(layer.statistics is None for layer in sparse_layers(model).values())
    run.fit_loop.epoch_loop.max_steps = 20
    run.fit(model, loader())
    (_, again), (before, after) = norms.began, norms.ended
    for name, norm_I in before.items():
        assert torch.equal(again[name], norm_I)
        assert (after[name] > norm_I).all()
