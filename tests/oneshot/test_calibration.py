"""Models whose blocks do not run one after the other, once each: refused, and never pruned wrong."""

import copy
import logging
import re

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import RwkvConfig, RwkvForCausalLM

from sparse_train import SparseGPT, Unstructured, prune, sparse_layers
from tests.conftest import tiny_llama
from tests.reference import nm_mask


def test_blocks_that_do_not_run_one_after_the_other_are_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return x + self.linear(x)

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block(), Block()])

        def forward(self, x):
            return self.blocks[1](self.blocks[2](self.blocks[0](x)))

    with pytest.raises(ValueError, match="do not run one after the other"):
        prune(Backwards(), [torch.randn(2, 8)], "2:4")
    prune(Backwards(), [torch.randn(2, 8)], Unstructured("model"), sparsity=0.5)


def test_a_model_that_rescales_its_weights_in_eval_mode_is_refused():
    config = RwkvConfig(vocab_size=32, hidden_size=16, num_hidden_layers=3, context_length=8, rescale_every=2)
    model, ids = RwkvForCausalLM(config), torch.arange(16).view(2, 8)
    with pytest.raises(ValueError, match="divides its weights in eval mode"):
        prune(model, [ids], "2:4")
    model.eval()(ids)
    config.rescale_every = 0
    with pytest.raises(ValueError, match="divides its weights"):
        prune(model, [ids], "2:4")
    assert prune(RwkvForCausalLM(config), [ids], "2:4").sparsity == 0.5


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        x += self.linear(x)
        return x


class Blocks(nn.Module):
    """Runs its blocks as often as it is told."""

    def __init__(self, loops=1):
        super().__init__()
        self.loops, self.first = loops, nn.Linear(8, 8)
        self.blocks = nn.ModuleList([InPlace(), InPlace(), InPlace()])

    def forward(self, x):
        x = self.first(x)
        for _ in range(self.loops):
            for block in self.blocks:
                x = block(x)
        return x


def test_blocks_that_run_several_times_are_refused():
    model, x = Blocks(loops=2), [torch.randn(2, 8)]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"once each \(came \[0, 1, 2, 0, 1, 2\]\).*first_mask=FirstWindow"):
        prune(model, x, "2:4")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    prune(model, x, Unstructured("model"), sparsity=0.5)


class Halves(Dataset):
    """Of a batch, read by index."""

    def __init__(self, x):
        self.x = x

    def __getitem__(self, index):
        return self.x.split([2, len(self.x) - 2])[index]


def test_blocks_may_write_into_their_input():
    model, x = Blocks(), torch.randn(5, 8)
    expected = copy.deepcopy(model)
    prune(model, Halves(x), "2:4")
    hidden = expected.first(x).detach()
    for block in expected.blocks:
        mask_OI = nm_mask(block.linear.weight.detach().abs().double() * hidden.double().norm(dim=0), 2, 4)
        with torch.no_grad():
            block.linear.weight.mul_(mask_OI)
            hidden = hidden + block.linear(hidden)
    for block, reference in zip(model.blocks, expected.blocks, strict=True):
        assert torch.equal(block.linear.weight, reference.linear.weight)


class Reader(nn.Module):
    """Reads with its layers in an order that depends on the batch: [[0, 1], [1, 0, 1]] in the first and the second."""

    def __init__(self, orders):
        super().__init__()
        self.orders, self.products = iter(orders), []
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x):
        for index in next(self.orders):
            x = self.layers[index](x)
            self.products.append(index)
        return x


class OneReader(nn.Module):
    def __init__(self, orders):
        super().__init__()
        self.blocks = nn.ModuleList([Reader(orders)])

    def forward(self, x):
        return self.blocks[0](x)


