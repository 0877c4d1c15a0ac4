import json
from dataclasses import replace

import pytest
import torch

from sparse_train import Magnitude, prune
from sparse_train.cli.main import main
from sparse_train.inspection import (
    BLOCK_2OF4,
    DTYPES_2OF4,
    LayerSparsity,
    summary,
)
from tests.conftest import tiny_llama


def pruned(dtype=torch.bfloat16):
    model = tiny_llama()
    prune(model, criterion=Magnitude(), ignore=["re:.*down_proj"])
    return model.to(dtype)


@pytest.mark.parametrize(
    ("changes", "fits", "reason"),
    [
        ({}, True, None),
        ({"pattern": "1:4", "dtype": torch.float16}, True, None),
        ({"kind": "SparseLinear"}, True, None),  # once it is squashed
        ({"pattern": "dense"}, False, "it is dense"),
        ({"pattern": "4:8"}, False, "its zeros are 4:8, not 2:4"),
        ({"pattern": "unstructured", "dtype": torch.float32}, False, "its zeros are unstructured, not 2:4"),
        ({"dtype": torch.float32}, True, "it is float32, and tensor cores"),
        ({"shape": (32, 72), "dtype": torch.float32}, False, "its shape 32 x 72 is not in multiples of 16"),
        ({"shape": (20, 64)}, False, "its shape 20 x 64 is not in multiples of 16"),
        ({"kind": "experts"}, False, "it is not a plain nn.Linear (experts)"),
    ],
)
def test_the_pattern_is_judged_then_the_dtype(changes, fits, reason):
    layer = replace(LayerSparsity("up", (32, 64), 1024, "2:4", torch.bfloat16), **changes)
    assert (layer.misfit_2of4 is None) == fits
    assert layer.why_not_2of4 == reason if reason is None else layer.why_not_2of4.startswith(reason)


def test_blocks_and_dtypes_are_those_of_this_torch():
    limits = torch.sparse.SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS
    for dtype in DTYPES_2OF4:
        assert (limits[dtype].sparse_min_rows, limits[dtype].sparse_min_cols) == (BLOCK_2OF4, BLOCK_2OF4)
    assert torch.float32 not in limits


def test_the_command_counts_in_the_dtype_on_disk(tmp_path, capsys, monkeypatch):
    pruned().save_pretrained(tmp_path / "model")
    main(["inspect", str(tmp_path / "model"), "--json"])
    found = json.loads(capsys.readouterr().out)  # one object and nothing else
    layers = {row["name"]: row for row in found["layers"]}
    up, down = layers["model.layers.0.mlp.up_proj"], layers["model.layers.0.mlp.down_proj"]
    assert (up["shape"], up["pattern"], up["sparsity"], up["dtype"]) == ([64, 32], "2:4", 0.5, "bfloat16")
    assert (up["dense_bytes"], up["runs_on_2of4_hardware"], up["why_not_2of4"]) == (4096, True, None)
    assert (down["fits_2of4"], down["runs_on_2of4_hardware"], down["why_not_2of4"]) == (False, False, "it is dense")
    assert found["dense_bytes"] == sum(row["dense_bytes"] for row in layers.values())

    monkeypatch.setenv("COLUMNS", "80")
    pruned(torch.float32).save_pretrained(tmp_path / "float32")
    for folder in ("model", "float32"):
        main(["inspect", str(tmp_path / folder)])
        shown = capsys.readouterr().out
        assert "18/22" in shown
        assert "it is dense" not in shown  # nothing is to be explained of layers that nobody has pruned
        assert ("fits 2:4; it is float32, and tensor cores compute" in shown) == (folder == "float32")
        assert "…" not in shown


@pytest.mark.parametrize("squash", [True, False])
def test_the_summary_of_a_model_fits_a_screen(squash):
    model = tiny_llama()
    prune(model, criterion=Magnitude(), squash=squash)
    *rows, last = summary(model).splitlines()
    assert len(rows) == 7 and all(len(row) <= 80 for row in rows)
    assert "up_proj            3  0.5000  2:4" in rows
    weights = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    share = weights / 2 / sum(p.numel() for p in model.parameters())
    assert f"0.5000 of their {weights:,} weights, {share:.4f} of all" in last and last.startswith("21 of 22 linear")
