"""The examples run as they are, end sparse, and are ordinary programs without the lines that they mark as ours."""

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from sparse_train import MaskUpdater, sparse_layers
from sparse_train.inspection import layer_sparsities, pruned_layers

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "model_and_text.py")
NOTEBOOK = EXAMPLES / "prune_train_look.ipynb"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def execute(monkeypatch, tmp_path):
    """Runs code as the script of that name, in this process and in an empty folder; returns its names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def execute(code, *command):
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        names = {"__name__": "__main__"}
        exec(compile(code, str(command[0]), "exec"), names)
        return names

    return execute


@pytest.mark.parametrize("name", SCRIPTS)
def test_masks_move_and_the_result_is_sparse(name, execute, monkeypatch, capsys):
    updaters, reports, step = [], [], MaskUpdater.step

    def seen(self):
        report = step(self)
        updaters.append(self)
        reports.extend([report] if report else [])
        return report

    monkeypatch.setattr(MaskUpdater, "step", seen)
    model = execute((EXAMPLES / name).read_text(), name)["model"]
    assert not sparse_layers(model)
    assert {(layer.pattern, layer.sparsity) for layer in pruned_layers(layer_sparsities(model))} == {("2:4", 0.5)}
    assert "14 of 15 linear layers are pruned: 0.5000 of" in capsys.readouterr().out
    assert sum(report.flip_rate > 0 for report in reports[1:]) >= 1
    assert updaters[-1].timing.end_step == updaters[-1].steps * 3 // 4  # the run was as long as it was said to be


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_the_marked_lines_it_is_a_dense_run(name, execute, tmp_path):
    lines = (EXAMPLES / name).read_text().splitlines(keepends=True)
    rest = "".join(line for line in lines if "# sparse-train" not in line)
    assert "sparse_train" not in rest
    (tmp_path / "short.txt").write_text("Three steps, more or less.\n\n" * 20)
    model = execute(rest, name, "--text", "short.txt")["model"]
    assert not pruned_layers(layer_sparsities(model))


def test_with_a_model_and_a_text_of_the_readers_own(execute, model_folder, tmp_path):
    script, text = EXAMPLES / "plain_loop.py", tmp_path / "own.txt"
    text.write_text("A sentence of my own. " * 60)
    names = execute(script.read_text(), script, "--model", model_folder, "--text", text)
    assert names["model"].name_or_path == str(model_folder) and names["text"] == text.read_text()
    assert len(pruned_layers(layer_sparsities(names["model"]))) == 14


def test_the_notebook_prunes_trains_looks_and_exports(execute, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    names = execute("\n".join("".join(cell["source"]) for cell in cells), NOTEBOOK)
    assert names["loss_on"](names["held_out"]) < names["pruned"]
    names["plt"].close("all")
    drawn, *_ = names["axes"].get_lines()
    assert len(drawn.get_ydata()) >= 4 and min(drawn.get_ydata()) > 0
    assert len(pruned_layers(layer_sparsities(AutoModelForCausalLM.from_pretrained(names["folder"])))) == 14
