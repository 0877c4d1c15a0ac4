import json
import shutil

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM

from sparse_train import Cubic, sparse_layers
from sparse_train.callbacks import DynamicPruning
from sparse_train.data.text_blocks import TextBlocks
from sparse_train.data.texts import TextFiles
from sparse_train.export import export_checkpoint, export_model
from sparse_train.models.causal_lm import CausalLM
from sparse_train.models.distillation import Distillation
from sparse_train.models.sources import Pretrained

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def data(model_folder, text_file):
    files = [str(text_file)]
    return TextBlocks(
        str(model_folder),
        TextFiles(train=files, validation=files),
        block_size=32,
        batch_size=4,
        max_validation_blocks=6,
    )


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"input_ids": torch.ones(4, dtype=torch.long)}])


def fit(module, data, *callbacks, ckpt_path=None, **settings):
    settings = {
        "max_steps": 10,
        "logger": False,
        "enable_progress_bar": False,
        "accelerator": "cpu",
        "enable_model_summary": False,
        "enable_checkpointing": False,
    } | settings
    trainer = L.Trainer(**settings, callbacks=list(callbacks))
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=False)
    return trainer


class Rates(L.Callback):
    """The learning rate of each step."""

    def __init__(self, rates):
        self.rates = rates

    def on_train_batch_start(self, trainer, *args):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_learning_rate_warms_up_and_decays_to_zero(model_folder, data):
    rates = []
    fit(CausalLM(str(model_folder), lr=1e-3, warmup=0.3), data, Rates(rates))
    assert rates[:4] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 1e-4


def test_the_fused_optimizer_clips_and_trains_like_the_plain_one(model_folder, data):
    class Plain(L.Callback):
        def on_train_start(self, trainer, pl_module):
            for group in trainer.optimizers[0].param_groups:
                assert group["fused"]
                group["fused"] = False

    trained = []
    for callbacks in ([], [Plain()]):
        module = CausalLM(str(model_folder), lr=1e-3)
        fit(module, data, DynamicPruning("2:4", update_freq=4), *callbacks, precision="bf16-mixed", gradient_clip_val=1)
        trained.append(module.model.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], atol=1e-4, rtol=1e-2)


def test_validation_perplexity_is_over_tokens(model_folder, data):
    module = CausalLM(str(model_folder))
    trainer = fit(module, data, max_steps=2)
    module.eval()
    total, count = 0.0, 0
    for batch in data.val_dataloader():  # 6 blocks: a batch of 4 and one of 2
        loss = module.model(**batch).loss
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total, count = total + float(loss) * tokens, count + tokens
    logged = trainer.validate(module, data, verbose=False)[0]["val/perplexity"]
    assert logged == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-5)
    assert trainer.test(module, data.val_dataloader(), verbose=False)[0]["test/perplexity"] == pytest.approx(logged)


def test_a_second_fit_has_a_whole_schedule_of_its_own(model_folder, data):
    module, rates = CausalLM(str(model_folder), lr=1e-3, warmup=0.3), []
    trainer = fit(module, data, Rates(rates), max_steps=5)
    trainer.fit_loop.epoch_loop.max_steps = 10
    trainer.fit(module, data)
    assert rates[5:] == pytest.approx(rates[:5])


def test_a_resumed_fit_keeps_the_schedule_of_the_whole_run(model_folder, data, tmp_path):
    rates = []
    fit(CausalLM(str(model_folder), lr=1e-3), data, Rates(rates))
    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    module = CausalLM(str(model_folder), lr=1e-3)
    trainer = fit(module, data, Rates(rates), saver, max_steps=10, enable_checkpointing=True)
    trainer.fit(module, data, ckpt_path=tmp_path / "step=5.ckpt", weights_only=False)  # in the same trainer
    assert rates[20:] == pytest.approx(rates[5:10])


def test_a_loss_that_is_not_a_number_is_not_left_out(model_folder, data):
    module = CausalLM(str(model_folder))
    trainer = fit(module, data, max_steps=2)
    with torch.no_grad():
        token = int(next(iter(data.val_dataloader()))["input_ids"][0, 0])
        module.model.get_input_embeddings().weight[token] = float("inf")
    for evaluate in (trainer.validate, trainer.test):
        (logged,) = evaluate(module, data.val_dataloader(), verbose=False)
        assert len(logged) == 2 and all(value != value for value in logged.values())


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_validation_sums_are_float32_in_true_half_precision(model_folder, data, precision):
    module = CausalLM(str(model_folder))
    data.setup("fit")
    batch = {key: value[:1, :8] for key, value in next(iter(data.val_dataloader())).items()}
    many = DataLoader([batch] * 60, batch_size=None)
    trainer = L.Trainer(precision=precision, logger=False, accelerator="cpu", enable_progress_bar=False)
    (once,) = trainer.validate(module, DataLoader([batch], batch_size=None), verbose=False)
    (logged,) = trainer.validate(module, many, verbose=False)  # 420 tokens of the same loss: more than bf16 counts
    assert logged["val/loss"] == pytest.approx(once["val/loss"], rel=1e-5)


@pytest.mark.parametrize("distillation", [None, Distillation()])
def test_gradient_checkpointing_changes_nothing(model_folder, data, distillation):
    states = []
    for checkpointing in (False, True):
        module = CausalLM(str(model_folder), gradient_checkpointing=checkpointing, distillation=distillation)
        fit(module, data, DynamicPruning("2:4", update_freq=4))
        states.append(module.state_dict())
    assert all(torch.allclose(states[0][key], states[1][key], atol=1e-6) for key in states[0])


