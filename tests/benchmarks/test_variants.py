"""What arms of the benchmark try beside the package does what their tables say."""

import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from sparse_train import LayerContext, Magnitude
from sparse_train.callbacks import DynamicPruning
from sparse_train.statistics import ActivationNorm
from tests.callbacks.runs import InInit, loader, trainer
from tests.conftest import shallow_llama

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from variants import (
    CoupledDecay,
    DenseNorms,
    FirstNorms,
    GrowingDecay,
    RisingDecay,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Module(InInit):
    def forward(self, **batch):
        return self.net(**batch)


def test_first_norms_are_those_of_a_layers_first_scores():
    criterion, stats = FirstNorms(), ActivationNorm(3)
    stats.add(torch.tensor([[1.0, 2, 3]]))

    def score(name):
        return criterion.scores(LayerContext(torch.ones(2, 3), stats, name)).tolist()

    first = score("one")
    stats.add(torch.tensor([[9.0, 9, 9]]))
    assert score("one") == first == [[1, 2, 3]] * 2 and score("two") != first


def test_norms_of_dense_forwards_are_those_of_the_model_without_masks(tmp_path):
    pruning, dense = DynamicPruning("2:4", update_freq=4, window=1, norm_decay=0), DenseNorms(2)
    seen = []

    class Compare(L.Callback):  # behind both
        def __init__(self):
            self.batches = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.batches.append(batch)
            if (batch_idx + 1) % 4 or batch_idx > 8:
                return
            model = shallow_llama()
            state = {name: value for name, value in pl_module.net.state_dict().items() if "weight_mask" not in name}
            model.load_state_dict(state)
            inputs = {name: [] for name in pruning.updater.layers}
            for name in inputs:
                linear = model.get_submodule(name.removeprefix("net."))
                linear.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
            with torch.no_grad():
                for batch in self.batches[-2:]:
                    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            for name, layer in pruning.updater.layers.items():
                x_TI = torch.cat([x.flatten(0, 1) for x in inputs[name]])
                assert layer.statistics.tokens == len(x_TI)
                torch.testing.assert_close(layer.statistics.sum_squares_I, x_TI.square().sum(0))
                assert not layer.is_dense()  # masks are back
            seen.append(batch_idx)

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            # the training forward, which is masked, adds nothing
            assert all(int(layer.statistics.tokens) in (0, 64) for layer in pruning.updater.layers.values())

    trainer(tmp_path, pruning, dense, Compare(), max_steps=12).fit(Module(), loader())
    assert seen == [3, 7]


def test_growing_decay_runs_dense_and_shrinks_what_would_be_pruned(tmp_path):
    policy = GrowingDecay(20.0)
    pruning = DynamicPruning("2:4", update_freq=4, criterion=Magnitude(), policy=policy, end_step=1.0)
    shares = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            layers = pruning.updater.layers
            assert all(layer.is_dense() for layer in layers.values())
            if batch_idx % 4 == 3:  # just before an update, of what the one before has chosen
                own = pruning.updater.policy._pruned
                pruned = sum(float(layer.weight_OI[own[name]].abs().sum()) for name, layer in layers.items())
                shares.append(pruned / sum(float(layer.weight_OI.abs().sum()) for layer in layers.values()))

    module = Module()
    trainer(tmp_path, pruning, Watch(), max_steps=20).fit(module, loader())
    assert len(shares) == 5
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.7 * shares[0]
    assert pruning.last_report.sparsity == 0.5


def test_coupled_decay_is_added_to_the_gradient_of_pruned_weights_alone(tmp_path):
    pruning, compared = DynamicPruning("2:4", update_freq=4, policy=CoupledDecay(0.5)), []

    class Before(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.gradients = {n: layer.weight_OI.grad.clone() for n, layer in pruning.updater.layers.items()}

    class After(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for name, layer in pruning.updater.layers.items():
                shadow_OI = layer.weight_OI.detach() * ~layer.unpacked_mask()
                assert shadow_OI.any()
                torch.testing.assert_close(layer.weight_OI.grad, before.gradients[name] + 0.5 * shadow_OI)
                compared.append(name)

    before = Before()
    trainer(tmp_path, before, pruning, After(), max_steps=3).fit(Module(), loader())
    assert len(compared) == 3 * len(pruning.updater.layers)


def test_rising_decay_rises_and_then_stays(tmp_path):
    policy = RisingDecay(full_decay=0.1, ramp=0.5)
    pruning, shrunk = DynamicPruning("2:4", update_freq=2, policy=policy, end_step=1.0), []

    class Look(L.Callback):  # before DynamicPruning
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.before = {name: layer.weight_OI.detach().clone() for name, layer in pruning.updater.layers.items()}
            self.masks = {name: layer.unpacked_mask() for name, layer in pruning.updater.layers.items()}

    class After(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            share = set()
            for name, layer in pruning.updater.layers.items():
                shadow_OI = ~look.masks[name] & (look.before[name] != 0)
                share.add(round(float((layer.weight_OI / look.before[name])[shadow_OI].mean()), 4))
                assert torch.equal(layer.weight_OI[look.masks[name]], look.before[name][look.masks[name]])
            (shrunk_by,) = share
            shrunk.append(shrunk_by)

    look = Look()
    trainer(tmp_path, look, pruning, After(), max_steps=8).fit(Module(), loader())
    assert shrunk[::2] == [1, 1, 1, 1]
    assert shrunk[1::2] == pytest.approx([0.95**2, 0.9**2, 0.9**2, 0.9**2], abs=1e-3)
    assert policy == RisingDecay(full_decay=0.1, ramp=0.5)  # the run works on a copy
