import functools
import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJConfig, GPTJForCausalLM

from sparse_train import OWL, Criterion, Magnitude, SparseGPT, Unstructured, Wanda, prune
from sparse_train.model_folders import (
    WeightFiles,
    copy_companions,
    copy_others,
    model_without_weights,
    write_index,
)
from sparse_train.oneshot import walk
from sparse_train.oneshot.disk import unfinished
from sparse_train.oneshot.prune import prune_checkpoint
from tests.conftest import tiny_gemma3, tiny_llama, tiny_tokenizer
from tests.oneshot.test_experts import tiny_moe
from tests.oneshot.test_prune import tiny
from tests.ranks import launch


def save(model, folder, **how):
    model.save_pretrained(folder, **how)
    return folder


def assert_equal(folder, expected):
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert found.state_dict().keys() == expected.state_dict().keys()
    for (name, a), (_, b) in zip(found.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


FAMILIES = [
    *((tiny, family) for family in ("llama", "gpt2", "gemma2", "opt", "bloom", "gpt_neox")),
    *((tiny_moe, family) for family in ("mixtral", "qwen3_moe", "gpt_oss")),
]


@pytest.mark.parametrize(("make", "family"), FAMILIES, ids=[family for _, family in FAMILIES])
def test_block_by_block_from_disk_equals_in_memory(make, family, tmp_path, ids):
    model = make(family)
    save(model, tmp_path / "dense")
    before = {f: f.read_bytes() for f in (tmp_path / "dense").iterdir()}
    report = prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids, "2:4")
    expected = prune(model, ids, "2:4")
    assert_equal(tmp_path / "sparse", model)
    assert report.sparsity == expected.sparsity and report.layers.keys() == expected.layers.keys()
    assert {f: f.read_bytes() for f in (tmp_path / "dense").iterdir()} == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dense", "sparse"]


@pytest.mark.parametrize("criterion", [Magnitude(), Wanda()])
def test_blocks_whose_keys_do_not_begin_as_in_the_model(criterion, tmp_path, ids):
    how, model = {"criterion": criterion, "targets": ["model.language_model.layers"]}, tiny_gemma3()
    save(model, tmp_path / "dense")
    before = WeightFiles(tmp_path / "dense").files
    assert "language_model.model.layers.0.mlp.up_proj.weight" in before
    prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids, **how)
    prune(model, ids, **how)
    assert_equal(tmp_path / "sparse", model)
    assert WeightFiles(tmp_path / "sparse").files.keys() == before.keys()


def test_a_key_in_two_shards_is_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"x": torch.ones(1), name: torch.ones(1)}, tmp_path / name)
    with pytest.raises(ValueError, match="x is in a and in b"):
        write_index(tmp_path, ["a", "b"])


@pytest.mark.parametrize(
    "how",
    [
        {"criterion": SparseGPT(), "mask_structure": "unstructured", "sparsity": 0.5},
        {"criterion": Wanda(), "mask_structure": "unstructured", "sparsity": 0.6, "distribution": OWL(owl_m=2.0)},
        {"criterion": Magnitude()},
        {"criterion": Wanda(), "ignore": ["re:.*layers.1"]},
        {"criterion": Wanda(), "autocast": torch.bfloat16},
    ],
    ids=["sparsegpt", "owl", "magnitude", "ignore", "autocast"],
)
def test_every_method_and_setting(how, tmp_path, ids):
    model = tiny_llama(num_hidden_layers=4)
    save(model, tmp_path / "dense", max_shard_size="50KB")  # several files
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", None if how["criterion"] == Magnitude() else ids, **how)
    prune(model, ids, **how)
    assert_equal(tmp_path / "sparse", model)
    assert (tmp_path / "sparse" / "tokenizer.json").is_file()
    index = json.loads((tmp_path / "sparse" / "model.safetensors.index.json").read_text())
    assert len({file for key, file in index["weight_map"].items() if ".layers." in key}) == 4


