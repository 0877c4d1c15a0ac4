"""``permute``: the model computes the same, and N:M keeps more."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from sparse_train import NM, Magnitude, permute, prune
from sparse_train.oneshot.permutation import better_order, kept
from tests.conftest import VOCABULARY, tiny_gemma3, tiny_llama

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
LLAMA_LIKE = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {},
    "qwen2": {},  # biases of queries, keys and values
    "qwen3": {},  # norms inside heads
    "gemma2": {},  # four norms in a block
    "gemma3_text": {},
    "granite": {"attention_bias": True, "mlp_bias": True},
    "olmo2": {},  # norms over all queries
    "cohere2": {},
    "smollm3": {},
}


def batches():
    ids = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids}, {"input_ids": ids.flip(0)}]


def random_model(name):
    """Parameters that all differ, norms and biases as well."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(SIZES | LLAMA_LIKE[name]))).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    return model


def weights(model):
    return {name: each.detach().clone() for name, each in model.named_parameters()}


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_a_permuted_model_computes_the_same(name):
    model = random_model(name).double()
    ids = batches()[0]["input_ids"]
    before, expected = weights(model), model.eval()(input_ids=ids).logits
    model.train()
    gained = permute(model, batches())
    assert gained.after > gained.before and model.training
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected, rtol=1e-6, atol=1e-6)
    moved = {name for name, each in weights(model).items() if not torch.equal(each, before[name])}
    assert {"self_attn.o_proj.weight", "mlp.down_proj.weight", "self_attn.v_proj.weight", "mlp.up_proj.weight"} <= {
        name.removeprefix("model.layers.0.") for name in moved
    }


def test_an_autocast_around_it_sees_the_new_weights():
    model, ids = tiny_llama().eval(), batches()[0]["input_ids"]
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=ids).logits  # casts of weights are kept until autocast ends
        permute(model, batches())
        found = model(input_ids=ids).logits
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_more_is_kept_in_each_kind_of_layer():
    plain, permuted = tiny_llama().eval(), tiny_llama().eval()
    permute(permuted, batches())
    dense = plain(**batches()[0]).logits
    errors = []
    for model in (plain, permuted):
        prune(model, batches(), "2:4")
        errors.append(float((model(**batches()[0]).logits - dense).norm()))
    assert errors[1] < errors[0]


def test_heads_that_groups_do_not_divide_stay_as_they_are():
    model = tiny_llama().eval()
    before = weights(model)
    permute(model, batches(), "8:16")  # heads have 8 channels
    after = weights(model)
    name = "model.layers.0.self_attn.v_proj.weight"
    assert torch.equal(after[name].sort().values, before[name].sort().values)  # rows where they were
    assert not torch.equal(after[name], before[name])


def test_padding_does_not_count():
    """Norms of the tokens alone, whatever is in the padding."""
    orders = []
    for filler in (0, 7):
        model, ids = tiny_llama().eval(), batches()[0]["input_ids"].clone()
        mask = torch.ones_like(ids)
        ids[:, 10:], mask[:, 10:] = filler, 0
        permute(model, [{"input_ids": ids, "attention_mask": mask}])
        orders.append(weights(model))
    assert all(torch.equal(orders[0][name], orders[1][name]) for name in orders[0])


def test_norms_of_inputs_count():
    """What a norm multiplies by and the next weights divide by, in exact powers of two, changes no Wanda score."""
    plain, rescaled = tiny_llama().eval(), tiny_llama().eval()
    gains = 2.0 ** torch.randint(-3, 4, (32,), generator=torch.Generator().manual_seed(1))
    for block in rescaled.model.layers:
        block.post_attention_layernorm.weight.data *= gains
        for layer in (block.mlp.gate_proj, block.mlp.up_proj):
            layer.weight.data /= gains
    permute(plain, batches())
    permute(rescaled, batches())
    for ours, theirs in zip(plain.model.layers, rescaled.model.layers, strict=True):
        assert torch.equal(ours.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight)


@pytest.mark.parametrize("broken", ["gain", "memory"])
def test_a_failure_leaves_the_model_as_it_was(broken, monkeypatch):
    model = tiny_llama().eval()
    if broken == "gain":  # a parameter that knows the order, and that permute does not know
        gain = torch.linspace(0.99, 1.01, 32)
        model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * gain, *args[1:]))
    before, expected = weights(model), (ValueError, "computes more than a Llama")
    if broken == "memory":  # in the middle of a set of channels
        count, real = itertools.count(), torch.Tensor.index_select

        def short(*args):
            if next(count) == 40:
                raise torch.OutOfMemoryError("no memory")
            return real(*args)

        monkeypatch.setattr(torch.Tensor, "index_select", short)
        expected = torch.OutOfMemoryError, "no memory"
    with pytest.raises(expected[0], match=expected[1]):
        permute(model, batches())
    assert all(torch.equal(each, before[name]) for name, each in weights(model).items())
    assert not any(module._forward_pre_hooks for module in model.modules() if isinstance(module, torch.nn.Linear))


def test_what_cannot_be_permuted_is_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY))
    with pytest.raises(ValueError, match="GPT2LMHeadModel have no self_attn.q_proj"):
        permute(gpt2, batches())
    with pytest.raises(ValueError, match="Permute for N:M"):
        permute(tiny_llama(), batches(), "unstructured")
    with pytest.raises(ValueError, match="vision_tower"):  # whose features would keep their order
        permute(tiny_gemma3(), batches())
    scaled = tiny_llama()
    scaled.model.layers[1].mlp.register_parameter("scale", torch.nn.Parameter(torch.ones(64)))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.scale"):
        permute(scaled, batches())
    with pytest.raises(ValueError, match="not a LlamaModel"):
        permute(tiny_llama().model, batches())
    pruned = tiny_llama()
    prune(pruned, criterion=Magnitude())
    with pytest.raises(ValueError, match="Permute before pruning"):
        permute(pruned, batches())
    with pytest.raises(ValueError, match="divisible by 3"):
        permute(tiny_llama(), batches(), "1:3")


@given(st.integers(0, 10**6), st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)]), st.integers(1, 5))
def test_orders_are_permutations_that_keep_no_less(seed, nm, groups):
    pattern = NM(*nm)
    scores_RC = torch.randn(6, groups * pattern.m, generator=torch.Generator().manual_seed(seed)).abs()
    order_C = better_order(scores_RC, pattern)
    assert sorted(order_C.tolist()) == list(range(groups * pattern.m))
    assert kept(scores_RC[:, order_C], pattern) >= kept(scores_RC, pattern)


def test_close_to_the_best_of_all_orders():
    """Of eight channels, every division into two groups is tried, in float64."""
    found = []
    for seed in range(20):
        scores_RC = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)).abs() ** 3
        best = 0.0
        for first in itertools.combinations(range(1, 8), 3):
            groups = [[0, *first], [each for each in range(1, 8) if each not in first]]
            both = [scores_RC.double()[:, group].sort(descending=True).values[:, :2].sum() for group in groups]
            best = max(best, float(sum(both)))
        found.append(kept(scores_RC[:, better_order(scores_RC, NM(2, 4))], NM(2, 4)) / best)
    assert max(found) == pytest.approx(1) and sum(found) / len(found) > 0.99
