"""Asymmetric calibration against the long way: both models run whole, with hooks, for each group of layers."""

import copy
import re

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

from sparse_train import IHT, NM, prune
from sparse_train.oneshot import asymmetric, walk
from sparse_train.oneshot.prune import prune_checkpoint
from sparse_train.patterns import Unstructured
from tests import reference
from tests.conftest import VOCABULARY, tiny_llama
from tests.oneshot.test_disk import assert_equal, save
from tests.oneshot.test_experts import tiny_moe
from tests.oneshot.test_prune import tiny

# dampened, since a tiny model has few samples for its inputs
SOLVER = IHT(dampening_frac=0.1, iterations=100, asymmetric=True)
STAGES = [
    (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], None),
    (["self_attn.o_proj"], "input_layernorm"),
    (["mlp.gate_proj", "mlp.up_proj"], None),
    (["mlp.down_proj"], "post_attention_layernorm"),
]


def inputs_of(model, module, batches):
    """What a module reads, over all tokens, float64 (T, I)."""
    found = []
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(found)


def the_long_way(model, batches, pattern):
    """A Llama, pruned in place: its layers are fitted, stage after stage, to the outputs of a copy of it."""
    dense = copy.deepcopy(model)
    for block, original in zip(model.model.layers, dense.model.layers, strict=True):
        for names, norm in STAGES:
            for name in names:
                layer, weight = block.get_submodule(name), original.get_submodule(name).weight.detach()
                x = inputs_of(model, layer, batches)
                wanted = inputs_of(dense, original.get_submodule(name), batches) @ weight.double().T
                if norm is not None:
                    streams = ((model, block.get_submodule(norm)), (dense, original.get_submodule(norm)))
                    pruned_stream, dense_stream = (inputs_of(*each, batches) for each in streams)
                    wanted += dense_stream - pruned_stream
                hessian = reference.dampened(x, 0.1)
                damping = hessian - x.T @ x
                target = torch.linalg.solve(hessian, (wanted.T @ x + weight.double() @ damping).T).T
                solved, mask = SOLVER.solve(target.float(), (x.T @ x).float(), pattern, pattern.sparsity)
                layer.weight.data.copy_(torch.where(mask, solved, 0))


def error(model, dense, batches):
    """Of the logits, as a share of their squares."""
    with torch.no_grad():
        wrong = sum(float((model(batch).logits - dense(batch).logits).square().sum()) for batch in batches)
        return wrong / sum(float(dense(batch).logits.square().sum()) for batch in batches)


@pytest.fixture
def many():
    """Eight batches of token ids (4, 32)."""
    return list(torch.randint(3, 128, (8, 4, 32)))


def test_a_pruned_llama_equals_one_that_was_pruned_the_long_way(many):
    model = tiny("llama")
    expected = copy.deepcopy(model)
    prune(model, many, "2:4", criterion=SOLVER)
    the_long_way(expected, many, NM(2, 4))
    own, others = model.state_dict(), expected.state_dict()
    differing = sum(int(((own[name] == 0) != (others[name] == 0)).sum()) for name in own)
    assert differing < 0.002 * sum(each.numel() for each in own.values())  # near-ties
    for name in own:
        assert (own[name] - others[name]).norm() < 0.05 * others[name].norm(), name


def test_target_weights_equal_a_float64_solution():
    weight, inputs, missing = torch.randn(24, 64), torch.randn(300, 64), torch.randn(300, 24)
    gram = asymmetric.AsymmetricGram(24, 64)
    gram.add(inputs)
    gram.missing_OI += missing.T @ inputs
    found = gram.target(weight, 0.1)
    hessian = reference.dampened(inputs, 0.1)
    wanted = inputs.double() @ weight.double().T + missing.double()
    towards = weight.double() @ (hessian - inputs.double().T @ inputs.double())
    expected = torch.linalg.solve(hessian, (wanted.T @ inputs.double() + towards).T).T
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


HEADS = {"ffn_dim": 64, "attention_heads": 4}
WRITERS = {
    "llama": {"self_attn.o_proj", "mlp.down_proj"},
    "qwen3": {"self_attn.o_proj", "mlp.down_proj"},
    "opt": {"self_attn.out_proj", "fc2"},
    "gpt2": {"attn.c_proj", "mlp.c_proj"},
    "bloom": {"self_attention.dense", "mlp.dense_4h_to_h"},
    "gemma2": set(),  # its norms lie between these layers and the stream
    "gpt_neox": set(),  # attention and MLP are added together
}


@pytest.fixture
def writers(monkeypatch):
    """Names, without block numbers, of the layers that were seen to write to the residual stream."""
    found, real = set(), asymmetric._stages

    def seen(*args):
        stages = real(*args)
        found.update(
            re.split(r"\.\d+\.", name)[1]
            for each in stages
            for name in each.layers
            if each.layers[name] in each.stream_at
        )
        return stages

    monkeypatch.setattr(asymmetric, "_stages", seen)
    return found


