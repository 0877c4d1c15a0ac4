import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from sparse_train import prune, sparse_layers, squash
from sparse_train.commands import cli
from sparse_train.criteria import Magnitude
from sparse_train.layers import masks
from sparse_train.packed.folder import pack_folder, unpack_folder
from sparse_train.packed.tensors import (
    load_packed,
    pack_weight,
    packed_bytes,
    read_metadata,
    save_packed,
    unpack_weight,
)
from tests.conftest import tiny_llama

FLOATS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(tensor):
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)) if tensor.dtype in FLOATS else found[name].equal(tensor)


@st.composite
def weights(draw):
    """Any bits at all, NaN payloads and -0.0 among them, with zeros in between."""
    dtype = draw(st.sampled_from(list(FLOATS)))
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 40)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    span = 2 ** (8 * dtype.itemsize - 1)
    raw = torch.randint(-span, span, shape, generator=generator).to(FLOATS[dtype])
    raw[torch.rand(shape, generator=generator) < 0.1] = -span  # -0.0
    raw[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.05, 0.5, 0.9, 1.0]))] = 0
    return raw.view(dtype)


@given(weights())
def test_a_weight_comes_back_bit_for_bit(weight):
    mask, values = pack_weight(weight)
    assert torch.equal(masks.unpack(mask, weight.shape[1]), bits(weight) != 0)
    assert mask.nbytes + values.nbytes == packed_bytes(*weight.shape, len(values), weight.itemsize)
    assert torch.equal(bits(unpack_weight(mask, values, weight.shape[1])), bits(weight))


@given(st.lists(weights(), min_size=1, max_size=4))
def test_a_file_comes_back_bit_for_bit(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("packed") / "file"
    state = {f"layer.{index}.weight": tensor for index, tensor in enumerate(tensors)}
    state |= {"bias": torch.zeros(7), "steps": torch.tensor(3), "empty": torch.empty(0, 4)}
    report = save_packed(state, path, {"format": "pt"})
    assert_same(load_packed(path), state)
    assert read_metadata(path) == {"format": "pt"}
    assert report.dense_bytes == sum(tensor.nbytes for tensor in state.values())
    assert report.packed_bytes == sum(tensor.nbytes for tensor in load_file(path).values()) <= report.dense_bytes


def test_what_is_stored(tmp_path):
    weight = torch.tensor([[0.0, 2.0, -0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 5.0]])
    report = save_packed({"w": weight}, tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as opened:
        metadata = opened.metadata()
        assert opened.get_tensor("w.packed_mask").tolist() == [[0b00000110, 0b00000010]]
        assert opened.get_tensor("w.kept_values").tolist() == [2.0, 0.0, 5.0]
        assert opened.get_tensor("w.kept_values")[1].signbit()
    assert metadata["sparse_train_packed"] == "1"
    assert json.loads(metadata["packed"]) == {"w": {"shape": [1, 10], "dtype": "float32"}}
    assert report.packed == {"w": (40, 2 + 12)}
    assert str(report).startswith("1 weights packed")


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1 / 32), (torch.bfloat16, 1 / 16)])
def test_weights_with_few_zeros_stay_dense(tmp_path, dtype, least):
    weight = torch.ones(64, 64, dtype=dtype)
    weight.view(-1)[: int(64 * 64 * least)] = 0
    assert not save_packed({"w": weight}, tmp_path / "dense").packed
    weight.view(-1)[: int(64 * 64 * least) + 1] = 0
    assert save_packed({"w": weight}, tmp_path / "packed").packed
    assert_same(load_packed(tmp_path / "packed"), {"w": weight})


def test_a_masked_model_is_packed_with_its_masks_folded_in(tmp_path):
    model = tiny_llama()
    prune(model, criterion=Magnitude(), squash=False)
    layer = sparse_layers(model)["model.layers.0.mlp.up_proj"]
    with torch.no_grad():
        layer.weight[layer.unpacked_mask()] = 0.0  # kept weights that happen to be zero are what they are
    report = save_packed(model, tmp_path / "file")
    assert len(report.packed) == 21
    found = load_packed(tmp_path / "file")
    assert found["lm_head.weight"] is found["model.embed_tokens.weight"]  # tied
    with pytest.raises(ValueError, match="holds masks"):
        save_packed(model.state_dict(), tmp_path / "other")
    squash(model)
    assert_same(found, model.state_dict())
    model.load_state_dict(found)


