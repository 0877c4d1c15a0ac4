import copy
import logging

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from sparse_train import Cubic, Fixed, Magnitude, SparseLinear, sparse_layers
from sparse_train.callbacks import DynamicPruning

from ..conftest import VOCABULARY, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Tokens(Dataset):
    """Forty different sequences of 16 tokens, as batches of dicts."""

    def __init__(self, padded=False):
        self.ids = torch.randint(3, VOCABULARY, (40, 16), generator=torch.Generator().manual_seed(1))
        self.mask = torch.ones_like(self.ids)
        if padded:
            self.mask[:, 12:] = 0

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": self.mask[i], "labels": self.ids[i]}


def loader(batch_size=2, padded=False):
    return StatefulDataLoader(
        Tokens(padded), batch_size=batch_size, shuffle=True, generator=torch.Generator().manual_seed(2)
    )


class InInit(L.LightningModule):
    """Layers made in ``__init__``; knows nothing of sparse_train."""

    def __init__(self):
        super().__init__()
        self.net = tiny_llama()
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(batch["input_ids"].sum().item())
        loss = self.net(**batch).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.log("val", self.net(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)


class InConfigureModel(InInit):
    """The same, with layers made in ``configure_model``."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = tiny_llama()


class Classifier(L.LightningModule):
    """No language model at all: batches are tuples, blocks there are none."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch, _):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ExactAfterEveryStep(L.Callback):
    """Asserts inside the run that every group of four keeps two, in training and in validation."""

    def __init__(self):
        self.checked = 0

    def check(self, pl_module):
        for layer in sparse_layers(pl_module).values():
            assert (layer.unpacked_mask().reshape(-1, 4).sum(1) == 2).all()
        assert sparse_layers(pl_module)
        self.checked += 1

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.check(pl_module)

    def on_validation_start(self, trainer, pl_module):
        self.check(pl_module)


def trainer(tmp_path, *callbacks, max_steps=12, **settings):
    settings = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, L.pytorch.callbacks.ModelCheckpoint) for c in callbacks),
        "accelerator": "cpu",
        "log_every_n_steps": 1,
    } | settings
    return L.Trainer(max_steps=max_steps, callbacks=list(callbacks), default_root_dir=tmp_path, **settings)


