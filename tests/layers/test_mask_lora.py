"""Adapters inside masks: scores see the sum, merging keeps zeros and outputs, and a run resumes bit for bit."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from transformers import AutoModelForCausalLM

from sparse_train import (
    FirstWindow,
    Fixed,
    Magnitude,
    MaskLoRA,
    MaskUpdater,
    SparseGPT,
    StraightThrough,
    add_mask_lora,
    merge_mask_lora,
    prune,
    sparse_layers,
    sparsify_like,
    squash,
)
from sparse_train.callbacks import DynamicPruning
from sparse_train.export import export_checkpoint, export_model
from sparse_train.inspection import layer_sparsities
from sparse_train.integrations.transformers import SparseTrainerCallback
from sparse_train.layers.mask_lora import MaskLoRALinear, check_mask_lora
from sparse_train.layers.state_dicts import folded_state_dict
from sparse_train.models.causal_lm import CausalLM
from sparse_train.models.sources import Pretrained
from tests.callbacks.runs import ExactAfterEveryStep, InConfigureModel, InInit, Interrupt, loader, trainer
from tests.conftest import shallow_llama, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

ALL = MaskLoRA(r=4, target_modules="all-linear")


def pruned():
    model = tiny_llama().eval()
    prune(model, criterion=Magnitude(), squash=False)
    return model


def adapted(lora=ALL):
    """A masked model whose adapters do something already."""
    model = pruned()
    add_mask_lora(model, lora)
    for name, parameter in model.named_parameters():
        if name.endswith("mask_lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model


def is_2of4(weight):
    return bool(((weight.reshape(-1, 4) != 0).sum(1) == 2).all())


def test_a_new_adapter_changes_nothing_and_is_all_that_trains(ids):
    model = pruned()
    expected = model(input_ids=ids[0]).logits
    names = {id(p): name for name, p in model.named_parameters()}
    factors = add_mask_lora(model)
    assert torch.equal(model(input_ids=ids[0]).logits, expected)
    assert len(factors) == 12  # A and B of q and v in three blocks
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in factors}
    assert not names.keys() & {id(p) for p in factors}
    own = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert own == {"q_proj", "v_proj"}
    model(input_ids=ids[0], labels=ids[0]).loss.backward()
    assert all(p.grad is not None for p in factors)
    assert add_mask_lora(model) == factors  # idempotent


def test_merged_and_squashed_it_is_exactly_sparse_and_computes_the_same(ids):
    model = adapted()
    expected = model(input_ids=ids[0]).logits
    kept = {name: layer.unpacked_mask() for name, layer in sparse_layers(model).items()}
    sums = {
        name: layer.weight + layer.lora_alpha / 4 * layer.mask_lora_B @ layer.mask_lora_A
        for name, layer in sparse_layers(model).items()
    }
    masked = copy.deepcopy(model)
    merge_mask_lora(masked)
    assert not any(layer.has_factors for layer in sparse_layers(masked).values())
    assert torch.equal(masked(input_ids=ids[0]).logits, expected)
    squash(model)
    assert torch.equal(model(input_ids=ids[0]).logits, expected)
    for name, mask in kept.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight != 0, mask)
        torch.testing.assert_close(layer.weight, torch.where(mask, sums[name], 0))
        torch.testing.assert_close(masked.get_submodule(name).weight, sums[name])  # shadow values too
    assert not any("mask" in name for name in model.state_dict())


def test_saved_and_counted_as_merged(tmp_path, ids):
    model = adapted(MaskLoRA(r=2))
    expected = model(input_ids=ids[0]).logits
    folded = folded_state_dict(model)
    assert folded.keys() == tiny_llama().state_dict().keys()
    before = copy.deepcopy(model.state_dict())
    for folder, save in (("saved", model.save_pretrained), ("exported", lambda out: export_model(model, None, out))):
        save(tmp_path / folder)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(loaded(input_ids=ids[0]).logits, expected)
        assert is_2of4(loaded.model.layers[0].self_attn.q_proj.weight)
        assert all(torch.equal(value, folded[name]) for name, value in loaded.state_dict().items())
    assert before.keys() == model.state_dict().keys()
    counted = {layer.name: layer.zeros for layer in layer_sparsities(model)}
    assert counted["model.layers.0.self_attn.q_proj"] == 32 * 32 // 2


def test_scores_are_those_of_the_sum():
    model = nn.Sequential(nn.Linear(16, 8, bias=False))
    updater = MaskUpdater(model, "2:4", criterion=Magnitude(), targets=["0"], update_freq=1, total_steps=100)
    add_mask_lora(model, MaskLoRA(r=2, lora_alpha=6, target_modules=["0"]))
    layer = model[0]
    alone = layer.weight_mask.clone()
    nn.init.normal_(layer.mask_lora_B, std=2.0)
    model(torch.randn(3, 16))
    report = updater.step()
    total = layer.weight + 3.0 * layer.mask_lora_B @ layer.mask_lora_A
    two_best = total.abs().reshape(8, 4, 4).argsort(-1).argsort(-1) >= 2
    assert torch.equal(layer.unpacked_mask(), two_best.reshape(8, 16))
    assert not torch.equal(layer.weight_mask, alone)
    assert report.flip_rate > 0
    assert report.sparsity == 0.5
    assert "mask_lora" in updater.settings()


def test_solvers_that_write_weights_are_refused():
    with pytest.raises(ValueError, match="merge_mask_lora"):
        prune(adapted(), [torch.randint(3, 100, (2, 8))], criterion=SparseGPT())


def test_a_check_raises_where_adding_would_and_adds_nothing():
    model = pruned()
    for wanted in (ALL, MaskLoRA(target_modules="q_proj")):
        check_mask_lora(model, wanted)
    assert not any(layer.has_factors for layer in sparse_layers(model).values())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for nowhere in (["q_prj"], []):
        with pytest.raises(ValueError, match="no masked layer is named like one of"):
            check_mask_lora(model, MaskLoRA(target_modules=nowhere))
    with pytest.raises(ValueError, match="an adapter already"):
        check_mask_lora(adapted(), MaskLoRA(r=8))
    check_mask_lora(adapted(), ALL)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: MaskLoRA(r=0), "from 1 on"),
        (lambda: MaskLoRA(lora_alpha=2.5), "whole numbers"),  # a state dict would hold 2
        (lambda: add_mask_lora(tiny_llama()), "build the MaskUpdater first"),
        (
            lambda: SparseTrainerCallback("2:4")._prepare(adapted()),
            "a mask_lora adapter, and a checkpoint of the Trainer",
        ),
    ],
)
def test_what_cannot_be_is_said(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_a_state_dict_brings_adapters_or_is_refused():
    model, other, bare = adapted(MaskLoRA(r=2, lora_alpha=5)), tiny_llama(), pruned()
    sparsify_like(other, model.state_dict())
    other.load_state_dict(model.state_dict())
    layer = other.model.layers[0].self_attn.q_proj
    assert isinstance(layer, MaskLoRALinear)
    assert (layer.scale, layer.weight.requires_grad) == (2.5, False)
    left, right = folded_state_dict(model), folded_state_dict(other)
    assert all(torch.equal(left[name], right[name]) for name in left)
    with pytest.raises(ValueError, match="the checkpoint has a mask_lora adapter, and the model has none"):
        bare.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="the model has a mask_lora adapter, and the checkpoint has none"):
        model.load_state_dict(pruned().state_dict())


def test_in_half_precision_factors_are_float32(ids):
    model = tiny_llama().bfloat16()
    prune(model, criterion=Magnitude(), squash=False)
    factors = add_mask_lora(model)
    assert {factor.dtype for factor in factors} == {torch.float32}
    nn.init.normal_(factors[1], std=0.1)
    expected = model(input_ids=ids[0]).logits
    squash(model)
    assert torch.equal(model(input_ids=ids[0]).logits, expected)
    assert is_2of4(model.model.layers[0].self_attn.q_proj.weight)


def test_compiled_it_computes_the_same():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(16, 8))
    MaskUpdater(model, criterion=Magnitude(), targets=["0"], total_steps=9)
    factors = add_mask_lora(model, MaskLoRA(r=2, target_modules=["0"]))
    nn.init.normal_(factors[1])
    x = torch.randn(3, 16)
    expected = model(x)
    wanted = torch.autograd.grad(expected.square().sum(), factors)
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), factors), wanted)


# --- in a run of Lightning -------------------------------------------------------------------------------------------


class Watched(InConfigureModel):
    def configure_optimizers(self):
        self.trained = [name for name, p in self.named_parameters() if p.requires_grad]
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("policy", [Fixed(), StraightThrough()])
def test_a_run_trains_adapters_alone_and_ends_sparse(tmp_path, policy):
    module, exact = Watched(), ExactAfterEveryStep()
    pruning = DynamicPruning("2:4", update_freq=4, policy=policy, mask_lora=MaskLoRA(r=4))
    trainer(tmp_path, pruning, exact).fit(module, loader())
    assert exact.checked == 12
    assert len(module.trained) == 8  # A and B of q and v in two blocks
    assert all(name.split(".")[-1] in ("mask_lora_A", "mask_lora_B") for name in module.trained)
    assert pruning.updater.settings()["mask_lora"] == "r=4, lora_alpha=16 on 4 of 14 layers"
    dense = shallow_llama().state_dict()
    changed = set()
    for name, value in module.net.state_dict().items():
        if name.endswith("proj.weight"):
            assert is_2of4(value), name
            if not torch.equal(value, torch.where(value != 0, dense[name], 0)):
                changed.add(name.split(".")[-2])
        else:
            assert torch.equal(value, dense[name]), name
    assert changed == {"q_proj", "v_proj"}


def test_a_module_with_layers_from_init_that_gives_all_parameters_to_its_optimizer(tmp_path):
    module = InInit()
    trainer(tmp_path, DynamicPruning("2:4", mask_lora=ALL), max_steps=4).fit(module, loader())
    assert is_2of4(module.net.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(module.net.model.embed_tokens.weight, shallow_llama().model.embed_tokens.weight)


def test_true_half_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="factor of mask_lora, torch.bfloat16.*bf16-mixed"):
        trainer(tmp_path, DynamicPruning("2:4", mask_lora=ALL), precision="bf16-true").fit(InInit(), loader())


@pytest.mark.parametrize("at", [6, 8], ids=["in a window", "at an update"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, at):
    def fit(*callbacks, seed, **settings):
        torch.manual_seed(seed)  # of the first A
        module = Watched()
        pruning = DynamicPruning("2:4", update_freq=4, window=3, end_step=100, mask_lora=ALL, squash=False)
        trainer(tmp_path, pruning, *callbacks, max_steps=14).fit(module, loader(), **settings)
        return module

    path = tmp_path / "middle.ckpt"
    whole = fit(seed=0).state_dict()
    with pytest.raises(SystemExit):
        fit(Interrupt(at, path), seed=0)
    resumed = fit(seed=1, ckpt_path=path).state_dict()
    assert whole.keys() == resumed.keys()
    tensors = {key for key in whole if isinstance(whole[key], torch.Tensor)}
    assert any(key.endswith("mask_lora_A") for key in tensors)
    assert all(torch.equal(whole[key], resumed[key]) for key in tensors)
    assert all(whole[key] == resumed[key] for key in whole.keys() - tensors)


def test_a_run_with_another_adapter_is_not_resumed(tmp_path):
    path = tmp_path / "middle.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, DynamicPruning("2:4", mask_lora=MaskLoRA()), Interrupt(2, path)).fit(InInit(), loader())
    other = trainer(tmp_path, DynamicPruning("2:4", mask_lora=MaskLoRA(lora_alpha=8)))
    with pytest.raises(ValueError, match=r"has an adapter already \(r=8, lora_alpha=16\)"):
        other.fit(InInit(), loader(), ckpt_path=path)


class Keeping(CausalLM):
    """Keeps a checkpoint of the end, before adapters are merged."""

    def on_train_end(self):
        self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "end.ckpt")


def test_a_checkpoint_of_causal_lm_validates_and_exports(tmp_path, model_folder):
    module = Keeping(str(model_folder), lr=1e-2)
    pruning = DynamicPruning("2:4", update_freq=4, mask_lora=MaskLoRA(r=4))
    trainer(tmp_path, pruning, max_steps=6).fit(module, loader())
    made = module.model.state_dict()
    exported = export_checkpoint(tmp_path / "end.ckpt", tmp_path / "exported")
    again = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    assert made.keys() == again.keys()
    assert all(torch.equal(made[name], again[name]) for name in made)
    without = DynamicPruning("2:4")
    other = trainer(tmp_path, without, max_steps=8)
    with pytest.raises(ValueError, match="was written with mask_lora"):
        other.fit(CausalLM(str(model_folder)), loader(), ckpt_path=tmp_path / "end.ckpt")
    losses = []
    for callbacks, checkpoint in (([pruning], None), ([], tmp_path / "end.ckpt"), ([without], tmp_path / "end.ckpt")):
        made_trainer = trainer(tmp_path, *callbacks)
        subject = module if checkpoint is None else CausalLM(str(model_folder))
        losses.append(made_trainer.validate(subject, loader(), ckpt_path=checkpoint, verbose=False)[0]["val/loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


def test_a_checkpoint_in_half_precision_exports_what_was_trained(tmp_path, model_folder):
    module = CausalLM(Pretrained(str(model_folder), dtype="bfloat16"), lr=1e-2)
    pruning = DynamicPruning("2:4", mask_lora=ALL, first_mask=FirstWindow(), squash=False)
    run = trainer(tmp_path, pruning, max_steps=2)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "half.ckpt")
    expected = folded_state_dict(module.model)
    export_checkpoint(tmp_path / "half.ckpt", tmp_path / "model")
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(value, expected[name]) and value.dtype == torch.bfloat16 for name, value in found.items())
    assert len(found) == 20


def test_accelerate_and_safetensors_save_adapters(tmp_path, ids):
    model, accelerator = adapted(), Accelerator(cpu=True)
    before = model(input_ids=ids[0]).logits
    accelerator.prepare(model)
    accelerator.save_state(str(tmp_path))
    save_model(model, str(tmp_path / "adapted.safetensors"))
    other = adapted(MaskLoRA(r=4, lora_alpha=5, target_modules="all-linear"))
    load_model(other, str(tmp_path / "adapted.safetensors"))
    assert torch.equal(other(input_ids=ids[0]).logits, before)  # with the factor of the file
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    accelerator.load_state(str(tmp_path))
    assert torch.equal(model(input_ids=ids[0]).logits, before)
