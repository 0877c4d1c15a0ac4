"""A user's own criterion and policy in a Lightning run."""

import jsonargparse
import lightning as L
import pytest
import torch

from sparse_train import sparse_layers
from sparse_train.callbacks import DynamicPruning
from tests.callbacks.runs import ExactAfterEveryStep, InInit, loader, trainer
from tests.pruning.test_policies import ByMomentum, Moments

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Adam(L.Callback):
    """Adam's memory right after an optimizer step, when masks are about to change."""

    def __init__(self, step):
        self.step, self.moments = step, {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            state = trainer.optimizers[0].state
            self.moments = {n: state[each.weight]["exp_avg"].clone() for n, each in sparse_layers(pl_module).items()}


def test_a_criterion_sees_what_the_optimizer_remembers(tmp_path):
    seen, adam = [], Adam(4)
    pruning = DynamicPruning("2:4", criterion=Moments(seen), update_freq=4, squash=False)
    trainer(tmp_path, adam, pruning, max_steps=8).fit(InInit(), loader())
    assert all(momentum is None for _, momentum in seen[:14])
    second = dict(seen[14:28])
    assert second.keys() == adam.moments.keys()
    assert all(torch.equal(momentum, adam.moments[name]) for name, momentum in second.items())


def test_a_policy_that_a_recipe_names_by_its_path_is_told_everything(tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text("pruning: {update_freq: 4, policy: tests.pruning.test_policies.ByMomentum}\n")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(DynamicPruning, "pruning")
    parser.add_argument("--config", action="config")
    pruning = parser.instantiate_classes(parser.parse_args(["--config", str(recipe)])).pruning
    exact = ExactAfterEveryStep()
    trainer(tmp_path, pruning, exact).fit(InInit(), loader())
    policy = pruning.updater.policy
    assert isinstance(policy, ByMomentum) and exact.checked == 12
    assert policy.told.count("optimizer") == 12
    assert [each for each in policy.told if each.startswith("update")] == [f"update after {n}" for n in (4, 4, 1)]
    assert policy.changed > 0
