import copy
import logging
import pickle
import re

import pytest
import torch
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)

from sparse_train import prune
from sparse_train.architecture import block_lists, read_directly
from sparse_train.layers.sparsify import sparsify, squash
from sparse_train.layers.targets import find_targets
from sparse_train.patterns import NM, Unstructured
from tests.conftest import VOCABULARY, tiny_llama

PATTERN = NM(2, 4)


def names(model, **arguments):
    return list(find_targets(model, arguments.pop("pattern", PATTERN), **arguments).layers)


def test_default_is_the_linear_layers_of_the_decoder_blocks(llama):
    chosen = names(llama)
    assert len(chosen) == 3 * 7
    assert all(name.startswith("model.layers.") and name.endswith("proj") for name in chosen)
    assert list(block_lists(llama)) == ["model.layers"]


def test_default_without_blocks_leaves_out_the_last_the_tied_and_what_does_not_fit(caplog):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    with caplog.at_level(logging.WARNING):
        assert names(model) == ["1", "2"]
    assert "0 stays dense: 2:4 needs in_features divisible by 4, but 0 has 6" in caplog.text
    model[2].weight = model[1].weight
    assert names(model, pattern=Unstructured()) == ["0"]


def test_names_classes_and_expressions(llama):
    assert names(llama, targets=["re:.*layers\\.[01]\\..*q_proj"]) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert names(llama, targets=["model.layers.2.mlp.up_proj"]) == ["model.layers.2.mlp.up_proj"]
    assert len(names(llama, targets=["LlamaMLP"])) == 9
    assert len(names(llama, targets=["model.layers.0"])) == 7
    assert len(names(llama, ignore=["re:.*down_proj", "model.layers.0"])) == 2 * 6
    assert names(llama, targets=["q_proj"]) == [f"model.layers.{block}.self_attn.q_proj" for block in range(3)]
    assert len(names(llama, targets=["self_attn", "mlp.up_proj"], ignore=["layers.1"])) == 2 * 5
    assert len(names(llama, targets=["Linear"], ignore=["lm_head"])) == 21


def test_a_teacher_is_only_named_with_a_warning(llama, caplog):
    pair = nn.ModuleDict({"model": llama.model, "teacher": tiny_llama()})
    assert len(names(pair, targets=["q_proj"])) == 6
    assert len(names(pair, targets=["model.layers"])) == 21  # a whole name is no part of another
    pair.teacher.requires_grad_(False)
    assert len(names(pair, targets=["model.layers"])) == 21 and not caplog.text
    assert len(names(pair, targets=["teacher.model.layers"])) == 21 and not caplog.text
    assert len(names(pair, targets=["q_proj"], ignore=["teacher"])) == 3 and not caplog.text
    for given in (["q_proj"], ["re:.*q_proj"]):
        caplog.clear()
        assert len(names(pair, targets=given)) == 6
        assert "3 of the layers that targets names, such as teacher.model.layers.0" in caplog.text
        assert "ignore=['teacher'] leaves them out" in caplog.text
    names(nn.ModuleDict({"model": pair}), targets=["q_proj"])
    assert "ignore=['model.teacher'] leaves them out" in caplog.text
    names(nn.ModuleDict({"model": pair.teacher, "student": llama}), targets=["q_proj"])
    assert "ignore=['model'] leaves them out" in caplog.text


def test_a_last_name_is_all_layers_of_that_name_as_in_peft():
    model = nn.Sequential()
    model.fc, model.out, model.blocks = nn.Linear(8, 8), nn.Linear(8, 8), nn.ModuleList([nn.Sequential()])
    model.blocks[0].fc, model.blocks[0].out = nn.Linear(8, 8), nn.Linear(8, 8)
    assert names(model, targets=["fc"]) == ["fc", "blocks.0.fc"]
    assert names(model, targets=["blocks.0.fc"]) == ["blocks.0.fc"]
    assert names(model, targets=["Linear"], ignore=["out"]) == ["fc", "blocks.0.fc"]
    assert names(nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))), targets=["0"]) == ["0"]


