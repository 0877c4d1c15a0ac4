"""The tables in docs/results.md and docs/more_results.md are those that the committed rows give."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import arms  # noqa: E402
import oneshot_tables  # noqa: E402
import performance  # noqa: E402
import quality_labels  # noqa: E402
import quality_tables  # noqa: E402
import rows  # noqa: E402
import zeroshot_tables  # noqa: E402


def shown(module, page="docs/results.md"):
    page = (ROOT / page).read_text()
    return page.partition(module.BEGIN)[2].partition(module.END)[0].strip()


def test_one_shot_tables_are_made_from_the_rows():
    assert shown(oneshot_tables) == oneshot_tables.tables().strip()


def test_the_zero_shot_table_is_made_from_the_rows():
    assert shown(zeroshot_tables) == zeroshot_tables.tables().strip()


def test_the_tables_of_times_are_made_from_what_was_measured():
    assert shown(performance, "docs/performance.md") == performance.tables().strip()


def test_tables_on_training_are_made_from_the_rows():
    sizes = quality_tables.by_size()
    assert shown(quality_tables) == quality_tables.tables(sizes).strip()
    assert shown(quality_tables, "docs/more_results.md") == quality_tables.more_tables(sizes).strip()
    assert shown(quality_tables, "README.md") == quality_tables.headline(sizes).strip()
    begin, end = quality_tables.BEGIN_MASKS, quality_tables.END_MASKS
    finding = (ROOT / "docs/results.md").read_text().partition(begin)[2].partition(end)[0]
    assert finding.strip() == quality_tables.first_masks(sizes).strip()


def test_every_arm_has_a_place_in_a_table():
    tables = [each for name, each in vars(quality_labels).items() if name[0].isupper() and isinstance(each, dict)]
    labelled = {arm for table in tables for arm in table}
    assert labelled == {"none", *arms.ARMS, *arms.ONESHOT, *quality_labels.REMOVED}
    assert not arms.ARMS.keys() & set(quality_labels.REMOVED)


def test_every_row_is_on_a_page():
    pages = "".join((ROOT / page).read_text() for page in ("docs/results.md", "docs/more_results.md"))
    found = [row["validation" if row["tuning"] == "True" else "heldout"] for row in rows.read(quality_tables.CSV)]
    assert not [each for each in found if f"{float(each):.2f}" not in pages]


def test_runs_with_other_sizes_of_a_step_are_apart(tmp_path):
    columns = "arm,seed,steps,lr,tuning,validation,heldout,wikitext2,c4,sparsity,tokens_a_step"
    lines = ["dynamic,1,100,0.1,False,9,9,9,9,0.5,2048", "dynamic,1,100,0.1,False,8,8,8,8,0.5,512"]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([columns, *lines]) + "\n")
    assert quality_tables.Runs(path).values("dynamic", "heldout") == {1: 9.0}
    assert quality_tables.Runs(path, 512).values("dynamic", "heldout") == {1: 8.0}


def test_an_arm_is_reported_at_its_best_learning_rate_and_on_seeds_that_chose_nothing(tmp_path):
    columns = "arm,seed,steps,lr,tuning,validation,heldout,wikitext2,c4,sparsity,"
    columns += "first_flip_rate,last_flip_rate,first_flip_agreement,last_flip_agreement"
    lines = [
        "dynamic,0,50,0.1,True,30,,,,0.5,0.02,0.01,,",
        "dynamic,0,50,0.2,True,20,,,,0.5,0.02,0.01,,",
        "dynamic,0,50,0.3,True,25,,,,0.5,0.02,0.01,,",
        "dynamic,1,100,0.1,False,9,9,9,9,0.5,0.02,0.01,,",
        "dynamic,1,100,0.2,False,18,18,36,,0.5,0.02,0.01,,",
        "dynamic,2,100,0.2,False,20,22,44,,0.5,0.02,0.01,,",
        "static,1,100,0.1,False,21,10,10,,0.5,,,,",
        "static,2,100,0.1,False,21,10,10,,0.5,,,,",
        "static,1,100,0.3,False,1,1,1,,0.5,,,,",
        "static,1,100,0.2,False,20,20,40,,0.5,,,,",
        "static,2,100,0.2,False,20,20,40,,0.5,,,,",
        "static,2,100,0.2,False,20,20,40,8,0.5,,,,",  # again, for a text that it lacked
    ]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([columns, *lines]) + "\n")
    runs = quality_tables.Runs(path)
    assert runs.lr("dynamic") == 0.2 and runs.lr("static") is None
    assert runs.has_grid("dynamic") and runs.has_grid("static")
    assert runs.values("dynamic", "heldout") == {1: 18.0, 2: 22.0}
    assert runs.values("dynamic", "c4") == {}
    mean, paired = runs.change("dynamic", "static")
    assert mean == pytest.approx(0) and paired == pytest.approx([-10, 10])
    made = quality_tables.table(runs, {"static": "kept", "dynamic": "moved", "dense": "no"}, "static", "static")
    assert "| moved | dynamic | 0.2 | 1, 2 | 20.00 (18.00, 22.00) | 40.00 (36.00, 44.00) | not measured |" in made
    assert "2.00 % to 1.00 % | +0.0 % (-10.0, +10.0) |" in made and "| kept | static | 0.2 |" in made
    assert "| no |" not in made
    made = quality_tables.other_rates(runs)
    assert "| dynamic | 0.1 | 100 | 1 | 9.00 | 9.00 | 9.00 |" in made
    assert "| static | 0.1 | 100 | 1, 2 | 10.00 (10.00, 10.00) |" in made and "| static | 0.3 | 100 | 1 |" in made
    assert made.count("\n") == 5  # and not the reported ones, nor those of seeds that chose a rate
    at = runs.at(0.1)
    assert at.values("dynamic", "heldout") == {1: 9.0} and at.values("static", "heldout") == {1: 10.0, 2: 10.0}
    assert at.lr("dynamic") == 0.2 and runs.at(0.3).values("dynamic", "heldout") == {1: 18.0, 2: 22.0}
