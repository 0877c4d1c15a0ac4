import lightning as L
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from sparse_train import Magnitude, MaskUpdater, prune, sparse_layers, squash
from sparse_train.callbacks import DynamicPruning
from sparse_train.export import export_model
from sparse_train.integrations.transformers import SparseTrainerCallback
from sparse_train.layers.sparsify import sparsify
from tests.callbacks.runs import ExactAfterEveryStep, Tokens
from tests.callbacks.runs import trainer as lightning_trainer
from tests.conftest import shallow_llama, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

LORA = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def adapters(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}


def with_adapters(model):
    """LoRA that does something already: B is made zero otherwise."""
    wrapped = get_peft_model(model, LORA)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


class Lora(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = get_peft_model(shallow_llama(), LORA)

    def training_step(self, batch, _):
        return self.net(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_lora_on_a_sparse_frozen_base_through_lightning(tmp_path):
    module, exact = Lora(), ExactAfterEveryStep()
    before = {name: value.clone() for name, value in module.net.state_dict().items()}
    pruning = DynamicPruning("2:4", update_freq=4)
    lightning_trainer(tmp_path, pruning, exact).fit(module, DataLoader(Tokens(), batch_size=2))
    assert exact.checked == 12
    assert len(pruning.updater.layers) == 14
    assert not any("lora" in name for name in pruning.updater.layers)
    for name, value in module.net.state_dict().items():
        if name.endswith(("proj.weight", "base_layer.weight")):
            assert ((value.reshape(-1, 4) != 0).sum(1) == 2).all(), name
            assert torch.equal(value, torch.where(value != 0, before[name], 0)), name  # frozen: kept as they were
        elif "lora_" in name:
            assert value.all() and not torch.equal(value, before[name]), name  # trained, and nothing pruned
        else:
            assert torch.equal(value, before[name]), name


def test_base_and_adapters_are_saved_apart_and_come_back(tmp_path, ids):
    model = with_adapters(tiny_llama())
    prune(model, criterion=Magnitude())
    expected = model(input_ids=ids[0]).logits
    model.save_pretrained(tmp_path / "adapters")
    export_model(model.unload(), None, tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert ((base.model.layers[0].self_attn.q_proj.weight.reshape(-1, 4) != 0).sum(1) == 2).all()
    again = PeftModel.from_pretrained(base, tmp_path / "adapters")
    torch.testing.assert_close(again(input_ids=ids[0]).logits, expected)


@pytest.mark.parametrize("adapters_first", [True, False])
def test_an_adapter_merged_into_masked_layers_is_found_before_anything_is_written(adapters_first, ids, tmp_path):
    if adapters_first:
        model = with_adapters(tiny_llama())
        prune(model, criterion=Magnitude(), squash=False)
    else:
        base = tiny_llama()
        prune(base, criterion=Magnitude(), squash=False)
        model = with_adapters(base)
    expected = model(input_ids=ids[0]).logits
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into a masked layer") as error:
        squash(model)
    assert "unmerge" in str(error.value)
    with pytest.raises(ValueError, match="merged into a masked layer"):
        model.get_base_model().save_pretrained(tmp_path / "lost")
    model.unmerge_adapter()
    squash(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids[0]).logits, expected, rtol=1e-4, atol=1e-4)  # what was trained
    assert merged.model.layers[0].self_attn.q_proj.weight.count_nonzero() > 0.9 * 32 * 32  # and dense


def test_an_adapter_that_was_there_at_the_first_mask_and_is_merged_and_gone_is_found():
    model = with_adapters(tiny_llama())
    layer = model.get_submodule(Q).base_layer
    sparsify(model, [layer])
    layer.set_mask(torch.arange(32) % 2 == torch.zeros(32, 1))
    with pytest.raises(ValueError, match="merged into a masked layer"):
        squash(model.merge_and_unload())


def test_an_adapter_that_is_merged_and_gone_in_the_middle_of_a_run_stops_it(ids):
    model = with_adapters(tiny_llama())
    updater = MaskUpdater(model, "2:4", update_freq=2, total_steps=8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        model(input_ids=ids[0], labels=ids[0]).loss.backward()
        optimizer.step()
        updater.step()
    merged = model.merge_and_unload()
    with pytest.raises(ValueError, match="merged into a masked layer"):
        squash(merged)


def test_an_adapter_that_is_merged_at_the_end_of_a_run_stops_it_before_it_is_squashed(ids):
    model = with_adapters(tiny_llama())
    updater = MaskUpdater(model, "2:4", criterion=Magnitude(), total_steps=20)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        updater.finish()


def test_lora_in_a_trainer_resumes_with_its_masks(tmp_path):
    def run(resume=None, **settings):
        made = Trainer(
            model=get_peft_model(shallow_llama(), LORA),
            args=TrainingArguments(
                str(tmp_path),
                per_device_train_batch_size=2,
                save_steps=4,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                learning_rate=1e-2,
                lr_scheduler_type="constant",
                **settings,
            ),
            train_dataset=Tokens(),
            eval_dataset=Tokens(),
            callbacks=[SparseTrainerCallback("2:4", update_freq=3, end_step=1.0, squash=False)],
        )
        made.train(resume_from_checkpoint=resume)
        return made.model

    torch.manual_seed(3)
    whole = run(max_steps=8)
    torch.manual_seed(4)  # other adapters at first: the checkpoint's must come
    again = run(resume=str(tmp_path / "checkpoint-4"), max_steps=8)
    assert len(sparse_layers(again)) == 14
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    again.save_pretrained(tmp_path / "adapter")  # adapters alone, as Trainer.save_model
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert ((base.model.layers[0].mlp.up_proj.weight.reshape(-1, 4) == 0).sum(1) == 2).all()
    squash(again)
    loaded, ids = PeftModel.from_pretrained(base, tmp_path / "adapter"), torch.arange(3, 19)[None]
    torch.testing.assert_close(loaded(input_ids=ids).logits, again.eval()(input_ids=ids).logits)
    with pytest.raises(ValueError, match="adapters without the masks of their base"):
        run(max_steps=4, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True)


def masked():
    model = tiny_llama()
    prune(model, None, "2:4", criterion=Magnitude(), squash=False)
    return model


def test_dora_whose_norms_include_pruned_weights_is_refused_in_either_order(tmp_path):
    dora = LoraConfig(target_modules=["q_proj"], use_dora=True)
    model = get_peft_model(masked(), dora)
    with pytest.raises(ValueError, match="DoRA divides by the norms"):
        squash(model)
    with pytest.raises(ValueError, match="DoRA divides by the norms"):
        model.get_base_model().save_pretrained(tmp_path / "lost")
    model = get_peft_model(tiny_llama(), dora)
    with pytest.raises(ValueError, match="DoRA divides by the norms"):
        prune(model, None, "2:4", criterion=Magnitude(), squash=False)
    assert not sparse_layers(model)
    model = masked()
    squash(model)
    get_peft_model(model, dora)  # pruned weights are zeros, and the base is frozen


def test_a_model_that_is_unpickled_in_a_new_process_saves_zeros_there(tmp_path, monkeypatch):
    torch.save(masked(), tmp_path / "model.pt")
    plain = PreTrainedModel.save_pretrained.__wrapped__  # of a process in which nothing was masked
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", plain)
    torch.load(tmp_path / "model.pt", weights_only=False).save_pretrained(tmp_path / "out")
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].self_attn.q_proj.weight
    assert float((weight == 0).float().mean()) == 0.5


def test_adapters_on_weights_of_8_bits_are_left_alone():
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        if name.endswith("q_proj.weight"):
            parameter.data = parameter.data.to(torch.float8_e4m3fn)
    get_peft_model(model, LORA)
    with pytest.raises(ValueError, match="float8_e4m3fn: masks are for 16 bits or more"):
        prune(model, None, "2:4", criterion=Magnitude())
