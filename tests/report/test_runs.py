"""``sparse-train report`` on real runs of the command line: a sparse one, and a dense one beside it."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from sparse_train.cli.main import main
from sparse_train.report import collect, headline, read_metrics, write_run_report
from sparse_train.report.page import paragraph
from sparse_train.report.runs import without_homes

pytestmark = pytest.mark.filterwarnings("ignore")
SECTIONS = [
    "Perplexity and loss",
    "Masks",
    "Time, settings and machine",
    "Recipe",
]
BROWSERS = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")


class Page(HTMLParser):
    """Elements in order, tables as lists of rows, descriptions of pictures, and what would be loaded."""

    VOID = ("meta", "img", "br")

    def __init__(self, path):
        super().__init__()
        self.open, self.headings, self.tables, self.pictures, self.loads, self.text = [], [], [], [], [], ""
        self.feed(path.read_text())
        assert not self.open, f"never closed: {self.open}"

    def handle_startendtag(self, tag, attributes):  # in pictures
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        attributes = dict(attributes)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "h2":
            self.headings.append("")
        elif attributes.get("role") == "img":
            self.pictures.append(attributes["aria-label"])
        self.loads += [attributes[key] for key in ("src", "srcset", "href", "xlink:href", "data") if key in attributes]
        assert tag not in ("script", "link", "iframe", "object")
        assert not any(key.startswith("on") for key in attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self.open and self.open[-1] == "h2":
            self.headings[-1] += data


def fit(root, recipe, model_folder, text_file, *options):
    files = {"train": [str(text_file)], "validation": [str(text_file)], "test": [str(text_file)]}
    main(
        [
            "fit",
            f"--config=recipes/{recipe}.yaml",
            "--config=configs/precision/float32.yaml",
            f"--model.model={model_folder}",
            f"--data.text={json.dumps({'class_path': 'TextFiles', 'init_args': files})}",
            "--data.block_size=32",
            "--trainer.max_steps=10",
            "--trainer.val_check_interval=4",
            f"--trainer.default_root_dir={root / recipe}",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_model_summary=false",
            "--trainer.enable_progress_bar=false",
            *options,
        ]
    )
    return root / recipe / "version_0"


@pytest.fixture(scope="module")
def root(tmp_path_factory, model_folder, text_file):
    """Two finished runs, each with the report that ``fit`` leaves."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("sys.argv", ["sparse-train"])
        fit(root, "smollm2_2of4", model_folder, text_file, "--pruning.update_freq=2")
        fit(root, "smollm2_dense", model_folder, text_file)
    return root


@pytest.fixture
def sparse(root):
    return root / "smollm2_2of4" / "version_0"


@pytest.fixture
def facts(sparse):
    return json.loads((sparse / "run.json").read_text())


@pytest.fixture
def rows(sparse):
    """What Lightning wrote, as it stands."""
    return list(csv.DictReader((sparse / "metrics.csv").open()))


def leave(folder, facts, rows=()):
    """A run in ``folder``, written by the logger that writes those of Lightning."""
    logger = CSVLogger(folder, name="", version="")
    for row in rows:
        logger.log_metrics({key: float(value) for key, value in row.items() if value}, int(row["step"]))
    logger.save()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


def test_fit_leaves_a_page_of_the_run(sparse, facts, rows):
    page = Page(sparse / "report.html")
    assert page.headings == SECTIONS
    assert len(page.pictures) == 4
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.loads)
    dense, first = facts["states"]
    last = [row for row in rows if row["val/loss"]][-1]
    flips = sum(float(row["sparsity/flip_rate"]) for row in rows if row["sparsity/flip_rate"] and int(row["step"]) > 0)

    def row(name, step, sparsity, perplexity, loss, flips):
        return [name, step, f"{float(perplexity):.2f}", f"{float(loss):.4f}", sparsity, f"{flips:.2%}"]

    assert page.tables[0] == [
        ["state", "step", "perplexity", "loss", "sparsity", "flips so far"],
        row("dense", "0", "0.0000", dense["perplexity"], dense["loss"], 0),
        row("after the first mask", "0", "0.5000", first["perplexity"], first["loss"], 0),
        row("at the end", "10", "0.5000", last["val/perplexity"], last["val/loss"], flips),
    ]
    shown = {row[0]: row[1] for table in page.tables[1:] for row in table}
    assert shown["tokens trained on"] == f"{facts['tokens']:,}" == f"{10 * 4 * 32:,}"
    assert float(shown["peak memory of the process, GiB"]) > 0.1
    took = sum(float(r["sparsity/update_seconds"]) for r in rows if r["sparsity/flip_rate"] and int(r["step"]) > 0)
    assert shown["of it in mask updates"] == f"{took:,.1f} s ({took / facts['seconds']:.1%})"
    assert shown["targeted layers"] == "14"
    assert shown["seed"] == "0"
    assert shown["mask_structure"] == "2:4" and shown["policy"] == "StraightThrough(srste_decay=0.0)"
    assert shown["torch"] == torch.__version__
    assert "update_freq: 2" in page.text


