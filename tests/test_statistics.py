import weakref
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparse_train import statistics
from sparse_train.layers.sparsify import sparsify
from sparse_train.pruning.norms import attach
from sparse_train.recorder import Recorder
from sparse_train.statistics import ActivationGram, ActivationNorm, LastSums
from tests.conftest import VOCABULARY, tiny_llama


def norm_of(*batches, mask=None) -> ActivationNorm:
    norm = ActivationNorm(batches[0].shape[-1])
    for batch in batches:
        norm.add(batch, mask)
    return norm


@given(st.integers(1, 30), st.integers(1, 20), st.integers(0, 2**31))
def test_splitting_and_merging_change_nothing(tokens, split, seed):
    x = torch.randn(tokens + split, 6, generator=torch.Generator().manual_seed(seed))
    whole, parts = norm_of(x), norm_of(*x.split(split))
    merged = norm_of(x[:split])
    merged.merge_state_dict(norm_of(x[split:]).state_dict())
    for other in (parts, merged):
        torch.testing.assert_close(other.sum_squares_I, whole.sum_squares_I, rtol=1e-5, atol=1e-6)
        assert int(other.tokens) == int(whole.tokens) == tokens + split
    torch.testing.assert_close(whole.norm_I.double(), x.double().norm(dim=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_long_batches_are_read_in_parts(monkeypatch, masked):
    x = torch.randn(2, 50, 6)
    mask = torch.arange(100).reshape(2, 50) % 3 if masked else None
    whole = norm_of(x, mask=mask)
    copied = []
    monkeypatch.setattr(statistics, "_PART", 6 * 7)
    monkeypatch.setattr(statistics, "sum_of_squares", lambda x_TI: copied.append(len(x_TI)) or x_TI.square().sum(0))
    parts = norm_of(x, mask=mask)
    assert copied == [7] * 14 + [2]
    torch.testing.assert_close(parts.sum_squares_I, whole.sum_squares_I)
    assert int(parts.tokens) == int(whole.tokens) == (66 if masked else 100)


@pytest.mark.parametrize("kind", [ActivationNorm, ActivationGram])
def test_statistics_move_with_their_layer(kind):
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 4))
    sparsify(model, list(model))
    attach(model, Recorder(), kind)
    model.to("meta")
    assert {tensor.device.type for tensor in model[0].statistics.tensors()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_float32_whatever_comes_in(dtype):
    x = torch.full((4096, 2), 0.1, dtype=dtype)
    norm = norm_of(x.view(8, 512, 2))
    assert norm.sum_squares_I.dtype == torch.float32
    torch.testing.assert_close(norm.sum_squares_I.double(), x.double().square().sum(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_inputs_are_converted_in_parts_to_the_same_sums(monkeypatch, dtype, threads):
    x = torch.randn(1001, 7).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)  # as true half precision in Lightning does
    try:
        monkeypatch.setattr(statistics, "_WORTH_THREADS", 0)
        assert torch.equal(statistics.sum_of_squares(x), statistics.sum_of_squares(x.float()))
        torch.testing.assert_close(norm_of(x).sum_squares_I.double(), x.double().square().sum(0), rtol=1e-6, atol=0)
    finally:
        torch.set_num_threads(before)
        torch.set_default_dtype(torch.float32)


def test_padding_does_not_count_even_where_it_is_not_finite():
    x = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    padded = x.masked_fill(mask[..., None] == 0, torch.nan)
    norm = norm_of(padded, mask=mask)
    torch.testing.assert_close(norm.sum_squares_I, x[mask.bool()].square().sum(0))
    assert int(norm.tokens) == 3
    recorder = Recorder(token_mask=torch.ones(7))  # a mask of another shape says nothing about these tokens
    assert recorder.token_mask_for(x) is None and recorder.misfit[0] == "(2, 3, 4)"


@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_that_is_not_finite_is_left_out_and_counted(compiled):
    good, norm = torch.randn(5, 4), ActivationNorm(4)
    add = torch.compile(norm.add, backend="eager") if compiled else norm.add
    for bad in (torch.inf, torch.nan, 1e30):  # the square of the last one overflows
        add(good.clone().index_fill(0, torch.tensor([2]), bad))
    add(good)
    assert torch.equal(norm.sum_squares_I, norm_of(good).sum_squares_I)
    assert (int(norm.tokens), int(norm.dropped)) == (5, 3)
    copy = ActivationNorm(4)
    copy.merge_state_dict(norm.state_dict())
    assert int(copy.dropped) == 3
    norm.fade(1.0)
    assert (int(norm.tokens), int(norm.dropped)) == (5, 0)


def test_reset_and_state():
    norm = norm_of(torch.randn(5, 4))
    copy = ActivationNorm(4)
    copy.merge_state_dict(norm.state_dict())
    assert torch.equal(copy.sum_squares_I, norm.sum_squares_I)
    norm.reset()
    assert int(norm.tokens) == 0
    assert int(copy.tokens) == 5
    before = copy.sum_squares_I.clone()
    copy.dropped += 1
    copy.fade(0.5)
    assert torch.equal(copy.sum_squares_I, before / 2) and (int(copy.tokens), int(copy.dropped)) == (3, 0)


@pytest.mark.parametrize("masked", [True, False])
def test_the_gram_matrix_is_that_of_the_tokens_that_count(masked):
    x, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 1, 0], [1, 0, 1, 1, 1]]) if masked else None
    gram = ActivationGram(4)
    for _ in range(2):
        gram.add(x, mask)
    counted_TI = x[mask.bool()] if masked else x.reshape(-1, 4)
    torch.testing.assert_close(gram.gram_II, 2 * counted_TI.t() @ counted_TI)
    assert int(gram.tokens) == int(gram.state_dict()["tokens"]) == 2 * len(counted_TI)
    assert torch.equal(gram.state_dict()["sum_squares"], gram.gram_II.diagonal())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_forward_counts_once(use_reentrant):
    model = Block()
    sparsify(model, [model.up, model.down])
    attach([model.up, model.down], Recorder("training"), ActivationNorm)
    x = torch.randn(2, 5, 8, requires_grad=True)
    checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    for layer in (model.up, model.down):
        assert int(layer.statistics.tokens) == 10
    torch.testing.assert_close(model.up.statistics.sum_squares_I, x.detach().square().sum((0, 1)))


