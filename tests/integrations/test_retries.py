"""Runs that begin again with smaller batches, where memory was too small (``auto_find_batch_size``)."""

import copy

import pytest
import torch
from transformers import TrainerCallback, default_data_collator

from sparse_train import Cubic, OneShot, SparseGPT, prune, sparse_layers
from sparse_train.integrations.transformers import SparseTrainerCallback
from sparse_train.oneshot.first_mask import random_batches
from tests.conftest import tiny_llama
from tests.integrations.runs import OutOfMemory, Tokens, pruning, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    "changes",
    [{}, {"first_mask": OneShot(SparseGPT())}, {"schedule": Cubic(final_sparsity=0.5, init_sparsity=0.25)}],
    ids=["plain", "solver", "gradual"],
)
def test_a_smaller_batch_is_tried_where_memory_runs_out(tmp_path, changes):
    sizes = []

    class Sizes(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            tokens = {int(layer.statistics.tokens) for layer in sparse_layers(model).values()}
            sizes.append((state.train_batch_size, tokens))

    again = [pruning(norm_decay=1.0, **changes), OutOfMemory(), Sizes()]
    run = trainer(tmp_path, *again, auto_find_batch_size=True, per_device_train_batch_size=4)
    run.train()
    assert run.state.global_step == 12
    (before, seen), (after, seen_again) = sizes
    assert after < before
    assert seen == seen_again == {8 * before * 16}  # the first mask stays that of the first try
    assert ((run.model.model.layers[0].mlp.up_proj.weight.reshape(-1, 4) == 0).sum(1) == 2).all()


def test_a_retry_goes_back_to_masks_that_were_there(tmp_path):
    model = tiny_llama()
    prune(model, random_batches(Tokens(), 2, default_data_collator, 8), "unstructured", sparsity=0.25, squash=False)
    before = {name: layer.weight_mask.clone() for name, layer in sparse_layers(model).items()}
    tokens = {name: int(layer.statistics.tokens) for name, layer in sparse_layers(model).items()}
    seen = []

    class Starts(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            layers = sparse_layers(model)
            seen.append(all(torch.equal(layers[name].weight_mask, mask) for name, mask in before.items()))
            seen.append({name: int(layer.statistics.tokens) for name, layer in layers.items()} == tokens)

    rising = SparseTrainerCallback("unstructured", schedule=Cubic(0.5, 0.25), update_freq=2, end_step=1.0)
    run = trainer(tmp_path, rising, OutOfMemory(), Starts(), model=model, auto_find_batch_size=True)
    run.train()
    assert seen == [True] * 4


def test_a_retry_begins_with_the_masks_and_weights_of_a_run_without_one(tmp_path):
    class Starts(TrainerCallback):
        def __init__(self):
            self.states = []

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.states.append(copy.deepcopy(model.state_dict()))

    def run(tries):
        starts, failing = Starts(), OutOfMemory(steps=0, tries=tries)
        settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "max_steps": 1}
        trainer(tmp_path, pruning(first_mask=OneShot(SparseGPT())), failing, starts, **settings).train()
        return starts.states

    (expected,) = run(tries=0)
    states = run(tries=2)
    assert len(states) == 3
    for state in states:
        assert all(torch.equal(value, state[name]) for name, value in expected.items())


@pytest.mark.parametrize("criterion", [None, SparseGPT()], ids=["scores", "solver"])
def test_a_smaller_batch_is_tried_where_memory_runs_out_in_calibration(tmp_path, criterion):
    def refuse_more_than_two(module, args, kwargs):
        if len(kwargs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model = tiny_llama()
    model.register_forward_pre_hook(refuse_more_than_two, with_kwargs=True)
    began = pruning(first_mask=OneShot(criterion))
    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "max_steps": 1}
    run = trainer(tmp_path, began, model=model, **settings)
    run.train()
    assert run.state.train_batch_size == 2
    assert began.updater.timing.start_step == 0


def test_a_retry_of_a_resumed_run_is_refused(tmp_path):
    trainer(tmp_path, pruning(), save_strategy="steps", save_steps=2, max_steps=2).train()
    run = trainer(tmp_path, pruning(), OutOfMemory(), auto_find_batch_size=True)
    with pytest.raises(ValueError, match="Resume with a smaller per_device_train_batch_size"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
