import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from sparse_train import (
    IHT,
    NM,
    OWL,
    Magnitude,
    MaskUpdater,
    SparseGPT,
    SparseLinear,
    Unstructured,
    Wanda,
    prune,
    sparse_layers,
    squash,
)
from sparse_train.architecture import block_lists
from sparse_train.layers.state_dicts import folded_state_dict
from tests.conftest import VOCABULARY, tiny_llama
from tests.reference import nm_mask, row_mask

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCABULARY}
ARCHITECTURES = {
    "llama": {"intermediate_size": 64, "num_key_value_heads": 2},
    "mistral": {"intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 8},
    "qwen2": {"intermediate_size": 64, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "phi": {"intermediate_size": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": {"intermediate_size": 64},
    "bloom": {"n_head": 4, "n_layer": 3},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64},
}


def tiny(architecture):
    config = AutoConfig.for_model(architecture, **(SMALL | ARCHITECTURES[architecture]))
    config.pad_token_id = 0
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def reference_prune(model, batches, mask_of):
    """Sequential calibration the long way: for each block and sample a forward of the whole model, with hooks.

    Returns the scores and masks of every layer.
    """
    blocks = next(iter(block_lists(model).values()))
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for block in blocks:
        sums: dict[nn.Module, torch.Tensor] = {}

        def add(module, args, sums=sums):
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            sums[module] = sums.get(module, 0) + x.float().square().sum(0)

        layers = [m for m in block.modules() if isinstance(m, (nn.Linear, Conv1D))]
        handles = [layer.register_forward_pre_hook(add) for layer in layers]
        with torch.no_grad():
            for batch in batches:
                for sample in batch:
                    model(input_ids=sample[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for layer in layers:
            weight = layer.weight.detach().t() if isinstance(layer, Conv1D) else layer.weight.detach()
            scores = weight.abs().float() * sums[layer].sqrt()
            mask = mask_of(scores)
            found[names[layer]] = scores, mask
            weight.copy_(torch.where(mask, weight, 0))
    return found


def matrix(layer):
    return layer.weight.detach().t() if isinstance(layer, Conv1D) else layer.weight.detach()


def assert_masks_equal(model, expected, group):
    """At least 99.99 % of all bits, and every difference between scores that are as good as equal."""
    differing = total = 0
    for name, (scores, mask) in expected.items():
        wrong = (matrix(model.get_submodule(name)) != 0) != mask
        differing, total = differing + int(wrong.sum()), total + mask.numel()
        members = scores.shape[1] if group is None else group
        highest = torch.where(wrong, scores, 0).reshape(-1, members).amax(1)
        lowest = torch.where(wrong, scores, torch.inf).reshape(-1, members).amin(1)
        assert (highest <= lowest * (1 + 1e-4)).all(), name
    assert differing <= 1e-4 * total, (differing, total)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
def test_block_by_block_equals_a_whole_model_reference(architecture, structure, ids):
    model, twin = tiny(architecture), tiny(architecture)
    twin.load_state_dict(model.state_dict())
    nm = structure == "2:4"
    report = prune(model, ids, structure, sparsity=0.5, criterion=Wanda())
    expected = reference_prune(twin, ids, (lambda s: nm_mask(s, 2, 4)) if nm else (lambda s: row_mask(s, 0.5)))
    assert_masks_equal(model, expected, 4 if nm else None)
    assert report.sparsity == pytest.approx(0.5)
    assert not model.training


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_autocast_is_of_the_forwards_alone(architecture, ids):
    """Inputs come from forwards in bfloat16; norms, scores and weights stay in float32."""
    model, twin, plain = tiny(architecture), tiny(architecture), tiny(architecture)
    for each in (twin, plain):
        each.load_state_dict(model.state_dict())
    single = [sample for batch in ids for sample in batch.split(1)]  # products of other shapes may round differently
    prune(model, single, "2:4", autocast=torch.bfloat16)
    # weights change below, and autocast would keep casts of the old ones
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = reference_prune(twin, ids, lambda scores: nm_mask(scores, 2, 4))
    assert_masks_equal(model, expected, 4)
    prune(plain, single, "2:4")
    with pytest.raises(AssertionError):
        assert_masks_equal(plain, expected, 4)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_the_model_ends_with_true_zeros_and_its_own_keys(llama, ids):
    keys, modes = list(llama.state_dict()), [m.training for m in llama.modules()]
    assert llama.config.use_cache
    prune(llama, ids, mask_structure="2:4", criterion=Wanda())
    assert list(llama.state_dict()) == keys
    assert [m.training for m in llama.modules()] == modes
    assert llama.config.use_cache
    assert not any("forward" in m.__dict__ for m in llama.modules())
    for name, module in llama.named_modules():
        assert not isinstance(module, SparseLinear)
        if name.endswith("proj"):
            assert type(module) is nn.Linear
            assert ((module.weight.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert llama.lm_head.weight is llama.model.embed_tokens.weight


def test_batches_may_be_tensors_dicts_or_a_generator(ids):
    models = [tiny_llama() for _ in range(3)]
    prune(models[0], ids, "2:4")
    prune(models[1], [{"input_ids": batch, "attention_mask": torch.ones_like(batch), "labels": batch} for batch in ids])
    prune(models[2], (batch for batch in ids))
    for model in models[1:]:
        for a, b in zip(models[0].parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_padding_does_not_count(ids):
    short = [batch[:, :10] for batch in ids]
    padded = [
        {
            "input_ids": torch.cat([batch, torch.full((2, 6), 99)], 1),
            "attention_mask": torch.cat([torch.ones(2, 10), torch.zeros(2, 6)], 1).long(),
        }
        for batch in short
    ]
    a, b = tiny_llama(), tiny_llama()
    prune(a, short, "unstructured", sparsity=0.5)
    prune(b, padded, "unstructured", sparsity=0.5)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert ((p == 0) == (q == 0)).float().mean() > 0.999


def test_pruning_twice_equals_pruning_once(llama, ids):
    prune(llama, ids, "2:4")
    once = copy.deepcopy(llama.state_dict())
    prune(llama, ids, "2:4")
    assert all(torch.equal(value, once[key]) for key, value in llama.state_dict().items())


def test_the_order_of_batches_changes_nothing_but_near_ties(ids):
    a, b = tiny_llama(), tiny_llama()
    expected = reference_prune(tiny_llama().eval(), ids, lambda s: nm_mask(s, 2, 4))
    prune(a, ids, "2:4")
    prune(b, ids[::-1], "2:4")
    assert_masks_equal(a, expected, 4)
    assert_masks_equal(b, expected, 4)


def test_an_input_that_is_always_zero_is_pruned_first_and_never_an_error(ids):
    model = tiny_llama()
    model.model.layers[0].input_layernorm.weight.data[5] = 0
    prune(model, ids, "unstructured", sparsity=0.5)
    assert (model.model.layers[0].self_attn.q_proj.weight[:, 5] == 0).all()


def test_gpt2_trains_sparse_too(ids):
    model = tiny("gpt2")
    keys = list(model.state_dict())
    prune(model, ids, "2:4", squash=False)
    masked = sparse_layers(model)
    assert len(masked) == 12 and {type(layer).__name__ for layer in masked.values()} == {"SparseConv1D"}
    sparse_logits = model(input_ids=ids[0]).logits
    folded = {key: value.clone() for key, value in folded_state_dict(model).items()}
    updater = MaskUpdater(model, "2:4", update_freq=1, total_steps=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in ids:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.step()
    squash(model)
    assert list(model.state_dict()) == keys and not sparse_layers(model)
    for name in masked:
        assert type(model.get_submodule(name)) is Conv1D
        zeros = (matrix(model.get_submodule(name)).reshape(-1, 4) == 0).sum(1)
        assert (zeros == 2).all()
    twin = tiny("gpt2")
    twin.load_state_dict(folded)
    assert torch.allclose(twin(input_ids=ids[0]).logits, sparse_logits, atol=1e-5)


def test_magnitude_needs_no_data(llama):
    expected = {n: nm_mask(m.weight.detach().abs(), 2, 4) for n, m in llama.named_modules() if n.endswith("proj")}
    prune(llama, criterion=Magnitude())
    assert all(torch.equal(llama.get_submodule(n).weight != 0, mask) for n, mask in expected.items())


def test_model_wide_groups_share_one_threshold(llama, ids):
    prune(llama, ids, Unstructured("model"), sparsity=0.5, criterion=Magnitude())
    weights = [m.weight.detach() for n, m in llama.named_modules() if n.endswith("proj")]
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert zeros == int(sum(w.numel() for w in weights) * 0.5)
    assert len({int((w == 0).sum()) / w.numel() for w in weights}) > 1
    prune(tiny_llama(), ids, Unstructured("model"), sparsity=0.5)


def test_any_module_with_linear_layers():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    batches = [torch.randn(5, 8) for _ in range(3)]
    inputs = torch.cat(batches)
    expected = nm_mask(model[0].weight.detach().abs() * inputs.square().sum(0).sqrt(), 2, 4)
    prune(model, batches, "2:4")
    assert torch.equal(model[0].weight != 0, expected)
    assert (model[4].weight != 0).all()


def test_other_masks_stay_as_they_are(ids):
    model = tiny_llama()
    prune(model, criterion=Magnitude(), targets=["re:.*mlp.*"], squash=False)
    masked = set(sparse_layers(model))
    prune(model, ids, targets=["re:.*self_attn.*"])
    assert set(sparse_layers(model)) == masked and all("mlp" in name for name in masked)


def test_named_layers_outside_the_blocks_come_last(ids):
    model = tiny_llama(tie_word_embeddings=False)
    report = prune(model, ids, "2:4", targets=["Linear"])
    assert list(report.layers)[-1] == "lm_head"
    assert ((model.lm_head.weight.reshape(-1, 4) == 0).sum(1) == 2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, ids):
    model = tiny_llama().to(dtype)
    prune(model, ids, NM(2, 4))
    assert model.dtype == dtype
    assert ((model.model.layers[0].mlp.up_proj.weight.reshape(-1, 4) == 0).sum(1) == 2).all()


def test_keeping_the_training_state(llama, ids):
    before = copy.deepcopy(llama.state_dict())
    prune(llama, ids, "2:4", squash=False)
    assert len(sparse_layers(llama)) == 21
    assert all(torch.equal(llama.state_dict()[key], value) for key, value in before.items())  # shadow values
    assert all(layer.recorder is None for layer in sparse_layers(llama).values())
    prune(llama, ids, "2:4", criterion=SparseGPT(), squash=False)
    for layer in sparse_layers(llama).values():
        assert layer.calibration_norm["sum_squares"].dim() == 1  # and not the second moments, which are large
        assert int(layer.calibration_norm["tokens"]) == sum(map(torch.numel, ids))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, "needs calibration data: pass batches"),
        ([], "There is no calibration data"),
        (object(), "This has a object"),
        (["text"], "Calibration data is a list, .* This has a str"),
        ([torch.tensor([3, 4, 5])], r"has ids of shape \(3,\): one sample. Put a batch dimension in front"),
        (torch.tensor([3, 4]), r"has ids of shape \(\): one sample"),
        ([{"input_ids": torch.tensor([3, 4])}], r"has ids of shape \(2,\): one sample"),
        ("nan", "input activations are not finite"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(llama, ids, batches, message):
    if batches == "nan":
        batches = ids
        llama.model.layers[1].input_layernorm.weight.data[3] = torch.nan  # found in the second block
    before = copy.deepcopy(llama.state_dict())
    with pytest.raises(ValueError, match=message):
        prune(llama, batches, "2:4")
    for key, value in llama.state_dict().items():
        assert torch.equal(value.nan_to_num(7), before[key].nan_to_num(7)), key
    assert not sparse_layers(llama)
    assert not any("forward" in m.__dict__ for m in llama.modules())


def test_an_encoder_decoder_makes_its_decoders_inputs_of_the_labels(ids):
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))
    batches = [{"input_ids": each, "labels": each} for each in ids]
    report = prune(model, batches, "2:4", targets=["encoder.block", "decoder.block"])
    assert report.sparsity == 0.5
    assert any("EncDecAttention" in name for name in report.layers)


def test_a_layer_that_no_token_reaches_is_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.last(self.used(x))

    with pytest.raises(ValueError, match="unused is a target, but no token reached it"):
        prune(Model(), [torch.randn(2, 8)], "2:4")


def test_padding_that_cannot_be_told_apart_is_said(caplog, ids):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, attention_mask):
            return self.b(self.a(x.transpose(0, 1)))

    prune(Flat(), [{"x": torch.randn(2, 3, 8), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}], "2:4")
    assert "does not fit a layer's input of shape (3, 2, 8)" in caplog.text


@pytest.mark.parametrize("architecture", ["llama", "opt"])  # OPT flattens (B, L, I) to (B * L, I)
def test_padding_does_not_count_where_tokens_are_flattened(architecture, ids, caplog):
    a, b = tiny(architecture), tiny(architecture)
    b.load_state_dict(a.state_dict())
    cut = [batch[:, :10] for batch in ids]
    padded = [{"input_ids": batch, "attention_mask": (torch.arange(16) < 10).long().expand(2, 16)} for batch in ids]
    prune(a, cut, "unstructured", sparsity=0.5)
    prune(b, padded, "unstructured", sparsity=0.5)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert ((p == 0) == (q == 0)).float().mean() > 0.999
    assert "padding counts" not in caplog.text


@pytest.mark.parametrize("method", [Wanda(), SparseGPT(), IHT()])
@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
def test_twice_is_once_where_inputs_die(method, structure):
    for seed in range(3):
        torch.manual_seed(seed)
        model = tiny("opt")  # ReLU: what fc1 loses is an input of fc2 that never comes
        batch = [torch.randint(3, VOCABULARY, (1, 4))]
        prune(model, batch, structure, sparsity=0.5, criterion=method)
        once = copy.deepcopy(model.state_dict())
        prune(model, batch, structure, sparsity=0.5, criterion=method)
        assert all(torch.equal(value, once[key]) for key, value in model.state_dict().items()), seed


def test_a_failure_leaves_earlier_masks_and_no_new_ones(ids):
    model = tiny_llama()
    prune(model, ids, "2:4", targets=["model.layers.0"], squash=False)
    model.model.layers[2].input_layernorm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        prune(model, ids, "2:4")
    assert {name.split(".")[2] for name in sparse_layers(model)} == {"0"}
    assert not any(layer.is_dense() for layer in sparse_layers(model).values())


def test_one_layer_with_identical_statistics_is_identical():
    layer = nn.Sequential(nn.Linear(576, 64), nn.Linear(64, 2))
    x = torch.randn(100, 576)
    expected = row_mask(layer[0].weight.detach().abs() * x.square().sum(0).sqrt(), 0.5)
    prune(layer, [x], "unstructured", sparsity=0.5)
    assert torch.equal(layer[0].weight != 0, expected)


def test_masks_of_an_earlier_pruning_are_no_obstacle(llama, ids):
    twin = copy.deepcopy(llama)
    prune(llama, ids, "1:4", squash=False)
    prune(llama, ids, "2:4")  # from shadow values: as if the first had not been
    prune(twin, ids, "2:4")
    for p, q in zip(llama.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p == 0, q == 0)


def test_layers_without_a_weight_left_are_said(ids, caplog):
    model = tiny_llama()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight *= 1e-6
    prune(model, ids, Unstructured("model"), 0.4, criterion=Magnitude())
    assert "All weights of 3 layers, such as model.layers.0.mlp.down_proj, are zero" in caplog.text


def test_a_progress_bar_changes_nothing_and_is_for_terminals(ids, capsys):
    shown, plain = tiny_llama(), tiny_llama()
    prune(shown, ids, "unstructured", 0.6, distribution=OWL(owl_m=2.0), progress=True)
    prune(plain, ids, "unstructured", 0.6, distribution=OWL(owl_m=2.0))
    assert all(map(torch.equal, shown.parameters(), plain.parameters()))
    assert capsys.readouterr().err == ""


class _Tiny(SparseGPT):
    def solve(self, weight_OI, gram_II, pattern, sparsity):
        weight_OI, mask_OI = super().solve(weight_OI, gram_II, pattern, sparsity)
        weight_OI[0] = 1e-9
        return weight_OI, mask_OI


def test_zeros_are_counted_on_the_weights_as_stored(ids):
    model = tiny_llama().half()  # in which 1e-9 is zero
    report = prune(model, ids, criterion=_Tiny())
    for name, layer in report.layers.items():
        assert layer.zeros == (model.get_submodule(name).weight == 0).sum(), name