def test_numbers_of_the_pictures_are_those_of_the_logs(sparse, facts, rows):
    alts = " ".join(Page(sparse / "report.html").pictures)
    flips = [100 * float(row["sparsity/flip_rate"]) for row in rows if row["sparsity/flip_rate"]][1:]
    assert f"{flips[0]:.4g} at step 2 to {flips[-1]:.4g} at step 7" in alts
    assert not [name for name in rows[0] if "layers" in name]
    # Lightning counts the steps of what it logs from 0
    losses = [(int(row["step"]) + 1, float(row["val/loss"])) for row in rows if row["val/loss"]]
    assert [step for step, _ in losses] == [4, 8, 10]
    assert f"validation {facts['states'][1]['loss']:.4g} at step 0 to {losses[-1][1]:.4g} at step 10" in alts


def test_runs_side_by_side(root, sparse, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dense = root / "smollm2_dense"  # the folder above the only version
    main(["report", str(sparse), str(dense)])
    assert "report: report/report.html" in capsys.readouterr().out
    page = Page(tmp_path / "report" / "report.html")
    assert page.headings == SECTIONS
    states = [row[:2] for row in page.tables[0][1:]]
    assert states == [
        ["smollm2_2of4", "dense"],
        ["smollm2_2of4", "after the first mask"],
        ["smollm2_2of4", "at the end"],
        ["smollm2_dense", "dense"],
        ["smollm2_dense", "at the end"],
    ]
    assert page.tables[0][1][3:5] == page.tables[0][4][3:5]  # the same model on the same text
    assert page.tables[0][3][3:5] != page.tables[0][5][3:5]
    for table in page.tables[1:]:
        assert table[0] == ["", "smollm2_2of4", "smollm2_dense"]
    perplexity = next(alt for alt in page.pictures if alt.startswith("perplexity"))
    assert "smollm2_2of4 " in perplexity and "smollm2_dense " in perplexity

    main(["report", str(dense), "--out", "alone"])
    alone = Page(tmp_path / "alone" / "report.html")
    assert alone.headings == [title for title in SECTIONS if title != "Masks"]
    assert len(alone.pictures) == 2


def test_a_run_that_was_cut_off_says_so(facts, rows, tmp_path):
    now = {"name": "latest", "step": 4, "loss": 3.0, "sparsity": 0.5}
    cut = facts | {"finished": False, "step": 4, "states": [], "now": now}
    run = leave(tmp_path / "run", cut, [row for row in rows if int(row["step"]) < 5])
    page = Page(write_run_report([run]))
    assert "not ended, or cut off: the last record is of step 4." in page.text
    assert [row[:2] for row in page.tables[0][1:]] == [["latest", "4"]]
    assert page.tables[0][1][2:4] == ["3.0000", "0.5000"]
    assert headline(collect([run])[0])["finished"] is False


def test_a_run_without_metrics_has_a_page_too(facts, tmp_path):
    begun = {"finished": False, "step": 0, "states": [], "now": {"name": "latest", "step": 0}}
    run = leave(tmp_path, facts | begun)
    assert Page(write_run_report([run])).headings == SECTIONS[-2:-1]


def test_what_a_run_says_is_text_and_no_markup(sparse, facts, tmp_path):
    run = tmp_path / "<script>"
    run.mkdir()
    facts["about"]["<script>fact"] = "<script>value"
    facts["protocols"] = ["<script>protocol"]
    (run / "run.json").write_text(json.dumps(facts))
    (run / "metrics.csv").write_text("step,evaluation/<script>metric\n1,2.0\n")
    (run / "config.yaml").write_text("<script>recipe")
    page = Page(write_run_report([run, sparse], tmp_path, title="<script>title"))  # has no such element
    assert all(f"<script>{word}" in page.text for word in ("fact", "value", "protocol", "metric", "recipe"))


def test_dollars_in_the_names_of_runs_are_no_formula(facts, rows, tmp_path):
    runs = [leave(tmp_path / name, facts, rows) for name in (r"a$\x$b", "c")]
    assert r"a$\x$b" in Page(write_run_report(runs, tmp_path)).text


def test_a_script_puts_its_own_table_first(sparse, tmp_path):
    page = Page(write_run_report([sparse], tmp_path, title="A & B", lead=[paragraph("measured <here>")]))
    assert page.text.count("A & B") == 2
    assert page.text.index("measured <here>") < page.text.index("after the first mask")


def test_names_tell_runs_apart(facts, tmp_path):
    a, b, again = (leave(tmp_path / name, facts) for name in ("a/version_0", "b/version_0", "a/version_1"))
    assert [run.name for run in collect([a, b])] == ["a", "b"]
    assert [run.name for run in collect([a, again])] == [str(a), str(again)]


def test_the_folder_above_will_do_where_it_holds_one_run(facts, tmp_path):
    def part(version, resumed, begun="2026-01-01T00:00:00+00:00"):
        about = facts["about"] | {"begun": begun, "resumed at steps": resumed}
        return leave(tmp_path / "run" / version, facts | {"about": about})

    run = part("version_1", [])
    assert collect([tmp_path / "run"])[0].folder == run
    assert collect([tmp_path])[0].folder == run
    resumed = part("version_0", [4])  # all of the run is in the folder in which it went on
    assert collect([tmp_path / "run"])[0].folder == resumed
    part("version_2", [4])  # from the same checkpoint in two ways
    with pytest.raises(ValueError, match="holds 2 runs: .*version_0, .*version_2"):
        collect([tmp_path / "run"])
    assert collect([part("version_3", [4, 6])])[0].folder.name == "version_3"
    part("version_3", [], begun="2026-01-02T00:00:00+00:00")
    with pytest.raises(ValueError, match="holds 3 runs"):
        collect([tmp_path / "run"])


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], "There is no run to report"),
        (["missing"], "has no run.json"),
        (["empty"], "has no run.json"),
    ],
)
def test_what_cannot_be_read_is_said(folders, message, facts, tmp_path):
    (tmp_path / "empty").mkdir()
    leave(tmp_path / "good", facts)
    with pytest.raises(ValueError, match=message):
        collect([tmp_path / folder for folder in folders])


