import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from sparse_train.layers.masked_layer import SparseLinear, sparse_layers
from sparse_train.layers.sparsify import sparsify, sparsify_like, squash
from sparse_train.layers.state_dicts import folded_state_dict
from sparse_train.layers.targets import find_targets
from sparse_train.patterns import NM
from tests.conftest import tiny_llama
from tests.layers.test_sparse_linear import sparse_linear
from tests.layers.test_state_dicts import masked_llama


def test_state_dict_keys_are_the_models_own_plus_masks():
    model = tiny_llama()
    own = set(model.state_dict())
    targets = {n: m for n, m in model.named_modules() if n.endswith("proj")}
    identities = {n: id(p) for n, p in model.named_parameters()}
    sparsify(model, targets.values())
    assert set(model.state_dict()) == own | {f"{name}.weight_mask" for name in targets}
    assert {n: id(p) for n, p in model.named_parameters()} == identities
    assert set(folded_state_dict(model)) == own
    squash(model)
    assert set(model.state_dict()) == own
    assert {n: id(p) for n, p in model.named_parameters()} == identities
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(isinstance(m, SparseLinear) for m in model.modules())


def test_squash_leaves_zeros_and_the_same_outputs():
    model = tiny_llama().eval()
    sparsify(model, [m for n, m in model.named_modules() if n.endswith("proj")])
    for layer in sparse_layers(model).values():
        layer.set_mask(torch.rand_like(layer.weight) < 0.5)
    ids = torch.randint(0, 128, (1, 8))
    before = model(input_ids=ids).logits
    kept = {name: layer.unpacked_mask() for name, layer in sparse_layers(model).items()}
    squash(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    for name, mask in kept.items():
        assert torch.equal(model.get_submodule(name).weight != 0, mask)


def test_a_checkpoint_of_a_sparse_run_loads_into_a_module_that_knows_nothing_of_it():
    model, other = masked_llama(), tiny_llama()
    sparsify_like(other, model.state_dict())
    other.load_state_dict(model.state_dict())
    squash(other)
    for name, layer in sparse_layers(model).items():
        assert torch.equal(other.get_submodule(name).weight, layer.masked_weight())


def test_a_module_that_is_itself_the_layer_loads_too():
    layer, other = (torch.nn.Linear(8, 8) for _ in range(2))
    sparsify(layer, [layer])
    sparsify_like(other, layer.state_dict())
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)


def test_sparsify_and_squash_are_idempotent():
    layer, mask = sparse_linear()
    sparsify(layer, [layer])
    assert torch.equal(layer.unpacked_mask(), mask)
    squash(layer)
    squash(layer)
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight != 0, mask)


@pytest.fixture
def _one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
def test_a_layer_that_fully_shard_has_taken_stays_fsdps():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(model[0], mesh=mesh)
    sparsify(model, find_targets(model, NM(2, 4), targets=["0"]).layers.values())
    assert isinstance(model[0], FSDPModule)
    assert isinstance(model[0], SparseLinear)
    out = model(torch.randn(3, 8))
    out.sum().backward()
    assert model[0].weight.grad is not None
    assert "weight_mask" in dict(model[0].named_buffers())
