"""The tables in docs/results.md are those that the committed rows give."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import oneshot_tables  # noqa: E402


def test_one_shot_tables_are_made_from_the_rows():
    page = (ROOT / "docs" / "results.md").read_text()
    shown = page.partition(oneshot_tables.BEGIN)[2].partition(oneshot_tables.END)[0]
    assert shown.strip() == oneshot_tables.tables().strip()
