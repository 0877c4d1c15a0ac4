"""First masks from a solver, which moves the weights it keeps."""

import copy

import lightning as L
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from sparse_train import (
    Explicit,
    FirstWindow,
    Fixed,
    Magnitude,
    MaskLoRA,
    OneShot,
    SparseGPT,
    Wanda,
    prune,
    sparse_layers,
)
from sparse_train.callbacks import DynamicPruning
from sparse_train.oneshot.first_mask import random_batches
from tests.callbacks.runs import ExactAfterEveryStep, InInit, Interrupt, Tokens, loader, trainer
from tests.conftest import VOCABULARY, shallow_llama

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Start(L.Callback):
    """What a run starts with: weights and masks of the first step, and the norms that are remembered."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            layers = sparse_layers(pl_module.net)
            self.weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
            self.masks = {name: layer.unpacked_mask() for name, layer in layers.items()}
            self.norms = {name: copy.deepcopy(layer.statistics) for name, layer in layers.items()}


def run(folder, *callbacks, **settings):
    start = Start()
    pruning = DynamicPruning("2:4", update_freq=4, **{"first_mask": OneShot(SparseGPT())} | settings)
    model = InInit()
    trainer(folder, start, pruning, *callbacks).fit(model, loader())
    return model, start


def test_its_masks_are_re_pruned_by_the_criterion_of_the_run(tmp_path):
    exact = ExactAfterEveryStep()
    model, start = run(tmp_path, exact)
    assert exact.checked == 12
    moved = [(dict(model.net.named_modules())[name].weight != 0) != mask for name, mask in start.masks.items()]
    assert any(each.any() for each in moved)


def test_its_norms_are_the_first_that_are_remembered(tmp_path):
    _, start = run(tmp_path, norm_decay="frozen")
    model = shallow_llama()
    batches = random_batches(Tokens(), 2, None, 8)
    prune(model, batches, "2:4", criterion=SparseGPT(), squash=False)
    for name, layer in sparse_layers(model).items():
        assert int(start.norms[name].tokens) == 8 * 2 * 16
        torch.testing.assert_close(start.norms[name].norm_I, layer.statistics.norm_I)
    wanda = shallow_llama()
    prune(wanda, batches, "2:4", criterion=Wanda(), squash=False)  # the first block reads the same in both
    for name, layer in sparse_layers(wanda.model.layers[0]).items():
        own = start.norms[f"model.layers.0.{name}"].norm_I
        if name.startswith("self_attn.q"):
            torch.testing.assert_close(own, layer.statistics.norm_I)


def test_a_run_that_began_with_a_solver_resumes_bit_for_bit(tmp_path):
    whole, _ = run(tmp_path / "whole")
    with pytest.raises(SystemExit):
        run(tmp_path / "half", Interrupt(6, tmp_path / "half.ckpt"))
    resumed, pruning = InInit(), DynamicPruning("2:4", update_freq=4, first_mask=OneShot(SparseGPT()))
    trainer(tmp_path / "half", pruning).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    for (name, ours), theirs in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_run_without_a_step_says_so(tmp_path):
    with pytest.warns(UserWarning, match="no step, so nothing was pruned"):
        trainer(tmp_path, DynamicPruning("2:4"), max_steps=0).fit(InInit(), loader())


def test_adapters_of_weights_that_a_solver_moves_are_refused(tmp_path):
    pruning = DynamicPruning("2:4", first_mask=OneShot(SparseGPT()), mask_lora=MaskLoRA())
    with pytest.raises(ValueError, match="of net.model.*q_proj are frozen"):
        trainer(tmp_path, pruning).fit(InInit(), loader())


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