def test_a_killed_run_goes_on_at_the_block_it_was_in(tmp_path, ids, monkeypatch):
    model = tiny_llama(num_hidden_layers=4)
    save(model, tmp_path / "dense")
    real, pruned = walk._prune_layers, []

    def killed(layers, *args):
        if len(pruned) == 2:
            raise KeyboardInterrupt
        pruned.append(next(iter(layers)))
        return real(layers, *args)

    arguments = (tmp_path / "dense", tmp_path / "sparse", ids, "2:4")
    monkeypatch.setattr(walk, "_prune_layers", killed)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(*arguments)
    assert not (tmp_path / "sparse").exists()
    with pytest.raises(ValueError, match="unfinished run with other settings"):
        prune_checkpoint(*arguments[:3], "4:8")
    with pytest.raises(ValueError, match=r"unfinished run with other settings \(autocast=None\)"):
        prune_checkpoint(*arguments, autocast=torch.bfloat16)
    again = []

    def counted(layers, *args):
        again.append(next(iter(layers)))
        return real(layers, *args)

    monkeypatch.setattr(walk, "_prune_layers", counted)
    report = prune_checkpoint(*arguments)
    assert [name.split(".")[2] for name in pruned + again] == ["0", "1", "2", "3"]
    assert len(report.layers) == 28
    prune(model, ids, "2:4")
    assert_equal(tmp_path / "sparse", model)


def prune_on_a_full_disk(folder, ids):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    real = walk._prune_layers

    def fills(layers, *args):
        if "model.layers.1.mlp.up_proj" in layers:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return real(layers, *args)

    walk._prune_layers = fills
    with pytest.raises(OSError) as caught:
        prune_checkpoint(folder / "dense", folder / "sparse", ids, "2:4")
    return str(caught.value)


def test_a_full_disk_is_said_and_the_finished_blocks_stay(tmp_path, ids, caplog):
    model = tiny_llama()
    save(model, tmp_path / "dense")
    assert "could not be written" in launch.alone(prune_on_a_full_disk, tmp_path, ids)
    assert not (tmp_path / "sparse").exists()
    assert not list((tmp_path / ".sparse.partial").glob(".*.writing"))
    prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids, "2:4")
    assert "Continuing after 1 finished blocks of 3" in caplog.text
    prune(model, ids, "2:4")
    assert_equal(tmp_path / "sparse", model)


def cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def absurd_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])


def index_of(content):
    def write(folder):
        (folder / "model.safetensors.index.json").write_text(content)
        (folder / "model.safetensors").unlink(missing_ok=True)

    return write


def drop_a_file(folder):
    next(folder.glob("model-00002-of-*.safetensors")).unlink()


def drop_weights(part):
    def drop(folder):
        file = folder / "model.safetensors"
        kept = {key: value for key, value in load(file.read_bytes()).items() if part not in key}
        save_file(kept, file, metadata={"format": "pt"})

    return drop


@pytest.mark.parametrize(
    ("damage", "how", "arguments", "message"),
    [
        (cut_off, {}, {}, "Cannot load .*model.safetensors'. "),
        (absurd_header, {}, {}, "Cannot load .*model.safetensors'. "),
        (index_of("[]"), {}, {}, r"Cannot load .*index.json'. "),
        (index_of("{}"), {}, {}, r"Cannot load .*index.json'. "),
        (index_of('{"weight_map": {"x": 1}}'), {}, {}, r"Cannot load .*index.json'. "),
        (index_of('{"weight_'), {}, {}, r"Cannot load .*index.json'. "),
        (index_of('{"weight_map": {"x": "/etc/passwd"}}'), {}, {}, "which is outside its folder"),
        (drop_a_file, {"max_shard_size": "100KB"}, {}, "Cannot load .*No such file"),
        (drop_weights("layers.0.mlp"), {}, {}, "has no weights for model.layers.0.mlp"),
        (drop_weights("layers.1"), {}, {}, r"is known as model.layers.1.\*. Load the model and use prune"),
        (lambda f: (f / "model.safetensors").unlink(), {}, {}, "only safetensors can be read block by block"),
        (None, {}, {"targets": ["lm_head"]}, "lm_head"),
        (None, {}, {"mask_structure": Unstructured("model"), "sparsity": 0.5}, "never in memory here"),
        (None, {}, {"batches": []}, "There is no calibration data"),
    ],
)
def test_errors_leave_nothing_behind(tmp_path, ids, damage, how, arguments, message):
    save(tiny_llama(tie_word_embeddings=False), tmp_path / "dense", **how)
    if damage:
        damage(tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", **({"batches": ids} | arguments))
    assert [f.name for f in tmp_path.iterdir()] == ["dense"]


GPTJ = GPTJConfig(vocab_size=128, n_embd=32, n_layer=1, n_head=4, n_positions=1024, rotary_dim=8)
WITH_BUFFERS = {
    "gptj": lambda: GPTJForCausalLM(GPTJ),  # computes its positions in the default dtype
    "llama": lambda: tiny_llama(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    **{family: functools.partial(tiny, family) for family in ("gemma3_text", "bloom", "gpt_neox", "gpt2")},
}


@pytest.mark.parametrize("family", WITH_BUFFERS)
def test_buffers_of_a_16_bit_model_are_those_of_from_pretrained(family, tmp_path):
    save(WITH_BUFFERS[family]().bfloat16(), tmp_path)
    expected = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").named_buffers())
    model = model_without_weights(tmp_path, WeightFiles(tmp_path))
    found = dict(model.named_buffers())
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == buffer.dtype for name, buffer in expected.items())
    assert all(torch.equal(found[name], buffer) for name, buffer in expected.items())
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_all_chat_templates_go_along(tmp_path, ids):
    save(tiny_llama(), tmp_path / "dense")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "dense")
    prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids, "2:4")
    found = AutoTokenizer.from_pretrained(tmp_path / "sparse").chat_template
    assert found == AutoTokenizer.from_pretrained(tmp_path / "dense").chat_template
    assert found.keys() == {"default", "tool_use"}