def test_an_expression_is_for_names_of_layers_alone(llama):
    """Or what excludes a layer would match the module around it, and take the layer, too."""
    kept = r"re:model\.layers\.(?!0\.)"
    assert len(names(llama, targets=[kept])) == 2 * 7 and len(names(llama, ignore=[kept])) == 7
    assert len(names(llama, targets=["re:.*layers.*(?<!down_proj)$"])) == 3 * 6
    for argument in ("targets", "ignore"):
        with pytest.raises(ValueError, match=r"mlp\$' matches no layer of LlamaForCausalLM.* Did you mean 'mlp'"):
            names(llama, **{argument: ["re:.*mlp$"]})


def test_a_module_under_two_names_shares_nothing(llama):
    root = nn.Module()
    root.net, root.backbone, root.blocks = llama, llama.model, llama.model.layers
    assert len(names(root)) == 21
    first = nn.Module()
    first.probe, first.net = llama.model.layers[0], llama  # a name outside of the blocks, ahead of theirs
    assert len(names(first)) == 21 and "probe.mlp.up_proj" in names(first)
    aliased = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    aliased.encoder = aliased[0]
    assert names(aliased) == ["0", "1"]


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"targets": ["query_proj"]}, "q_proj"),
        ({"targets": ["*q_proj"]}, "q_proj"),
        ({"targets": ["proj"]}, ""),
        ({"ignore": ["re:.*donw_proj$"]}, "down_proj"),
    ],
)
def test_a_mistyped_part_of_a_name_is_told_what_it_may_have_meant(llama, arguments, kind):
    with pytest.raises(ValueError, match=f"Did you mean .*'{kind}"):
        names(llama, **arguments)


def test_where_nothing_is_left_no_layer_is_offered_that_was_left_out(llama):
    with pytest.raises(ValueError, match=r"before it has run\.$"):
        names(llama, ignore=["re:.*"])


def test_where_nothing_is_left_a_layer_is_offered_that_the_pattern_fits():
    with pytest.raises(ValueError, match=r"targets=\['1'\]"):  # 1 is the last one, and 0 has 6 inputs
        names(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)))
    with pytest.raises(ValueError, match=r"before it has run\.$"):
        names(nn.Sequential(nn.Linear(6, 8), nn.Linear(6, 2)))


class MyAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)


def test_attention_of_torch_stays_dense(caplog):
    assert names(MyAttention()) == ["a"]
    assert "2 weights cannot be masked and stay dense" in caplog.text
    assert "attention.in_proj_weight, attention.out_proj.weight" in caplog.text


@pytest.mark.parametrize("given", ["", "layers"])  # the encoder, or its blocks alone
def test_encoder_layers_of_torch_compute_with_their_masks_in_eval_mode_too(given):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    by_hand, x = copy.deepcopy(model), torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[3], [5], [4]])
    chosen = find_targets(model, PATTERN).layers
    assert list(chosen) == [f"layers.{block}.linear{number}" for block in (0, 1) for number in (1, 2)]
    sparsify(model.get_submodule(given), chosen.values())
    for name, masked in chosen.items():
        mask_OI = torch.rand(masked.out_features, masked.in_features) < 0.5
        masked.set_mask(mask_OI)
        by_hand.get_submodule(name).weight.data *= mask_OI

    def check(module):
        for training in (True, False):
            for of_batch in (None, padding):
                with torch.no_grad():
                    found = module.train(training)(x, src_key_padding_mask=of_batch)
                    expected = by_hand.train(training)(x, src_key_padding_mask=of_batch)
                torch.testing.assert_close(found[~padding], expected[~padding])

    check(model)
    check(pickle.loads(pickle.dumps(model)))
    assert torch.backends.mha.get_fastpath_enabled()  # other models of the process keep it
    squash(model.get_submodule(given))
    for module, own in zip(model.modules(), by_hand.modules(), strict=True):
        for condition in ("activation_relu_or_gelu", "use_nested_tensor"):
            assert getattr(module, condition, None) == getattr(own, condition, None)


