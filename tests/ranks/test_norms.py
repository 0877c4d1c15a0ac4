"""What one rank has seen and another one has not: inputs of layers, zeros of a model."""

import torch
from torch import nn

from sparse_train import MaskUpdater
from sparse_train.distributed.collectives import gather_objects, rank
from tests.ranks import launch


class Branches(nn.Module):
    """Two layers with one input, of which a forward may leave out the first."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, both=True):
        return self.a(x) + self.b(x) if both else self.b(x)


def train() -> tuple[dict[str, int], bool]:
    """Tokens that each layer has counted over all ranks, and if its norms are those of its inputs on all of them."""
    torch.manual_seed(0)  # the same weights
    model, seen = Branches(), {"a": [], "b": []}
    for name, layer in (("a", model.a), ("b", model.b)):
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
    updater = MaskUpdater(model, "2:4", update_freq=4, window=4, total_steps=40, targets=["a", "b"])
    torch.manual_seed(1 + rank())
    for step in range(4):
        model(torch.randn(5, 8), both=rank() == 0 or step not in (1, 2)).sum().backward()
        updater.step()
    close = True
    for name, layer in updater.layers.items():
        inputs = torch.cat([each for of_rank in gather_objects(seen[name]) for each in of_rank])
        if rank() == 0:  # which continues with the sums
            close = close and torch.allclose(layer.statistics.norm_I, inputs.norm(dim=0))
    return {name: int(layer.statistics.tokens) for name, layer in updater.layers.items()}, close


def test_norms_of_each_layer_are_summed_over_ranks_whatever_each_has_used():
    first, second = launch.run(train)
    assert first == ({"a": 30, "b": 40}, True)
    assert second[0] == {"a": 0, "b": 0}