def test_of_one_file_and_an_index_the_file_is_read_as_in_transformers(tmp_path, ids):
    other = tiny_llama()
    torch.nn.init.ones_(other.model.layers[0].mlp.up_proj.weight)
    save(other, tmp_path / "dense", max_shard_size="100KB")
    save(tiny_llama(), tmp_path / "single")
    (tmp_path / "single" / "model.safetensors").rename(tmp_path / "dense" / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids, "2:4")
    prune(expected, ids, "2:4")
    assert_equal(tmp_path / "sparse", expected)


def test_non_finite_activations_are_found(tmp_path, ids):
    model = tiny_llama()
    model.model.layers[0].input_layernorm.weight.data[3] = torch.nan
    save(model, tmp_path / "dense")
    with pytest.raises(ValueError, match=r"layers\.0.*activations are not finite"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids, "2:4")
    assert [f.name for f in tmp_path.iterdir()] == ["dense"]


def test_half_precision_checkpoints_stay_half(tmp_path, ids):
    model = tiny_llama().to(torch.bfloat16)
    save(model, tmp_path / "dense")
    prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids, "2:4")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype="auto")
    assert found.dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")  # its buffers are float32
    prune(model, ids, "2:4")
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True))


def test_old_buffers_in_a_checkpoint_go_along(tmp_path, ids):
    model = tiny("gpt2")
    save(model, tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    # as the hub's GPT-2
    hub = {key.removeprefix("transformer."): value for key, value in load(file.read_bytes()).items()}
    hub |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8) for i in range(3)}
    save_file(hub, file, metadata={"format": "pt"})
    prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids, "2:4")
    prune(model, ids, "2:4")
    assert_equal(tmp_path / "sparse", model)
    index = json.loads((tmp_path / "sparse" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == hub.keys()


def test_a_kill_before_the_last_rename_is_finished_by_the_same_call_only(tmp_path, ids, monkeypatch):
    save(tiny_llama(), tmp_path / "dense")
    real = Path.rename

    def killed(self, target):
        if Path(target).name == "sparse":
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids, "2:4")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="unfinished run with other settings"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", None, "1:4", criterion=Magnitude())
    assert prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids, "2:4").sparsity == pytest.approx(0.5)