def overridden():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].forward = lambda x: x
    return model


def tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight = model[1].weight
    return model


class Quantized(nn.Linear):
    def forward(self, x):
        return super().forward(x).round()


class FalconLinear(nn.Linear):  # the name of a class of transformers, and nothing else of it
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (overridden(), {}, "forward overridden on the instance .accelerate"),
        (tied(), {"targets": ["0"]}, "shares its weight with another module"),
        (nn.Sequential(Quantized(8, 8), nn.Linear(8, 8)), {}, "a Quantized, a subclass of nn.Linear"),
        (nn.Sequential(FalconLinear(8, 8), nn.Linear(8, 8)), {}, "a FalconLinear, a subclass of nn.Linear"),
        (MyAttention(), {"targets": ["Linear"]}, "inside a MultiheadAttention, which reads the weight itself"),
        (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8)), {"targets": ["0"]}, "divisible by 4, but 0 has 6"),
        (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), {"targets": ["0"]}, "0 is a LayerNorm; only nn.Linear"),
        (nn.Sequential(nn.Linear(8, 8)), {}, "Nothing to prune: no linear layer was targeted"),
        (nn.Sequential(nn.ReLU()), {}, "built in configure_model does not exist"),
        (tiny_llama(), {"targets": ["model.layers.0.mlp.up_prj"]}, "Did you mean 'model.layers.0.mlp.up_proj'"),
        (tiny_llama(), {"ignore": ["lm_hed"]}, "ignore: 'lm_hed' matches no layer"),
        (tiny_llama(), {"targets": ["re:.*("]}, "not a regular expression"),
        (tiny_llama(), {"targets": "Linear"}, "write .'Linear'."),
        (
            tiny_llama(intermediate_size=30),
            {},
            r"by 4.*ignore=.'down_proj'.",
        ),
        (tiny_llama(), {"targets": ["lm_head"]}, "shares its weight"),
    ],
)
def test_what_cannot_be_masked_is_an_error_with_a_way_out(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        find_targets(model, PATTERN, **arguments)


def test_block_weights_out_of_reach_are_listed_with_their_share(caplog):
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)
    assert len(find_targets(GPT2LMHeadModel(config), PATTERN).layers) == 8  # Conv1D layers are targets
    assert "cannot be masked" not in caplog.text

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(4, 8, 8))
            self.linear = nn.Linear(8, 8)

    model = nn.Module()
    model.layers = nn.ModuleList([Mixed(), Mixed()])
    with caplog.at_level(logging.WARNING):
        selection = find_targets(model, PATTERN)
    assert list(selection.layers) == ["layers.0.linear", "layers.1.linear"]
    assert "2 weights cannot be masked and stay dense (78.0 % of" in caplog.text


class Pair(nn.Module):
    def __init__(self, *models):
        super().__init__()
        self.student, self.teacher = models


def test_beside_a_model_in_training_a_frozen_one_is_its_teacher():
    pair = Pair(tiny_llama(num_hidden_layers=2), tiny_llama(num_hidden_layers=4).requires_grad_(False))
    chosen = names(pair)
    assert len(chosen) == 14
    assert all(name.startswith("student.") for name in chosen)
    assert len(names(tiny_llama().requires_grad_(False))) == 21


def mlp():
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)


def with_blocks():
    model = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(3))
    return model


