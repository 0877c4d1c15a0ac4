"""``make demo`` on a tiny model and text: all arms, table, report, exported model."""

import csv
import runpy
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from sparse_train.data.texts import TextFiles
from sparse_train.models.sources import Pretrained
from sparse_train.report import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[2]


def test_the_whole_job(model_folder, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo.py"])
    demo = runpy.run_path(str(ROOT / "benchmarks" / "demo.py"))
    files = [str(text_file)]
    text = TextFiles(train=files, validation=files, test=files)
    out = tmp_path / "demo"
    demo["main"](steps=6, model=Pretrained(str(model_folder)), text=text, eval_tokens=256, window=32, out=str(out))
    rows = {row["arm"]: row for row in csv.DictReader((out / "table.csv").open())}
    assert list(rows) == [
        "dense",
        "one-shot magnitude",
        "one-shot Wanda",
        "dense, fine-tuned",
        "static mask, fine-tuned",
        "dynamically re-pruned",
    ]
    for name, row in rows.items():
        assert float(row["perplexity"]) > 1
        assert float(row["sparsity"]) == (0 if name.startswith("dense") else 0.5)
        assert int(row["train_tokens"]) == (6 * 4 * 32 if "tuned" in name or "re-pruned" in name else 0)
        assert int(row["peak_bytes"]) > 1e8
        assert (row["window"], row["stride"], row["tokens"]) == ("32", "32", "248")
    assert len({row["perplexity"] for row in rows.values()}) == 6
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert ((model.model.layers[0].mlp.up_proj.weight.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert (out / "dynamic" / "version_0" / "config.yaml").read_text().count("DynamicPruning") == 1
    for name in ("static", "dynamic"):  # both start with the one-shot mask
        first = next(row for row in read_metrics(out / name / "version_0" / "metrics.csv") if "sparsity/actual" in row)
        assert (first["step"], first["sparsity/actual"]) == (0, 0.5)
    page = (out / "report.html").read_text()
    assert all(text in page for text in ("held-out perplexity", "one-shot Wanda", "dense_finetuned", "flip rate"))
    assert "too few steps to rank methods" in " ".join(capsys.readouterr().out.split())  # lines wrap
    assert not (out / "dense").exists()
