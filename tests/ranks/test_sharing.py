"""What one rank has found in its model and another one has not: shared inputs, zeros."""

import torch

from sparse_train import Magnitude, MaskUpdater, prune
from sparse_train.distributed import gather_objects, rank
from tests.ranks import launch
from tests.statistics.test_input_sharing import Branches


def train() -> tuple[dict[str, int], bool]:
    """Tokens that each layer has counted over all ranks, and if its norms are those of its inputs on all of them."""
    torch.manual_seed(0)  # the same weights
    model, seen = Branches(), {"a": [], "b": []}
    for name, layer in (("a", model.a), ("b", model.b)):
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
    updater = MaskUpdater(model, "2:4", update_freq=4, window=4, total_steps=40, targets=["a", "b"])
    torch.manual_seed(1 + rank())
    for step in range(4):
        skips = rank() == 1 and step in (1, 2)
        model(torch.randn(5, 8), "b" if skips else "ab").sum().backward()
        updater.step()
    close = True
    for name, layer in updater.layers.items():
        inputs = torch.cat([each for of_rank in gather_objects(seen[name]) for each in of_rank])
        if rank() == 0:  # which goes on with the sums
            close = close and torch.allclose(layer.statistics.norm_I, inputs.norm(dim=0))
    return {name: int(layer.statistics.tokens) for name, layer in updater.layers.items()}, close


def test_a_layer_that_stops_sharing_on_one_rank_stops_on_all():
    first, second = launch.run(train)
    assert first == ({"a": 30, "b": 40}, True)
    assert second[0] == {"a": 0, "b": 0}


def begin() -> tuple[float | None, int]:
    torch.manual_seed(rank())
    model = Branches()
    if rank() == 0:  # only here was a pruned model loaded; DDP would send it to the other rank
        prune(model, mask_structure="2:4", criterion=Magnitude(), targets=["a", "b"])
    updater = MaskUpdater(model, "2:4", update_freq=4, total_steps=40, targets=["a", "b"])
    return updater.sparsity, updater.timing.start_step


def test_zeros_are_a_first_mask_only_where_all_ranks_have_them():
    assert launch.run(begin) == [(None, 2), (None, 2)]
