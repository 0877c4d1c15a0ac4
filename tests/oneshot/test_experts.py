import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_train import Magnitude, prune
from sparse_train.layers.targets import find_targets
from sparse_train.oneshot import experts
from sparse_train.patterns import NM
from tests.conftest import VOCABULARY
from tests.reference import nm_mask, row_mask

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "head_dim": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2},
}


def tiny_moe(family):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SMALL | FAMILIES[family])))
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.3)
        elif "bias" in name:
            nn.init.zeros_(parameter)
    return model.eval()


def reference_prune(model, batches, mask_of):
    """Per-sample forwards of the whole model; each expert's inputs are made again from what its module was given."""
    for block in model.model.layers:
        sums, handles = {}, []

        def add(key, x, sums=sums):
            sums[key] = sums.get(key, 0) + x.float().square().sum(0)

        for module in block.modules():
            if isinstance(module, nn.Linear) and module.out_features > 1:  # no gate of a shared expert
                handles.append(
                    module.register_forward_pre_hook(lambda m, a, f=add: f(m, a[0].reshape(-1, m.in_features)))
                )
            if hasattr(module, "gate_up_proj") and module.gate_up_proj.dim() == 3:
                handles.append(module.register_forward_pre_hook(lambda m, a, f=add: watch_experts(m, a[0], a[1], f)))
        with torch.no_grad():
            for batch in batches:
                for sample in batch:
                    model(input_ids=sample[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for key, total in sums.items():
            if isinstance(key, nn.Linear):
                key.weight.data *= mask_of(key.weight.data.abs() * total.sqrt())
            else:
                parameter, expert, transposed = key
                weight = parameter.data[expert].t() if transposed else parameter.data[expert]
                weight.mul_(mask_of(weight.abs() * total.sqrt()))


def watch_experts(module, x, chosen, add):
    x = x.reshape(-1, x.shape[-1])
    for expert in range(len(module.gate_up_proj)):
        own = x[(chosen.reshape(len(x), -1) == expert).any(-1)]
        add((module.gate_up_proj, expert, module.is_transposed), own)
        if module.is_transposed:
            up = own @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
            inner = module._apply_gate(up)
        else:
            gate, up = F.linear(own, module.gate_up_proj[expert]).chunk(2, dim=-1)
            inner = module.act_fn(gate) * up
        add((module.down_proj, expert, module.is_transposed), inner)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
def test_fused_experts_equal_a_whole_model_reference(family, structure, ids, monkeypatch):
    monkeypatch.setattr(experts, "FEW_TOKENS", 1)
    model, expected = tiny_moe(family), tiny_moe(family)
    expected.load_state_dict(model.state_dict())
    report = prune(model, ids, structure, sparsity=0.5)
    reference_prune(expected, ids, (lambda s: nm_mask(s, 2, 4)) if structure == "2:4" else (lambda s: row_mask(s, 0.5)))
    differing = total = 0
    for (_, a), (_, b) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        differing, total = differing + int(((a == 0) != (b == 0)).sum()), total + a.numel()
    assert differing <= 1e-4 * total
    assert report.sparsity == pytest.approx(0.5)
    pruned = {name: p for name, p in model.named_parameters() if p.dim() > 1 and bool((p == 0).any())}
    assert sum(int((p == 0).sum()) for p in pruned.values()) / sum(map(torch.numel, pruned.values())) == 0.5
    assert any("down_proj" in name and "experts" in name for name in pruned)


def test_experts_that_saw_few_tokens_fall_back_and_it_is_said(ids, monkeypatch, caplog):
    monkeypatch.setattr(experts, "FEW_TOKENS", 10**6)
    model = tiny_moe("mixtral")
    weight = model.model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    prune(model, ids, "2:4")
    assert "16 of 16 expert matrices saw fewer than 1000000 calibration tokens" not in caplog.text  # per block: 8
    assert "8 of 8 expert matrices saw fewer than 1000000 calibration tokens" in caplog.text
    for expert in range(4):
        kept = model.model.layers[0].mlp.experts.gate_up_proj[expert] != 0
        assert torch.equal(kept, nm_mask(weight[expert].abs(), 2, 4))  # magnitude: all inputs count the same


def test_an_expert_without_a_token_is_pruned_by_the_fallback(ids):
    model = tiny_moe("mixtral")
    model.model.layers[0].mlp.gate.weight.data[3] = -1e4 * model.model.layers[0].mlp.gate.weight.data[0].abs()
    prune(model, ids[:1], "2:4")
    zeros = (model.model.layers[0].mlp.experts.down_proj[3].reshape(-1, 4) == 0).sum(1)
    assert (zeros == 2).all()


def test_a_failure_brings_experts_back(ids):
    model = tiny_moe("mixtral")
    model.model.layers[1].input_layernorm.weight.data[3] = torch.nan
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="not finite"):
        prune(model, ids, "2:4")
    assert all(torch.equal(v.nan_to_num(7), before[k].nan_to_num(7)) for k, v in model.state_dict().items())


def test_experts_can_be_named_ignored_and_are_left_to_training(ids, caplog):
    model = tiny_moe("mixtral")
    names = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
    assert list(find_targets(model, NM(2, 4), names, experts=True).experts) == names
    assert list(find_targets(model, NM(2, 4), ["re:.*layers.0.*experts"], experts=True).experts) == names
    assert names[1] not in find_targets(model, NM(2, 4), ignore=[names[1]], experts=True).experts
    assert not find_targets(model, NM(2, 4)).experts
    assert "4 weights cannot be masked and stay dense" in caplog.text
    prune(model, ids, "2:4")
    caplog.clear()
    find_targets(model, NM(2, 4))
    assert "experts.gate_up_proj has zeros, as left by one-shot pruning" in caplog.text


def test_experts_alone_are_pruned_block_by_block(ids):
    """The second block's experts see what the pruned experts of the first one give."""
    alone, given = tiny_moe("mixtral"), tiny_moe("mixtral")
    given.load_state_dict(alone.state_dict())
    prune(alone, ids, "2:4", ignore=["re:.*self_attn"])
    first, second = (f"model.layers.{i}.mlp.experts" for i in (0, 1))
    prune(given, ids, "2:4", targets=[f"re:{first}"])
    prune(given, ids, "2:4", targets=[f"re:{second}"])
    for (name, a), (_, b) in zip(alone.named_parameters(), given.named_parameters(), strict=True):
        assert torch.equal(a == 0, b == 0), name
    assert (alone.get_parameter(f"{second}.down_proj") == 0).any()


def test_linear_as_a_class_means_experts_too_and_other_parameters_never(ids):
    model = tiny_moe("mixtral")
    assert len(find_targets(model, NM(2, 4), ["Linear"], ["lm_head"], experts=True).experts) == 4
    model.model.layers[0].self_attn.bias_table = nn.Parameter(torch.randn(4, 8, 8))
    before = model.model.layers[0].self_attn.bias_table.detach().clone()
    prune(model, None, "2:4", criterion=Magnitude())
    assert torch.equal(model.model.layers[0].self_attn.bias_table, before)


def test_padding_that_reaches_experts_is_said(ids, caplog):
    padded = [{"input_ids": batch, "attention_mask": (torch.arange(16) < 10).long().expand(2, 16)} for batch in ids]
    prune(tiny_moe("mixtral"), padded, "2:4")
    assert "tokens that are routed to experts" in caplog.text and "without padding" in caplog.text


class DenseExperts(nn.Module):
    """All experts at once, in one product; rows of zeros where a token goes elsewhere (as Llama 4 does)."""

    def __init__(self):
        super().__init__()
        self.is_transposed = True
        self.weight = nn.Parameter(torch.randn(3, 8, 16))

    def forward(self, x):
        route = torch.zeros(3, len(x), 1)
        route[0, ::2], route[1, 1::2] = 1, 1  # the third expert sees nothing
        return torch.bmm(x * route, self.weight).sum(0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.experts, self.down = nn.Linear(8, 8), DenseExperts(), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.experts(self.up(x)))


def test_experts_in_one_product_count_their_own_tokens(caplog):
    model = nn.Module()
    model.layers = nn.ModuleList([Block()])
    model.forward = lambda x: model.layers[0](x)
    weight = model.layers[0].experts.weight.detach().clone()
    prune(model, [torch.randn(100, 8)], "2:4")
    zeros = (model.layers[0].experts.weight.mT.reshape(-1, 4) == 0).sum(1)
    assert (zeros == 2).all()  # along the inputs
    assert "1 of 3 expert matrices" in caplog.text
    kept = model.layers[0].experts.weight[2].t() != 0
    assert torch.equal(kept, nm_mask(weight[2].t().abs(), 2, 4))