@pytest.mark.parametrize(
    ("orders", "computed"),
    [
        ([[0, 1], [0, 1], [1, 0]], [0, 1, 0, 1]),  # all have read: the last product is not needed
        ([[0, 1, 1], [0, 1, 1], [0, 1, 1]], [0, 1, 1] * 3),
        ([[0], [0, 1], [0]], [0, 0, 1, 0]),
        ([[0, 1], [0, 1, 0, 1], [0, 1, 0, 1]], [0, 1] * 5),
    ],
    ids=["once", "twice", "sometimes", "in parts"],
)
def test_a_forward_ends_only_when_every_layer_has_read_all_that_it_reads(orders, computed):
    # the check of block order is the first forward
    sizes = [4 * max(1, len(order) // 2) for order in orders]  # longer batches are read in two parts
    model, batches = OneReader([orders[0], *orders]), [torch.randn(size, 8) for size in sizes]
    dense, block = copy.deepcopy(model.blocks[0].layers), model.blocks[0]
    prune(model, batches, "2:4")
    assert block.products[len(orders[0]) :] == computed
    squares = torch.zeros(2, 8, dtype=torch.float64)
    for x, order in zip(batches, orders, strict=True):
        for index in order:
            squares[index] += x.double().square().sum(0)
            x = dense[index](x).detach()
    for layer, before, squares_I in zip(block.layers, dense, squares, strict=True):
        mask_OI = nm_mask(before.weight.detach().abs().double() * squares_I.sqrt(), 2, 4)
        assert torch.equal(layer.weight, before.weight * mask_OI)


def test_blocks_that_take_more_of_each_other_than_the_output_are_refused():
    class Sideways(Blocks):
        def forward(self, x):
            x, self.left = self.first(x), {}
            for number, block in enumerate(self.blocks):
                x = block(x, self.left, number)
            return x

    class Leaves(InPlace):
        def forward(self, x, left, number):
            left[number] = self.linear(x)
            return x + (left[number - 1] if number else left[number])

    model = Sideways()
    model.blocks = nn.ModuleList([Leaves(), Leaves(), Leaves()])
    with pytest.raises(ValueError, match="Block 1 of Sideways does not run on the output .*KeyError: 0.*shared keys"):
        prune(model, [torch.randn(2, 8)], "2:4")


def test_a_skip_from_an_earlier_block_is_refused():
    class Skips(Blocks):
        def forward(self, x):
            x, outputs = self.first(x), []
            for number, block in enumerate(self.blocks):
                x = block(x if number < 2 else x + outputs[0].tanh())
                outputs.append(x)
            return x

    model, x = Skips(), [torch.randn(2, 8)]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"Block 2 of Skips .* alone .*outputs of earlier ones.*skip connection"):
        prune(model, x, "2:4", criterion=SparseGPT())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    prune(Skips(), [torch.randn(2, 8)], Unstructured("model"), sparsity=0.5)


@pytest.mark.parametrize("inference", [False, True])
def test_what_happens_between_blocks_is_no_skip(inference, caplog):
    class Between(Blocks):
        def forward(self, x):
            x, depth = self.first(x), 0.0
            for block in self.blocks:
                x = block(x)
                x *= 1.5  # in place
                depth = depth + x.mean()  # which no block reads
                self.seen = x.numpy().max()  # not of a tensor that autograd traces
            return x + depth

    model, x = Between(), torch.randn(2, 8)
    with torch.inference_mode(inference):
        report = prune(model, [x], "2:4", squash=False)
    assert report.sparsity == 0.5
    assert not caplog.records
    assert torch.is_grad_enabled()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    seen = {}
    for name, layer in sparse_layers(model).items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, inputs[0].detach().clone()))
    with torch.no_grad():
        model(x)
    for name, layer in sparse_layers(model).items():
        torch.testing.assert_close(layer.calibration_norm["sum_squares"].sqrt(), seen[name].norm(dim=0))


def test_a_layer_of_two_blocks_is_refused():
    model = Blocks()
    model.blocks[2].linear = model.blocks[0].linear
    with pytest.raises(ValueError, match=r"blocks.0.linear is part of blocks 0 and 2.*ignore=\['blocks.0.linear'\]"):
        prune(model, [torch.randn(2, 8)], "2:4")
    prune(model, [torch.randn(2, 8)], "2:4", ignore=["blocks.0.linear"])


def test_ids_that_the_model_does_not_know_are_refused(caplog):
    with pytest.raises(ValueError, match=r"ids go from 5 to 200, and LlamaForCausalLM has embeddings for 0 to 127"):
        prune(tiny_llama(), [torch.tensor([[5, 200]])], "2:4")
    assert not caplog.records


def test_layers_that_no_token_reaches_are_named_together():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.dt_in, self.x_in = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.up(x) @ self.dt_in.weight.T @ self.x_in.weight.T

    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleList([Reads(), Reads()]))
    model.forward = lambda x: model[1][1](model[1][0](model[0](x)))
    with pytest.raises(ValueError, match=r"1.0.dt_in is a target.*the same is true of 1 more") as error:
        prune(model, [torch.randn(2, 8)], "2:4")
    prune(model, [torch.randn(2, 8)], "2:4", ignore=re.search(r"ignore=\['(.*)'\]", str(error.value))[1].split("', '"))


def test_what_could_not_be_told_is_said(caplog):
    class Headless(Blocks):  # as a head that is not loaded yet does on a GPU
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("no head")

    class Fails(Blocks):
        def forward(self, x):
            self.blocks[0](x)
            raise RuntimeError("no second block")

    prune(Blocks(), [torch.randn(2, 8)], "2:4")
    prune(Headless(), [torch.randn(2, 8)], "2:4", targets=["re:blocks.*"])
    assert "could not be told" not in caplog.text
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="no second block"):
        prune(Fails(), [torch.randn(2, 8)], "2:4", targets=["re:blocks.*"])
    assert "the blocks of Fails run once each could not be told (RuntimeError: no second block)" in caplog.text


def test_batches_that_the_model_generates_may_change_its_mode():
    model, training = tiny_llama(), []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: training.append(module.training))

    def batches():
        assert torch.is_grad_enabled()
        model.train()  # as after generating text
        yield torch.randint(3, 100, (2, 8))

    prune(model, batches(), "2:4")
    assert training and not any(training)