@pytest.mark.parametrize("family", WRITERS)
def test_outputs_are_closer_to_the_dense_ones_and_layers_that_write_to_the_stream_are_seen(
    family, many, writers, caplog
):
    dense = tiny(family)
    model, other = copy.deepcopy(dense), copy.deepcopy(dense)
    prune(model, many, "2:4", criterion=SOLVER)
    prune(other, many, "2:4", criterion=IHT(dampening_frac=0.1, iterations=100))
    assert error(model, dense, many) < 0.95 * error(other, dense, many)
    assert writers == WRITERS[family]
    assert ("only in part" in caplog.text) == (not writers)


def test_layers_that_stay_dense_may_write_to_the_stream_between_those_that_are_pruned(many, writers):
    prune(tiny("llama"), many, "2:4", criterion=SOLVER, ignore=["lm_head", "o_proj"])
    assert writers == {"mlp.down_proj"}


@pytest.mark.parametrize("block", [0, 1])
def test_blocks_without_targets_stay_dense(block, many):
    model = tiny("llama")
    before = copy.deepcopy(model)
    prune(model, many, "2:4", criterion=SOLVER, targets=[f"model.layers.{block}"])
    for number, (own, other) in enumerate(zip(model.model.layers, before.model.layers, strict=True)):
        for name, weight in own.named_parameters():
            changes = number == block and "proj" in name
            assert torch.equal(weight, other.get_parameter(name)) != changes, name


def test_padding_does_not_count(many):
    model = tiny("llama")
    padded = copy.deepcopy(model)
    prune(model, many, Unstructured("row"), 0.5, criterion=SOLVER)
    filler = torch.randint(3, 128, (4, 7))
    masks = torch.cat([torch.ones(4, 32), torch.zeros(4, 7)], 1).long()
    batches = [{"input_ids": torch.cat([batch, filler], 1), "attention_mask": masks} for batch in many]
    prune(padded, batches, Unstructured("row"), 0.5, criterion=SOLVER)
    for (name, a), b in zip(model.state_dict().items(), padded.state_dict().values(), strict=True):
        assert (a - b).norm() < 0.05 * a.norm(), name


def test_padding_of_another_text_is_not_taken_for_that_of_a_decoder(ids, caplog):
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "vocab_size": VOCABULARY, "dropout": 0.0}
    heads = {f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in HEADS.items()}
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads)).eval()
    masks = torch.ones(2, 16).long()
    masks[:, 8:] = 0  # of the encoder's text
    batches = [{"input_ids": each, "attention_mask": masks, "decoder_input_ids": each} for each in ids]
    how = {"mask_structure": "2:4", "targets": ["re:.*decoder.layers.*fc"]}
    prune(model, batches, criterion=SOLVER, **how)
    assert "attention_mask does not fit" in caplog.text


def test_a_killed_run_from_disk_goes_on_and_equals_one_in_memory(tmp_path, ids, monkeypatch):
    model = tiny_llama(num_hidden_layers=4)
    save(model, tmp_path / "dense")
    real, calls = walk._prune_layers, []

    def killed(layers, *args):
        calls.append(next(iter(layers)))
        if calls[-1] == "model.layers.2.mlp.gate_proj":
            raise KeyboardInterrupt
        return real(layers, *args)

    arguments = (tmp_path / "dense", tmp_path / "sparse", ids, "2:4")
    with monkeypatch.context() as patched:
        patched.setattr(walk, "_prune_layers", killed)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(*arguments, criterion=SOLVER)
    prune_checkpoint(*arguments, criterion=SOLVER)
    prune(model, ids, "2:4", criterion=SOLVER)
    assert_equal(tmp_path / "sparse", model)


def test_a_failure_in_the_middle_of_a_block_leaves_the_model_unchanged(ids, monkeypatch):
    model = tiny_llama()
    before, real = copy.deepcopy(model.state_dict()), walk._prune_layers

    def fails(layers, *args):
        if "model.layers.1.mlp.down_proj" in layers:
            raise RuntimeError("no memory")
        return real(layers, *args)

    monkeypatch.setattr(walk, "_prune_layers", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        prune(model, ids, criterion=SOLVER)
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())


def test_models_whose_tokens_cannot_be_compared_are_refused(ids):
    with pytest.raises(ValueError, match="fused experts, which get other tokens"):
        prune(tiny_moe("mixtral"), ids, criterion=SOLVER)
    model = tiny_llama()
    mlp = model.model.layers[1].mlp
    mlp.act_fn = nn.Sequential(mlp.act_fn, mlp.act_fn)
    forward = mlp.forward
    mlp.forward = lambda x: forward(forward(x))
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.gate_proj reads more than once"):
        prune(model, ids, criterion=SOLVER)
    routed = tiny_llama()
    expert = routed.model.layers[1].mlp.forward

    def some(x):  # tokens are chosen by what they are, as a router does
        chosen, out = x[..., 0] > 0, torch.zeros_like(x)
        out[chosen] = expert(x[chosen])
        return out

    routed.model.layers[1].mlp.forward = some
    with pytest.raises(ValueError, match="gate_proj gets other tokens in the pruned model"):
        prune(routed, ids, criterion=SOLVER)
    with pytest.raises(ValueError, match="nothing is pruned block by block"):
        prune(nn.Sequential(nn.Linear(8, 8)), [torch.randn(4, 8)], targets=["0"], criterion=SOLVER)
