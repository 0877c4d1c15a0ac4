"""Damaged files of every kind that a command reads: one line that names the file or its folder, and no output."""

import copy
import json
import os
import shutil
import struct

import pytest
import torch

from sparse_train import Magnitude, MaskUpdater
from sparse_train.cli.main import main
from tests.conftest import tiny_llama, tiny_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("elsewhere")]
INDEX, CONFIG, SHARD = "model.safetensors.index.json", "config.json", "model-00001-of-00002.safetensors"


def refused(*command):
    with pytest.raises(SystemExit) as end:
        main(list(map(str, command)))
    message = end.value.code  # a text, with which Python exits with code 1
    assert isinstance(message, str) and "\n" not in message and len(message) < 800
    assert message.startswith(f"sparse-train {command[0]}: ") and "bad" in message


# --- model folders ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "model"
    tiny_llama(num_hidden_layers=1).save_pretrained(folder, max_shard_size="50KB")
    tiny_tokenizer().save_pretrained(folder)
    assert (folder / SHARD).is_file()
    return folder


def with_header(header: bytes):
    return lambda whole: struct.pack("<Q", len(header)) + header + whole


def entry(**changes):
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}).encode()


def changed(**changes):
    return lambda whole: json.dumps(json.loads(whole) | changes).encode()


DAMAGES = [
    *((INDEX, lambda _, text=text: text) for text in (b"", b"[]", b"{}", b"\xff\xfe")),
    *((INDEX, changed(weight_map=value)) for value in ([], {"a": 3}, {"a": "nowhere.safetensors"})),
    *((SHARD, lambda whole, end=end: whole[:end]) for end in (0, 50, -10)),
    *((SHARD, with_header(text)) for text in (b"[]", entry(dtype="X9"), entry(shape=[-1]))),
    (SHARD, with_header(entry(shape=[10**9], data_offsets=[0, 4 * 10**9]))),
    (SHARD, lambda _: struct.pack("<Q", 2**62) + b"{}"),
    *((CONFIG, lambda _, text=text: text) for text in (b"", b"[]", b"\xff\xfe")),
    *((CONFIG, changed(hidden_size=size)) for size in ("big", 48)),
    (CONFIG, changed(num_attention_heads=0)),
    (CONFIG, changed(vocab_size=10**15)),
    (CONFIG, changed(model_type="nothing")),
    (CONFIG, changed(dtype="float33")),
    (CONFIG, changed(rope_parameters=3)),
    *(("tokenizer.json", lambda _, text=text: text) for text in (b"", b"[]")),
    ("tokenizer_config.json", lambda _: b"[]"),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_model_folders(name, damage, sharded, text_file):
    bad = shutil.copytree(sharded, "bad")
    path = os.path.join(bad, name)
    with open(path, "rb") as file:
        whole = file.read()
    with open(path, "wb") as file:
        file.write(damage(whole))
    if "token" not in name:
        refused("inspect", bad)
    calibration = [f"--text={text_file}", "--num_calibration_samples=1", "--max_seq_length=16"]
    refused("prune", bad, "bad_out", "--streaming=true", *calibration)
    assert not os.path.exists("bad_out/config.json")


# --- checkpoints, the state in them, and records of runs -------------------------------------------------------------

GARBAGE = [0.5, "x", None, [], {"a": 1}, float("nan"), torch.zeros(3)]
NAME = "model.model.layers.0.self_attn.q_proj.weight"


def run(**state):
    model = torch.nn.ModuleDict({"model": tiny_llama(num_hidden_layers=1)})
    return model, MaskUpdater(model, "2:4", criterion=Magnitude(), update_freq=2, total_steps=8, **state)


@pytest.fixture(scope="module")
def checkpoint():
    """What an export reads of a run of CausalLM with DynamicPruning."""
    model, updater = run()
    return {
        "pytorch-lightning_version": "2.6",
        "state_dict": model.state_dict(),
        "callbacks": {"DynamicPruning": updater.state_dict()},
        "model_config": model["model"].config.to_dict(),
        "generation_config": model["model"].generation_config.to_dict(),
    }


def replaced(content, *path_and_value):
    *path, last, value = path_and_value
    found = inner = copy.deepcopy(content)
    for key in path:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return found


PARTS = [
    *(("state_dict", value) for value in (3, None)),
    *(("state_dict", NAME, value) for value in (3, torch.zeros(3), ...)),
    # of masks also what would be a dense layer in silence
    *(("state_dict", f"{NAME}_mask", value) for value in (3, torch.zeros(3), torch.full((32, 4), 255), ...)),
    *(("callbacks", value) for value in (3, [])),
    *(("callbacks", "DynamicPruning", value) for value in (3, "x", {"a": 1})),
    *(("callbacks", "DynamicPruning", key, ...) for key in ("settings", "timing", "steps", "masks", "sparsity")),
    *(("model_config", value) for value in (3, None)),
    *(("model_config", "hidden_size", value) for value in ("x", 48)),
    *(("model_config", "model_type", value) for value in ("nothing", ...)),
]


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_exports_of_checkpoints(part, checkpoint):
    torch.save(replaced(checkpoint, *part), "bad.ckpt")
    refused("export", "bad.ckpt", "out")
    assert not os.path.exists("out")


@pytest.mark.parametrize("name", [NAME, "model.model.norm.weight"])
def test_weights_that_are_not_numbers_are_not_exported(name, checkpoint):
    state = checkpoint["state_dict"]
    torch.save(replaced(checkpoint, "state_dict", name, state[name] * float("nan")), "bad.ckpt")
    with pytest.raises(SystemExit, match=f"{name.removeprefix('model.')} has weights that are infinite or NaN"):
        main(["export", "bad.ckpt", "out"])
    assert not os.path.exists("out")


def test_an_undamaged_checkpoint_is_exported(checkpoint):
    torch.save(checkpoint, "good.ckpt")
    main(["export", "good.ckpt", "out"])
    assert os.path.exists("out/model.safetensors")


@pytest.mark.parametrize("key", ["settings", "masks", "norms", "timing", "steps", "last_update", "first_rows"])
def test_states_of_runs(key, checkpoint):
    state = checkpoint["callbacks"]["DynamicPruning"]
    for garbage in [*GARBAGE, ...]:
        with pytest.raises(
            ValueError, match="state of the run is no updater's|was written with|did not prune the same"
        ):
            run(state=replaced(state, key, garbage))
    for garbage in GARBAGE:
        if garbage is not None:
            with pytest.raises(ValueError, match="state of the run is no updater's"):
                run(state=garbage)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "{}", '{"finished": false, "step": "x", "states": 3}'])
def test_records_of_runs(text):
    os.mkdir("bad")
    with open("bad/run.json", "w") as file:
        file.write(text)
    refused("report", "bad")
