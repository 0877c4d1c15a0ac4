"""``sparse-train evaluate`` on tasks."""

import json
from pathlib import Path

import pytest

from sparse_train.cli import main as cli
from tests.conftest import shallow_llama
from tests.evaluation.tasks import task_file

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("elsewhere")]


def test_evaluate_on_tasks(model_folder, text, capsys):
    file = task_file(Path.cwd())
    options = ["evaluate", str(model_folder), "--limit=2"]
    cli.main([*options, f"--tasks=perplexity,{file}", f"--text={text}", "--window=32", "--max_tokens=640", "--json"])
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert found["perplexity"]["tokens"] == 620
    assert found["zero_shot"]["tasks"][0]["n"] == found["zero_shot"]["limit"] == 2
    assert found["zero_shot"]["data"] == file
    cli.main([*options, "--tasks", file])
    table = capsys.readouterr().out
    row = next(line for line in table.splitlines() if "acc" in line and "mine" in line)
    assert row.split()[-2:] == ["2", "acc"]
    assert "perplexity" not in table
    assert "zero-shot accuracy of" in table


def test_a_folder_without_a_tokenizer_takes_that_of_another(model_folder, text, capsys):
    shallow_llama().save_pretrained("bare")
    options = [f"--text={text}", "--window=32", "--max_tokens=640", "--json"]
    with pytest.raises(SystemExit, match="Cannot load 'bare'.*okenizer"):
        cli.main(["evaluate", "bare", *options])
    cli.main(["evaluate", "bare", f"--tokenizer={model_folder}", *options])
    bare = json.loads(capsys.readouterr().out)
    cli.main(["evaluate", str(model_folder), *options])
    whole = json.loads(capsys.readouterr().out)
    assert (bare["tokenizer"], bare["perplexity"]) == (str(model_folder), whole["perplexity"])


def test_what_is_measured_before_a_task_that_fails_is_printed(model_folder, text, capsys):
    file = task_file(Path.cwd(), doc_to_choice=["good", "bad " * 200, "so"])
    options = [f"--tasks=perplexity,{file}", f"--text={text}", "--window=32", "--max_tokens=640"]
    with pytest.raises(SystemExit, match="an answer alone has more than the 128 tokens that the model reads"):
        cli.main(["evaluate", str(model_folder), *options])
    assert "perplexity" in capsys.readouterr().out


def test_mistakes_of_evaluate_come_before_the_model(model_folder, monkeypatch):
    monkeypatch.setattr("sparse_train.models.sources.Pretrained.load", lambda self: pytest.fail("loaded a model"))
    with pytest.raises(SystemExit, match="Cannot load 'absent.yaml'"):
        cli.main(["evaluate", str(model_folder), "--tasks=absent.yaml"])
