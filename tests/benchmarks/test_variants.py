"""What arms of the benchmark try beside the package does what their tables say."""

import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from sparse_train.callbacks import DynamicPruning
from tests.callbacks.runs import InInit, loader, trainer
from tests.conftest import tiny_llama

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from variants import CoupledDecay, DenseNorms, SlowShadows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Module(InInit):
    def forward(self, **batch):
        return self.net(**batch)


def test_norms_of_dense_forwards_are_those_of_the_model_without_masks(tmp_path):
    pruning, dense = DynamicPruning("2:4", update_freq=4, window=1, memory=0), DenseNorms(2)
    seen = []

    class Compare(L.Callback):  # behind both
        def __init__(self):
            self.batches = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.batches.append(batch)
            if (batch_idx + 1) % 4 or batch_idx > 8:
                return
            model = tiny_llama()
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
                assert not layer.keeps_all()  # masks are back
            seen.append(batch_idx)

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            # the training forward, which is masked, adds nothing
            assert all(int(layer.statistics.tokens) in (0, 64) for layer in pruning.updater.layers.values())

    trainer(tmp_path, pruning, dense, Compare(), max_steps=12).fit(Module(), loader())
    assert seen == [3, 7]


def test_coupled_decay_is_added_to_the_gradient_of_pruned_weights_alone(tmp_path):
    pruning, compared = DynamicPruning("2:4", update_freq=4), []

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
    trainer(tmp_path, pruning, before, CoupledDecay(0.5), After(), max_steps=3).fit(Module(), loader())
    assert len(compared) == 3 * len(pruning.updater.layers)


def test_slow_shadows_move_by_a_share_of_the_optimizers_step_and_kept_weights_by_all(tmp_path):
    pruning, compared = DynamicPruning("2:4", update_freq=4), []

    class Plain(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.before = {name: layer.weight_OI.detach().clone() for name, layer in pruning.updater.layers.items()}
            self.gradients = {name: layer.weight_OI.grad.clone() for name, layer in pruning.updater.layers.items()}

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            (rate,) = {group["lr"] for group in optimizer_of(trainer).param_groups}
            for name, layer in pruning.updater.layers.items():
                if batch_idx == 3:  # masks change after this step
                    continue
                share_OI = torch.where(layer.unpacked_mask(), 1.0, 0.25)
                expected_OI = self.before[name] - rate * share_OI * self.gradients[name]
                torch.testing.assert_close(layer.weight_OI, expected_OI)
                compared.append((expected_OI - self.before[name])[~layer.unpacked_mask()].any())

    class Descent(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def optimizer_of(trainer):
        (optimizer,) = trainer.optimizers
        return optimizer

    trainer(tmp_path, pruning, SlowShadows(0.25), Plain(), max_steps=6).fit(Descent(), loader())
    assert len(compared) == 5 * len(pruning.updater.layers) and all(compared)
