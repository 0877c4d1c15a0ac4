"""Variants of updates in a Lightning run: exact in every step, and resumed bit for bit."""

import functools

import lightning as L
import pytest
import torch

from sparse_train import Cubic, FirstWindow, Magnitude, OneShot, Regrow, Wanda, sparse_layers
from sparse_train.callbacks import DynamicPruning
from tests.callbacks.runs import ExactAfterEveryStep, InInit, Interrupt, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

VARIANTS = {
    "decaying norms": {"norm_decay": 0.5},
    "regrow": {"policy": Regrow()},
}


def pruning(variant, **changes):
    return DynamicPruning("2:4", **({"update_freq": 4, "window": 3, "end_step": 0.9} | VARIANTS[variant] | changes))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_moves_masks_and_keeps_2_of_4(tmp_path, variant):
    model, exact, callback = InInit(), ExactAfterEveryStep(), pruning(variant)
    trainer(tmp_path, callback, exact, max_epochs=-1, accumulate_grad_batches=2).fit(model, loader())
    assert exact.checked >= 24
    assert callback.last_report.initial_flip_rate > 0
    assert not sparse_layers(model)
    for name, layer in model.net.named_modules():
        if name.endswith("proj"):
            assert ((layer.weight.reshape(-1, 4) != 0).sum(1) <= 2).all()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a run of a variant ends with, by the variant and its first mask."""

    @functools.cache
    def of(variant, first_mask):
        module = InInit()
        callback = pruning(variant, end_step=100, first_mask=first_mask, squash=False)
        trainer(tmp_path_factory.mktemp("run"), callback, max_steps=14).fit(module, loader())
        return module.state_dict()

    return of


@pytest.mark.parametrize(
    ("variant", "first_mask", "at", "before"),
    [
        *((variant, OneShot(), 6, False) for variant in VARIANTS),  # in a window
        ("regrow", FirstWindow(), 8, False),  # at an update
        *((variant, OneShot(), 8, True) for variant in ("decaying norms", "regrow")),  # in the middle of one
    ],
)
def test_every_variant_resumes_bit_for_bit(tmp_path, uninterrupted, variant, first_mask, at, before):
    def callback():
        return pruning(variant, end_step=100, first_mask=first_mask, squash=False)

    def interrupted():
        callbacks = [Interrupt(at, tmp_path / "middle.ckpt"), callback()]
        return trainer(tmp_path, *(callbacks if before else reversed(callbacks)), max_steps=14)

    resumed = InInit()
    with pytest.raises(SystemExit):
        interrupted().fit(InInit(), loader())
    path = tmp_path / "middle.ckpt"
    trainer(tmp_path, callback(), max_steps=14).fit(resumed, loader(), ckpt_path=path, weights_only=False)
    a, b = uninterrupted(variant, first_mask), resumed.state_dict()
    assert a.keys() == b.keys()
    assert any(key.endswith("weight_mask") for key in a)
    assert all(torch.equal(a[key], b[key]) for key in a)


class GradientsOfPrunedWeights(L.Callback):
    """Behind DynamicPruning, ahead of clipping: pruned weights with a gradient, and steps in which they had one."""

    def __init__(self):
        self.after, self.straight_through = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        layers = sparse_layers(pl_module).values()
        self.after.append(sum(int(layer.weight.grad[~layer.unpacked_mask()].count_nonzero()) for layer in layers))
        self.straight_through.append({layer.straight_through for layer in layers})
        assert all(layer.weight.grad.any() for layer in layers)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_regrow_takes_gradients_in_the_step_of_an_update_ahead_of_clipping(tmp_path, precision):
    callback, watch = pruning("regrow", squash=False), GradientsOfPrunedWeights()
    run = trainer(
        tmp_path,
        callback,
        watch,
        precision=precision,
        max_epochs=-1,
        accumulate_grad_batches=2,
        gradient_clip_val=0.1,
    )
    run.fit(InInit(), loader())
    assert watch.after == [0] * 12
    # updates after 4, 8 and 10 steps, where at the last nothing is grown
    assert [step + 1 for step, found in enumerate(watch.straight_through) if found == {True}] == [4, 8]
    assert callback.updater.report().initial_flip_rate > 0


def test_regrow_knows_its_optimizers_before_the_first_step(tmp_path):
    class Unknown(InInit):
        def configure_optimizers(self):
            return torch.optim.Adagrad(self.parameters())

    module = Unknown()
    with pytest.raises(ValueError, match="Adagrad: Regrow clears what the optimizer remembers"):
        trainer(tmp_path, pruning("regrow")).fit(module, loader())
    assert module.seen == []


class FirstMasks(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.masks = {name: layer.unpacked_mask().clone() for name, layer in sparse_layers(pl_module).items()}


def first_masks(folder, **settings):
    seen = FirstMasks()
    trainer(folder, seen, DynamicPruning("2:4", update_freq=4, **settings), max_steps=5).fit(InInit(), loader())
    return seen.masks


def test_the_first_mask_can_come_from_another_score(tmp_path):
    wanda, magnitude = (first_masks(tmp_path, criterion=each) for each in (Wanda(), Magnitude()))
    assert any(not torch.equal(wanda[name], magnitude[name]) for name in wanda)
    found = first_masks(tmp_path, criterion=Magnitude(), first_mask=OneShot(Wanda()))
    assert all(torch.equal(found[name], wanda[name]) for name in wanda)
    found = first_masks(tmp_path, criterion=Wanda(), first_mask=OneShot(Magnitude()))
    assert all(torch.equal(found[name], magnitude[name]) for name in magnitude)


@pytest.mark.parametrize(
    "settings",
    [{"start_step": 2}, {"schedule": Cubic(0.5)}],
    ids=lambda each: next(iter(each)),
)
def test_a_score_for_a_first_mask_that_is_not_one_shot_is_refused(tmp_path, settings):
    with pytest.raises(ValueError, match="no one-shot pruning has made the first mask"):
        first_masks(tmp_path, first_mask=OneShot(Magnitude()), **settings)


def test_masks_that_are_there_are_not_made_again_by_another_score(tmp_path):
    model = InInit()
    trainer(tmp_path, DynamicPruning("2:4", squash=False), max_steps=2).fit(model, loader())
    pruning = DynamicPruning("2:4", first_mask=OneShot(Magnitude()))
    with pytest.raises(ValueError, match="the model has masks already"):
        trainer(tmp_path, pruning, max_steps=2).fit(model, loader())


class TokensRemembered(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            layers = sparse_layers(pl_module).values()
            self.tokens = {float(layer.statistics.tokens) for layer in layers}


@pytest.mark.parametrize(("decay", "share"), [(0.0, 0), (0.5, 0.5), (1.0, 1)])
def test_norms_of_the_first_mask_are_the_first_that_are_remembered(tmp_path, decay, share):
    seen = TokensRemembered()
    pruning = DynamicPruning("2:4", update_freq=4, first_mask=OneShot(samples=6), norm_decay=decay)
    trainer(tmp_path, seen, pruning, max_steps=5).fit(InInit(), loader())
    assert seen.tokens == {share * 3 * 2 * 16}
