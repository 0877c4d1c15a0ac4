import pytest
import torch
from torch.nn import functional as F

from sparse_train import MaskUpdater
from sparse_train.evaluation import evaluate_perplexity, token_ids
from sparse_train.losses import next_token_loss

from .conftest import VOCABULARY, tiny_llama, tiny_tokenizer


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
    assert result.protocol.tokens == tokens
    assert model.training


def test_training_goes_on_as_if_nothing_had_happened():
    model, ids = tiny_llama(attention_dropout=0.5).train(), torch.randint(3, VOCABULARY, (4, 16))
    updater = MaskUpdater(model, "2:4", update_freq=2, window=1.0, total_steps=8)
    model(input_ids=ids, labels=ids).loss.backward()
    layer = model.model.layers[0].mlp.up_proj
    layer.reached = False
    recorded, chance = layer.statistics.sum_squares_I.clone(), torch.get_rng_state()
    assert layer.recorder.when == "training"
    assert recorded.sum() > 0
    result = evaluate_perplexity(model, ids.flatten(), window=16)
    assert torch.equal(layer.statistics.sum_squares_I, recorded)
    assert torch.equal(torch.get_rng_state(), chance)
    assert not layer.reached
    assert model.training
    assert evaluate_perplexity(model.eval(), ids.flatten(), window=16) == result  # without dropout
    assert updater.steps == 0


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
    assert str(result.protocol) == (
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
        ({"window": 8, "stride": 9}, "stride from 1 to window"),
        ({"window": 100}, "text has 70 tokens, fewer than one window of 100"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(tiny_llama(), torch.randint(3, VOCABULARY, (70,)), **arguments)


def test_token_ids():
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(token_ids(["ab", "cd"], tokenizer)) == "ab\n\ncd"
