"""The tables of docs/migrating.md, read and run: what stands in their last column does what stands before it."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from sparse_train.cli import main as cli
from sparse_train.cli.evaluate import evaluate
from sparse_train.cli.parser import parser_of, spelt_out
from sparse_train.cli.prune import prune
from tests.conftest import tiny_llama, tiny_tokenizer
from tests.test_recipes import WithoutObjects, lightning_cli

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()
# Of the sources that the page names, and two that older recipes have.
FIELDS = """
sparsity sparsity_profile mask_structure owl_m owl_lmbda targets ignore sequential_targets sequential_update block_size
dampening_frac percdamp preserve_sparsity_mask offload_hessians quantize init_sparsity final_sparsity start end update
update_scheduler scheduler_args leave_enabled apply_globally"""
FLAGS = """
--model --seed --nsamples --sparsity_ratio --sparsity_type --prune_method --cache_dir --use_variant --save --save_model
--eval_zero_shot"""


def rows(heading: str, columns: str) -> list[list[str]]:
    section = PAGE[PAGE.index(f"\n## {heading}\n") :].partition("\n## ")[2]
    table = re.search(rf"^\| {columns} \|\n\| --- .*\n((?:\|.*\n)+)", section, re.M)
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table[1].splitlines()]


def code(cell: str) -> str:
    found = re.search(r"`(.*?)`", cell)
    return found[1] if found else ""


MODIFIERS = rows("llm-compressor", r"field \| theirs \| here")
SCRIPTS = rows("The scripts of Wanda", r"theirs \| here")
OF_FIELDS = [(code(theirs), code(ours)) for _, theirs, ours in MODIFIERS if theirs and code(ours).startswith("--")]
OF_FLAGS = [(code(theirs), code(ours)) for theirs, ours in SCRIPTS if code(ours).startswith("--")]


@pytest.fixture
def run(tmp_path, monkeypatch, text_file):
    """Prune a model with a head of its own, by some options; its weights before and after, and the record."""
    monkeypatch.chdir(tmp_path)
    model = tiny_llama(tie_word_embeddings=False)
    model.save_pretrained("ID")
    tiny_tokenizer().save_pretrained("ID")

    def run(options: str):
        given = shlex.split(options)
        small = ["--num_calibration_samples=4", "--max_seq_length=32", f"--text={text_file}", "--out=DIR"]
        cli.main(["prune", "ID", *given, *(each for each in small if each.partition("=")[0] not in given)])
        pruned = AutoModelForCausalLM.from_pretrained("DIR").state_dict()
        return model.state_dict(), pruned, json.loads(Path("DIR/pruning.json").read_text())

    return run


def zeros(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {name.removesuffix(".weight"): weight == 0 for name, weight in weights.items() if "embed" not in name}
    return {name: mask_OI for name, mask_OI in found.items() if mask_OI.any()}


def counts_n_pruned(masks: dict[str, torch.Tensor], word: str) -> bool:
    n, m = map(int, word.split(":"))
    return all((mask.reshape(-1, m).sum(1) == n).all() for mask in masks.values())


def test_every_field_and_flag_is_in_a_table():
    named = {name for field, theirs, _ in MODIFIERS for name in re.findall(r"\w+", field + theirs)}
    assert named >= set(FIELDS.split())
    assert {flag for theirs, _ in SCRIPTS for flag in re.findall(r"--\w+", theirs)} == set(FLAGS.split())
    assert len(OF_FIELDS) >= 13 and len(OF_FLAGS) >= 11


@pytest.mark.parametrize(("theirs", "ours"), OF_FIELDS)
def test_fields_of_llm_compressor(theirs, ours, run):
    ((modifier, fields),) = yaml.safe_load(theirs.replace("\\", "\\\\")).items()
    before, after, details = run(ours)
    (stage,), masks = details["stages"], zeros(after)
    method = stage["criterion"] + stage["distribution"]
    assert stage["criterion"].startswith(modifier.removesuffix("PruningModifier").removesuffix("Modifier"))
    names = [name.removesuffix(".weight") for name, weight in before.items() if "proj" in name or "lm_head" in name]
    if "1:4" in theirs or "2:4" in theirs:
        assert counts_n_pruned(masks, fields["mask_structure"])
    else:
        level = fields.get("sparsity", fields.get("final_sparsity"))
        wanted = sum(level) / len(level) if isinstance(level, list) else level  # blocks are of one size
        assert -1e-2 < details["sparsity"] - wanted < 1 / 32  # rows of 32 prune up to one more
    for name in ("block_size", "dampening_frac", "owl_m", "owl_lmbda"):
        assert name not in fields or f"{name}={fields[name]}" in method
    if "apply_globally" in fields:
        assert stage["mask_structure"] == "unstructured (model)"
    elif modifier.startswith("Magnitude"):
        assert stage["mask_structure"] == "unstructured (layer)"
    reached = {
        "[Linear]": names,
        "re:.*mlp$": [name for name in names if ".mlp." in name],
        "up_proj.weight": ["model.layers.0.mlp.up_proj"],
        "re:.*down_proj": [name for name in names if not name.endswith(("down_proj", "lm_head"))],
    }
    default = [name for name in names if name != "lm_head"]
    assert set(masks) == set(next((value for key, value in reached.items() if key in theirs), default))


@pytest.mark.parametrize(("theirs", "ours"), OF_FLAGS)
def test_flags_of_the_scripts(theirs, ours, run):
    asked = dict(zip(*[iter(shlex.split(theirs.replace("--use_variant", "--use_variant true")))] * 2, strict=True))
    if "--prune_method" not in asked:
        options = spelt_out(["ID", "DIR", *shlex.split(ours)], ["model", "out"])
        parsed = parser_of("prune", prune).parse_args(options)
        (number,) = [int(value) for value in asked.values() if value.isdigit()] or [2048]  # tokens of a window
        assert number in parsed.values() or "DIR" in theirs or "ID" in theirs
        return
    _, after, details = run(ours)
    (stage,), masks = details["stages"], zeros(after)
    method = asked["--prune_method"] + ("cumulative" if "--use_variant" in asked else "")
    assert stage["criterion"].partition("(")[0].lower() == method
    assert details["sparsity"] == pytest.approx(float(asked["--sparsity_ratio"]), abs=1e-2)
    if asked["--sparsity_type"] == "unstructured":  # only Wanda compares within rows there
        rows_differ = any(len(set(mask.sum(1).tolist())) > 1 for mask in masks.values())
        assert rows_differ == (method != "wanda")
    else:
        assert counts_n_pruned(masks, asked["--sparsity_type"])


@pytest.mark.parametrize("line", [code(row[-1]) for row in MODIFIERS + SCRIPTS if "`sparse-train " in row[-1]])
def test_other_commands_parse(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    _, command, *options = shlex.split(line)
    if command == "fit":
        lightning_cli.run([command, *options], WithoutObjects)
    else:
        parsed = parser_of(command, evaluate).parse_args(spelt_out(options, ["model"]))
        assert (parsed.tasks, parsed.window) in (("wanda7", 512), (None, 2048))
