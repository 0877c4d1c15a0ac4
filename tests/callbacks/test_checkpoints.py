"""``DynamicPruning`` and checkpoints: resumed, validated from, and refused."""

import copy

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import sparse_train
from sparse_train import Dormant, FirstWindow, Magnitude, OneShot, sparse_layers, sparsify_like, squash
from sparse_train.callbacks import DynamicPruning
from sparse_train.models.checkpoints import PRUNING_STATE
from tests.callbacks.runs import (
    ExactAfterEveryStep,
    InConfigureModel,
    InInit,
    Interrupt,
    Tokens,
    loader,
    trainer,
    zeros,
)
from tests.conftest import shallow_llama

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    ("module", "at", "first_mask", "saved_by"),
    [
        (InInit, 6, FirstWindow(), "a callback behind"),  # in a window
        (InInit, 8, OneShot(), "a callback before"),  # at an update
        (InConfigureModel, 6, OneShot(), "a callback before"),
        (InConfigureModel, 8, FirstWindow(), "a callback behind"),
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, module, at, first_mask, saved_by):
    class Pruning(DynamicPruning):
        def on_train_end(self, trainer, pl_module):
            self.at_end = copy.deepcopy(self.state_dict())

    def pruning():
        return Pruning("2:4", update_freq=4, window=3, end_step=100, first_mask=first_mask, squash=False)

    def interrupted(pruning, interrupt):
        callbacks = [pruning, interrupt] if saved_by == "a callback behind" else [interrupt, pruning]
        return trainer(tmp_path, *callbacks, max_steps=14)

    whole, whole_pruning = module(), pruning()
    trainer(tmp_path, whole_pruning, max_steps=14).fit(whole, loader())

    path = tmp_path / "middle.ckpt"
    first = module()
    with pytest.raises(SystemExit):
        interrupted(pruning(), Interrupt(at, path)).fit(first, loader())
    resumed, resumed_pruning = module(), pruning()
    trainer(tmp_path, resumed_pruning, max_steps=14).fit(resumed, loader(), ckpt_path=path)  # weights only, by default

    assert first.seen[:at] + resumed.seen == whole.seen
    a, b = whole.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(key.endswith("weight_mask") for key in a)
    left, right = whole_pruning.at_end, resumed_pruning.at_end
    assert any(int(s["tokens"]) for s in left["norms"]["norms_by_rank"][0].values())
    assert left["steps"] == right["steps"] == 14
    assert left["timing"] == right["timing"]
    for name, rows in left["first_rows"].items():
        assert torch.equal(rows, right["first_rows"][name])
    for name, statistics in left["norms"]["norms_by_rank"][0].items():
        assert torch.equal(statistics["sum_squares"], right["norms"]["norms_by_rank"][0][name]["sum_squares"])


