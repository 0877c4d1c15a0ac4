"""``torch.compile``: one graph through masked layers, tokens counted once, and no recompiling from step to step."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from sparse_train import MaskUpdater, sparse_layers
from sparse_train.evaluation.perplexity import undisturbed
from tests.conftest import VOCABULARY, tiny_llama


def model_and_updater(num_hidden_layers: int, checkpointing: bool) -> tuple:
    """A tiny Llama in training, and its updater; nothing is compiled yet."""
    torch._dynamo.reset()
    counters.clear()
    model = tiny_llama(num_hidden_layers=num_hidden_layers)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model, MaskUpdater(model, "2:4", update_freq=4, window=2, norm_decay=0.0, total_steps=100)


def train(compiled: bool, checkpointing: bool = False, steps: int = 20) -> tuple:
    """Statistics in the middle of a window, masks at the end, and graphs compiled by step 10 and by the end."""
    model, updater = model_and_updater(1, checkpointing)
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    graphs = []
    statistics = {}
    for step in range(steps):
        ids = torch.randint(3, VOCABULARY, (2, 16), generator=generator)
        forward(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.step()
        graphs.append(counters["stats"]["unique_graphs"])
        if step == 16:
            statistics = updater.state_dict()["norms"]["norms_by_rank"][0]
    return statistics, {name: layer.weight_mask for name, layer in sparse_layers(model).items()}, graphs


@pytest.mark.parametrize("checkpointing", [True])
def test_a_compiled_model_makes_the_masks_of_an_eager_one(checkpointing):
    expected, masks, _ = train(compiled=False, checkpointing=checkpointing)
    found, compiled_masks, graphs = train(compiled=True, checkpointing=checkpointing)
    assert {int(each["tokens"]) for each in found.values()} == {32}  # one step of the window of two: each token once
    for name, each in expected.items():
        assert torch.allclose(found[name]["sum_squares"], each["sum_squares"], rtol=1e-4), name
    differing = sum(int((masks[name] != compiled_masks[name]).sum()) for name in masks)
    assert differing <= 2  # bytes; the order of additions differs
    assert graphs[0] > 0
    # compiled for: no recording, looking for shared inputs, recording; not again once each has been met
    assert graphs[8] == graphs[-1]


def test_no_graph_break_in_a_masked_layer():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8), nn.Linear(8, 4))
    updater = MaskUpdater(model, "2:4", update_freq=4, window=4, norm_decay=0.0, total_steps=20)
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(9):
        forward(torch.randn(5, 16)).sum().backward()
        updater.step()
    assert {int(s["tokens"]) for s in updater.state_dict()["norms"]["norms_by_rank"][0].values()} == {5}
    with torch.no_grad():
        x = torch.randn(3, 16)
        assert torch.allclose(forward(x), model(x))


@pytest.mark.parametrize("checkpointing", [False])
def test_blocks_that_are_compiled_one_by_one_compile_whole(checkpointing):
    model, updater = model_and_updater(1, checkpointing)
    for block in model.model.layers:
        block.compile(backend="eager")
    for _ in range(4):
        ids = torch.randint(3, VOCABULARY, (2, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        updater.step()
    assert counters["stats"]["unique_graphs"] > 0
    assert counters["frames"]["ok"] == counters["frames"]["total"]  # those that fail run eagerly, and nothing says so
    assert not counters["graph_break"]


def test_training_goes_on_after_an_evaluation_in_inference_mode():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(16, 16))
    MaskUpdater(model, "2:4", targets=["0"], total_steps=20)
    with torch.inference_mode(), undisturbed(model):
        model(torch.randn(2, 16))
    torch.compile(model, backend="eager")(torch.randn(2, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
