"""Numbers gone bad in a run: each has one stated outcome, and masks stay exact and scores finite whatever happens."""

import pytest
import torch
from torch import nn

from sparse_train import MaskUpdater
from sparse_train.statistics import ActivationNorm
from tests.pruning.loops import assert_exact

STEPS, BAD = 8, 6  # updates at 2, 4, 6 and 8, each from the two steps before it


def data(step):
    return torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(step))


def run(*, bad=None, structure="unstructured", sparsity=0.5, dtype=torch.float32, weights=None, **settings):
    """A run in which ``bad`` may change input and loss of step 6. Returns model and updater."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    model = model.to(dtype)
    if weights is not None:
        nn.init.constant_(model[0].weight, weights)
    share = None if ":" in structure else sparsity
    settings = {"update_freq": 2, "window": 2, "total_steps": STEPS, "end_step": 1.0, **settings}
    updater = MaskUpdater(model, structure, share, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(1, STEPS + 1):
        x, factor, skipped = data(step).to(dtype), 1.0, False
        if bad is not None and (step == BAD or bad in ALWAYS):
            x, factor, skipped = bad(x, updater)
        (model(x).float().pow(2).mean() * factor).backward()
        if not skipped:
            optimizer.step()
        optimizer.zero_grad()
        updater.token_mask = None
        updater.step()
        if updater.sparsity is not None:
            assert_exact(model, updater)
        for layer in updater.layers.values():
            assert isinstance(layer.statistics, ActivationNorm) and layer.statistics.norm_I.isfinite().all()
    return model, updater


def tokens(updater):
    return [int(layer.statistics.tokens) for layer in updater.layers.values()]


ALL = STEPS * 24


# --- what happens in one step: (input, factor of the loss, whether the optimizer skips the step) ----------------------


def nan_loss(x, updater):
    return x, torch.nan, True


def infinite_gradient(x, updater):
    return x, torch.inf, True


def nan_input(x, updater):
    return x.index_fill(2, torch.tensor(5), torch.nan), 1.0, True


def infinite_input(x, updater):
    return x.index_fill(1, torch.tensor(0), -torch.inf), 1.0, True


def overflow(x, updater):  # in float16: finite at the first layer, infinite behind it
    return torch.full_like(x, 60000.0), 1.0, True


def all_padding(x, updater):
    updater.token_mask = torch.zeros(4, 6, dtype=torch.int64)
    return x, 1.0, False


def one_token(x, updater):
    return x[:1, :1], 1.0, False


def underflow(x, updater):  # squares are below the smallest number of bfloat16 and float32
    return torch.full_like(x, 1e-30), 1.0, False


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
@pytest.mark.parametrize(
    ("bad", "dtype", "counted"),
    [
        # a bad loss or gradient leaves activations as they are: they count, and the optimizer's skip keeps weights
        (nan_loss, torch.float32, [ALL, ALL]),
        (infinite_gradient, torch.float32, [ALL, ALL]),
        # a batch with an input that is not finite is left out, by each layer for itself
        (nan_input, torch.float32, [ALL - 24, ALL - 24]),
        (infinite_input, torch.float32, [ALL - 24, ALL - 24]),
        (overflow, torch.float16, [ALL, ALL - 24]),
        # what is padding does not count, and what is small does
        (all_padding, torch.float32, [ALL - 24, ALL - 24]),
        (one_token, torch.float32, [ALL - 23, ALL - 23]),
        (underflow, torch.bfloat16, [ALL, ALL]),
    ],
)
def test_one_bad_step(bad, dtype, counted, structure):
    weights = 1.0 if bad is overflow else None  # so that outputs are 8 times the input
    _, updater = run(bad=bad, dtype=dtype, structure=structure, weights=weights)
    assert tokens(updater) == counted
    if counted[0] == ALL - 24:  # as if the batch had not been there
        _, without = run(bad=lambda x, own: (x, 1.0, bad is not all_padding), dtype=dtype, structure=structure)
        first = [next(iter(each.layers.values())).statistics for each in (updater, without)]
        expected = first[1].sums - data(BAD).reshape(-1, 16).square().sum(0)
        assert torch.allclose(first[0].sums, expected, rtol=1e-5)


def test_weights_that_are_no_longer_finite_stop_the_run_and_change_no_mask():
    for factor in (torch.nan, torch.inf):
        masks = {}

        def bad(x, updater, factor=factor, masks=masks):
            masks |= {name: layer.weight_mask.clone() for name, layer in updater.layers.items()}
            masks["updater"] = updater
            return x, factor, False

        with pytest.raises(ValueError, match="0: scores are not finite"):
            run(bad=bad)
        updater = masks.pop("updater")
        assert masks.keys() == updater.layers.keys() == {"0", "2"}
        assert all(torch.equal(mask, updater.layers[name].weight_mask) for name, mask in masks.items())


# --- what is so from the beginning -----------------------------------------------------------------------------------


def dead_feature(x, updater):
    return x.index_fill(2, torch.tensor(5), 0.0), 1.0, False


def zeros(x, updater):
    return torch.zeros_like(x), 1.0, False


ALWAYS = {dead_feature, zeros}


def test_a_feature_that_is_always_zero_is_pruned_in_every_row():
    _, updater = run(bad=dead_feature)
    assert not updater.layers["0"].unpacked_mask()[:, 5].any()


@pytest.mark.parametrize("case", [{"bad": zeros}, {"weights": 0.0}, {"weights": 1e-45}, {"bad": zeros, "weights": 1.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_among_equal_scores_the_lower_index_is_pruned(case, dtype):
    _, updater = run(dtype=dtype, **case, targets=["0"])
    kept = updater.layers["0"].unpacked_mask()
    if case != {"weights": 1e-45} or dtype == torch.bfloat16:  # a number of float32, and zero in bfloat16
        assert torch.equal(kept, (torch.arange(16) >= 8).expand(16, 16))


@pytest.mark.parametrize(("sparsity", "pruned"), [(0.0, 0), (0.999, 15), (0.0624, 0), (0.0625, 1)])
def test_the_ends_of_sparsity(sparsity, pruned):
    _, updater = run(sparsity=sparsity)
    assert ((~updater.layers["0"].unpacked_mask()).sum(1) == pruned).all()


def test_layers_smaller_than_a_group_stay_dense_or_are_refused_by_name(caplog):
    model = nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4))
    assert MaskUpdater(model, "4:8", total_steps=8).layers.keys() == {"0"}
    assert "2 stays dense" in caplog.text
    with pytest.raises(ValueError, match="2"):
        MaskUpdater(model, "4:8", targets=["2"], total_steps=8)