def test_weight_decay_is_for_matrices(model_folder, data):
    module = CausalLM(str(model_folder), weight_decay=0.1)
    trainer = fit(module, data, max_steps=1)
    decays = {group["weight_decay"]: {p.dim() for p in group["params"]} for group in trainer.optimizers[0].param_groups}
    assert decays == {0.1: {2}, 0.0: {1}}


def test_another_optimizer_and_schedule_are_named_by_their_classes(model_folder, data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {optimizer: {class_path: SGD, init_args: {lr: 0.5, momentum: 0.9}}, "
        "lr_scheduler: {class_path: ExponentialLR, init_args: {gamma: 0.5}}}"
    )
    parser = LightningArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_lightning_class_args(CausalLM, "model")
    arguments = parser.parse_args([f"--config={recipe}", f"--model.model={model_folder}"])
    module, rates = parser.instantiate_classes(arguments).model, []
    trainer = fit(module, data, Rates(rates), max_steps=3)
    assert rates == [0.5, 0.25, 0.125]
    (group,) = trainer.optimizers[0].param_groups
    assert type(trainer.optimizers[0]) is torch.optim.SGD and group["momentum"] == 0.9
    assert len(group["params"]) == len(list(module.parameters()))


def test_a_sparse_checkpoint_loads_without_the_callback(model_folder, data, tmp_path):
    module = CausalLM(str(model_folder))
    trainer = fit(module, data, DynamicPruning("2:4", update_freq=4, squash=False))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "x.ckpt", model=str(model_folder), weights_only=False)
    assert len(sparse_layers(loaded)) == 14
    batch = next(iter(data.val_dataloader()))
    module.eval()
    loaded.eval()
    assert torch.equal(loaded.model(**batch).logits, module.model(**batch).logits)
    trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", enable_checkpointing=False)
    assert trainer.validate(CausalLM(str(model_folder)), data, ckpt_path=tmp_path / "x.ckpt", weights_only=False)


def test_mistakes(model_folder, data):
    with pytest.raises(ValueError, match="warmup is a share"):
        CausalLM(str(model_folder), warmup=1.5)
    with pytest.raises(ValueError, match="the run needs an end: set max_steps"):
        fit(CausalLM(str(model_folder)), data, max_steps=-1, max_epochs=-1)
    with pytest.raises(ValueError, match="the run needs an end: set max_steps"):
        fit(CausalLM(str(model_folder)), DataLoader(Stream()), max_steps=-1, max_epochs=1)


def test_compiled_blocks_train_the_same_model_and_are_plain_again_afterwards(model_folder, data, monkeypatch):
    with_default, weights = nn.Module.compile, []
    # the default backend wants a C++ compiler; layers/test_compile.py has the one that also traces backward
    monkeypatch.setattr(nn.Module, "compile", lambda self: with_default(self, backend="eager"))
    for compile_blocks in (False, True):
        L.seed_everything(0, verbose=False)
        module = CausalLM(str(model_folder), lr=1e-3, compile_blocks=compile_blocks, distillation=Distillation())
        compiled = Compiled()
        fit(module, data, DynamicPruning("2:4", update_freq=2), compiled, max_steps=4)
        assert compiled.blocks == compile_blocks and compiled.teachers_blocks == compile_blocks
        assert not any(block._compiled_call_impl for block in module.model.model.layers)
        weights.append(module.state_dict())
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, atol=2e-4, rtol=1e-3)


class Compiled(L.Callback):
    """Whether blocks, and those of the teacher, were compiled in training."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        models = pl_module.model, pl_module._teacher.model
        self.blocks, self.teachers_blocks = (
            all(block._compiled_call_impl is not None for block in model.model.layers) for model in models
        )


def test_an_export_from_before_the_final_sparsity_is_said(model_folder, data, tmp_path, caplog):
    module = CausalLM(str(model_folder))
    rising = DynamicPruning("unstructured", schedule=Cubic(0.5), update_freq=2, end_step=8)
    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(module, data, rising, saver, max_steps=8, enable_checkpointing=True)
    export_checkpoint(tmp_path / "step=8.ckpt", tmp_path / "end")
    assert "was written after" not in caplog.text
    export_checkpoint(tmp_path / "step=1.ckpt", tmp_path / "begin")  # where the sparsity is 0
    export_checkpoint(tmp_path / "step=4.ckpt", tmp_path / "middle")
    assert "was written after 4 steps, at a sparsity of 0.4375: it rises to 0.5 until step 8" in caplog.text


def test_the_card_of_an_exported_checkpoint_names_its_source(model_folder, data, tmp_path):
    source = Pretrained(str(model_folder))
    source.name, source.hub_id, source.license = "a model", "someone/model", "mit"
    trainer = fit(CausalLM(source), data, DynamicPruning("2:4", update_freq=4), max_steps=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    export_checkpoint(tmp_path / "x.ckpt", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# a model, 2:4" in card and "base_model: someone/model" in card and "license: mit" in card
    assert str(model_folder) not in card


def test_an_exported_checkpoint_generates_as_its_source_does(model_folder, data, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_folder, source)
    settings = {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 5]}
    (source / "generation_config.json").write_text(json.dumps(settings))
    module = CausalLM(str(source))
    trainer = fit(module, data, DynamicPruning("2:4", update_freq=4, squash=False), max_steps=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    export_checkpoint(tmp_path / "x.ckpt", tmp_path / "of_checkpoint")
    export_model(module.model, None, tmp_path / "of_model")
    for folder in ("of_checkpoint", "of_model"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert loaded.config.use_cache
        assert {name: getattr(loaded.generation_config, name) for name in settings} == settings
        assert loaded.generation_config.use_cache is not False


def test_no_cache_is_kept_while_training(model_folder):
    module = CausalLM(str(model_folder))
    module.configure_model()
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert module(input_ids=ids).past_key_values is None
    assert module(input_ids=ids, use_cache=True).past_key_values is not None