def test_the_last_checkpoint_holds_shadow_values_after_a_squashed_fit(tmp_path):
    model = InInit()
    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=5)
    trainer(tmp_path, saver, DynamicPruning("2:4", update_freq=4)).fit(model, loader())
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    weight = state["net.model.layers.0.mlp.up_proj.weight"]
    assert (weight != 0).all()
    assert "net.model.layers.0.mlp.up_proj.weight_mask" in state
    assert (model.net.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("module", [InInit, InConfigureModel])
def test_validation_from_a_sparse_checkpoint_sees_its_masks(tmp_path, module):
    data = DataLoader(Tokens(), batch_size=4)
    model = module()
    run = trainer(tmp_path, DynamicPruning("2:4", update_freq=4, squash=False), limit_val_batches=2)
    run.fit(model, loader(), data)
    run.save_checkpoint(tmp_path / "x.ckpt")
    expected = run.validate(model, data, verbose=False)
    fresh = trainer(tmp_path, DynamicPruning("2:4"), limit_val_batches=2)
    found = fresh.validate(module(), data, ckpt_path=tmp_path / "x.ckpt", verbose=False, weights_only=False)
    assert found == expected


def test_validation_of_a_dense_module_leaves_it_as_it_was(tmp_path):
    model = InInit()
    trainer(tmp_path, DynamicPruning("2:4")).validate(model, DataLoader(Tokens(), batch_size=4), verbose=False)
    assert not sparse_layers(model)


def test_a_checkpoint_with_masks_but_without_the_callbacks_state_is_no_run_to_resume(tmp_path):
    path = tmp_path / "middle.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, DynamicPruning("2:4"), Interrupt(2, path)).fit(InInit(), loader())
    content = torch.load(path, weights_only=False)
    del content["callbacks"]["DynamicPruning"]
    torch.save(content, path)
    with pytest.raises(ValueError, match="was written without DynamicPruning"):
        trainer(tmp_path, DynamicPruning("2:4")).fit(InInit(), loader(), ckpt_path=path, weights_only=False)


def test_a_subclass_keeps_its_state_where_the_class_does(tmp_path):
    class Padded(DynamicPruning):
        def token_mask(self, batch):
            return None

    run = trainer(tmp_path, Padded("2:4", update_freq=4, squash=False))
    run.fit(InInit(), loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=False)["callbacks"]
    assert saved[PRUNING_STATE]["steps"] == run.global_step


@pytest.mark.parametrize(
    ("settings", "at"),
    [
        ({"start_step": 8, "end_step": 16}, 15),
        ({"first_mask": FirstWindow(), "window": 4}, 17),
    ],
)
def test_a_run_resumes_late_on_the_steps_of_the_whole_run(tmp_path, settings, at):
    path = tmp_path / "late.ckpt"
    first, again = (DynamicPruning("2:4", update_freq=4, **settings) for _ in range(2))
    with pytest.raises(SystemExit):
        trainer(tmp_path, first, Interrupt(at, path), max_steps=20).fit(InInit(), loader())
    timing = first.updater.timing
    trainer(tmp_path, again, max_steps=20).fit(InInit(), loader(), ckpt_path=path, weights_only=False)
    assert again.updater.timing == timing and again.updater.steps == 20


def test_resuming_with_another_pattern_is_refused(tmp_path):
    path = tmp_path / "middle.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, DynamicPruning("2:4"), Interrupt(2, path)).fit(InInit(), loader())
    with pytest.raises(ValueError, match=r"mask_structure = 2:4, and this run has 1:4"):
        trainer(tmp_path, DynamicPruning("1:4")).fit(InInit(), loader(), ckpt_path=path, weights_only=False)


def test_a_new_run_may_start_from_the_shadow_values_of_an_old_one(tmp_path):
    path = tmp_path / "old.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, DynamicPruning("2:4", update_freq=4), Interrupt(6, path)).fit(InInit(), loader())
    saved, module = torch.load(path, weights_only=False)["state_dict"], InInit()
    sparsify_like(module, saved)
    module.load_state_dict(saved)
    layer = next(iter(sparse_layers(module).values()))
    first, shadow = layer.weight_mask.clone(), layer.weight_OI[~layer.unpacked_mask()].detach()
    assert shadow.all()

    class First(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                assert torch.equal(layer.weight_mask, first)
                assert torch.equal(layer.weight_OI[~layer.unpacked_mask()], shadow)

    again = DynamicPruning("2:4", update_freq=3, policy=Dormant(), squash=False)  # other settings, a longer run
    trainer(tmp_path, again, First(), max_steps=18).fit(module, loader())
    assert again.updater.steps == 18
    assert again.last_report.initial_flip_rate > 0


@pytest.mark.parametrize(("first", "second"), [((), ["re:.*down_proj"]), (["re:.*down_proj"], ())])
def test_resuming_with_other_targets_is_refused(tmp_path, first, second):
    path = tmp_path / "middle.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, DynamicPruning("2:4", ignore=first), Interrupt(2, path)).fit(InInit(), loader())
    again = trainer(tmp_path, DynamicPruning("2:4", ignore=second))
    with pytest.raises((ValueError, RuntimeError), match="net.model.layers.0.mlp.down_proj.weight_mask"):
        again.fit(InInit(), loader(), ckpt_path=path, weights_only=False)


def test_a_fit_that_fails_leaves_nothing_behind_that_refuses_checkpoints(tmp_path):
    module = InInit()
    with pytest.raises(ValueError, match="matches no layer"):
        trainer(tmp_path, DynamicPruning("2:4", targets=["nope"])).fit(module, loader())
    with pytest.raises(SystemExit):
        trainer(tmp_path, DynamicPruning("2:4"), Interrupt(2, tmp_path / "at.ckpt")).fit(InInit(), loader())
    state = torch.load(tmp_path / "at.ckpt", weights_only=False)["state_dict"]
    assert not module._load_state_dict_pre_hooks
    sparsify_like(module, state)
    module.load_state_dict(state)


def test_a_fit_with_nothing_left_to_train_ends(tmp_path):
    run = trainer(tmp_path, DynamicPruning("2:4", update_freq=4, squash=False), max_steps=4)
    module = InInit()
    run.fit(module, loader())
    run.fit(module, loader())
    assert run.global_step == 4


def test_a_run_that_is_at_its_end_already_is_looked_at_too(tmp_path):
    path = tmp_path / "end.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, DynamicPruning("2:4", update_freq=4), Interrupt(12, path)).fit(InInit(), loader())
    others = [{"mask_structure": "1:4"}, {"update_freq": 5}, {"criterion": Magnitude()}, {"norm_decay": 0.5}]
    for other in [*others, {"end_step": 8}, {"start_step": 1}, {"window": 1}]:
        pruning = DynamicPruning(**({"mask_structure": "2:4", "update_freq": 4} | other))
        with pytest.raises(ValueError, match="The checkpoint was written with"):
            trainer(tmp_path, pruning).fit(InInit(), loader(), ckpt_path=path, weights_only=False)
    model = InInit()
    with pytest.warns(UserWarning, match="at step 12 already, where it ends: nothing was trained"):
        trainer(tmp_path, DynamicPruning("2:4", update_freq=4)).fit(model, loader(), ckpt_path=path, weights_only=False)
    assert not sparse_layers(model)
    assert ((model.net.model.layers[0].mlp.up_proj.weight.reshape(-1, 4) == 0).sum(1) == 2).all()


@pytest.mark.parametrize("module", [InInit, InConfigureModel])
def test_a_dense_checkpoint_is_no_sparse_run(tmp_path, module):
    path = tmp_path / "dense.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, Interrupt(2, path)).fit(module(), loader())
    with pytest.raises(ValueError, match="this checkpoint holds no masks"):
        trainer(tmp_path, DynamicPruning("2:4")).fit(module(), loader(), ckpt_path=path, weights_only=False)


def test_a_sparse_checkpoint_is_loaded_without_the_callback(tmp_path):
    class Lit(InInit):
        def __init__(self, width=1, scale=1.0):
            super().__init__()
            self.save_hyperparameters()
            self.own = torch.nn.Parameter(torch.zeros(width))

        def on_save_checkpoint(self, checkpoint):
            checkpoint["state_dict"]["old"] = checkpoint["state_dict"].pop("own")

        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"]["own"] = checkpoint["state_dict"].pop("old")

        def test_step(self, batch, batch_idx):
            self.log("test", self.net(**batch).loss)

    path, run, trained = tmp_path / "sparse.ckpt", trainer(tmp_path, DynamicPruning("2:4", squash=False)), Lit(width=3)
    run.fit(trained, loader())
    run.save_checkpoint(path)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*up_proj.weight_mask"):
        Lit.load_from_checkpoint(path)
    loaded = sparse_train.load_from_checkpoint(Lit, path, scale=2.0)
    assert (type(loaded), loaded.hparams) == (Lit, {"width": 3, "scale": 2.0})
    pairs = zip(loaded.state_dict().items(), trained.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    data = DataLoader(Tokens(), batch_size=4)
    found, expected = (trainer(tmp_path).test(module, data, verbose=False) for module in (loaded, trained))
    assert found == expected
    squash(loaded)
    assert zeros(loaded) == 0.5

    content = torch.load(path, weights_only=True)
    content["state_dict"] = {key: value for key, value in content["state_dict"].items() if "weight_mask" not in key}
    torch.save(content, path)
    with pytest.raises(ValueError, match="holds no masks"):
        sparse_train.load_from_checkpoint(Lit, path)
    torch.save({**content, "harmless": print}, path)
    with pytest.raises(ValueError, match="more than tensors and plain values"):
        sparse_train.load_from_checkpoint(Lit, path)


def test_a_checkpoint_written_on_an_exception_loses_no_update(tmp_path):
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "exception.ckpt")
                raise RuntimeError("out of memory")

    whole = InInit()
    pruning = {"mask_structure": "2:4", "update_freq": 4, "squash": False}
    trainer(tmp_path, DynamicPruning(**pruning)).fit(whole, loader())
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(tmp_path, Fails(), DynamicPruning(**pruning)).fit(InInit(), loader())
    resumed, callback = InInit(), DynamicPruning(**pruning)
    trainer(tmp_path, callback).fit(resumed, loader(), ckpt_path=tmp_path / "exception.ckpt", weights_only=False)
    assert callback.updater.steps == 12
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_a_resume_that_is_refused_leaves_the_state_in_the_checkpoint(tmp_path):
    """Of a run that writes the checkpoint that it was resumed from, whenever it fails."""

    class Fails(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 6:
                raise RuntimeError("out of memory")

    def run(update_freq, *others, **settings):
        saving = L.pytorch.callbacks.OnExceptionCheckpoint(tmp_path, "only")
        callbacks = (DynamicPruning("2:4", update_freq=update_freq), saving, *others)
        trainer(tmp_path, *callbacks, enable_checkpointing=True).fit(InInit(), loader(), **settings)

    with pytest.raises(RuntimeError, match="out of memory"):
        run(4, Fails())
    resumed = {"ckpt_path": tmp_path / "only.ckpt", "weights_only": False}
    with pytest.raises(ValueError, match="update_freq"):
        run(5, **resumed)
    run(4, **resumed)


def test_a_validation_that_fails_leaves_no_masks_either(tmp_path):
    class Fails(InInit):
        def validation_step(self, batch, _):
            raise RuntimeError("in validation")

    path = tmp_path / "middle.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, DynamicPruning("2:4"), Interrupt(6, path)).fit(InInit(), loader())
    model, data = Fails(), DataLoader(Tokens(), batch_size=4)
    with pytest.raises(RuntimeError, match="in validation"):
        trainer(tmp_path, DynamicPruning("2:4")).validate(model, data, ckpt_path=path, weights_only=False)
    assert not sparse_layers(model)


def test_a_dense_checkpoint_can_be_validated_with_the_callback_in_place(tmp_path):
    path = tmp_path / "dense.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, Interrupt(2, path)).fit(InInit(), loader())
    run = trainer(tmp_path, DynamicPruning("2:4"))
    assert run.validate(InInit(), DataLoader(Tokens()), ckpt_path=path, verbose=False, weights_only=False)


class Norms(L.Callback):
    """What is known of inputs as training begins and ends."""

    def __init__(self):
        self.began, self.ended = [], []

    def _norms(self, module):
        return {name: layer.statistics.norm_I.clone() for name, layer in sparse_layers(module).items()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in (0, 10):
            self.began.append(self._norms(pl_module))

    def on_train_end(self, trainer, pl_module):
        self.ended.append(self._norms(pl_module))


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_checkpoint_after_a_fit_remembers_what_the_fit_has_seen(tmp_path, decay):
    def callback():
        return DynamicPruning("2:4", end_step=100, update_freq=4, norm_decay=decay, squash=False)

    before, after = Norms(), Norms()
    run = trainer(tmp_path, callback(), before, max_steps=10)
    run.fit(InInit(), loader())
    run.save_checkpoint(tmp_path / "after.ckpt")
    pruning = callback()
    resumed = trainer(tmp_path, pruning, after, max_steps=18)
    resumed.fit(InInit(), loader(), ckpt_path=tmp_path / "after.ckpt")
    assert pruning.updater.steps == 18 and pruning.last_report.step == 16
    for name, norm_I in before.ended[0].items():
        assert torch.equal(after.began[0][name], norm_I)


def test_a_checkpoint_after_a_squashed_fit_is_a_plain_one(tmp_path):
    run, model = trainer(tmp_path, DynamicPruning("2:4", update_freq=4)), InInit()
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "after.ckpt")
    loaded = InInit.load_from_checkpoint(tmp_path / "after.ckpt", weights_only=False)
    assert zeros(loaded) == 0.5


def test_a_checkpoint_that_is_tested_leaves_a_squashed_model(tmp_path):
    class Tested(InInit):
        def test_step(self, batch, batch_idx):
            self.layers = len(sparse_layers(self))
            self.log("test", self.net(**batch).loss)

    data, model = DataLoader(Tokens(), batch_size=4), Tested()
    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=6)
    run = trainer(tmp_path, saver, DynamicPruning("2:4", update_freq=4), limit_test_batches=2)
    run.fit(model, loader())
    expected = run.test(model, data, verbose=False)
    assert (model.layers, zeros(model)) == (0, 0.5)
    found = run.test(model, data, ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=False)
    assert model.layers == 14  # while it was tested
    assert found[0]["test"] == pytest.approx(expected[0]["test"])
    assert not sparse_layers(model)
    assert zeros(model) == 0.5


class InSetup(InInit):
    """The same, with layers made in ``setup``, behind that of callbacks."""

    def __init__(self, early=True):
        super().__init__()
        self.net = None
        self.head = torch.nn.Linear(8, 8) if early else None

    def setup(self, stage):
        if self.net is None:
            self.net = shallow_llama()


@pytest.mark.parametrize("early", [True, False])
def test_layers_made_in_setup_are_pruned_and_resumed(early, tmp_path):
    path = tmp_path / "middle.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, DynamicPruning("2:4", update_freq=4), Interrupt(6, path)).fit(InSetup(early), loader())
    model, exact = InSetup(early), ExactAfterEveryStep()
    pruning = DynamicPruning("2:4", update_freq=4)
    trainer(tmp_path, pruning, exact).fit(model, loader(), ckpt_path=path, weights_only=False)
    assert exact.checked == 6
    assert zeros(model) == 0.5


class DropsFrozen(InInit):
    """Its checkpoints hold what is trained, and no buffers; so masks are missing from them."""

    def __init__(self):
        super().__init__()
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint):
        trained = {name for name, each in self.named_parameters() if each.requires_grad}
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in trained}


