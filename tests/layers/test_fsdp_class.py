"""A layer that ``fully_shard`` has already taken keeps being FSDP's when it becomes sparse; one process, gloo."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from sparse_train.layers.sparse_linear import SparseLinear
from sparse_train.layers.sparsify import sparsify
from sparse_train.patterns import NM
from sparse_train.targets.selection import select


@pytest.fixture
def _one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
def test_a_sharded_layer_stays_fsdps():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(model[0], mesh=mesh)
    sparsify(model, select(model, NM(2, 4), targets=["0"]).layers.values())
    assert isinstance(model[0], FSDPModule)
    assert isinstance(model[0], SparseLinear)
    out = model(torch.randn(3, 8))
    out.sum().backward()
    assert model[0].weight.grad is not None
    assert "weight_mask" in dict(model[0].named_buffers())
