"""``make demo`` on a tiny model and text: all arms, table, report, exported model."""

import csv
import logging
import runpy
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from sparse_train.data.texts import TextFiles
from sparse_train.models.sources import Pretrained
from sparse_train.report import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def log_levels():
    """The demo is a program: it leaves loggers as it set them."""
    before = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "sparse_train")}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def test_the_whole_job(model_folder, text_file, tmp_path, monkeypatch, capsys, log_levels):
    monkeypatch.setattr("sys.argv", ["demo.py"])
    demo = runpy.run_path(str(ROOT / "benchmarks" / "demo.py"))
    files = [str(text_file)]
    text = TextFiles(train=files, validation=files, test=files)
    out = tmp_path / "demo"
    options = {"steps": 12, "eval_tokens": 256, "window": 32, "sparsity": 0.5, "out": str(out)}
    demo["main"](model=Pretrained(str(model_folder)), text=text, **options)
    rows = {row["arm"]: row for row in csv.DictReader((out / "table.csv").open())}
    assert list(rows) == ["dense", "one-shot Wanda", "kept mask, fine-tuned", "re-pruned, fine-tuned"]
    for name, row in rows.items():
        assert float(row["perplexity"]) > 1
        assert float(row["sparsity"]) == (0 if name == "dense" else 0.5)
        assert int(row["train_tokens"]) == (12 * 32 if "fine-tuned" in name else 0)
        assert (row["window"], row["stride"], row["tokens"]) == ("32", "32", "248")
    assert len({row["perplexity"] for row in rows.values()}) == 4
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert ((model.model.layers[0].mlp.up_proj.weight == 0).float().mean(1) == 0.5).all()
    metrics = {name: read_metrics(out / name / "metrics.csv") for name in ("kept", "repruned")}
    for name, logged in metrics.items():  # both start with the one-shot mask; only one of them moves
        assert next(row["sparsity/actual"] for row in logged if "sparsity/actual" in row) == 0.5
        flips = [row["sparsity/flip_rate"] for row in logged if "sparsity/flip_rate" in row]
        assert any(flips) == (name == "repruned")
    page = (out / "report.html").read_text()
    assert all(text in page for text in ("held-out articles", "one-shot Wanda", "repruned", "flip rate"))
    assert "ahead after 200,000" in " ".join(capsys.readouterr().out.split())  # lines wrap
