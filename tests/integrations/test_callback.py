import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from sparse_train import (
    OWL,
    Cubic,
    FirstWindow,
    FromZeros,
    MaskUpdater,
    OneShot,
    SparseLinear,
    prune,
    sparse_layers,
)
from sparse_train.integrations.transformers import SparseTrainerCallback
from sparse_train.oneshot.batches import random_batches
from tests.conftest import VOCABULARY, shallow_llama
from tests.integrations.runs import Tokens, pruning, trainer
from tests.pruning.test_policies import Moments

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class ExactAfterEveryStep(TrainerCallback):
    """Asserts inside the run that every group of four keeps two."""

    def __init__(self):
        self.checked = 0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        layers = sparse_layers(model)
        assert len(layers) == 14
        for layer in layers.values():
            assert (layer.unpacked_mask().reshape(-1, 4).sum(1) == 2).all()
        self.checked += 1


def test_exact_after_every_step_and_true_zeros_at_the_end(tmp_path):
    exact, pruning = ExactAfterEveryStep(), SparseTrainerCallback("2:4", update_freq=4)
    run = trainer(tmp_path / "run", pruning, exact, gradient_accumulation_steps=2)
    assert all(isinstance(layer, SparseLinear) for layer in sparse_layers(run.model).values())  # before the optimizer
    run.train()
    assert exact.checked == pruning.updater.steps == 12
    assert not sparse_layers(run.model)
    run.save_model(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert set(loaded.state_dict()) == set(shallow_llama().state_dict())
    assert ((loaded.model.layers[0].mlp.up_proj.weight.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert loaded.lm_head.weight.count_nonzero() == loaded.lm_head.weight.numel()


@pytest.mark.parametrize("padded", [0, 5])
def test_masks_are_those_of_a_plain_loop_on_the_same_batches(tmp_path, padded):
    seen = []

    class Seeing(SparseTrainerCallback):
        def token_mask(self, inputs):
            seen.append({name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)})
            return super().token_mask(inputs)

    pruning = Seeing("2:4", update_freq=4, first_mask=FirstWindow(), squash=False)
    run = trainer(
        tmp_path, pruning, data=Tokens(padded), gradient_accumulation_steps=2, max_steps=8, optim="sgd", max_grad_norm=0
    )
    run.train()
    assert len(seen) == 16

    model = shallow_llama()
    updater = MaskUpdater(model, "2:4", update_freq=4, total_steps=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-3)
    model.train()
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        for batch in (first, second):
            updater.token_mask = batch["attention_mask"]
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.step()
    expected = sparse_layers(model)
    for name, layer in sparse_layers(run.model).items():
        assert torch.equal(layer.weight_mask, expected[name].weight_mask), name
        torch.testing.assert_close(layer.weight, expected[name].weight)
    assert updater.steps == pruning.updater.steps == 8
    assert updater.report().initial_flip_rate > 0


def test_padding_changes_masks(tmp_path):
    found = []
    for padded in (0, 8):
        run = trainer(tmp_path, SparseTrainerCallback("2:4", update_freq=2, squash=False), data=Tokens(padded))
        run.train()
        found.append({name: layer.weight_mask for name, layer in sparse_layers(run.model).items()})
    assert any(not torch.equal(mask, found[1][name]) for name, mask in found[0].items())


def by_position(model, inputs):
    return model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"]).loss


def on_the_body(model, inputs):
    hidden = model.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    return model.loss_function(model.lm_head(hidden), inputs["labels"], VOCABULARY)


@pytest.mark.parametrize("loss", [by_position, on_the_body])
def test_padding_does_not_count_however_a_loss_hands_it_on(tmp_path, loss):
    tokens = []

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            tokens.append({int(layer.statistics.tokens) for layer in pruning.updater.layers.values()})

    pruning = SparseTrainerCallback("2:4", update_freq=10, first_mask=FirstWindow())
    run = trainer(tmp_path, pruning, Looks(), data=Tokens(padded=5), max_steps=3)
    run.compute_loss = lambda model, inputs, **_: loss(model, inputs)
    run.train()
    assert tokens[:2] == [{2 * 11}, {4 * 11}]


class ScheduleFree(torch.optim.SGD):
    """Trains at other weights than those that it means, as schedule-free optimizers do."""

    away = 0.0

    def train(self):
        self._move(0.1)

    def eval(self):
        self._move(0.0)

    @torch.no_grad()
    def _move(self, to):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(to - self.away)
        self.away = to


def test_a_schedule_free_optimizer_leaves_zeros_at_the_end(tmp_path):
    run = trainer(tmp_path, SparseTrainerCallback("2:4", update_freq=2), max_steps=6)
    run.optimizer = ScheduleFree(run.model.parameters(), lr=1e-3)
    run.train()
    run.evaluate(run.train_dataset)
    assert ((run.model.model.layers[0].mlp.up_proj.weight.reshape(-1, 4) == 0).sum(1) == 2).all()


class StopsBetweenEvaluations(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 10


@pytest.mark.parametrize("schedule_free", [False, True])
def test_the_best_model_comes_back_sparse(tmp_path, schedule_free):
    settings = {
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # the worst: not the last
    }
    run = trainer(tmp_path, pruning(), *([StopsBetweenEvaluations()] if schedule_free else []), **settings)
    if schedule_free:
        run.optimizer = ScheduleFree(run.model.parameters(), lr=1e-3)
    run.train()
    last_step = 9 if schedule_free else 12
    assert run.state.best_global_step < last_step
    stored = AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint).state_dict()
    last = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{last_step}").state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(stored[name] != 0, last[name] != 0)
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, stored[key]), key


def test_a_model_init_and_a_second_run(tmp_path):
    exact = ExactAfterEveryStep()
    run = Trainer(
        model_init=lambda: shallow_llama(),
        args=TrainingArguments(str(tmp_path), max_steps=4, report_to=[], use_cpu=True, save_strategy="no"),
        train_dataset=Tokens(),
        callbacks=[pruning(update_freq=2), exact],
    )
    run.train()
    run.train()
    assert exact.checked == 8
    assert ((run.model.model.layers[0].mlp.up_proj.weight.reshape(-1, 4) == 0).sum(1) == 2).all()


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_a_run_that_ends_early_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="sparse_train"):
        early = SparseTrainerCallback(schedule=Cubic(final_sparsity=0.5), update_freq=2)
        trainer(tmp_path, early, Stops(), max_steps=20).train()
        assert "ended after 2 steps, before its masks reached the final sparsity of 0.5" in caplog.text
        caplog.clear()
        rounded = SparseTrainerCallback("unstructured", 0.7, update_freq=2)  # 22 zeros in a row of 32
        trainer(tmp_path, rounded, max_steps=4).train()
    assert "ended after" not in caplog.text


