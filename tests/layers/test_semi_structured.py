import pytest
import torch
from torch import nn

from sparse_train import Magnitude, prune, sparse_layers
from sparse_train.layers.semi_structured import (
    BLOCK,
    DTYPES,
    to_sparse_semi_structured,
    why_not_device,
    why_not_module,
    why_not_weight,
)
from sparse_train.patterns import NM
from tests.conftest import tiny_llama


def two_of_four(out_features=32, in_features=64, dtype=torch.bfloat16):
    layer = nn.Linear(in_features, out_features, bias=False)
    with torch.no_grad():
        layer.weight *= NM(2, 4).mask(layer.weight.abs(), 0.5)
    return layer.to(dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "pattern", "reason"),
    [
        ((32, 64), torch.bfloat16, "2:4", None),
        ((32, 64), torch.float16, "1:4", None),
        ((32, 64), torch.float16, "dense", "it is dense"),
        ((32, 64), torch.float16, "4:8", "its zeros are 4:8, not 2:4"),
        ((32, 64), torch.float16, "unstructured", "its zeros are unstructured, not 2:4"),
        ((32, 64), torch.float32, "2:4", "its dtype is float32; bfloat16 and float16 can be 2:4"),
        ((32, 72), torch.float16, "2:4", "its shape 32 x 72 is not in multiples of 16"),
        ((20, 64), torch.float16, "2:4", "its shape 20 x 64 is not in multiples of 16"),
    ],
)
def test_weights(shape, dtype, pattern, reason):
    assert why_not_weight(shape, dtype, pattern) == reason


def test_blocks_and_dtypes_are_those_of_this_torch():
    limits = torch.sparse.SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS
    for dtype in DTYPES:
        assert (limits[dtype].sparse_min_rows, limits[dtype].sparse_min_cols) == (BLOCK, BLOCK)
    assert torch.float32 not in limits


@pytest.mark.parametrize(
    ("capability", "built", "reason"),
    [
        ((7, 5), True, "compute capability 7.5"),
        ((8, 0), True, None),
        ((9, 0), True, None),
        ((8, 6), False, "no cuSPARSELt"),
    ],
)
def test_devices(monkeypatch, capability, built, reason):
    assert why_not_device(torch.device("cpu")) == "it is on cpu, and 2:4 needs a CUDA GPU"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("torch.backends.cusparselt.is_available", lambda: built)
    found = why_not_device(torch.device("cuda", 0))
    assert found is None if reason is None else reason in found


def test_a_model_on_a_cpu_is_left_as_it_is_and_every_layer_has_its_reason():
    model = tiny_llama().bfloat16()
    prune(model, criterion=Magnitude(), ignore=["re:.*down_proj"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = to_sparse_semi_structured(model)
    assert report.converted == ()
    assert report.refused["model.layers.0.mlp.up_proj"].startswith("it is on cpu")
    assert report.refused["model.layers.0.mlp.down_proj"] == "it is dense"
    assert report.refused["lm_head"] == "its zeros are unstructured, not 2:4"  # the embedding of padding
    assert len(report.refused) == 22
    assert "0 layers converted, 22 unchanged\n  model.layers.0.self_attn.q_proj: it is on cpu" in str(report)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_masked_layers_and_other_classes():
    model = tiny_llama()
    prune(model, criterion=Magnitude(), squash=False)
    layer = next(iter(sparse_layers(model).values()))
    assert why_not_module(layer) == "it is masked; squash the model first"

    class Own(nn.Linear):
        pass

    assert why_not_module(Own(4, 4)) == "it is a Own, not a plain nn.Linear"


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_layers_that_can_are_converted_and_the_others_are_not(monkeypatch):
    """The compressing itself needs a GPU: here a stand-in shows what is given to it, and where its result goes."""
    given = []

    def compress(weight):
        given.append(weight)
        return weight.to_sparse_csr() * 1

    monkeypatch.setattr("sparse_train.layers.semi_structured.why_not_device", lambda device: None)
    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", compress)
    model = nn.Sequential(two_of_four(), two_of_four(20, 32), two_of_four(dtype=torch.float32))
    report = to_sparse_semi_structured(model)
    assert report.converted == ("0",)
    assert list(report.refused) == ["1", "2"]
    assert len(given) == 1 and given[0].is_contiguous() and not given[0].requires_grad
    assert model[0].weight.layout == torch.sparse_csr and not model[0].weight.requires_grad
    assert isinstance(model[0].weight, nn.Parameter)


@pytest.mark.skipif(
    not torch.cuda.is_available() or why_not_device(torch.device("cuda")) is not None, reason="needs a GPU with 2:4"
)
def test_outputs_on_a_gpu():
    layer = two_of_four(128, 256).cuda()
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    expected = layer(x)
    assert to_sparse_semi_structured(layer).converted == ("",)
    torch.testing.assert_close(layer(x), expected, rtol=2e-2, atol=2e-2)
