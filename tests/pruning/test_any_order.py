"""A run in any order of its events: training, stops and resumes, validations, squashes, a second run on the same model.

Beside each run goes one that is never disturbed. After every event both are the same bit for bit, and exactly sparse.
"""

import copy
import io
import pickle

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from sparse_train import Dormant, Fixed, MaskUpdater, Regrow, StraightThrough, squash
from sparse_train.layers.state_dicts import folded_state_dict
from sparse_train.pruning.config import FromZeros
from sparse_train.schedules import Cubic
from tests.pruning.loops import assert_exact, equal

POLICIES = [Fixed(), Dormant(), StraightThrough(), StraightThrough(srste_decay=0.01), Regrow()]
STRUCTURES = [{"mask_structure": "unstructured", "sparsity": 0.4}, {"mask_structure": "2:4"}]
RISING = {"mask_structure": "unstructured", "schedule": Cubic(0.7)}


class Training:
    """A model, its updater and its optimizer."""

    def __init__(self, arguments, state=None):
        self.arguments = arguments
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))
        self.begin(state)

    def begin(self, state=None, **changes):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02, weight_decay=0.1)
        self.updater = MaskUpdater(self.model, **self.arguments | changes, optimizers=[self.optimizer], state=state)

    def step(self, x):
        self.model(x).pow(2).mean().backward()
        self.updater.before_optimizer_step(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updater.step()

    def states(self):
        return {
            "model": self.model.state_dict(),
            "updater": self.updater.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }


class AnyOrder(RuleBasedStateMachine):
    @initialize(
        structure=st.sampled_from([*STRUCTURES, RISING]),
        policy=st.sampled_from(POLICIES),
        steps=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]),
        decay=st.sampled_from([0.0, 0.5, 1.0, 0.25]),
    )
    def start(self, structure, policy, steps, decay):
        freq, window = steps
        shared = {"update_freq": freq, "window": window, "norm_decay": decay, "total_steps": 16, "policy": policy}
        self.run, self.undisturbed = Training(structure | shared), Training(structure | shared)
        self.seen = 0

    @rule(steps=st.integers(1, 5))
    def fit(self, steps):
        for _ in range(steps):
            self.seen += 1
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(self.seen))
            for each in (self.run, self.undisturbed):
                each.step(x)

    @rule(model_first=st.booleans())
    def stop_and_resume(self, model_first):
        file = io.BytesIO()
        torch.save(self.run.states(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        if model_first:  # into the model that is there, of which the run has ended in another state
            with torch.no_grad():
                self.run.model[0].weight.add_(1.0)
            self.run.model.load_state_dict(saved["model"])
            self.run.begin(saved["updater"])
        else:
            self.run = Training(self.run.arguments, saved["updater"])
            self.run.model.load_state_dict(saved["model"])
        self.run.optimizer.load_state_dict(saved["optimizer"])

    @rule()
    def validate(self):
        self.run.model.eval()
        with torch.no_grad():
            self.run.model(torch.randn(4, 16))
        with self.run.updater.paused():
            self.run.model(torch.randn(4, 16))
        self.run.model.train()

    @rule()
    def copy_and_squash_the_copy(self):
        before = folded_state_dict(self.run.model)
        for other in (copy.deepcopy(self.run.model), pickle.loads(pickle.dumps(self.run.model))):
            squash(other)
            assert equal(before, other.state_dict())

    def ready(self):
        return self.run.updater.sparsity == self.run.updater.config.sparsity_at(1.0)

    @precondition(ready)
    @rule()
    def squash_and_begin_anew_from_zeros(self):
        for each in (self.run, self.undisturbed):
            each.updater.finish()
            squash(each.model)
            sparsity = each.updater.config.sparsity_at(1.0)
            fixed = {"schedule": None, "sparsity": sparsity} if each.arguments.get("schedule") else {}
            each.arguments = each.arguments | fixed | {"first_mask": FromZeros()}
            for layer in (each.model[0], each.model[2]):  # training leaves no other zeros
                assert not (layer.weight == 0).all()
            each.begin()

    @precondition(ready)
    @rule()
    def begin_anew_with_the_masks(self):
        for each in (self.run, self.undisturbed):
            sparsity = each.updater.config.sparsity_at(1.0)
            fixed = {"schedule": None, "sparsity": sparsity} if each.arguments.get("schedule") else {}
            each.arguments = each.arguments | fixed
            each.begin()

    @invariant()
    def is_the_same_and_exact(self):
        if not hasattr(self, "run"):
            return
        if self.run.updater.sparsity is not None:
            assert_exact(self.run.model, self.run.updater)
        found, expected = flat(self.run.states()), flat(self.undisturbed.states())
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            same = torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
            assert same, key


def flat(states, prefix=""):
    if isinstance(states, dict | list | tuple):
        inner = states.items() if isinstance(states, dict) else enumerate(states)
        return {k: v for key, value in inner for k, v in flat(value, f"{prefix}/{key}").items()}
    return {prefix: states}


AnyOrder.TestCase.settings = settings(
    max_examples=20, stateful_step_count=12, deadline=None, phases=[Phase.reuse, Phase.generate]
)  # shrinking takes minutes
TestAnyOrder = AnyOrder.TestCase


def test_a_run_whose_masks_do_not_change_is_stopped_ahead_of_its_first_step():
    run = AnyOrder()
    run.start(STRUCTURES[0], Fixed(), (1, 1), 0.5)
    run.fit(steps=3)
    run.begin_anew_with_the_masks()
    run.stop_and_resume(model_first=False)
    run.fit(steps=1)
    run.is_the_same_and_exact()
