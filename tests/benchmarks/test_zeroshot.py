"""``benchmarks/zeroshot.py`` on a tiny model, and the table that its rows give."""

import csv
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from lm_eval.tasks import TaskManager

from sparse_train.data.texts import TextFiles
from sparse_train.evaluation import WANDA7
from sparse_train.export import export_model
from sparse_train.export.card import ModelCard
from sparse_train.models.sources import ModelSource
from tests.conftest import tiny_llama, tiny_tokenizer
from tests.evaluation.tasks import ARC, hub  # noqa: F401  (a fixture)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import zeroshot
import zeroshot_tables
from zeroshot_data import read, write_tasks

pytestmark = pytest.mark.filterwarnings("ignore")
RECIPE = "seed_everything: 3\ntrainer:\n  max_steps: 20\nmodel:\n  lr: 0.0005\n"

ITEMS = {
    "boolq": {
        "query": "Passage: Ice -- Ice is frozen water.\nIt floats.\nQuestion: does ice float?",
        "choices": ["no", "yes"],
        "gold": 1,
    },
    "rte": {"premise": "Ann sold her car.", "hypothesis": "Ann had a car.", "gold": 0},
    "hellaswag": {
        "query": "Home and Garden: How to mend a roof. Climb up. Take a ladder. Then",
        "choices": [" Nail the shingles down.", "climb down", "paint it. Use red.", "call a friend."],
        "gold": 2,
    },
    "winogrande": {
        "context_options": ["The cat fled the dog as the cat", "The cat fled the dog as the dog"],
        "continuation": "was big.",
        "gold": 1,
    },
    "arc_easy": {"query": "Question: What measures length?", "choices": ARC["text"], "gold": 1},
    "arc_challenge": {"query": "Question: What measures time?", "choices": ARC["text"], "gold": 3},
    "openbookqa": {"query": "A thing that measures mass is", "choices": ARC["text"], "gold": 0},
}
"""The items of ``HUB`` as files have them."""


def write(folder, **tasks):
    folder.mkdir(exist_ok=True)
    for task, items in tasks.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


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
    data = write(tmp_path / "data", **{task: [ITEMS[task]] * 3 for task in WANDA7})
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


# --- items from files


@pytest.mark.parametrize("name", WANDA7)
def test_local_items_are_asked_and_scored_as_lm_evals_own(name, hub, tmp_path):  # noqa: F811
    stock = hub.load([name])["tasks"][name]
    files = write_tasks(write(tmp_path, **{task: [ITEMS[task]] for task in WANDA7}), tmp_path)
    ours = TaskManager(include_defaults=False).load(files)["tasks"][name]
    for task in (stock, ours):
        task.set_config("num_fewshot", 0)
        task.build_all_requests(limit=None, rank=0, world_size=1)
    arguments = [instance.args for instance in stock.instances]
    assert [instance.args for instance in ours.instances] == arguments
    assert len(arguments) >= 2
    assert {instance.request_type for instance in ours.instances} == {"loglikelihood"}
    for winner in range(len(arguments)):
        likelihoods = [(-3.0 if i == winner else -20.0 - i, False) for i in range(len(arguments))]
        scores = stock.process_results(stock.eval_docs[0], likelihoods)
        assert ours.process_results(ours.eval_docs[0], likelihoods) == scores
        assert scores["acc"] == (winner == ITEMS[name]["gold"])
    assert ours.VERSION == stock.VERSION
    assert ours.aggregation() == stock.aggregation()


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("rte", '{"premise": "a", "hypothesis": "b", "gold": 2}', "item 1 is to have premise, hypothesis and gold"),
        ("rte", '{"premise": "a", "hypothesis": "b", "gold": true}', "'gold': True"),
        ("rte", '{"premise": "a", "hypothesis": "", "gold": 0}', "'hypothesis': ''"),
        ("arc_easy", '{"query": "a", "choices": ["b"], "gold": 0}', "item 1"),
        ("arc_easy", '{"query": "a", "choices": "bc", "gold": 0}', "item 1"),
    ],
)
def test_items_that_lm_eval_would_count_as_wrong_answers(task, line, message, tmp_path):
    (tmp_path / f"{task}.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, task)


def test_a_line_separator_in_a_text_is_no_new_line(tmp_path):
    item = {"premise": "a\u2028b", "hypothesis": "c", "gold": 0}
    (tmp_path / "rte.jsonl").write_text(json.dumps(item, ensure_ascii=False), encoding="utf-8")
    assert read(tmp_path, "rte") == [item]


def test_files_that_are_missing(tmp_path):
    folder = write(tmp_path, rte5=[ITEMS["rte"]], rte7=[ITEMS["rte"]])
    with pytest.raises(ValueError, match=r"openbookqa expects its items in .*openbookqa.jsonl .*there is none"):
        read(folder, "openbookqa")
    with pytest.raises(ValueError, match=r"rte expects its items in one file.*rte5.jsonl and rte7.jsonl"):
        read(folder, "rte")