def test_views_and_experts(tmp_path):
    large = torch.randn(6, 10, 8)
    large[torch.rand_like(large) < 0.6] = 0
    state = {"experts": large, "part": torch.randn(100, 100)[:2, ::3], "turned": large[0].t()}
    report = save_packed(state, tmp_path / "file")
    assert set(report.packed) == {"experts", "turned"}
    assert_same(load_packed(tmp_path / "file"), state)
    assert (tmp_path / "file").stat().st_size < 4000


def test_what_cannot_be_read_says_why(tmp_path):
    with pytest.raises(ValueError, match="There is no packed file"):
        load_packed(tmp_path / "none")
    (tmp_path / "broken").write_bytes(b"x" * 50)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_packed(tmp_path / "broken")
    save_file({"w": torch.ones(2)}, tmp_path / "plain")
    with pytest.raises(ValueError, match="is not a packed file"):
        load_packed(tmp_path / "plain")
    weight = torch.zeros(4, 8)
    weight[0] = 1
    save_packed({"w": weight}, tmp_path / "file")
    with pytest.raises(ValueError, match="exists already"):
        save_packed({"w": weight}, tmp_path / "file")
    with pytest.raises(ValueError, match="a name that packed files use themselves"):
        save_packed({"w.packed_mask": weight}, tmp_path / "other")
    with safe_open(tmp_path / "file", "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(tmp_path / "file")
    save_file(tensors, tmp_path / "later", metadata={**metadata, "sparse_train_packed": "2"})
    with pytest.raises(ValueError, match="version 2 of the packed format"):
        load_packed(tmp_path / "later")
    short = {**tensors, "w.kept_values": tensors["w.kept_values"][1:]}
    save_file(short, tmp_path / "short", metadata=metadata)
    with pytest.raises(ValueError, match="Cannot unpack w of .*keeps 8 weights, and there are 7 values"):
        load_packed(tmp_path / "short")


def test_nothing_is_left_of_a_file_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("safetensors.torch.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_packed(nn.Linear(4, 4), tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("max_shard_size", ["1GB", "50KB"])
def test_a_folder_packed_and_unpacked_is_the_same(tmp_path, max_shard_size):
    model = tiny_llama()
    prune(model, criterion=Magnitude())
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size=max_shard_size)
    (tmp_path / "model" / "pruning.json").write_text("{}")
    (tmp_path / "model" / "adapter").mkdir()
    (tmp_path / "model" / "adapter" / "adapter_model.safetensors").write_bytes(b"trained")
    report = pack_folder(tmp_path / "model", tmp_path / "packed")
    assert len(report.packed) == 21
    assert all(packed == dense // 2 + dense // 16 for dense, packed in report.packed.values())
    assert size(tmp_path / "packed") < 0.8 * size(tmp_path / "model")
    assert not list((tmp_path / "packed").glob("model.safetensors"))
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    for name in names:
        before, after = tmp_path / "model" / name, tmp_path / "again" / name
        if before.is_dir():
            assert (after / "adapter_model.safetensors").read_bytes() == b"trained"
        elif name.endswith(".safetensors"):
            assert_same(load_file(after), load_file(before))
        else:
            assert after.read_bytes() == before.read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    with pytest.raises(ValueError, match="exists already and is not an empty folder"):
        unpack_folder(tmp_path / "packed", tmp_path / "again")


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    prune(model, criterion=Magnitude())
    model.save_pretrained("model")
    cli.main(["pack", "model", "packed"])
    assert "21 weights packed" in capsys.readouterr().out
    cli.main(["unpack", "packed", "again"])
    assert_same(load_file("again/model.safetensors"), load_file("model/model.safetensors"))
    with pytest.raises(SystemExit, match="There are no safetensors to pack in packed"):
        cli.main(["pack", "packed", "twice"])
    with pytest.raises(SystemExit, match="There is no packed file"):
        cli.main(["unpack", "model", "twice"])
