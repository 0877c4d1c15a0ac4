import copy
import pickle

import pytest
import torch
from torch import nn

from sparse_train import MaskUpdater
from sparse_train.layers.matrices import Recorder
from sparse_train.layers.sparse_linear import sparse_layers
from sparse_train.layers.sparsify import sparsify
from sparse_train.pipeline.recording import attach, share_statistics
from sparse_train.statistics.activations import ActivationNorm
from sparse_train.statistics.input_sharing import InputSharing, SeenInput
from tests.conftest import VOCABULARY, tiny_llama


def test_layers_that_share_an_input_are_found_by_identity():
    llama = tiny_llama()
    linears = {n: m for n, m in llama.named_modules() if n.endswith("proj")}
    sparsify(llama, linears.values())
    recorder = Recorder("always", sharing=InputSharing())
    attach(linears.values(), recorder, ActivationNorm)
    llama(input_ids=torch.randint(0, VOCABULARY, (1, 8)))
    name = {m: n for n, m in sparse_layers(llama).items()}
    leaders = {
        name[m].split("layers.0.")[-1]: name[leader]
        for m, leader in recorder.sharing.leaders().items()
        if "layers.0." in name[m]
    }
    prefix = "model.layers.0."
    assert leaders == {
        "self_attn.q_proj": prefix + "self_attn.q_proj",
        "self_attn.k_proj": prefix + "self_attn.q_proj",
        "self_attn.v_proj": prefix + "self_attn.q_proj",
        "self_attn.o_proj": prefix + "self_attn.o_proj",
        "mlp.gate_proj": prefix + "mlp.gate_proj",
        "mlp.up_proj": prefix + "mlp.gate_proj",
        "mlp.down_proj": prefix + "mlp.down_proj",
    }


def test_equal_values_or_reused_addresses_are_no_shared_input():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    sharing = InputSharing()
    for layer in (a, b):
        x = torch.ones(2, 4)  # the second may well sit where the first was
        sharing.watch(layer, SeenInput(x))
        del x
    assert sharing.leaders() == {a: a, b: b}
    x = torch.ones(2, 4)
    sharing.watch(a, SeenInput(x))
    sharing.watch(b, SeenInput(x))
    assert sharing.leaders()[b] is b  # shared once, but not always


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, branches="ab"):
        return sum(getattr(self, name)(x) for name in branches)


def test_a_layer_whose_leader_is_skipped_records_its_own_input():
    model, seen = Branches(), []
    updater = MaskUpdater(model, "2:4", update_freq=8, window=8, total_steps=80, targets=["a", "b"])
    model.b.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for branches in ("ab", "b", "ab", "b"):
        model(torch.randn(5, 8), branches).sum().backward()
        updater.step()
    assert int(model.a.statistics.tokens) == 10 and int(model.b.statistics.tokens) == 20
    torch.testing.assert_close(model.b.statistics.norm_I, torch.cat(seen).norm(dim=0))


def run(plan, state=None, **settings):
    """A run in which each word names the branches of a step; optionally continued from ``state``."""
    torch.manual_seed(0)
    model = Branches()
    targets = {"targets": ["a", "b"], "update_freq": 4, "window": 4, "total_steps": 80}
    if state is not None:
        sparsify(model, [model.a, model.b])
        model.load_state_dict(state[0])
    updater = MaskUpdater(model, "2:4", state=state and state[1], **targets | settings)
    for step, branches in enumerate(plan, start=updater.steps):
        model(torch.randn(5, 8, generator=torch.Generator().manual_seed(step)), branches).sum().backward()
        updater.step()
    return model, updater


@pytest.mark.parametrize("memory", [0.0, 1.0])
@pytest.mark.parametrize("plan", ["ab ab a ab ab a a", "ab b ab b ab ab b a", "b b a ab ab a b"])
def test_a_resumed_run_shares_what_the_whole_one_does(plan, memory):
    plan = plan.split()
    whole, whole_updater = run(plan, memory=memory)
    for at in range(1, len(plan)):
        model, updater = run(plan[:at], memory=memory)
        resumed, _ = run(plan[at:], (model.state_dict(), updater.state_dict()), memory=memory)
        for name in ("a", "b"):
            ours, theirs = getattr(whole, name), getattr(resumed, name)
            assert torch.equal(ours.weight_mask, theirs.weight_mask), (name, at)
            assert all(map(torch.equal, ours.statistics.tensors(), theirs.statistics.tensors())), (name, at)
        updater.load_state_dict(whole_updater.state_dict())  # of an updater that shares already
        for name in ("a", "b"):
            assert int(getattr(model, name).statistics.tokens) == int(getattr(whole, name).statistics.tokens)


def test_a_layer_can_stop_sharing_in_inference_mode():
    model, _ = run(["ab"])
    with torch.inference_mode():
        model(torch.randn(5, 8), "b")  # in train mode, where forwards count
    model(torch.randn(5, 8)).sum().backward()
    assert (int(model.a.statistics.tokens), int(model.b.statistics.tokens)) == (10, 15)


def test_a_leader_that_has_gone_on_to_another_input_is_none():
    model = Branches()
    sharing = InputSharing()
    first, second = torch.randn(5, 8), torch.randn(5, 8)
    for layer, x in ((model.a, first), (model.a, second), (model.b, first), (model.b, second)):
        sharing.watch(layer, SeenInput(x))
    assert sharing.leaders()[model.b] is model.b


@pytest.mark.parametrize("seed", range(30))
def test_sums_are_those_of_each_layers_own_inputs_whatever_reads_what(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3, 4, 8, generator=generator)
    layers = nn.ModuleList(nn.Linear(8, 4) for _ in range(4))
    calls = [
        (int(torch.randint(4, (), generator=generator)), int(torch.randint(3, (), generator=generator)))
        for _ in range(8)
    ]
    sparsify(layers, layers)
    recorder = Recorder("always", sharing=InputSharing())
    attach(layers, recorder, ActivationNorm)
    expected = torch.zeros(4, 8, dtype=torch.float64)
    for step in range(2):
        for layer, read in calls:
            layers[layer](inputs[read])
            expected[layer] += inputs[read].double().pow(2).sum(0)
        if step == 0:
            share_statistics(recorder, list(layers))
    for layer, sums_I in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.statistics.sum_squares_I.double(), sums_I, rtol=1e-5, atol=1e-5)


def test_a_copy_of_a_model_in_training_holds_no_reference_to_inputs():
    model = Branches()
    updater = MaskUpdater(model, "2:4", update_freq=8, window=8, total_steps=80, targets=["a", "b"])
    for _ in range(2):
        model(torch.randn(5, 8)).sum().backward()
        updater.step()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.a.statistics.last_input is None
        assert int(other.a.statistics.tokens) == 10
