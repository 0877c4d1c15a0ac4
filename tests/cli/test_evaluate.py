"""``sparse-train evaluate`` on tasks."""

import json
from pathlib import Path

import pytest

from sparse_train.cli import main as cli
from tests.conftest import shallow_llama

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("elsewhere")]


def test_evaluate_on_tasks(model_folder, text, capsys):
    item = {"premise": "Ann sold her car.", "hypothesis": "Ann had a car.", "gold": 0}
    Path("data").mkdir()
    Path("data/rte.jsonl").write_text(f"{json.dumps(item)}\n" * 3)
    options = ["evaluate", str(model_folder), "--task_data=data", "--limit=2"]
    cli.main([*options, "--tasks=perplexity,rte", f"--text={text}", "--window=32", "--max_tokens=640", "--json"])
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert found["perplexity"]["tokens"] == 620
    assert found["zero_shot"]["tasks"][0]["n"] == found["zero_shot"]["limit"] == 2
    assert found["zero_shot"]["data"] == "data/rte.jsonl"
    cli.main([*options, "--tasks", "rte"])
    table = capsys.readouterr().out
    row = next(line for line in table.splitlines() if "rte" in line)
    assert row.split()[2:] == ["0.00", "2", "acc"]
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
    item = {"premise": "Ann sold her car.", "hypothesis": "Ann had a car.", "gold": 0}
    Path("data").mkdir()
    Path("data/rte.jsonl").write_text(f"{json.dumps(item)}\n")
    long = {"query": "It is", "choices": ["good", "bad " * 200, "so", "no"], "gold": 0}
    Path("data/hellaswag.jsonl").write_text(f"{json.dumps(long)}\n")
    options = ["--task_data=data", "--tasks=perplexity,hellaswag", f"--text={text}", "--window=32", "--max_tokens=640"]
    with pytest.raises(SystemExit, match="an answer alone has more than the 128 tokens that the model reads"):
        cli.main(["evaluate", str(model_folder), *options])
    assert "perplexity" in capsys.readouterr().out


def test_mistakes_of_evaluate_come_before_the_model(model_folder, monkeypatch):
    monkeypatch.setattr("sparse_train.models.sources.Pretrained.load", lambda self: pytest.fail("loaded a model"))
    Path("data").mkdir()
    for options, message in [
        (["--tasks=wanda7", "--task_data=data"], "boolq expects its items in one file, data/boolq.jsonl"),
    ]:
        with pytest.raises(SystemExit, match="sparse-train evaluate") as error:
            cli.main(["evaluate", str(model_folder), *options])
        assert message in str(error.value)