@pytest.mark.parametrize("at", [6, 12], ids=["in the run", "at its end"])
def test_a_checkpoint_without_masks_does_not_end_dense(tmp_path, at):
    path = tmp_path / "middle.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, DynamicPruning("2:4", update_freq=4), Interrupt(at, path)).fit(DropsFrozen(), loader())
    again = trainer(tmp_path, DynamicPruning("2:4", update_freq=4))
    with pytest.raises(ValueError, match="no masks|is not the one it had"):
        again.fit(DropsFrozen(), loader(), ckpt_path=path, weights_only=False)


def test_a_checkpoint_without_masks_is_not_evaluated_with_other_weights(tmp_path):
    path = tmp_path / "middle.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, DynamicPruning("2:4"), Interrupt(6, path)).fit(DropsFrozen(), loader())
    run = trainer(tmp_path, DynamicPruning("2:4"))
    with pytest.raises(ValueError, match="has no mask of net.*Evaluate the exported model"):
        run.validate(DropsFrozen(), DataLoader(Tokens(), batch_size=4), ckpt_path=path, weights_only=False)


def test_a_checkpoint_without_its_optimizer_is_not_resumed_by_a_new_one(tmp_path):
    path = tmp_path / "middle.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, DynamicPruning("2:4", update_freq=4), Interrupt(6, path)).fit(InInit(), loader())
    content = torch.load(path, weights_only=False)
    content["optimizer_states"] = []
    torch.save(content, path)
    with pytest.raises(ValueError, match="no state of an optimizer"):
        trainer(tmp_path, DynamicPruning("2:4", update_freq=4)).fit(
            InInit(), loader(), ckpt_path=path, weights_only=False
        )


def test_a_checkpoint_whose_masks_keep_everything_does_not_end_dense(tmp_path):
    path = tmp_path / "middle.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, DynamicPruning("2:4", update_freq=4), Interrupt(6, path)).fit(InInit(), loader())
    content = torch.load(path, weights_only=False)
    for key, value in content["state_dict"].items():
        if key.endswith("weight_mask"):
            value.fill_(255)
    torch.save(content, path)
    again = trainer(tmp_path, DynamicPruning("2:4", update_freq=4))
    with pytest.raises(ValueError, match="no masks|is not the one it had"):
        again.fit(InInit(), loader(), ckpt_path=path, weights_only=False)
