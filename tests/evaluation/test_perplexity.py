import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from sparse_train import MaskUpdater
from sparse_train.evaluation import evaluate_perplexity, token_ids
from sparse_train.evaluation.perplexity import undisturbed
from sparse_train.models.losses import next_token_loss
from tests.conftest import VOCABULARY, tiny_llama, tiny_tokenizer


def reference(model, ids, window, stride):
    """Window by window in float64: a token counts where it has ``window - stride`` tokens before it."""
    total, count = 0.0, 0
    for index, start in enumerate(range(0, len(ids) - window + 1, stride)):
        part = ids[start : start + window]
        logits = model(input_ids=part[None]).logits[0].double()
        first = 1 if index == 0 else max(1, window - stride)
        losses = F.cross_entropy(logits[first - 1 : -1], part[first:], reduction="none")
        total, count = total + losses.sum().item(), count + len(losses)
    return torch.tensor(total / count).exp().item(), count


@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 4), (16, 15), (2, 1)])
def test_equals_a_loop_in_float64(window, stride):
    model, ids = tiny_llama().train(), torch.randint(3, VOCABULARY, (70,))
    result = evaluate_perplexity(model, ids, window=window, stride=stride, batch_size=3)
    perplexity, tokens = reference(model, ids, window, stride or window)
    assert result.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert result.tokens == tokens
    assert model.training


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_window_whose_loss_is_not_a_number_is_not_left_out(batch_size):
    model, ids = tiny_llama(), torch.randint(3, VOCABULARY - 1, (64,))
    ids[20] = VOCABULARY - 1
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY - 1] = float("inf")
    found = evaluate_perplexity(model, ids, window=16, batch_size=batch_size)
    assert found.perplexity != found.perplexity


def test_training_goes_on_as_if_nothing_had_happened():
    model, ids = tiny_llama(attention_dropout=0.5).train(), torch.randint(3, VOCABULARY, (4, 16))
    updater = MaskUpdater(model, "2:4", update_freq=2, window=1.0, total_steps=8)
    model(input_ids=ids, labels=ids).loss.backward()
    layer = model.model.layers[0].mlp.up_proj
    recorded, chance = layer.statistics.sum_squares_I.clone(), torch.get_rng_state()
    assert layer.recorder.when == "training"
    assert recorded.sum() > 0
    result = evaluate_perplexity(model, ids.flatten(), window=16)
    assert torch.equal(layer.statistics.sum_squares_I, recorded)
    assert torch.equal(torch.get_rng_state(), chance)
    assert model.training
    assert evaluate_perplexity(model.eval(), ids.flatten(), window=16) == result  # without dropout
    assert updater.steps == 0


def test_scoring_keeps_no_keys_and_values_and_generation_does():
    model, ids, kept = tiny_llama(), torch.randint(3, VOCABULARY, (1, 8)), []
    with undisturbed(model):
        assert model(input_ids=ids).past_key_values is None
        hook = model.register_forward_hook(lambda *args: kept.append(args[-1].past_key_values is not None))
        model.generate(ids, max_new_tokens=3, do_sample=False)
        hook.remove()
    assert kept == [True] * 3
    assert model.config.use_cache
    assert model(input_ids=ids).past_key_values is not None


def test_the_protocol_says_everything():
    ids = torch.randint(3, VOCABULARY, (70,))
    result = evaluate_perplexity(
        tiny_llama(),
        ids,
        window=16,
        max_tokens=40,
        model_name="M",
        data_name="D",
        split="test",
        tokenizer_name="K",
        autocast=torch.bfloat16,
    )
    assert result.protocol == (
        "token perplexity of M on D, test: 30 tokens scored, windows of 16, stride 16, tokenizer of K, "
        "computed in bfloat16, loss in float32"
    )
    assert result.as_dict()["tokens"] == 30