@pytest.mark.parametrize("module", [InInit, InConfigureModel])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_three_lines_keep_any_module_at_2_of_4(tmp_path, module, accumulate, precision):
    model, exact = module(), ExactAfterEveryStep()
    pruning = DynamicPruning("2:4", update_freq=4)
    run = trainer(tmp_path, pruning, exact, precision=precision, accumulate_grad_batches=accumulate, max_epochs=-1)
    run.fit(model, loader(), DataLoader(Tokens(), batch_size=4))
    assert exact.checked > 12 * accumulate
    assert pruning.updater.steps == 12
    assert not sparse_layers(model)
    for name, layer in model.net.named_modules():
        if name.endswith("proj"):
            assert ((layer.weight.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert model.net.lm_head.weight is model.net.model.embed_tokens.weight


def flip_rates(tmp_path, **arguments):
    model, logger = InInit(), L.pytorch.loggers.CSVLogger(tmp_path)
    trainer(tmp_path, DynamicPruning(update_freq=4, **arguments), logger=logger).fit(model, loader())
    rows = (line.split(",") for line in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines())
    header, *values = rows
    table = [dict(zip(header, row, strict=True)) for row in values]
    return [row for row in table if row.get("sparsity/flip_rate")]


def test_flip_rate_is_logged_and_above_zero(tmp_path):
    rows = flip_rates(tmp_path, mask_structure="2:4")
    assert [row["step"] for row in rows] == ["0", "4", "8", "9"]  # the first mask; frozen at three quarters
    assert [float(row["sparsity/flip_rate"]) > 0 for row in rows] == [False, True, True, True]
    assert all(float(row["sparsity/target"]) == float(row["sparsity/actual"]) == 0.5 for row in rows)
    assert float(rows[-1]["sparsity/initial_flip_rate"]) > 0


def test_fixed_masks_do_not_change(tmp_path):
    rows = flip_rates(tmp_path, mask_structure="2:4", policy=Fixed())
    assert [row["step"] for row in rows] == ["0", "4", "8", "9"]
    for row in rows:
        assert float(row["sparsity/flip_rate"]) == float(row["sparsity/initial_flip_rate"]) == 0
        assert float(row["sparsity/actual"]) == 0.5


def test_the_first_mask_is_calibrated_on_training_data_and_leaves_no_trace_in_its_order(tmp_path):
    model, plain = InInit(), InInit()
    trainer(tmp_path, DynamicPruning("2:4", update_freq=4)).fit(model, loader())
    trainer(tmp_path).fit(plain, loader())
    assert model.seen == plain.seen


def test_modules_without_a_language_model_start_from_their_first_window(tmp_path, caplog):
    model = Classifier()
    pruning = DynamicPruning("2:4", update_freq=4)
    data = DataLoader(TensorDataset(torch.randn(64, 8), torch.randint(0, 2, (64,))), batch_size=4)
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, pruning).fit(model, data)
    assert "first mask will come from the activations of the first steps" in caplog.text
    assert ((model.net[0].weight.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert (model.net[4].weight != 0).all()


def test_a_stream_is_not_read_for_calibration(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(Tokens())

    model = InInit()
    trainer(tmp_path, DynamicPruning("2:4", update_freq=4)).fit(model, DataLoader(Stream(), batch_size=2))
    expected = [Tokens().ids[i : i + 2].sum().item() for i in range(0, 24, 2)]
    assert model.seen == expected


def test_a_later_start_trains_dense_until_then(tmp_path):
    model = InInit()
    pruning = DynamicPruning("2:4", update_freq=4, start_step=6)
    kept = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            kept.append(all(layer.unpacked_mask().all() for layer in sparse_layers(pl_module).values()))

    trainer(tmp_path, pruning, Watch()).fit(model, loader())
    assert kept == [True] * 5 + [False] * 7


class Interrupt(L.Callback):
    """Stops a run in the middle of an epoch, after a checkpoint."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@pytest.mark.parametrize("module", [InInit, InConfigureModel])
@pytest.mark.parametrize("at", [6, 8], ids=["in a window", "at an update"])
@pytest.mark.parametrize("calibration_batches", [8, 0], ids=["calibrated", "from a window"])
@pytest.mark.parametrize("saved_by", ["a callback behind", "a callback before"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, module, at, calibration_batches, saved_by):
    class Pruning(DynamicPruning):
        def on_train_end(self, trainer, pl_module):
            self.at_end = copy.deepcopy(self.state_dict())

    def pruning():
        return Pruning(
            "2:4", update_freq=4, window=3, end_step=100, calibration_batches=calibration_batches, squash=False
        )

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
    trainer(tmp_path, resumed_pruning, max_steps=14).fit(resumed, loader(), ckpt_path=path, weights_only=False)

    assert first.seen[:at] + resumed.seen == whole.seen
    a, b = whole.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(key.endswith("weight_mask") for key in a)
    left, right = whole_pruning.at_end, resumed_pruning.at_end
    assert any(int(s["tokens"]) for s in left["statistics_by_rank"][0].values())
    assert left["steps"] == right["steps"] == 14
    assert left["timing"] == right["timing"]
    for name, rows in left["first_rows"].items():
        assert torch.equal(rows, right["first_rows"][name])
    for name, statistics in left["statistics_by_rank"][0].items():
        assert torch.equal(statistics["sum_squares"], right["statistics_by_rank"][0][name]["sum_squares"])


def test_the_last_checkpoint_holds_shadow_values_after_a_squashed_fit(tmp_path):
    model = InInit()
    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=5)
    trainer(tmp_path, saver, DynamicPruning("2:4", update_freq=4)).fit(model, loader())
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    weight = state["net.model.layers.0.mlp.up_proj.weight"]
    assert (weight != 0).all()
    assert "net.model.layers.0.mlp.up_proj.weight_mask" in state
    assert (model.net.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5


def test_generation_and_validation_see_the_sparse_model(tmp_path):
    model = InInit()
    trainer(tmp_path, DynamicPruning("2:4", update_freq=4, squash=False)).fit(model, loader())
    model.eval()
    ids = Tokens().ids[:1]
    generated, logits = model.net.generate(ids, max_new_tokens=4, do_sample=False), model.net(input_ids=ids).logits
    model.net.save_pretrained(tmp_path / "out")
    exported = type(model.net).from_pretrained(tmp_path / "out")
    assert torch.equal(exported(input_ids=ids).logits, logits)
    assert torch.equal(exported.generate(ids, max_new_tokens=4, do_sample=False), generated)
    weight = exported.model.layers[0].mlp.up_proj.weight
    assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all()


@pytest.mark.parametrize("checkpointing", [True, False])
def test_statistics_under_accumulation_padding_and_gradient_checkpointing(tmp_path, checkpointing):
    model = InInit()
    if checkpointing:
        model.net.gradient_checkpointing_enable({"use_reentrant": False})
    pruning = DynamicPruning("2:4", update_freq=100, window=1.0, end_step=200)
    counted = []

    class Watch(L.Callback):
        def on_train_end(self, trainer, pl_module):
            counted.extend(int(s["tokens"]) for s in pruning.state_dict()["statistics_by_rank"][0].values())

    trainer(tmp_path, pruning, Watch(), max_steps=3, accumulate_grad_batches=2, max_epochs=-1, limit_val_batches=2).fit(
        model, loader(padded=True), DataLoader(Tokens(), batch_size=4)
    )
    # three steps of two micro-batches of two sequences with twelve real tokens each; validation does not count
    assert set(counted) == {3 * 2 * 2 * 12}


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


def test_resuming_with_another_pattern_is_refused(tmp_path):
    path = tmp_path / "middle.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, DynamicPruning("2:4"), Interrupt(2, path)).fit(InInit(), loader())
    with pytest.raises(ValueError, match=r"mask_structure = NM\(n=2, m=4\), and this run has NM\(n=1, m=4\)"):
        trainer(tmp_path, DynamicPruning("1:4")).fit(InInit(), loader(), ckpt_path=path, weights_only=False)


@pytest.mark.parametrize("module", [InInit, InConfigureModel])
def test_a_dense_checkpoint_is_no_sparse_run(tmp_path, module):
    path = tmp_path / "dense.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, Interrupt(2, path)).fit(module(), loader())
    with pytest.raises(ValueError, match="this checkpoint holds no masks"):
        trainer(tmp_path, DynamicPruning("2:4")).fit(module(), loader(), ckpt_path=path, weights_only=False)


def test_loading_a_sparse_checkpoint_without_the_callback_names_the_masks(tmp_path):
    path = tmp_path / "sparse.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, DynamicPruning("2:4"), Interrupt(2, path)).fit(InInit(), loader())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*up_proj.weight_mask"):
        InInit.load_from_checkpoint(path, weights_only=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_structure": "2:4", "sparsity": 0.7}, "in conflict with 0.7"),
        ({"mask_structure": "unstructured"}, "needs a sparsity"),
        ({"mask_structure": "unstructured", "sparsity": 1.5}, "at least 0 and below 1"),
        ({"update_freq": 0}, "at least 1, got 0"),
        ({"criterion": "Wanda"}, "criterion is an object such as Wanda.., got 'Wanda'"),
        ({"policy": Fixed}, "policy is an object such as StraightThrough"),
        ({"calibration_batches": -1}, "at least 0, got -1"),
    ],
)
def test_mistakes_are_found_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        DynamicPruning(**arguments)


def test_mistakes_that_need_the_model_are_found_before_the_first_step(tmp_path):
    for arguments, message in [
        ({"targets": ["no_such_layer"]}, "matches no layer"),
        ({"ignore": ["re:.*"]}, "Nothing to prune"),
        ({"start_step": 50}, "must not lie before the first update"),
    ]:
        for module in (InInit(), InConfigureModel()):
            with pytest.raises(ValueError, match=message):
                trainer(tmp_path, DynamicPruning("2:4", **arguments)).fit(module, loader())
            assert not module.net or not hasattr(module, "seen") or module.seen == []


def test_an_endless_run_needs_whole_steps(tmp_path):
    with pytest.raises(ValueError, match="end_step=0.75 is a share of the run, whose length is not known"):
        trainer(tmp_path, DynamicPruning("2:4"), max_steps=-1, max_epochs=-1).fit(InInit(), loader())


def test_a_mask_that_does_not_fit_warns_once(tmp_path, caplog):
    class Flattens(InInit):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))

        def training_step(self, batch, _):
            return self.net(batch["input_ids"].float()).mean()

    pruning = DynamicPruning("2:4", update_freq=4)
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, pruning).fit(Flattens(), loader())
    assert caplog.text.count("does not fit a layer's input of shape (2, 16)") == 1


def test_the_callback_can_be_used_for_a_second_fit(tmp_path):
    pruning = DynamicPruning("2:4", criterion=Magnitude(), update_freq=4)
    for _ in range(2):
        model = InInit()
        trainer(tmp_path, pruning, max_steps=5).fit(model, loader())
        assert pruning.updater.steps == 5
        assert (model.net.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5
        assert not isinstance(model.net.model.layers[0].mlp.up_proj, SparseLinear)


def zeros(model):
    weight = model.net.model.layers[0].mlp.up_proj.weight
    return float((weight == 0).float().mean())


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


def test_validation_leaves_nothing_behind_for_the_next_fit(tmp_path):
    path = tmp_path / "middle.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, DynamicPruning("2:4"), Interrupt(6, path)).fit(InInit(), loader())
    pruning, data = DynamicPruning("2:4"), DataLoader(Tokens(), batch_size=4)
    run = trainer(tmp_path, pruning)
    run.validate(InInit(), data, ckpt_path=path, verbose=False, weights_only=False)
    run.fit(InInit(), loader())
    assert pruning.updater.steps == 12


def test_a_dense_checkpoint_can_be_validated_with_the_callback_in_place(tmp_path):
    path = tmp_path / "dense.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, Interrupt(2, path)).fit(InInit(), loader())
    run = trainer(tmp_path, DynamicPruning("2:4"))
    assert run.validate(InInit(), DataLoader(Tokens()), ckpt_path=path, verbose=False, weights_only=False)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_trial_of_a_few_steps_ends_sparse(tmp_path, steps):
    for calibration_batches in (0, 8):
        model = InInit()
        pruning = DynamicPruning("2:4", calibration_batches=calibration_batches)
        trainer(tmp_path, pruning, max_steps=steps).fit(model, loader())
        assert zeros(model) == 0.5


def test_a_run_that_ends_before_its_schedule_says_so(tmp_path, caplog):
    model = InInit()
    pruning = DynamicPruning("unstructured", schedule=Cubic(0.7), end_step=1000, update_freq=4)
    trainer(tmp_path, pruning).fit(model, loader())
    assert "before its masks reached the final sparsity of 0.7" in caplog.text


def test_a_fit_that_goes_on_without_a_checkpoint_goes_on_with_its_schedule(tmp_path):
    model = InInit()
    pruning = DynamicPruning("unstructured", schedule=Cubic(0.7), end_step=20, update_freq=4, squash=False)
    run = trainer(tmp_path, pruning, max_steps=10)
    run.fit(model, loader())
    before = pruning.updater.target
    run.fit_loop.epoch_loop.max_steps = 20
    run.fit(model, loader())
    assert pruning.updater.steps == 20
    assert before < pruning.updater.target == 0.7


class TwoOptimizers(InInit):
    automatic_optimization = False

    def training_step(self, batch, _):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.net(**batch).loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [
            torch.optim.SGD([p for n, p in self.named_parameters() if key in n], lr=0.01) for key in ("mlp", "attn")
        ]


def test_a_batch_that_steps_two_optimizers_is_one_step(tmp_path):
    pruning, model = DynamicPruning("2:4", update_freq=1, window=1, end_step=5), TwoOptimizers()
    trainer(tmp_path, pruning, max_steps=16).fit(model, loader())
    assert pruning.updater.steps == 8
    assert zeros(model) == 0.5


@pytest.mark.parametrize("module", [InInit, InConfigureModel])
def test_averaged_weights_are_sparse_too(tmp_path, module):
    seen = []

    class Validated(module):
        def validation_step(self, batch, batch_idx):  # which sees the averaged model
            if self.trainer.global_step:
                seen.append(max(int(m.unpacked_mask().view(-1, 4).sum(1).max()) for m in sparse_layers(self).values()))
                seen.append(squashed_zeros(self))

    averaging = L.pytorch.callbacks.EMAWeightAveraging(use_buffers=False, decay=0.5)
    model, pruning = Validated(), DynamicPruning("2:4", update_freq=4, squash=False)
    run = trainer(tmp_path, pruning, averaging, val_check_interval=4, limit_val_batches=1)
    run.fit(model, loader(), loader())
    assert set(seen) == {2, 0.5}
    masks = {name: layer.weight_mask for name, layer in sparse_layers(model).items()}
    averaged = {name: layer.weight_mask for name, layer in sparse_layers(averaging._average_model.module).items()}
    assert all(torch.equal(mask, averaged[name]) for name, mask in masks.items())
    assert len(masks) == len(averaged) == 21

    model, pruning = module(), DynamicPruning("2:4", update_freq=4)
    averaging = L.pytorch.callbacks.EMAWeightAveraging(use_buffers=False, decay=0.5)
    trainer(tmp_path, pruning, averaging).fit(model, loader())
    assert zeros(model) == 0.5


def squashed_zeros(module):
    found = [layer.masked_weight() == 0 for layer in sparse_layers(module).values()]
    return sum(int(each.sum()) for each in found) / sum(each.numel() for each in found)


def test_averaging_that_would_spoil_masks_says_what_to_do(tmp_path):
    averaging = L.pytorch.callbacks.EMAWeightAveraging()
    with pytest.raises(ValueError, match="average the bytes of the masks. Give it use_buffers=False"):
        trainer(tmp_path, DynamicPruning("2:4"), averaging).fit(InInit(), loader())
    averaging = L.pytorch.callbacks.EMAWeightAveraging(use_buffers=False)
    with pytest.raises(ValueError, match="Put DynamicPruning first"):
        trainer(tmp_path, averaging, DynamicPruning("2:4")).fit(InInit(), loader())


def test_a_sampler_that_leaves_data_out_is_respected(tmp_path):
    touched = []

    class Watched(Tokens):
        def __getitem__(self, i):
            touched.append(i)
            return super().__getitem__(i)

    data = DataLoader(Watched(), batch_size=2, sampler=torch.utils.data.SubsetRandomSampler(range(20)))
    trainer(tmp_path, DynamicPruning("2:4"), max_steps=8).fit(InInit(), data)
    assert max(touched) < 20


def test_a_learning_rate_finder_in_front_changes_nothing(tmp_path):
    class Finder(L.pytorch.callbacks.LearningRateFinder):
        pass

    class WithRate(InInit):
        lr = 1e-3

    model, pruning = WithRate(), DynamicPruning("2:4", update_freq=4)
    trainer(tmp_path, Finder(num_training_steps=6), pruning).fit(model, loader())
    assert pruning.updater.steps == 12
    assert zeros(model) == 0.5


def test_a_checkpoint_after_a_squashed_fit_is_a_plain_one(tmp_path):
    run, model = trainer(tmp_path, DynamicPruning("2:4", update_freq=4)), InInit()
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "after.ckpt")
    loaded = InInit.load_from_checkpoint(tmp_path / "after.ckpt", weights_only=False)
    assert zeros(loaded) == 0.5


def test_metrics_can_be_monitored(tmp_path):
    run = trainer(tmp_path, DynamicPruning("2:4", update_freq=4))
    run.fit(InInit(), loader())
    assert run.callback_metrics["sparsity/actual"] == 0.5
    assert run.callback_metrics["sparsity/flip_rate"] > 0