def test_missing_embeddings_and_quantised_checkpoints_are_refused(tmp_path, ids):
    save(tiny_llama(), tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    whole = load(file.read_bytes())  # load_file may map the file, which is written next
    save_file({k: v for k, v in whole.items() if "embed" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no weights for model.embed_tokens.weight"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids, "2:4")
    narrow = {k: v.to(torch.float8_e4m3fn) if "proj" in k else v for k, v in whole.items()}
    save_file(narrow, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is quantised"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids, "2:4")
    assert [f.name for f in tmp_path.iterdir()] == ["dense"]


class _Mine(Criterion):  # no dataclass
    needs_activations = True

    def scores(self, layer):
        return layer.weight_OI.float().abs() * layer.norm_I


def test_a_criterion_of_ones_own_goes_on_too(tmp_path, ids, monkeypatch):
    save(tiny_llama(), tmp_path / "dense")
    real, calls = walk._prune_layers, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(walk, "_prune_layers", killed)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids, "2:4", criterion=_Mine())
    report = prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids, "2:4", criterion=_Mine())
    assert report.sparsity == 0.5
    assert len(calls) == 2 + 2


@pytest.mark.parametrize("stop", [RuntimeError("CUDA out of memory"), KeyboardInterrupt()])
def test_a_run_that_stopped_ahead_of_its_first_block_is_in_nobodys_way(stop, tmp_path, ids, monkeypatch):
    save(tiny_llama(), tmp_path / "dense")

    def stopped(*args):
        raise stop

    with monkeypatch.context() as patched:
        patched.setattr(walk, "_prune_layers", stopped)
        with pytest.raises(type(stop)):
            prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids, "2:4")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids[:1], "4:8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "sparse"]


def test_two_runs_cannot_write_to_one_folder(tmp_path, ids):
    save(tiny_llama(), tmp_path / "dense")
    with unfinished(tmp_path / "sparse", ["another run"]) as work:
        with pytest.raises(ValueError, match="Another process is writing"):
            prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids, "2:4")
        (work / "mine").touch()
    assert [path.name for path in (tmp_path / "sparse").iterdir()] == ["mine"]


def prune_until_killed(folder, ids):
    real = walk._prune_layers

    def killed(layers, *args):
        if "model.layers.1.mlp.up_proj" in layers:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(layers, *args)

    walk._prune_layers = killed
    prune_checkpoint(folder / "dense", folder / "sparse", ids, "2:4")


def test_a_run_that_was_killed_holds_no_lock(tmp_path, ids):
    save(tiny_llama(), tmp_path / "dense")
    with pytest.raises(launch.RankFailed, match="ended with -9"):
        launch.alone(prune_until_killed, tmp_path, ids)
    assert (tmp_path / ".sparse.partial" / ".lock").exists()
    model = tiny_llama()
    prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids, "2:4")
    prune(model, ids, "2:4")
    assert_equal(tmp_path / "sparse", model)
    assert not {".lock", "progress.json"} & {path.name for path in (tmp_path / "sparse").iterdir()}


@pytest.mark.parametrize("copy", [copy_companions, copy_others])
def test_links_out_of_a_model_folder_are_not_followed(copy, tmp_path, caplog):
    secret, source, out = tmp_path / "secret", tmp_path / "model", tmp_path / "out"
    for folder in (secret, source, out):
        folder.mkdir()
    (secret / "key").write_text("secret")
    (secret / "one.jinja").write_text("secret")
    (source / "real").write_text("terms")
    (source / "LICENSE").symlink_to(source / "real")
    (source / "NOTICE.txt").symlink_to(secret / "key")
    (source / "additional_chat_templates").symlink_to(secret)
    copy(source, out)
    assert (out / "LICENSE").read_text() == "terms" and not (out / "LICENSE").is_symlink()
    assert not any(path.is_file() and path.read_text() == "secret" for path in out.rglob("*"))
    assert "NOTICE.txt is a link to a file outside its folder" in caplog.text


def test_the_links_of_the_hubs_cache_are(tmp_path):
    source, out = tmp_path / "models--a--b" / "snapshots" / "123", tmp_path / "out"
    source.mkdir(parents=True)
    out.mkdir()
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "456").write_text("{}")
    (source / "config.json").symlink_to(Path("../../blobs/456"))
    copy_companions(source, out)
    assert (out / "config.json").read_text() == "{}"


def test_how_the_source_was_pruned_does_not_go_with_other_zeros(tmp_path, ids):
    save(tiny("llama"), tmp_path / "dense")
    (tmp_path / "dense" / "pruning.json").write_text("{}")
    prune_checkpoint(tmp_path / "dense", tmp_path / "sparse", ids, "2:4")
    assert (tmp_path / "sparse" / "config.json").exists() and not (tmp_path / "sparse" / "pruning.json").exists()
