"""How much earlier windows count: ``norm_decay``."""

import copy

import pytest
import torch
from torch import nn

from sparse_train import MaskUpdater, Wanda, prune
from sparse_train.distributed.collectives import rank, world_size
from sparse_train.recorder import Recorder
from sparse_train.statistics import ActivationNorm
from tests.conftest import VOCABULARY, shallow_llama
from tests.ranks import launch


class Watched(Wanda):
    """Wanda that keeps the norms it was shown, squared, in float64."""

    def __init__(self):
        object.__setattr__(self, "seen", [])

    def scores(self, layer):
        self.seen.append(layer.stats.sum_squares_I.double().clone())
        return super().scores(layer)


def step(model, updater, optimizer, generator, tokens=16):
    batch = torch.randint(3, VOCABULARY, (2, tokens), generator=generator)
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return updater.step()


def run(decay, lengths):
    """Norms squared that each update scored the first layer with, and float64 sums of each window of two steps.

    Each process of several has its own data, and a learning rate of 0: the models stay the same.
    """
    model, criterion = shallow_llama(), Watched()
    updater = MaskUpdater(
        model, "2:4", criterion=criterion, update_freq=2, window=1.0, norm_decay=decay, total_steps=20, end_step=1.0
    )
    inputs, windows, lr = [], [], 0.1 if world_size() == 1 else 0.0
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, args: inputs.append(args[0].double()))
    optimizer, generator = torch.optim.SGD(model.parameters(), lr=lr), torch.Generator().manual_seed(rank())
    for length in lengths:
        if step(model, updater, optimizer, generator, length) is not None:
            windows.append(sum(x.square().sum((0, 1)) for x in inputs))
            inputs.clear()
    state = updater.state_dict() if world_size() > 1 else None
    return criterion.seen[:: len(updater.layers)], windows, state


