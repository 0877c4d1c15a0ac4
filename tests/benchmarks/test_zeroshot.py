"""``benchmarks/zeroshot.py`` on a tiny model, and the table that its rows give."""

import csv
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from sparse_train.data.texts import TextFiles
from sparse_train.evaluation import WANDA7
from sparse_train.export import export_model
from sparse_train.export.card import ModelCard
from sparse_train.models.sources import ModelSource
from tests.conftest import tiny_llama, tiny_tokenizer
from tests.evaluation.test_zeroshot import ITEMS, write

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import zeroshot
import zeroshot_tables

pytestmark = pytest.mark.filterwarnings("ignore")
RECIPE = "seed_everything: 3\ntrainer:\n  max_steps: 20\nmodel:\n  lr: 0.0005\n"


@dataclass
class Tiny(ModelSource):
    name = "tiny"

    def load(self):
        return tiny_llama()

    def tokenizer(self):
        return tiny_tokenizer()


@pytest.fixture
def measure(tmp_path, monkeypatch, text_file):
    """Runs the command, and gives the rows there are."""
    data = write(tmp_path / "data", **{task: [ITEMS[task][1]] * 3 for task in WANDA7})
    monkeypatch.setattr(zeroshot, "PackagedSmolLM2", Tiny)
    monkeypatch.setattr(zeroshot, "PackagedWikipedia", lambda: TextFiles(train=[str(text_file)]))
    out = tmp_path / "zeroshot.csv"

    def run(**options):
        zeroshot.main(task_data=str(data), limit=2, samples=4, length=32, out=str(out), **options)
        return list(csv.DictReader(out.open()))

    return run


def exported(folder, recipe=RECIPE):
    return str(export_model(tiny_llama(), tiny_tokenizer(), folder, ModelCard("tiny", recipe=recipe)))


def test_the_whole_table_by_one_command(measure, tmp_path, capsys):
    folder = exported(tmp_path / "static")
    found = measure(static=folder)
    assert "left out: dynamic" in capsys.readouterr().out
    assert [row["task"] for row in found] == list(WANDA7) * 5
    assert list(dict.fromkeys(row["arm"] for row in found)) == ["dense", "magnitude", "sparsegpt", "wanda", "static"]
    for row in found:
        pruned = row["arm"] in ("magnitude", "sparsegpt", "wanda")
        assert float(row["sparsity"]) == pytest.approx(0.5 if pruned else 0, abs=1e-3)
        assert float(row["accuracy"]) == row["items"].count("1") / int(row["n"])
        assert (row["n"], row["limit"], len(row["items"])) == ("2", "2", 2)
        assert str(tmp_path) not in str(row)
    trained = found[-1]
    assert (trained["seed"], trained["steps"], trained["lr"]) == ("3", "20", "0.0005")
    assert found[0]["data"] == "boolq.jsonl, with the titles of articles"
    assert found[-8]["calibration"] == "4 samples of 32 tokens of topics.txt"

    capsys.readouterr()
    assert measure(static=folder) == found  # nothing is run again
    assert capsys.readouterr().out.count("already in") == 5
    assert len(measure(arm="wanda", seed=1)) == len(found) + 7
    assert len(measure(arm="dynamic", model=folder)) == len(found) + 14
    made = zeroshot_tables.tables(tmp_path / "zeroshot.csv")
    label = "re-pruned minus static Wanda mask, seed 3, 20 steps, learning rates 0.0005 and 0.0005, paired"
    assert f"| {label} | +0.0 ± 0.0 |" in made
    assert "tiny" not in made and "the first 2 items of each task; 0 examples in the prompt; `acc`" in made
    assert re.search(r"Wanda, one-shot, 4 samples of 32 tokens of topics.txt, seed 1 \|", made)


def test_mistakes(measure, tmp_path):
    for options, message in [
        ({"arm": "wander"}, "all or one of dense, magnitude"),
        ({"arm": "wanda", "model": "x"}, "--model goes with one --arm of static"),
        ({"arm": "static"}, "needs the folder of a trained model"),
        ({"arm": "static", "model": exported(tmp_path / "bare", recipe=None)}, "has no README.md with a recipe"),
    ]:
        with pytest.raises(SystemExit, match=message):
            measure(**options)


def test_errors_against_plain_formulas(tmp_path):
    chance, models = np.random.default_rng(0), []
    for _ in range(2):
        answers = {task: chance.integers(0, 2, 30 + 10 * i) for i, task in enumerate(WANDA7)}
        errors = {task: (right.var(ddof=1) / len(right)) ** 0.5 for task, right in answers.items()}
        rows = {
            task: {"accuracy": right.mean(), "stderr": errors[task], "items": "".join(map(str, right))}
            for task, right in answers.items()
        }
        models.append((answers, rows))
    (a, rows_a), (b, rows_b) = models
    found, differences = zeroshot_tables.accuracies(rows_a), zeroshot_tables.paired(rows_a, rows_b)
    for task in WANDA7:
        change = 100.0 * (a[task] - b[task])
        error = (np.square(change - change.mean()).sum() / (len(change) - 1) / len(change)) ** 0.5
        assert differences[task] == pytest.approx((change.mean(), error), rel=1e-12)
    means = [100 * a[task].mean() for task in WANDA7]
    variance = sum((100 * rows_a[task]["stderr"]) ** 2 for task in WANDA7) / 49
    assert found["mean"] == pytest.approx((np.mean(means), variance**0.5), rel=1e-12)
    assert differences["mean"][0] == pytest.approx(found["mean"][0] - zeroshot_tables.accuracies(rows_b)["mean"][0])
    error = sum(differences[task][1] ** 2 for task in WANDA7) ** 0.5 / 7
    assert differences["mean"][1] == pytest.approx(error, rel=1e-12)