def test_metrics_are_sorted_and_without_empty_cells(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,val/loss,sparsity/flip_rate\n20,8.0,\n10,,0.02\n10,9.5,\n")
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"step": 10, "sparsity/flip_rate": 0.02},
        {"step": 10, "val/loss": 9.5},
        {"step": 20, "val/loss": 8.0},
    ]
    assert read_metrics(tmp_path / "none.csv") == []


def test_home_folders_are_not_shown():
    assert without_homes(f"path: {Path.home()}/data/a.txt") == "path: ~/data/a.txt"
    assert without_homes("- /home/jane/runs\n- '/Users/joe/x'\n") == "- ~/runs\n- '~/x'\n"
    assert without_homes("runs/home/jane: /data/home") == "runs/home/jane: /data/home"


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason=f"none of {', '.join(BROWSERS)} is installed")
def test_a_browser_shows_it(sparse, tmp_path):
    browser = next(path for path in map(shutil.which, BROWSERS) if path)
    count = len(Page(sparse / "report.html").pictures)
    wide = "[...document.querySelectorAll('figure svg')].filter(svg => svg.getBoundingClientRect().width > 500).length"
    script = f"<script>addEventListener('load', () => {{ document.title = {wide} }})</script></body>"
    (tmp_path / "probe.html").write_text((sparse / "report.html").read_text().replace("</body>", script))
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--window-size=1000,2000",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            (tmp_path / "probe.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert re.search(r"<title>(\d+)</title>", done.stdout)[1] == str(count)
    assert "CONSOLE" not in done.stderr