@pytest.mark.parametrize("pruned_before", [False, True])
def test_layers_keep_sparsities_of_their_own(tmp_path, pruned_before):
    def zeros(model):
        return {n: int((m.weight == 0).sum()) for n, m in model.named_modules() if n.endswith("proj")}

    owl, model, first = OWL(owl_m=2), shallow_llama(), FromZeros() if pruned_before else OneShot()
    prune(model, random_batches(Tokens(), 2, default_data_collator, 32), "unstructured", 0.6, distribution=owl)
    callback = SparseTrainerCallback("unstructured", 0.6, update_freq=4, distribution=owl, first_mask=first)
    run = trainer(tmp_path, callback, model=model if pruned_before else None, max_steps=9)
    run.train()
    assert zeros(run.model) == zeros(model)
    assert len({zeros(model)[f"model.layers.{block}.self_attn.q_proj"] for block in range(2)}) > 1


def test_a_criterion_sees_what_the_optimizer_remembers(tmp_path):
    seen, moments = [], {}

    class Adam(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == 3:  # of the fourth step, after which masks change
                for name, layer in sparse_layers(model).items():
                    moments[name] = optimizer.state[layer.weight]["exp_avg"].clone()

    own = pruning(criterion=Moments(seen), squash=False)
    trainer(tmp_path, own, Adam(), max_steps=5).train()
    assert all(momentum is None for _, momentum in seen[:14])
    assert len(moments) == 14
    assert all(torch.equal(momentum, moments[name]) for name, momentum in seen[14:28])
