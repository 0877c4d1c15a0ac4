"""First masks by one-shot pruning."""

import copy

import lightning as L
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from sparse_train import (
    IHT,
    Explicit,
    FirstWindow,
    Fixed,
    Magnitude,
    OneShot,
    Wanda,
    prune,
    sparse_layers,
)
from sparse_train.callbacks import DynamicPruning
from tests.callbacks.runs import InInit, loader, trainer
from tests.conftest import VOCABULARY, shallow_llama

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Start(L.Callback):
    """The masks of the first step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            layers = sparse_layers(pl_module.net)
            self.masks = {name: layer.unpacked_mask() for name, layer in layers.items()}


def test_a_run_without_a_step_says_so(tmp_path):
    with pytest.warns(UserWarning, match="no step, so nothing was pruned"):
        trainer(tmp_path, DynamicPruning("2:4"), max_steps=0).fit(InInit(), loader())


class Shifted(InInit):
    """Cuts inputs and targets out of one tensor, so that its batches are longer than what the model takes."""

    def __init__(self):
        super().__init__()
        self.net = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=16))

    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())


def test_batches_that_the_model_does_not_take_as_they_are(tmp_path):
    ids = torch.randint(3, VOCABULARY, (16, 17), generator=torch.Generator().manual_seed(0))
    data = DataLoader(ids, batch_size=4)
    with pytest.raises(IndexError) as error:
        trainer(tmp_path, DynamicPruning("2:4", update_freq=4)).fit(Shifted(), data)
    assert "first_mask=FirstWindow()" in error.value.__notes__[0]
    trainer(tmp_path, DynamicPruning("2:4", update_freq=4, first_mask=FirstWindow())).fit(Shifted(), data)


class _Misshapen(Wanda):
    def scores(self, layer):
        return layer.weight_OI.abs() * layer.norm_I[:, None]


def test_mistakes_of_a_criterion_are_not_laid_on_the_batches(tmp_path):
    module = InInit()
    with pytest.raises(RuntimeError, match="must match the size of tensor"):
        trainer(tmp_path, DynamicPruning("2:4", criterion=_Misshapen())).fit(module, loader())


class Classified(InInit):
    """Labels of its batches are of sequences, which the model's own loss does not take."""

    def training_step(self, batch, _):
        logits = self.net(input_ids=batch["input_ids"]).logits[:, -1]
        return F.cross_entropy(logits, batch["labels"])


def test_labels_that_are_not_the_models_are_no_hindrance(tmp_path):
    ids = torch.randint(3, VOCABULARY, (16, 8), generator=torch.Generator().manual_seed(0))
    data = DataLoader([{"input_ids": row, "labels": row[0]} for row in ids], batch_size=2)
    pruning = DynamicPruning("2:4", update_freq=4)
    trainer(tmp_path, pruning, max_steps=4).fit(Classified(), data)
    assert pruning.updater.timing.start_step == 0


class Embedded(InInit):
    """Its batches are no token ids."""

    def training_step(self, batch, _):
        return self.net(inputs_embeds=batch).logits.square().mean()


def test_a_copy_of_the_model_as_a_reference_changes_nothing(tmp_path):
    class WithReference(InInit):
        def on_fit_start(self):
            self.reference = copy.deepcopy(self.net).requires_grad_(False)

    found = []
    for module in (InInit(), WithReference()):
        start = Start()
        trainer(tmp_path, start, DynamicPruning("2:4", update_freq=4)).fit(module, loader())
        found.append((module, start))
    (plain, first), (with_reference, second) = found
    assert len(first.masks) == 14
    assert all(torch.equal(first.masks[name], second.masks[name]) for name in first.masks)
    ours, theirs = plain.net.state_dict(), with_reference.net.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    dense = shallow_llama().state_dict()
    assert all(torch.equal(dense[name], weight) for name, weight in with_reference.reference.state_dict().items())


def test_batches_that_are_no_ids_leave_the_first_mask_to_the_first_window(tmp_path):
    pruning = DynamicPruning("2:4", update_freq=4)
    trainer(tmp_path, pruning).fit(Embedded(), DataLoader(torch.randn(16, 8, 32), batch_size=2))
    assert pruning.updater.timing.start_step == 2


def test_zeros_that_a_first_mask_does_not_keep_are_said(tmp_path, caplog):
    def fit(sparsity):
        module = InInit()
        uneven = Explicit({"gate_proj": 0.7, "up_proj": 0.7, "down_proj": 0.7})
        prune(module.net, mask_structure="unstructured", sparsity=0.6, criterion=Magnitude(), distribution=uneven)
        caplog.clear()
        trainer(tmp_path, DynamicPruning("unstructured", sparsity, policy=Fixed())).fit(module, loader())

    fit(0.6)
    assert "The model was pruned before" in caplog.text and "that the first masks keep" in caplog.text
    fit(0.75)
    assert "pruned before" not in caplog.text  # all that was zero stays zero


def test_steps_that_do_not_fit_are_refused_before_a_solver_moves_weights(tmp_path):
    model = InInit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="window must be from 1 to update_freq"):
        trainer(tmp_path, DynamicPruning("2:4", first_mask=OneShot(IHT()), update_freq=2, window=3)).fit(
            model, loader()
        )
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