@pytest.mark.parametrize("teacher", [mlp, with_blocks, tiny_llama])
@pytest.mark.parametrize("teacher_first", [True, False])
def test_a_frozen_teacher_is_left_alone_by_a_student_without_blocks(teacher, teacher_first):
    pair = nn.Module()
    if teacher_first:
        pair.teacher = teacher().requires_grad_(False)
    pair.student = mlp()
    pair.teacher = teacher().requires_grad_(False)
    assert names(pair) == ["student.0", "student.1", "student.2"]
    chosen = names(pair.requires_grad_(False))  # as always, where nothing is trained
    assert any(name.startswith("teacher.") for name in chosen)


def test_frozen_layers_are_no_targets_of_ones_own_accord_and_the_error_says_why():
    model = nn.Module()
    model.backbone, model.head = with_blocks().requires_grad_(False), nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"7 nn.Linear in Module, 6 of them frozen.* targets=\['head'\]"):
        find_targets(model, PATTERN)
    assert len(names(model, targets=["backbone"])) == 6
    assert names(nn.Sequential(nn.Linear(8, 8).requires_grad_(False), *mlp())) == ["1", "2", "3"]


def test_adapters_train_a_model_of_which_most_is_frozen():
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(mlp(), LoraConfig(r=4, target_modules=["0", "1"]))
    chosen = ["base_model.model.0.base_layer", "base_model.model.1.base_layer", "base_model.model.2"]
    assert names(student) == chosen
    for teacher in (mlp(), with_blocks()):
        pair = Pair(student, teacher.requires_grad_(False))
        assert names(pair) == [f"student.{name}" for name in chosen]


def test_two_models_in_training_are_no_guessing_matter():
    pair = Pair(tiny_llama(num_hidden_layers=2), tiny_llama(num_hidden_layers=4))
    with pytest.raises(ValueError, match=r"several lists of blocks \(teacher.model.layers, student.model.layers\)"):
        find_targets(pair, PATTERN)
    assert len(names(pair, targets=["student.model.layers"])) == 14


def test_a_weight_that_is_computed_or_tied_under_another_name():
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"subclass|is computed .weight_norm"):
        find_targets(normed, PATTERN, targets=["0"])
    old = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    old[0].weight_v = old[0]._parameters.pop("weight")
    with pytest.raises(ValueError, match="is computed"):
        find_targets(old, PATTERN, targets=["0"])
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model.w = model[0].weight
    assert names(model) == ["1"]


def test_peft_adapters_are_never_targets(llama):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    chosen = names(model)
    assert len(chosen) == 21
    assert not any("lora" in name for name in chosen)
    assert sum(name.endswith("q_proj.base_layer") for name in chosen) == 3
    assert len(names(model, targets=["re:.*q_proj.*"])) == 3
    assert len(names(model, targets=["re:.*_proj$"])) == 21
    assert not any("q_proj" in name for name in names(model, targets=["re:.*layers.*(?<!q_proj)$"]))
    adapter = next(n for n, m in model.named_modules() if "lora_A" in n and isinstance(m, nn.Linear))
    with pytest.raises(ValueError, match="belongs to a peft adapter"):
        find_targets(model, PATTERN, targets=[adapter])


def test_the_name_that_an_error_offers_leaves_out_what_does_not_fit_and_no_more():
    model = tiny_llama(intermediate_size=30)
    with pytest.raises(ValueError, match="needs in_features divisible by 4") as error:
        find_targets(model, PATTERN)
    chosen = names(model, ignore=[re.search(r"ignore=\['(.*)'\]\.$", str(error.value))[1]])
    assert len(chosen) == 3 * 6
    assert not any(name.endswith("down_proj") for name in chosen)


