"""``inspect --verify``: the zeros of files against what their folder says about its pruning."""

import json

import pytest
from safetensors.torch import load, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from sparse_train import Explicit, FirstWindow, Magnitude, prune
from sparse_train.arguments import describe
from sparse_train.callbacks import DynamicPruning
from sparse_train.cli.main import main
from sparse_train.export import ModelCard, export_checkpoint, export_model
from sparse_train.export.hf_folder import renamed
from sparse_train.export.verify import pruning_json, verify
from sparse_train.model_folders import PRUNING_FILE, WeightFiles
from sparse_train.models.causal_lm import CausalLM
from tests.callbacks.runs import loader, trainer
from tests.conftest import tiny_gemma3, tiny_llama, tiny_tokenizer
from tests.integrations import runs

pytestmark = pytest.mark.filterwarnings("ignore")
UP = "model.layers.1.mlp.up_proj"
STAGE = {"mask_structure": "2:4", "wanted_sparsity": 0.5, "distribution": "Uniform()"}


def change(folder, key, change_OI):
    """Change a weight of a folder in place."""
    file = WeightFiles(folder).files[key]
    state = load(file.read_bytes())
    change_OI(state[key])
    save_file(state, file, metadata={"format": "pt"})


def fill(row, weights):
    """Fill this many of the zeros of a row."""

    def filled(weight_OI):
        weight_OI[row, (weight_OI[row] == 0).nonzero()[:weights, 0]] = 1.0

    return filled


def move(weight_OI):
    """A zero from a row to the next."""
    fill(0, 1)(weight_OI)
    weight_OI[1, weight_OI[1].nonzero()[0]] = 0


def set_zero(weight_OI):
    weight_OI[3] = 0


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "model"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


