"""The tables in docs/results.md are those that the committed rows give."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import oneshot_tables  # noqa: E402
import zeroshot_tables  # noqa: E402


def shown(module):
    page = (ROOT / "docs" / "results.md").read_text()
    return page.partition(module.BEGIN)[2].partition(module.END)[0].strip()


def test_one_shot_tables_are_made_from_the_rows():
    assert shown(oneshot_tables) == oneshot_tables.tables().strip()


def test_the_zero_shot_table_is_made_from_the_rows():
    assert shown(zeroshot_tables) == zeroshot_tables.tables().strip()