@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0, 0, 1])
def test_earlier_windows_count_by_their_tokens_and_fade_by_the_factor(decay):
    seen, windows, _ = run(decay, [16, 16, 4, 5, 30, 2, 7, 7])
    assert len(seen) == len(windows) == 4
    expected = torch.zeros(32, dtype=torch.float64)
    for scored, window in zip(seen, windows, strict=True):
        expected = decay * expected + window
        torch.testing.assert_close(scored, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_what_is_carried_over_counts_once_among_ranks_and_is_resumed_by_any_number(decay):
    (seen, first, state), (other_seen, second, _) = launch.run(run, decay, [16, 9, 4, 5, 7, 7])
    expected = torch.zeros(32, dtype=torch.float64)
    for scored, other, *windows in zip(seen, other_seen, first, second, strict=True):
        assert torch.equal(scored, other)
        expected = decay * expected + sum(windows)
        torch.testing.assert_close(scored, expected, rtol=1e-5, atol=0)
    own, theirs = state["norms"]["norms_by_rank"]
    name = "model.layers.0.self_attn.q_proj"
    assert int(own[name]["tokens"]) > 0
    assert not any(int(each["tokens"]) for each in theirs.values())
    settings = {"criterion": Watched(), "update_freq": 2, "window": 1.0, "norm_decay": decay, "end_step": 1.0}
    resumed = MaskUpdater(shallow_llama(), "2:4", total_steps=20, state=state, **settings)
    assert torch.equal(resumed.layers[name].statistics.sum_squares_I, own[name]["sum_squares"])


@pytest.mark.parametrize(("decay", "after"), [(0.5, 3), (0.5, 6), (0.5, 9), (1.0, 6)])
def test_decayed_norms_are_resumed_bit_for_bit(decay, after):
    def fresh(state=None):
        model = shallow_llama()
        updater = MaskUpdater(model, "2:4", update_freq=4, norm_decay=decay, total_steps=20, state=state)
        return model, updater, torch.optim.AdamW(model.parameters(), lr=3e-3)

    def run(model, updater, optimizer, steps, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            step(model, updater, optimizer, generator)

    whole = fresh()
    run(*whole, after, 1)
    half = fresh(copy.deepcopy(whole[1].state_dict()))
    for at in (0, 2):
        half[at].load_state_dict(copy.deepcopy(whole[at].state_dict()))
    assert half[1].norms.recorder.when == whole[1].norms.recorder.when
    run(*whole, 14 - after, 2)
    run(*half, 14 - after, 2)
    found = half[0].state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole[0].state_dict().items())
    with pytest.raises(ValueError, match=f"norm_decay = {decay}, and this run has 0.0"):
        MaskUpdater(shallow_llama(), "2:4", update_freq=4, norm_decay=0.0, total_steps=20, state=whole[1].state_dict())


def test_fading_keeps_counts_whole_and_never_forgets_a_token():
    norm = ActivationNorm(4)
    norm.add(torch.ones(3, 4))
    norm.fade(0.5)
    assert norm.sum_squares_I.tolist() == [1.5] * 4
    assert int(norm.tokens) == 2
    norm.tokens += 2**30
    norm.fade(1.0)
    assert int(norm.tokens) == 2**30 + 2


def test_a_second_updater_begins_anew_on_every_rank():
    for found in launch.each(two_updaters, [(1.0,), (0.5,)]).values():
        assert [tokens for tokens, _ in found] == [0, 0]
        assert torch.equal(found[0][1], found[1][1])


def two_updaters(decay):
    """Tokens in a layer's statistics as the second updater begins, and its mask at the end."""
    torch.manual_seed(0)
    model, generator = shallow_llama(), torch.Generator().manual_seed(rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tokens = 0
    for _ in range(2):
        updater = MaskUpdater(model, "2:4", update_freq=2, norm_decay=decay, total_steps=20)
        layer = updater.layers["model.layers.0.self_attn.q_proj"]
        tokens = int(layer.statistics.tokens)
        for _ in range(6):
            step(model, updater, optimizer, generator)
    return tokens, layer.weight_mask.clone()


class LeavesOut(nn.Module):
    """Two layers, of which the second is used as long as ``both``."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.both = nn.Linear(8, 8), nn.Linear(8, 8), True

    def forward(self, x):
        return self.b(self.a(x)) if self.both else self.a(x)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_target_that_is_left_out_later_goes_by_what_is_remembered_and_is_named(decay, resumed, caplog):
    model = LeavesOut()
    settings = {"targets": ["Linear"], "update_freq": 3, "window": 1.0, "norm_decay": decay, "total_steps": 20}
    updater = MaskUpdater(model, "2:4", **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def advance():
        model(torch.randn(3, 8)).square().mean().backward()
        optimizer.step()
        return updater.step()

    assert [advance() is not None for _ in range(6)] == [False, False, True] * 2
    model.both = False
    advance()
    if resumed:
        updater = MaskUpdater(model, "2:4", **settings, state=copy.deepcopy(updater.state_dict()))
    advance()
    before = updater.layers["b"].weight_mask.clone()
    if not decay:
        with pytest.raises(ValueError, match="b is a target, but no token reached it since the last mask update"):
            advance()
        assert torch.equal(updater.layers["b"].weight_mask, before)
        return
    assert [advance() is not None for _ in range(4)] == [True, False, False, True]
    said = [record.message for record in caplog.records if "No token reached" in record.message]
    assert len(said) == 1  # once a run
    assert said[0].startswith("No token reached 1 targets") and "ignore=['b']" in said[0]
    assert (updater.layers["b"].unpacked_mask().view(-1, 4).sum(1) == 2).all()


def test_a_target_left_out_from_the_first_mask_on_is_named(caplog):
    model = LeavesOut()
    prune(model, [torch.randn(3, 8)], "2:4", targets=["Linear"], squash=False)
    updater = MaskUpdater(model, "2:4", targets=["Linear"], update_freq=1, total_steps=20)
    model.both = False
    model(torch.randn(3, 8)).square().mean().backward()
    assert updater.step() is not None
    assert "such as b: masks there use the norms of" in caplog.text


def test_padding_of_a_later_batch_is_told_where_the_first_has_none(caplog):
    recorder = Recorder(two_texts=True)
    for mask in (torch.ones(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])):
        assert recorder.padding_of({"attention_mask": mask}) is None
    recorder.warn_of_padding()
    assert "padding counts" in caplog.text
