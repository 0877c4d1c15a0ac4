import json

import torch
from torch import nn

from sparse_train import Magnitude, prune
from sparse_train.commands import cli
from sparse_train.inspection import layer_sparsities
from sparse_train.packed.tensors import save_packed
from tests.conftest import tiny_llama


def pruned(dtype=torch.bfloat16):
    model = tiny_llama()
    prune(model, criterion=Magnitude(), ignore=["re:.*down_proj"])
    return model.to(dtype)


def test_sizes_are_those_of_a_packed_file(tmp_path):
    for dtype in (torch.bfloat16, torch.float32):
        model = pruned(dtype)
        report = save_packed(model, tmp_path / str(dtype))
        layers = {layer.name: layer for layer in layer_sparsities(model)}
        assert len(report.packed) == 18
        for key, (dense, packed) in report.packed.items():
            layer = layers[key.removesuffix(".weight")]
            assert (layer.dense_bytes, layer.packed_bytes) == (dense, packed)
        dense = layers["model.layers.0.mlp.down_proj"]
        assert dense.packed_bytes == dense.dense_bytes == 32 * 64 * dtype.itemsize


def test_which_layers_could_run_on_hardware():
    def reason(name, model):
        return {layer.name: layer.why_not_2of4 for layer in layer_sparsities(model)}[name]

    assert reason("model.layers.0.mlp.up_proj", pruned()) is None
    assert reason("model.layers.0.mlp.down_proj", pruned()) == "it is dense"
    assert "float32" in reason("model.layers.0.mlp.up_proj", pruned(torch.float32))
    masked = tiny_llama()
    prune(masked, criterion=Magnitude(), squash=False)
    assert reason("model.layers.0.mlp.up_proj", masked.bfloat16()) is None  # once it is squashed

    class Own(nn.Linear):
        pass

    assert layer_sparsities(Own(16, 16))[0].why_not_2of4 == "it is not a plain nn.Linear (Own)"


def test_the_command_counts_in_the_dtype_on_disk(tmp_path, capsys, monkeypatch):
    model = pruned()
    model.save_pretrained(tmp_path / "model")
    cli.main(["inspect", str(tmp_path / "model"), "--json"])
    found = json.loads(capsys.readouterr().out)  # one object and nothing else
    layers = {row["name"]: row for row in found["layers"]}
    assert found["packed_bytes"] == sum(row["packed_bytes"] for row in layers.values()) < found["dense_bytes"]
    up, down = layers["model.layers.0.mlp.up_proj"], layers["model.layers.0.mlp.down_proj"]
    assert (up["shape"], up["pattern"], up["sparsity"], up["dtype"]) == ([64, 32], "2:4", 0.5, "bfloat16")
    assert (up["dense_bytes"], up["packed_bytes"]) == (4096, 2048 + 256)
    assert (up["runs_on_2of4_hardware"], up["why_not_2of4"]) == (True, None)
    assert (down["runs_on_2of4_hardware"], down["why_not_2of4"]) == (False, "it is dense")

    monkeypatch.setenv("COLUMNS", "80")
    cli.main(["inspect", str(tmp_path / "model")])
    shown = capsys.readouterr().out
    assert "18/22" in shown
    assert "not on a 2:4 GPU, it is dense: model.layers.0.mlp.down_proj" in shown
    assert "…" not in shown
