"""``benchmarks/quality.py``: which runs it makes, and what it writes of them."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from sparse_train import Magnitude, prune
from tests.conftest import tiny_llama

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import quality


@pytest.fixture
def trained(monkeypatch):
    """The calls of training, which is replaced; perplexities are 1, 2, ... in the order in which they are asked for."""
    calls, texts = [], []

    def train(arm, seed, steps, lr, tokens_a_step, teacher, export, checkpoint):
        calls.append((arm, seed, steps, lr, tokens_a_step))
        if export is not None:
            Path(export).mkdir()
        model = tiny_llama()
        prune(model, criterion=Magnitude())
        return model, {"first_flip_rate": 0.5, "last_flip_rate": 0.0}, "a model"

    def perplexity(model, text, split):
        texts.append(split)
        return float(len(texts))

    monkeypatch.setattr(quality, "_train", train)
    monkeypatch.setattr(quality, "_perplexity", perplexity)
    return calls


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_row_that_is_there_is_not_run_again(tmp_path, trained):
    out = tmp_path / "rows.csv"
    for _ in range(2):
        quality.main("dynamic", seed=1, steps=3, lr=2e-4, out=str(out))
    assert trained == [("dynamic", 1, 3, 2e-4, 2048)]
    (row,) = rows(out)
    assert (row["validation"], row["heldout"], row["wikitext2"], row["c4"]) == ("1.0", "2.0", "", "")
    assert (row["first_flip_rate"], row["last_flip_rate"], row["sparsity"]) == ("0.5", "0.0", "0.5")
    quality.main("dynamic", seed=1, steps=3, lr=2e-4, tuning=True, out=str(out))
    quality.main("dynamic", seed=1, steps=3, lr=5e-4, out=str(out))
    assert len(trained) == 3 and [row["tuning"] for row in rows(out)] == ["False", "True", "False"]
    assert rows(out)[1]["heldout"] == ""
    quality.main("dynamic", seed=1, steps=3, lr=5e-4, tokens_a_step=512, out=str(out))
    assert trained[3:] == [("dynamic", 1, 3, 5e-4, 512)]
    assert [row["tokens_a_step"] for row in rows(out)] == ["2048"] * 3 + ["512"]


def test_a_text_that_a_row_does_not_have_is_a_reason_to_run_again(tmp_path, trained):
    out, text = tmp_path / "rows.csv", tmp_path / "text.txt"
    text.write_text("words")
    quality.main("static", out=str(out))
    for _ in range(2):
        quality.main("static", wikitext=str(text), out=str(out))
    assert len(trained) == 2
    assert [row["wikitext2"] for row in rows(out)] == ["", "5.0"]


def test_an_export_that_is_missing_is_made_without_another_row(tmp_path, trained):
    out, folder = tmp_path / "rows.csv", tmp_path / "dense_seed0_100"
    quality.main("dense", out=str(out))
    for _ in range(2):
        quality.main("dense", out=str(out), export=str(folder))
    assert len(trained) == 2 and len(rows(out)) == 1 and folder.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arm": "dynamics"}, "--arm is one of none, "),
        ({"arm": "dynamic", "teacher": "dense_seed0_100"}, "--teacher is for the arms .*static_distill_tuned"),
        ({"arm": "dynamic_distill_tuned"}, "--teacher is for the arms"),
        ({"arm": "dynamic_distill_tuned", "teacher": "dense_seed1_100"}, "must name dense_seed0_100"),
        (
            {"arm": "dynamic_distill_tuned", "teacher": "dense_seed0_100", "steps": 300},
            "must name dense_seed0_300",
        ),
        (
            {"arm": "dynamic_distill_tuned", "teacher": "dense_seed0_400", "steps": 400, "tokens_a_step": 512},
            "must name dense_seed0_100",
        ),
        ({"arm": "dynamic", "tokens_a_step": 700}, "multiple of 512, got 700"),
        ({"arm": "dynamic_frozen_norms", "checkpoints": "saved"}, "a state that no checkpoint holds"),
    ],
)
def test_what_is_not_to_be_run(tmp_path, trained, arguments, message):
    with pytest.raises(SystemExit, match=message):
        quality.main(**arguments, out=str(tmp_path / "rows.csv"))
    assert not trained


def test_flips_are_those_of_updates():
    def logged(*rates):
        steps = range(0, 10 * len(rates), 10)
        keys = ("step", "sparsity/flip_rate", "sparsity/initial_flip_rate")
        return [
            dict(zip(keys, (str(step), str(rate), "0.2"), strict=True)) for step, rate in zip(steps, rates, strict=True)
        ]

    assert quality.flips(logged(0.0, 0.3, 0.2, 0.0)) == {
        "first_flip_rate": 0.3,
        "last_flip_rate": 0.0,  # as Regrow's is
        "initial_flip_rate": 0.2,
    }
    assert "first_flip_rate" not in quality.flips(logged(0.0, 0.0, 0.0))  # masks that are only confirmed
    assert quality.flips([{"step": "0", "train/loss": "1"}]) == {}


@pytest.mark.parametrize(("arm", "tokens_a_step"), [("static", 2048), ("ast_distill", 512), ("dense", 1024)])
def test_the_size_of_a_step_changes_neither_sequences_nor_what_calibrates(monkeypatch, arm, tokens_a_step):
    given = {}

    def run(arguments):
        given.update(argument.split("=", 1) for argument in arguments if "=" in argument)
        raise InterruptedError

    monkeypatch.setattr(quality.lightning_cli, "run", run)
    with pytest.raises(InterruptedError):
        quality.main(arm, seed=3, steps=7, tokens_a_step=tokens_a_step, teacher=None, out="/nowhere")
    batch_size = int(given["--data.batch_size"])
    assert batch_size * 512 == tokens_a_step and given["--data.seed"] == "3" and given["--trainer.max_steps"] == "7"
    ids = [{"input_ids": torch.tensor([i])} for i in range(50)]
    found = [
        torch.cat([batch["input_ids"].flatten() for batch in quality.random_batches(ids, size, None, 32)])
        for size in (4, batch_size)
    ]
    assert torch.equal(*found)
