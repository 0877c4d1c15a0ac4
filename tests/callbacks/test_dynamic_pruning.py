"""``DynamicPruning`` in Lightning's trainer: exact masks after every step, in any module, under any setting."""

import csv
import json
import logging
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import T5Config, T5ForConditionalGeneration

from sparse_train import Cubic, FirstWindow, Fixed, OneShot, sparse_layers
from sparse_train.callbacks import DynamicPruning, RunRecord
from sparse_train.report.runs import RUN_FILE
from tests.callbacks.runs import (
    Classifier,
    ExactAfterEveryStep,
    InConfigureModel,
    InInit,
    Interrupt,
    Tokens,
    flip_rates,
    loader,
    trainer,
    zeros,
)
from tests.conftest import VOCABULARY

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    ("module", "accumulate", "precision"),
    [
        (InInit, 1, "32-true"),
        (InConfigureModel, 2, "32-true"),
        (InInit, 2, "bf16-mixed"),
        (InConfigureModel, 1, "bf16-true"),
        (InInit, 2, "bf16-true"),
    ],
)
def test_three_lines_keep_any_module_at_2_of_4(tmp_path, module, accumulate, precision):
    model, exact = module(), ExactAfterEveryStep()
    pruning = DynamicPruning("2:4", update_freq=4)
    settings = {"precision": precision, "accumulate_grad_batches": accumulate, "val_check_interval": 4}
    run = trainer(tmp_path, pruning, exact, max_epochs=-1, **settings)
    run.fit(model, loader(), DataLoader(Tokens(), batch_size=4))
    assert exact.checked > 12 * accumulate
    assert pruning.updater.steps == 12
    assert not sparse_layers(model)
    for name, layer in model.net.named_modules():
        if name.endswith("proj"):
            assert ((layer.weight.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert model.net.lm_head.weight is model.net.model.embed_tokens.weight


def test_flip_rate_is_logged_and_above_zero(tmp_path):
    rows = flip_rates(tmp_path, mask_structure="2:4", log_layers=True)
    of_layers = [float(value) for name, value in rows[-1].items() if name.startswith("layers/flip_rate/")]
    assert len(of_layers) == 14 and 0 <= min(of_layers) <= float(rows[-1]["sparsity/flip_rate"]) <= max(of_layers) <= 1
    assert [value for name, value in rows[-1].items() if name.startswith("layers/sparsity/")] == ["0.5"] * 14
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
    assert "The first steps run dense" in caplog.text
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


def test_a_stream_that_only_max_epochs_ends_has_no_known_length(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(Tokens())

    data = DataLoader(Stream(), batch_size=2)
    with pytest.raises(ValueError, match="is a share of the run, whose length is not known"):
        trainer(tmp_path, DynamicPruning("2:4"), max_steps=-1, max_epochs=1).fit(InInit(), data)
    callback = DynamicPruning("2:4", update_freq=4, end_step=12)
    trainer(tmp_path, callback, max_steps=-1, max_epochs=1).fit(InInit(), data)
    assert callback.updater.timing.end_step == 12


@pytest.mark.parametrize(("max_steps", "steps"), [(-1, 20 + 3 + 3), (22, 22)])
def test_accumulation_that_changes_by_epochs_counts_in_shares_of_the_run(tmp_path, max_steps, steps):
    callback, accumulate = DynamicPruning("2:4", update_freq=2), GradientAccumulationScheduler({1: 8})
    run = trainer(tmp_path, callback, accumulate, max_steps=max_steps, max_epochs=3)
    run.fit(InInit(), loader())
    assert (run.global_step, callback.updater.timing.end_step) == (steps, int(0.75 * steps))


def test_a_later_start_trains_dense_until_then(tmp_path):
    model = InInit()
    pruning = DynamicPruning("2:4", update_freq=4, start_step=6)
    kept = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            kept.append(all(layer.unpacked_mask().all() for layer in sparse_layers(pl_module).values()))

    trainer(tmp_path, pruning, Watch()).fit(model, loader())
    assert kept == [True] * 5 + [False] * 7


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
    pruning = DynamicPruning("2:4", update_freq=100, window=1.0, end_step=200, norm_decay=0.0)
    counted = []

    class Watch(L.Callback):
        def on_train_end(self, trainer, pl_module):
            counted.extend(int(s["tokens"]) for s in pruning.state_dict()["norms"]["norms_by_rank"][0].values())

    trainer(tmp_path, pruning, Watch(), max_steps=3, accumulate_grad_batches=2, max_epochs=-1, limit_val_batches=2).fit(
        model, loader(padded=True), DataLoader(Tokens(), batch_size=4)
    )
    # three steps of two micro-batches of two sequences with twelve real tokens each; validation does not count
    assert set(counted) == {3 * 2 * 2 * 12}


class EverySecondHasNoMask(InInit):
    """The batches it gets have no ``attention_mask`` at odd steps."""

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        if self.trainer.global_step % 2:
            del batch["attention_mask"]
        return batch


def test_the_padding_of_a_batch_is_not_that_of_the_next(tmp_path):
    pruning = DynamicPruning("2:4", update_freq=100, window=1.0, end_step=200, norm_decay=0.0, squash=False)
    trainer(tmp_path, pruning, max_steps=4, max_epochs=-1).fit(EverySecondHasNoMask(), loader(padded=True))
    counted = {int(each["tokens"]) for each in pruning.state_dict()["norms"]["norms_by_rank"][0].values()}
    assert counted == {2 * 2 * 12 + 2 * 2 * 16}


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
        trainer(tmp_path, pruning).fit(Flattens(), loader(padded=True))
    assert caplog.text.count("does not fit a layer's input of shape (2, 16)") == 1


@pytest.mark.parametrize("steps", [1, 3])
def test_a_trial_of_a_few_steps_ends_sparse(tmp_path, steps):
    for first_mask in (FirstWindow(), OneShot()):
        model = InInit()
        pruning = DynamicPruning("2:4", first_mask=first_mask)
        trainer(tmp_path, pruning, max_steps=steps).fit(model, loader())
        assert zeros(model) == 0.5


def test_a_run_that_ends_before_its_schedule_says_so(tmp_path, caplog):
    model = InInit()
    pruning = DynamicPruning("unstructured", schedule=Cubic(0.7), end_step=1000, update_freq=4)
    trainer(tmp_path, pruning).fit(model, loader())
    assert "before its masks reached the final sparsity of 0.7" in caplog.text
    caplog.clear()
    trainer(tmp_path, DynamicPruning("unstructured", schedule=Cubic(0.7), update_freq=4)).fit(InInit(), loader())
    assert "The run ended" not in caplog.text


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


def test_a_learning_rate_finder_in_front_changes_nothing(tmp_path):
    class Finder(L.pytorch.callbacks.LearningRateFinder):
        pass

    class WithRate(InInit):
        lr = 1e-3

    model, pruning = WithRate(), DynamicPruning("2:4", update_freq=4)
    trainer(tmp_path, Finder(num_training_steps=6), pruning).fit(model, loader())
    assert pruning.updater.steps == 12
    assert zeros(model) == 0.5


def test_a_learning_rate_finder_within_the_run_changes_nothing(tmp_path):
    class Finder(L.pytorch.callbacks.LearningRateFinder):
        """As in Lightning's guide to fine-tuning."""

        def on_fit_start(self, *_):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    class WithRate(InInit):
        lr = 1e-3

    def run(*callbacks):
        pruning, module = DynamicPruning("2:4", update_freq=4), WithRate()
        data = DataLoader(Tokens(), batch_size=4)
        trainer(tmp_path, pruning, *callbacks, max_steps=-1, max_epochs=2).fit(module, data)
        assert pruning.updater.steps == 20
        return module.state_dict().values()

    found = run(Finder(num_training_steps=4, update_attr=False))
    assert all(torch.equal(a, b) for a, b in zip(run(), found, strict=True))


def test_metrics_can_be_monitored(tmp_path):
    run = trainer(tmp_path, DynamicPruning("2:4", update_freq=4))
    run.fit(InInit(), loader())
    assert run.callback_metrics["sparsity/actual"] == 0.5
    assert run.callback_metrics["sparsity/flip_rate"] > 0


def test_another_fit_of_one_trainer_freezes_masks_for_its_own_last_quarter(tmp_path):
    pruning, module = DynamicPruning("2:4", update_freq=2), InInit()
    run = trainer(tmp_path, pruning, max_steps=-1, max_epochs=1)
    run.fit(module, loader())
    assert (pruning.updater.timing.end_step, pruning.updater.steps) == (15, 20)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    assert (pruning.updater.timing.end_step, pruning.updater.steps) == (15, 20)


class Validations(L.Callback):
    """What other callbacks would find at validations."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            names = ("sparsity/flip_rate", "sparsity/actual", "sparsity/target")
            self.seen.append(tuple(map(trainer.callback_metrics.get, names)))


@pytest.mark.parametrize("settings", [{}, {"first_mask": FirstWindow()}, {"start_step": 6}])
def test_metrics_are_there_for_other_callbacks_ahead_of_the_first_update(tmp_path, settings):
    early, seen = EarlyStopping("sparsity/flip_rate", mode="min", patience=99), Validations()
    pruning = DynamicPruning("2:4", update_freq=5, **settings)
    run = trainer(tmp_path, pruning, early, seen, val_check_interval=2, limit_val_batches=1)
    run.fit(InInit(), loader(), loader())
    assert len(seen.seen) == 6 and all(None not in each for each in seen.seen)


def test_metrics_of_the_latest_update_are_there_after_a_resume(tmp_path):
    path, pruning = tmp_path / "at.ckpt", DynamicPruning("2:4", update_freq=4)
    with pytest.raises(SystemExit):
        trainer(tmp_path, pruning, Interrupt(13, path), max_steps=16).fit(InInit(), loader())
    last = pruning.last_report.flip_rate
    assert last > 0
    seen = Validations()
    validating = {"val_check_interval": 1, "limit_val_batches": 1}
    again = trainer(tmp_path, DynamicPruning("2:4", update_freq=4), seen, max_steps=16, **validating)
    again.fit(InInit(), loader(), loader(), ckpt_path=path, weights_only=False)
    assert seen.seen and all(each[0] == pytest.approx(last) for each in seen.seen)


class Translation(InInit):
    """An encoder-decoder, whose attention_mask is that of the text that the encoder reads."""

    def __init__(self):
        super().__init__()
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
        self.net = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes))


class NextToAJudge(InInit):
    """A language model in training, and an encoder-decoder that is not."""

    def __init__(self):
        super().__init__()
        self.judge = Translation().net.requires_grad_(False)


def test_the_padding_of_an_encoders_text_is_not_that_of_the_decoders(tmp_path, caplog):
    pruning = DynamicPruning(
        "2:4", update_freq=4, window=4, end_step=4, targets=["net.encoder", "net.decoder"], squash=False
    )
    counted = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                layers = pruning.updater.layers.items()
                counted.update({name: int(layer.statistics.tokens) for name, layer in layers})

    trainer(tmp_path, pruning, Look(), max_steps=4).fit(Translation(), loader(padded=True))
    assert set(counted.values()) == {(32 + 3 * 2) * 16}  # in calibration and in three steps
    assert "does not fit a layer's input of shape (tokens of the other text, I)" in caplog.text

    pruning = DynamicPruning("2:4", update_freq=4, window=4, end_step=4, targets=["net.model"], squash=False)
    trainer(tmp_path, pruning, Look(), max_steps=4).fit(NextToAJudge(), loader(padded=True))
    assert {count for name, count in counted.items() if name.startswith("net.model")} == {(32 + 3 * 2) * 12}


def test_of_several_optimizers_all_callbacks_count_batches_as_loggers_do(tmp_path):
    class Logs(TwoOptimizers):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.log("loss", 1.0 * batch_idx)

    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    record = RunRecord()
    pruning = DynamicPruning("2:4", update_freq=2, window=1, end_step=8)
    run = trainer(tmp_path, pruning, record, max_steps=16, logger=logger, log_every_n_steps=1)
    run.fit(Logs(), loader())
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    losses = [int(row["step"]) for row in rows if row["loss"]]
    updates = [int(row["step"]) for row in rows if row["sparsity/flip_rate"]]
    assert losses == list(range(8))
    assert updates[-4:] == [2, 4, 6, 8]
    assert json.loads((record.folder / RUN_FILE).read_text())["step"] == 8


class Autoencoder(L.LightningModule):
    """Its decoder is the transposed weight of its encoder, if ``tied``, and then reads it beside the layer."""

    def __init__(self, tied):
        super().__init__()
        self.encoder, self.inner, self.decoder = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.tied = tied

    def training_step(self, batch, _):
        code = self.inner(self.encoder(batch[0]).relu()).relu()
        output = nn.functional.linear(code, self.encoder.weight.t()) if self.tied else self.decoder(code)
        return (output - batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_a_weight_that_is_also_read_beside_its_layer_is_named_once(tmp_path, caplog, tied):
    data = DataLoader(TensorDataset(torch.randn(16, 16)), batch_size=2)
    trainer(tmp_path, DynamicPruning("2:4", update_freq=2), max_steps=4).fit(Autoencoder(tied), data)
    named = [each.message for each in caplog.records if "beside their forward" in each.message]
    assert len(named) == tied
    assert not tied or ("such as encoder," in named[0] and "inner" not in named[0])