def test_the_loss_is_float32_whatever_the_logits():
    logits = torch.randn(2, 5, VOCABULARY).bfloat16() * 40
    labels = torch.randint(0, VOCABULARY, (2, 5))
    labels[1, 3:] = -100
    loss, tokens = next_token_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert int(tokens) == 6
    kept = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2)]
    expected = sum(F.cross_entropy(logits[b, i - 1].double(), labels[b, i]) for b, i in kept) / 6
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    nothing, none = next_token_loss(logits, torch.full_like(labels, -100))
    assert nothing == 0
    assert none == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 1}, "window must be at least 2"),
        ({"window": 8, "stride": 9}, "stride must be from 1 to window, which is 8, got 9"),
        ({"window": 8, "stride": 0}, "stride must be from 1 to window, which is 8, got 0"),
        ({"window": 100}, "text has 70 tokens, fewer than one window of 100"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(tiny_llama(), torch.randint(3, VOCABULARY, (70,)), **arguments)


def test_ids_of_another_tokenizer_are_refused():
    with pytest.raises(ValueError, match=r"ids go from 3 to 200, and LlamaForCausalLM has embeddings for 0 to 127"):
        evaluate_perplexity(tiny_llama(), torch.tensor([3, 200] * 20), window=8)


def test_conversations_have_no_perplexity():
    with pytest.raises(ValueError, match="plain texts, and the documents are conversations"):
        token_ids([[{"role": "user", "content": "Hi"}]], None)


def test_a_model_of_ones_own_may_have_a_config_of_its_own():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = tiny_llama(), SimpleNamespace(n_layer=2)

        def forward(self, **inputs):
            return self.inner(**inputs)

    model, ids = Model(), torch.randint(3, VOCABULARY, (70,))
    assert (
        evaluate_perplexity(model, ids, window=8).perplexity
        == evaluate_perplexity(model.inner, ids, window=8).perplexity
    )


def test_windows_longer_than_the_model_was_made_for(caplog):
    ids = torch.randint(3, VOCABULARY, (70,))
    learned = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=VOCABULARY, n_positions=16))
    with pytest.raises(ValueError, match="window is 32 tokens, and GPT2LMHeadModel has 16 positions. Use window=16"):
        evaluate_perplexity(learned, ids, window=32)
    with pytest.raises(ValueError, match=r"window is 16 tokens after 1 in front of each, .* Use window=15"):
        evaluate_perplexity(learned, ids, window=16, prefix=[1])
    evaluate_perplexity(learned, ids, window=16)
    assert "positions" not in caplog.text
    evaluate_perplexity(tiny_llama(max_position_embeddings=16), ids, window=32)
    assert "window is 32 tokens, and LlamaForCausalLM has 16 positions" in caplog.text


def test_token_ids():
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(token_ids(["ab", "cd"], tokenizer)) == "ab\n\ncd"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer.decode(token_ids(["ab", "cd"], tokenizer)) == "<s>ab\n\ncd"


@pytest.mark.parametrize("stride", [10, 4])
def test_a_prefix_stands_in_front_of_each_window_and_the_same_tokens_are_scored(stride):
    model, ids = tiny_llama(), torch.randint(3, VOCABULARY, (40,))
    without = evaluate_perplexity(model, ids, window=10, stride=stride)
    found = evaluate_perplexity(model, ids, window=10, stride=stride, prefix=[1, 2])
    losses = []
    for index, start in enumerate(range(0, 31, stride)):
        part = torch.cat([torch.tensor([1, 2]), ids[start : start + 10]])
        log_p = model(input_ids=part[None]).logits[0].double().log_softmax(-1)
        first = 1 if index == 0 else max(1, 10 - stride)
        losses += [-log_p[place + 1, part[place + 2]].item() for place in range(first, 10)]
    assert found.tokens == without.tokens == len(losses)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found.perplexity != without.perplexity
    assert "2 special token(s) in front of each" in found.protocol
    assert "special token" not in without.protocol
