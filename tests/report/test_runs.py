"""``sparse-train report`` on real runs of the command line: a sparse one, and a dense one beside it."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from sparse_train.commands import cli
from sparse_train.report import collect, markdown_table, run_page
from sparse_train.report.page import Table, to_html

pytestmark = pytest.mark.filterwarnings("ignore")
SECTIONS = [
    "Perplexity and loss",
    "Masks",
    "Sparsity by layer",
    "One mask before and after",
    "Time and memory",
    "Settings",
    "Environment",
    "Recipe",
]
BROWSERS = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")


class Page(HTMLParser):
    """Elements in order, tables as lists of rows, and what would be loaded."""

    VOID = ("meta", "img", "source", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.tables, self.pictures, self.loads = [], [], [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

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
        elif tag == "img":
            self.pictures.append(attributes)
        self.loads += [attributes[key] for key in ("src", "srcset", "href", "data") if key in attributes]
        assert tag not in ("script", "link", "iframe", "object")
        assert not any(key.startswith("on") for key in attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self.open and self.open[-1] == "h2":
            self.headings[-1] += data


def fit(root, recipe, model_folder, text_file, *options):
    files = {"train": [str(text_file)], "validation": [str(text_file)], "test": [str(text_file)]}
    cli.main(
        [
            "fit",
            f"--config=recipes/{recipe}.yaml",
            "--config=configs/precision/float32.yaml",
            f"--model.model={model_folder}",
            f"--data.text={json.dumps({'class_path': 'TextFiles', 'init_args': files})}",
            "--data.block_size=32",
            "--trainer.max_steps=8",
            "--trainer.val_check_interval=4",
            f"--trainer.logger.init_args.save_dir={root / recipe}",
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
        fit(root, "smollm2_2of4", model_folder, text_file, "--trainer.callbacks.init_args.update_freq=2")
        fit(root, "smollm2_dense", model_folder, text_file)
    return root


@pytest.fixture
def sparse(root):
    return root / "smollm2_2of4" / "version_0"


@pytest.fixture
def records(sparse):
    return [json.loads(line) for line in (sparse / "sparse_train_history.jsonl").read_text().splitlines()]


def check_pictures(page, count):
    assert len(page.pictures) == count
    data = [re.fullmatch(r"data:image/png;base64,(.*)", address) for address in page.loads if address[0] != "#"]
    assert len(data) == 2 * count  # for light pages, and for dark ones
    for match in data:
        with Image.open(io.BytesIO(base64.b64decode(match[1]))) as picture:
            picture.load()
            assert picture.format == "PNG" and picture.width > 700 and picture.height > 150
            assert len(picture.convert("L").getcolors(256)) > 5  # something is drawn
    assert all(len(picture["alt"]) > 30 for picture in page.pictures)


def test_fit_leaves_a_page_of_the_run(sparse, records):
    text = (sparse / "report.html").read_text()
    page = Page(text)
    assert page.headings == SECTIONS
    check_pictures(page, 6)
    assert "http" not in text and "@import" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text

    baselines = {record["state"]: record["metrics"] for record in records if record["kind"] == "baseline"}
    last = [record for record in records if record["kind"] == "validation"][-1]

    def row(state, step, sparsity, metrics):
        return [state, step, sparsity, f"{metrics['val/perplexity']:.2f}", f"{metrics['val/loss']:.4f}"]

    assert page.tables[0] == [
        ["state", "step", "sparsity", "perplexity", "loss"],
        row("dense, untrained", "0", "0.0000", baselines["dense"]),
        row("one-shot mask, untrained", "0", "0.5000", baselines["first mask"]),
        row("trained", "8", "0.5000", last["metrics"]),
    ]
    facts = {row[0]: row[1] for table in page.tables[1:] for row in table}
    end, updates = records[-1], [record for record in records if record["kind"] == "update"]
    assert facts["tokens trained on"] == f"{end['tokens']:,}" == f"{8 * 4 * 32:,}"
    assert facts["peak memory of the process"] == f"{end['peak_bytes'] / 2**30:.2f} GiB"
    took = sum(update["took"] for update in updates if update["step"] > 0)
    assert facts["in mask updates"] == f"{took:,.1f} s ({took / end['seconds']:.1%})"
    assert facts["updates after the first mask"] == str(len(updates) - 1) == "3"
    assert facts["seed"] == "0"
    assert facts["mask_structure"] == "2:4"
    assert facts["torch"] == records[0]["versions"]["torch"]
    assert "update_freq: 2" in text


def test_numbers_of_the_pictures_are_those_of_the_records(sparse, records):
    alts = " ".join(picture["alt"] for picture in Page((sparse / "report.html").read_text()).pictures)
    updates = [record for record in records if record["kind"] == "update"]
    first, last = 100 * updates[1]["flip_rate"], 100 * updates[-1]["flip_rate"]
    assert f"{first:.4g} at step 2 to {last:.4g} at step 6" in alts
    assert "zeros, %: 50.00 to 50.00" in alts
    sizes = list(records[0]["pruning"]["layers"].values())
    totals = [sum(update["flips"][i] for update in updates[1:]) / size for i, size in enumerate(sizes)]
    assert f"flips over the run, %: {100 * min(totals):.2f} to {100 * max(totals):.2f}" in alts
    run = collect([sparse])[0]
    before, after = run.crop(run.updates[0]), run.crop(run.updates[-1])
    assert before.reshape(-1, 4).sum(1).tolist() == [2] * (before.size // 4)
    assert f"{(before & ~after).sum()} went, {(after & ~before).sum()} came back" in alts
    assert (before != after).any()


def test_the_markdown_twin_has_the_same_tables_and_pictures(sparse):
    page, twin = Page((sparse / "report.html").read_text()), (sparse / "report.md").read_text()
    for head, *rows in page.tables:
        assert markdown_table(head, rows) in twin
    assert re.findall(r"^## (.*)", twin, re.M) == SECTIONS
    pictures = re.findall(r"\]\((.*?\.png)\)", twin)
    assert len(pictures) == len(page.pictures)
    for name in pictures:
        with Image.open(sparse / name) as picture:
            assert picture.size[0] > 700


def test_runs_side_by_side(root, sparse, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dense = root / "smollm2_dense"  # the folder above the only version
    cli.main(["report", str(sparse), str(dense)])
    assert "report: report/report.html" in capsys.readouterr().out
    page = Page((tmp_path / "report" / "report.html").read_text())
    assert page.headings == SECTIONS
    states = [row[:2] for row in page.tables[0][1:]]
    assert states == [
        ["smollm2_2of4", "dense, untrained"],
        ["smollm2_2of4", "one-shot mask, untrained"],
        ["smollm2_2of4", "trained"],
        ["smollm2_dense", "dense, untrained"],
        ["smollm2_dense", "trained"],
    ]
    assert page.tables[0][1][4:] == page.tables[0][4][4:]  # the same model on the same text
    assert page.tables[0][3][4:] != page.tables[0][5][4:]
    for table in page.tables[1:]:
        assert table[0] == ["", "smollm2_2of4", "smollm2_dense"]
    curves = next(picture["alt"] for picture in page.pictures if picture["alt"].startswith("perplexity"))
    assert "smollm2_2of4: " in curves and "smollm2_dense: " in curves
    assert "No mask was recorded in smollm2_dense." in (tmp_path / "report" / "report.md").read_text()

    cli.main(["report", str(dense), "--out", "alone"])
    alone = Page((tmp_path / "alone" / "report.html").read_text())
    assert alone.headings == SECTIONS
    check_pictures(alone, 2)


def test_a_run_that_was_cut_off_says_so(sparse, records, tmp_path):
    lines = [json.dumps(r) for r in records if r["kind"] != "end" and r["step"] < 5 and r["kind"] != "baseline"]
    (tmp_path / "sparse_train_history.jsonl").write_text("\n".join(lines) + '\n{"kind": "trai')
    (run,) = collect([tmp_path])
    page = run_page([run])
    text = to_html(page)
    assert "has not ended, or was cut off: its last record is of step 4." in text
    assert "was not evaluated before training" in text
    assert "Not started by sparse-train fit" in text
    table = page.lead[0]
    assert isinstance(table, Table)
    assert [row[:3] for row in table.rows] == [["latest validation", "4", "0.5000"]]


def test_a_run_with_a_first_mask_only(sparse, records, tmp_path):
    lines = [json.dumps(r) for r in records if r["kind"] == "start" or (r["kind"] == "update" and r["step"] == 0)]
    (tmp_path / "sparse_train_history.jsonl").write_text("\n".join(lines) + "\n")
    text = to_html(run_page(collect([tmp_path])))
    assert "there is no flip rate" in text
    assert "No mask was updated after the first." in text
    assert "No loss and no perplexity were recorded." in text
    check_pictures(Page(text), 2)


def test_a_mask_that_comes_later_is_said(sparse, records, tmp_path):
    late = [r for r in records if r.get("state") != "first mask" and not (r["kind"] == "update" and r["step"] == 0)]
    (tmp_path / "sparse_train_history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in late))
    page = run_page(collect([tmp_path]))
    assert "The first mask came at step 2, so there is no row for it untrained." in page.lead
    assert [row[0] for row in page.lead[0].rows] == ["dense, untrained", "trained"]


def test_a_partial_sanity_check_does_not_pass_for_the_whole(sparse, records, tmp_path):
    changed = [
        record | {"batches": 2, "of_batches": 4} if record["kind"] == "baseline" else record for record in records
    ]
    (tmp_path / "sparse_train_history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in changed))
    page = run_page(collect([tmp_path]))
    text = to_html(page)
    assert "measured on 2 of 4 validation batches, and cannot be compared" in text
    perplexity = next(picture["alt"] for picture in Page(text).pictures if picture["alt"].startswith("perplexity"))
    assert "at step 4 to" in perplexity  # the curve begins with the first whole validation


def test_without_records_there_is_a_clear_error(tmp_path):
    with pytest.raises(SystemExit, match="has no sparse_train_history.jsonl, so nothing was recorded"):
        cli.main(["report", str(tmp_path)])
    with pytest.raises(SystemExit, match="There is no folder nowhere"):
        cli.main(["report", "nowhere"])


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason=f"none of {', '.join(BROWSERS)} is installed")
def test_a_browser_shows_it(sparse, tmp_path):
    browser = next(path for path in map(shutil.which, BROWSERS) if path)
    count = len(Page((sparse / "report.html").read_text()).pictures)
    probe = (
        (sparse / "report.html")
        .read_text()
        .replace(
            "</body>",
            "<script>addEventListener('load', () => { document.title = [...document.images]"
            ".filter(image => image.complete && image.naturalWidth > 700).length })</script></body>",
        )
    )
    (tmp_path / "probe.html").write_text(probe)
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            (tmp_path / "probe.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert f"<title>{count}</title>" in done.stdout
    assert "CONSOLE" not in done.stderr