class TopKGating(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = TopKGating()
        self.router = nn.Linear(8, 4)
        self.shared_expert_gate = nn.Linear(8, 1)
        self.gate_proj = nn.Linear(8, 8)


class OwnMixture(nn.Module):
    """Its router is a linear layer with a name that others also use."""

    def __init__(self, experts=True):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        if experts:
            self.experts = nn.ModuleList([nn.Linear(8, 8)])


def test_a_gate_beside_experts_is_a_router():
    model = nn.Module()
    model.layers = nn.ModuleList([OwnMixture(), OwnMixture(experts=False)])
    assert names(model) == ["layers.0.experts.0", "layers.1.gate"]


def test_routers_and_gates_of_experts_stay_dense_unless_they_are_named():
    model = nn.Module()
    model.layers = nn.ModuleList([Mixture(), Mixture()])
    assert names(model) == ["layers.0.gate_proj", "layers.1.gate_proj"]
    assert len(names(model, targets=["Linear"])) == 8
    with pytest.raises(ValueError, match="Did you mean 'router'"):
        names(model, targets=["re:.*ruoter$"])


class SwiGLUGate(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.projection = nn.Linear(8, outputs)


class Gated(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.gate = SwiGLUGate(outputs)
        self.down = nn.Linear(8, 8)


@pytest.mark.parametrize(("outputs", "chosen"), [(32, ["gate.projection", "down"]), (4, ["down"])])
def test_a_gate_that_is_no_router_is_a_target_or_is_named(outputs, chosen, caplog):
    model = nn.Module()
    model.layers = nn.ModuleList([Gated(outputs)])
    assert names(model) == [f"layers.0.{name}" for name in chosen]
    assert ("layers.0.gate.projection, are taken for routers" in caplog.text) == (outputs == 4)


def test_falcons_linear_layers_are_linear_layers(ids):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    model = FalconForCausalLM(FalconConfig(**sizes))
    dense = model(input_ids=ids[0]).logits
    sparsify(model, find_targets(model, PATTERN).layers.values())
    torch.testing.assert_close(model(input_ids=ids[0]).logits, dense)
    assert prune(model, ids, "2:4").sparsity == 0.5


def test_an_expression_that_leaves_out_what_is_never_pruned_is_no_mistake(llama):
    assert names(llama, ignore=["re:.*lm_head", "re:.*embed_tokens"]) == names(llama)
    with pytest.raises(ValueError, match="embed_tokens is a Embedding; only nn.Linear layers can be masked. Take"):
        find_targets(llama, PATTERN, targets=["re:.*embed_tokens"])
    with pytest.raises(ValueError, match="'re:.*emded_tokens' matches no layer"):
        find_targets(llama, PATTERN, ignore=["re:.*emded_tokens"])


class Mixer(nn.Module):
    """As in Mamba: in training, a kernel gets the weight of the last projection."""

    def __init__(self):
        super().__init__()
        self.in_proj, self.out_proj, self.A_log = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.zeros(8, 2))

    def forward(self, x):
        x = self.in_proj(x)
        return x @ self.out_proj.weight.t() if self.training else self.out_proj(x)


class DeltaNet(Mixer):
    """As in Qwen3-Next: all of them are called."""

    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.gate_proj(self.in_proj(x))


def test_of_mixers_only_weights_that_they_read_stay_dense():
    model = nn.ModuleDict({"layers": nn.ModuleList([Mixer(), DeltaNet()])})
    assert names(model) == ["layers.0.in_proj", "layers.1.in_proj", "layers.1.gate_proj"]  # DeltaNet is a Mixer
    unknown = type("Unknown", (nn.Module,), {})()  # its code is in no file
    unknown.proj, unknown.A_log = nn.Linear(8, 8), nn.Parameter(torch.zeros(8, 2))
    assert read_directly(nn.Sequential(unknown)) == {"0.proj"}


def test_weights_that_kernels_of_a_mamba_block_read_stay_dense(caplog):
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=16)
    model = MambaForCausalLM(config)
    report = prune(model, list(torch.randint(3, 128, (2, 2, 16))), "unstructured", 0.5)
    assert {name.rpartition(".")[2] for name in report.layers} == {"in_proj"}
    assert "stay dense" in caplog.text and "as left by one-shot pruning" not in caplog.text
