"""What ``make bench`` measures and shows, on a tiny model."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import overhead
import performance

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_table_of_a_step(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overhead, "starts", lambda: {"--help": [0.1], "fit --help": [3.0]})
    monkeypatch.setattr(overhead, "BLOCK_SIZE", 64)
    out = tmp_path / "times.json"
    overhead.main(rounds=2, batch_size=1, model=str(model_folder), memory=False, out=str(out))
    assert "KL of the re-pruned model, from the cache against live: -" in capsys.readouterr().out
    found = json.loads(out.read_text())["step"]
    assert set(found["profile"]) == {"dense", "re-pruned", "sums of squares", "update"}
    for each in found["profile"].values():
        assert 0 < each["sum"] < 1.1 * each["wall"]
    functions = {name for name, *_ in found["profile"]["update"]["top"]}
    assert functions & {"_comparison_chunk", "_score", "pack", "choose"}, functions
    made = performance.tables(out)
    assert "| `fit --help` | at most 2 s | 3.00 | nothing that is known" in made
    assert "| mask and cast | " in made and "| update | `" in made


@pytest.mark.parametrize(
    ("at_most", "measured", "told"), [(False, 2.5, "reached"), (False, 1.5, "less work"), (True, 2.5, "less work")]
)
def test_a_number_that_is_missed_says_what_would_close_it(at_most, measured, told):
    number = performance.Number("steps", 2, [measured], "less work", at_most=at_most)
    assert number.line() == [
        "steps",
        f"at {'most' if at_most else 'least'} 2",
        performance.spread([measured], 3 if measured < 2 else 2),
        told,
    ]
