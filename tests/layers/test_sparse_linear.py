import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparse_train import MaskUpdater
from sparse_train.layers import masks
from sparse_train.layers.functional import masked_linear
from sparse_train.layers.sparsify import sparsify, squash


def sparse_linear(in_features=12, out_features=6, bias=True, dtype=torch.float32):
    layer = nn.Linear(in_features, out_features, bias=bias).to(dtype)
    sparsify(layer, [layer])
    mask = torch.rand(out_features, in_features) < 0.5
    layer.set_mask(mask)
    return layer, mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("in_features", [4, 12, 20, 576])
def test_forward_is_the_masked_linear(dtype, bias, in_features):
    layer, mask = sparse_linear(in_features, bias=bias, dtype=dtype)
    x = torch.randn(2, 3, in_features, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, torch.where(mask, layer.weight, 0), layer.bias))


@pytest.mark.parametrize("straight_through", [True, False])
def test_gradients_in_float64(straight_through):
    layer, _ = sparse_linear(5, 3, dtype=torch.float64)
    weight, mask = layer.weight.detach().requires_grad_(), layer.weight_mask
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def output(x, bias, weight=weight):
        return masked_linear(x, weight, mask, bias, straight_through=straight_through)

    assert torch.autograd.gradcheck(lambda x, b: output(x, b, weight.detach()), (x, bias))
    if not straight_through:
        assert torch.autograd.gradcheck(output, (x, bias, weight))


@pytest.mark.parametrize("bias", [True, False])
def test_straight_through_gives_the_gradient_of_the_masked_weight(bias):
    layer, mask = sparse_linear(bias=bias)
    x = torch.randn(2, 3, 12)
    masked = torch.where(mask, layer.weight, 0).detach().requires_grad_()
    F.linear(x, masked, layer.bias).square().sum().backward()
    expected_bias = layer.bias.grad.clone() if bias else None
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, masked.grad)
    assert (layer.weight.grad[~mask] != 0).any()
    if bias:
        torch.testing.assert_close(layer.bias.grad, expected_bias)
    layer.zero_grad()
    layer.straight_through = False
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.where(mask, masked.grad, 0))
    assert (layer.weight.grad[~mask] == 0).all()


def saved_bytes(run):
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = run()
    return sum(saved.values()), output


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_is_held_for_backward_beyond_the_dense_layer_and_the_mask(autocast, frozen):
    dense = nn.Linear(64, 32).requires_grad_(not frozen)
    layer = copy.deepcopy(dense)
    sparsify(layer, [layer])
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        held_dense, _ = saved_bytes(lambda: dense(x))
        held, _ = saved_bytes(lambda: layer(x))
    assert held <= held_dense + layer.weight_mask.nbytes


def test_a_frozen_layer_lets_its_input_be_changed_in_place():
    layer, mask = sparse_linear(8, 4)
    layer.requires_grad_(False)
    x = torch.randn(2, 8, requires_grad=True)
    hidden = x * 1
    output = layer(hidden)
    hidden += 1  # as a residual connection may, where the layer is dense
    output.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(mask, layer.weight, 0).sum(0).expand(2, 8))


def test_autocast_forward_and_backward():
    layer, _ = sparse_linear(16, 8)
    dense = nn.Linear(16, 8)
    dense.load_state_dict({"weight": layer.masked_weight(), "bias": layer.bias})
    x = torch.randn(3, 16, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = layer(x), dense(twin)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    out.float().square().sum().backward()  # outside autocast, as Lightning does it
    expected.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad)


def test_mixed_dtypes_without_autocast_are_refused_as_by_a_dense_layer():
    layer, _ = sparse_linear(8, 4)
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(torch.randn(2, 8, dtype=torch.bfloat16))


def test_a_mask_changed_between_forward_and_backward_is_noticed():
    layer, mask = sparse_linear(8, 4)
    out = layer(torch.randn(2, 8))
    layer.set_mask(~mask)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_copies_pickles_and_casts_keep_the_mask():
    layer, mask = sparse_linear(20, 6)
    x = torch.randn(2, 20)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert twin.weight_mask is not layer.weight_mask
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other, _ = sparse_linear(20, 6)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.unpacked_mask(), mask)
    assert layer.to(torch.bfloat16).weight_mask.dtype == torch.uint8
    assert torch.equal(layer.unpacked_mask(), mask)


def test_made_on_meta_then_emptied_and_reset_keeps_everything():
    with torch.device("meta"):
        layer = nn.Linear(20, 6)
    sparsify(layer, [layer])
    assert layer.weight_mask.device.type == "meta"
    layer.to_empty(device="cpu")
    layer.weight_mask.fill_(77)
    layer.reset_parameters()
    assert torch.equal(layer.weight_mask, masks.full(6, 20))


def test_nothing_of_a_run_stays_after_squash():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    before = [set(vars(layer)) for layer in model]
    updater = MaskUpdater(model, "2:4", targets=["Linear"], update_freq=2, total_steps=4)
    for _ in range(4):
        model(torch.randn(3, 8)).sum().backward()
        updater.step()
    squash(model)
    assert [set(vars(layer)) for layer in model] == before


def test_empty_batch_and_frozen_weight():
    layer, _ = sparse_linear(8, 4)
    assert layer(torch.randn(0, 8)).shape == (0, 4)
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("shape", [(4, 16), (2, 4, 16)])
def test_the_output_can_be_changed_in_place_as_that_of_a_dense_layer(shape):
    layer, _ = sparse_linear(16)
    nn.ReLU(inplace=True)(layer(torch.randn(shape))).sum().backward()
    assert layer.weight.grad is not None