@pytest.mark.parametrize("use_reentrant", [True, False, None])
def test_a_checkpointed_llama_counts_once(use_reentrant):
    model = tiny_llama().train()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    linears = [m for n, m in model.named_modules() if n.endswith("proj")]
    sparsify(model, linears)
    attach(linears, Recorder("training"), ActivationNorm)
    ids = torch.randint(0, VOCABULARY, (2, 16))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert {int(layer.statistics.tokens) for layer in linears} == {32}
    assert all(layer.weight.grad is not None for layer in linears)


def test_evaluation_does_not_count_but_eval_mode_training_does():
    model = Block().eval()  # transformers models come in eval mode, and many are trained in it
    sparsify(model, [model.up])
    attach([model.up], Recorder("training"), ActivationNorm)
    with torch.no_grad():
        model(torch.randn(3, 8))
    assert int(model.up.statistics.tokens) == 0
    model(torch.randn(3, 8))
    assert int(model.up.statistics.tokens) == 3
    model.up.recorder.when = "never"
    model(torch.randn(3, 8))
    assert int(model.up.statistics.tokens) == 3


def test_statistics_survive_a_cast_of_the_model():
    model = Block()
    sparsify(model, [model.up])
    attach([model.up], Recorder("training"), ActivationNorm)
    model(torch.randn(3, 8))
    before = model.up.statistics.sum_squares_I.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.up.statistics.sum_squares_I, before)
    assert model.up.weight_mask.dtype == torch.uint8


def test_a_token_mask_follows_the_input():
    recorder = Recorder(token_mask=torch.ones(2, 3))
    assert recorder.token_mask_for(torch.ones(2, 3, 4, device="meta")) is recorder.token_mask
    assert recorder.token_mask.device.type == "meta"


def test_the_sums_of_one_tensor_are_computed_once_and_each_layer_owns_its_norm(monkeypatch):
    computed = []
    sums = statistics.batch_sums
    monkeypatch.setattr(statistics, "batch_sums", lambda x, mask: computed.append(x.shape) or sums(x, mask))
    layers = [nn.Linear(4, 4) for _ in range(3)]
    model = nn.ModuleList(layers)
    sparsify(model, layers)
    attach(layers, Recorder("always"), ActivationNorm)
    x = torch.randn(5, 4)
    layers[0](x), layers[1](x)
    assert len(computed) == 1
    layers[2](x.clone())  # equal values in another tensor
    x.mul_(2)  # the same tensor with other values
    layers[1](x)
    assert len(computed) == 3
    expected = x.square().sum(0)
    torch.testing.assert_close(layers[0].statistics.sum_squares_I, expected / 4)
    torch.testing.assert_close(layers[1].statistics.sum_squares_I, expected * 5 / 4)
    assert [int(layer.statistics.tokens) for layer in layers] == [5, 10, 5]


def test_sums_of_an_input_do_not_keep_it_alive_nor_outlive_it():
    last = LastSums()
    x = torch.ones(2, 3)
    first = last.of(x, None)
    assert last.of(x, None) is first
    assert last.of(x, torch.tensor([1, 0])) is not first  # padding is said anew
    gone = weakref.ref(x)
    del x
    assert gone() is None
    assert last.of(torch.zeros(2, 3), None)[0].tolist() == [0, 0, 0]


def test_second_moments_of_one_tensor_are_added_up_once_and_only_where_histories_agree(monkeypatch):
    q, k, late, alone = (ActivationGram(6) for _ in range(4))
    last, products = LastSums(), []
    monkeypatch.setattr(statistics, "in_float32", lambda kind: products.append(kind) or nullcontext())
    mask = torch.tensor([[True] * 3 + [False]] * 2)
    inputs = [torch.randn(2, 4, 6) for _ in range(3)]
    for number, x in enumerate(inputs):
        for gram in (q, k, late) if number else (q, k):
            gram.add(x, mask, last)
    assert len(products) == 1 + 2 * 2
    inputs[-1].mul_(2)  # changed in place: another input
    q.add(inputs[-1], mask, last)
    k.add(inputs[-1], None, last)  # another mask
    assert len(products) == 7
    for x in inputs[:-1]:
        alone.add(x, mask)
    alone.add(inputs[-1] / 2, mask)
    alone.add(inputs[-1], mask)
    assert torch.equal(q.gram_II, alone.gram_II) and int(q.tokens) == int(alone.tokens) == 24
    assert int(k.tokens) == 26 and int(late.tokens) == 12
    assert not torch.equal(q.gram_II, k.gram_II)