GROUP = "--mask_structure=Unstructured --mask_structure.group="
BY_NAME = {f"re:.*layers.{block}": 0.4 + block / 10 for block in range(3)}
BLOCKS = "--distribution=" + json.dumps(
    {"class_path": "Explicit", "init_args": {"layers": BY_NAME}}, separators=(",", ":")
)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("--mask_structure=2:4", "2:4 at a sparsity of 0.5 has 1024 zeros; found 1023, and 1 of the expected"),
        (
            "--mask_structure=unstructured --sparsity=0.6",
            "unstructured at a sparsity of 0.6 has 1216 zeros; found 1215",
        ),
        ("--mask_structure=unstructured --sparsity=0.6 --streaming", "unstructured at a sparsity of 0.6"),
        (f"{GROUP}layer --sparsity=0.55", "unstructured (layer) at a sparsity of 0.55 has 1126 zeros; found 1125"),
        (f"{GROUP}model --sparsity=0.5", "unstructured (layer) at"),
        (f"--mask_structure=unstructured --sparsity=0.5 {BLOCKS}", "unstructured at a sparsity of 0.5 has 1024"),
    ],
)
def test_what_prune_writes_and_one_weight_that_is_not_zero(dense, tmp_path, options, found, capsys):
    out = tmp_path / "out"
    main(["prune", str(dense), str(out), "--criterion=Magnitude", *options.split()])
    change(out, "model.layers.2.mlp.up_proj.weight", set_zero)  # sparser than asked for
    capsys.readouterr()
    main(["inspect", str(out), "--verify", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["layers"] == 21 and result["zeros_kept"] > 0 and 0.49 < result["sparsity"] < 0.61
    change(out, f"{UP}.weight", fill(0, 1))
    with pytest.raises(SystemExit) as error:
        main(["inspect", str(out), "--verify"])
    assert f"{UP}: {found}" in error.value.code


def test_weights_that_are_stored_transposed(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    main(["prune", str(tmp_path / "dense"), str(tmp_path / "out"), "--criterion=Magnitude"])
    assert verify(tmp_path / "out") == {"layers": 8, "sparsity": 0.5, "zeros_kept": 0}


def test_what_a_run_exports_and_a_model_that_is_not_that_of_the_run(dense, tmp_path):
    settings = {"update_freq": 2, "first_mask": FirstWindow(), "squash": False}
    pruning = DynamicPruning("unstructured", 0.5, distribution=Explicit(BY_NAME), **settings)
    run = trainer(tmp_path, pruning, max_steps=2)
    run.fit(CausalLM(str(dense)), loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    out = export_checkpoint(tmp_path / "x.ckpt", tmp_path / "out")
    assert verify(out)["layers"] == 21
    record = json.loads((out / PRUNING_FILE).read_text())
    assert record["stages"][0]["distribution"] == describe(Explicit(BY_NAME))  # as prune writes it
    assert record["layers"].keys() == {n.removeprefix("model.") for n in pruning.pruning_json["layers"]}
    with pytest.raises(ValueError, match=r"(?s)layers\.0\.self_attn\.q_proj: .* found 0, .*and 12 more"):
        export_model(tiny_llama(), None, tmp_path / "other", ModelCard(pruning=record))
    assert not (tmp_path / "other").exists()
    sparsest = next(iter(pruning.updater.layers.values())).weight_mask[3]
    sparsest.zero_()  # as where a model has had zeros beyond the pattern
    assert renamed(pruning_json(pruning.updater.settings(), 0.5, pruning.updater.layers)) == record
    change(out, f"{UP}.weight", move)
    with pytest.raises(ValueError, match=f"{UP}: unstructured at a sparsity of 0.5 has 1024 zeros; found 1024, and 1 "):
        verify(out)
    none = record | {"layers": dict.fromkeys(record["layers"], 0.0)}  # as of masks that keep everything
    with pytest.raises(ValueError, match="all 21 layers: expected a sparsity of 0.5, found 0"):
        export_model(tiny_llama(), None, tmp_path / "other", ModelCard(pruning=none))


def test_keys_that_are_not_the_names_of_the_model_in_the_middle_of_a_schedule(tmp_path):
    """N:M goes through whole counts: at a sparsity of 0.3, 2:4 is 3:4."""
    model = tiny_gemma3()
    layers = prune(model, None, "3:4", criterion=Magnitude(), targets=["model.language_model.layers"]).layers
    record = {"stages": [STAGE | {"wanted_sparsity": 0.3}], "layers": dict.fromkeys(layers, 0.25)}
    out = export_model(model, None, tmp_path / "out", ModelCard(pruning=record))
    assert verify(out) == {"layers": 14, "sparsity": 0.25, "zeros_kept": 0}
    up = "model.language_model.layers.0.mlp.up_proj"
    change(out, "language_model.model.layers.0.mlp.up_proj.weight", fill(0, 1))
    with pytest.raises(ValueError, match=f"{up}: 2:4 at a sparsity of 0.3 has 512 zeros; found 511, and 1 of"):
        verify(out)


def test_what_the_trainer_writes(tmp_path):
    run = runs.trainer(tmp_path, runs.pruning(), save_strategy="steps", save_steps=4, max_steps=4)
    run.train()
    run.save_model()
    for folder in (tmp_path / "checkpoint-4", tmp_path):
        assert verify(folder) == {"layers": 14, "sparsity": 0.5, "zeros_kept": 0}
        change(folder, f"{UP}.weight", fill(5, 3))
        with pytest.raises(ValueError, match=f"{UP}: 2:4 at a sparsity of 0.5 has 1024 zeros; found 1021, and 3 of"):
            verify(folder)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "pruning.json'. It says what zeros should be"),
        ("[]", "Cannot load .*pruning.json"),
        (f'{{"stages": [{json.dumps(STAGE)}], "layers": {{}}}}', "no layer is named"),
    ],
)
def test_folders_that_record_nothing(tmp_path, record, message):
    out = export_model(tiny_llama(), None, tmp_path / "out")
    if record is not None:
        (out / PRUNING_FILE).write_text(record)
    with pytest.raises(ValueError, match=message):
        verify(out)
