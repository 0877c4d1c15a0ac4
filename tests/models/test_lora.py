"""peft's adapters on a sparse base: trained, exported apart from a base that keeps its zeros."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparse_train import Fixed, Magnitude, prune
from sparse_train.callbacks import DynamicPruning
from sparse_train.cli.main import main
from sparse_train.export import export_checkpoint, export_model
from sparse_train.models.causal_lm import CausalLM
from sparse_train.models.distillation import Distillation
from sparse_train.models.lora import LoRA
from tests.callbacks.runs import loader, trainer
from tests.conftest import shallow_llama, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def is_2of4(weight):
    return bool(((weight.reshape(-1, 4) != 0).sum(1) == 2).all())


@pytest.fixture
def sparse_folder(tmp_path):
    model = shallow_llama()
    prune(model, criterion=Magnitude())
    return export_model(model, tiny_tokenizer(), tmp_path / "sparse")


class Keeping(CausalLM):
    def on_train_end(self):
        self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/end.ckpt")


def test_on_a_sparse_folder_adapters_alone_are_trained_and_exported_beside_it(tmp_path, sparse_folder, ids):
    module = Keeping(sparse_folder, lora=LoRA(r=2), lr=1e-2, gradient_checkpointing=True)
    run = trainer(tmp_path, max_steps=4)
    run.fit(module, loader())
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    assert all("lora_" in name for name in trained)
    assert {id(p) for group in run.optimizers[0].param_groups for p in group["params"]} == {
        id(p) for p in module.parameters() if p.requires_grad
    }
    model = module.model.eval()
    expected = model(input_ids=ids[0]).logits
    before = AutoModelForCausalLM.from_pretrained(sparse_folder).state_dict()
    exports = (
        export_model(model, tiny_tokenizer(), tmp_path / "exported"),
        export_checkpoint(tmp_path / "end.ckpt", tmp_path / "from_checkpoint"),
    )
    for out in exports:
        base = AutoModelForCausalLM.from_pretrained(out)
        assert base.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
        again = PeftModel.from_pretrained(base, out / "adapter").eval()
        torch.testing.assert_close(again(input_ids=ids[0]).logits, expected)
        by_config = AutoPeftModelForCausalLM.from_pretrained(out / "adapter").eval()
        torch.testing.assert_close(by_config(input_ids=ids[0]).logits, expected)
        card = (out / "README.md").read_text()
        assert "adapter: LoRA, r 2, lora_alpha 16, on q_proj, v_proj" in card
        assert "0.5000 of the 14 pruned layers' weights" in card
        assert "base_layer" not in card
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(exports[0])(input_ids=ids[0]).logits, expected)


def test_a_dense_base_is_pruned_at_the_start_of_the_run(tmp_path, model_folder, ids):
    module = CausalLM(model_folder, lora=LoRA(r=2), lr=1e-2, distillation=Distillation())
    trainer(tmp_path, DynamicPruning("2:4", policy=Fixed()), max_steps=4).fit(module, loader())
    model = module.model.eval()
    out = export_model(model, None, tmp_path / "exported")
    base, dense = AutoModelForCausalLM.from_pretrained(out), shallow_llama().state_dict()
    for name, value in base.state_dict().items():
        if name.endswith("proj.weight"):
            assert is_2of4(value), name
            assert torch.equal(value, torch.where(value != 0, dense[name], 0)), name
        else:
            assert torch.equal(value, dense[name]), name
    again = PeftModel.from_pretrained(base, out / "adapter").eval()
    torch.testing.assert_close(again(input_ids=ids[0]).logits, model(input_ids=ids[0]).logits)


def test_export_before_masks_are_folded_writes_zeros_too(tmp_path):
    model = get_peft_model(shallow_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    prune(model, criterion=Magnitude(), squash=False)
    base = AutoModelForCausalLM.from_pretrained(export_model(model, None, tmp_path / "out"))
    assert is_2of4(base.model.layers[0].self_attn.q_proj.weight)
    assert is_2of4(base.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("more", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 6]}])
def test_what_else_an_adapter_of_peft_wraps_is_in_the_base_under_its_own_name(tmp_path, ids, more, tied):
    model = get_peft_model(
        shallow_llama(tie_word_embeddings=tied), LoraConfig(r=2, target_modules=["q_proj"], **more)
    ).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    prune(model, criterion=Magnitude())
    out = export_model(model, None, tmp_path / "out")
    assert set(load_file(out / "model.safetensors")) <= set(shallow_llama().state_dict())
    base = AutoModelForCausalLM.from_pretrained(out).eval()
    with model.disable_adapter():
        assert torch.equal(base(input_ids=ids[0]).logits, model(input_ids=ids[0]).logits)
    again = PeftModel.from_pretrained(base, out / "adapter").eval()
    torch.testing.assert_close(again(input_ids=ids[0]).logits, model(input_ids=ids[0]).logits)


def test_a_base_that_would_lack_a_weight_is_an_error(tmp_path):
    model = get_peft_model(shallow_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    base = model.get_base_model()
    base.lm_head = torch.nn.Sequential(base.lm_head)
    with pytest.raises(ValueError, match=r"would lack lm_head\.weight"):
        export_model(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_trained_adapter_is_loaded_to_go_on_with_or_to_evaluate(tmp_path, sparse_folder, text_file, capsys, ids):
    base = AutoModelForCausalLM.from_pretrained
    model = LoRA(r=2).added_to(base(sparse_folder))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    out = export_model(model, tiny_tokenizer(), tmp_path / "exported")
    again = LoRA(adapter=str(out / "adapter")).added_to(base(out))
    torch.testing.assert_close(again.eval()(input_ids=ids[0]).logits, model.eval()(input_ids=ids[0]).logits)
    assert sum(p.requires_grad for p in again.parameters()) == 8
    text = ["--text=TextFiles", f"--text.test=[{text_file}]", "--max_tokens=512", "--json"]
    found = []
    for arguments in ([], [f"--adapter={out / 'adapter'}"]):
        main(["evaluate", str(out), *arguments, *text])
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["perplexity"] != found[1]["perplexity"]
    assert found[1]["model"] == f"{out} with {out / 'adapter'}"
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        LoRA(adapter=str(out)).added_to(base(out))
    with pytest.raises(ValueError, match="positive integer"):
        LoRA(r=0).added_to(base(out))
