"""Which rows of benchmarks/quality.csv are reported, and at which learning rate: ``Runs``.

An arm is reported at the learning rate with the lowest perplexity on validation articles among its tuning rows, whose
seeds are not reported. An arm without tuning rows is reported at the rate with the most seeds; of several, at the one
with the lowest perplexity on validation articles. Nothing is chosen on other texts.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import rows

TUNING_STEPS = "50"


class Runs:
    """The rows of a CSV file for one size of a step, by arm.

    Args:
        path: of the file.
        tokens_a_step: the size.
    """

    def __init__(self, path: Path, tokens_a_step: int = 2048) -> None:
        found = rows.read(path)
        self._rows = [row for row in found if row.get("tokens_a_step", "2048") == str(tokens_a_step)]
        self._chosen_on = {row["seed"] for row in self._rows if row["tuning"] == "True"}

    def tuning(self, arm: str) -> dict[float, dict[str, str]]:
        """The tuning row of each learning rate that was tried."""
        found = [row for row in self._rows if row["arm"] == arm and row["tuning"] == "True"]
        return {float(row["lr"]): row for row in found if row["steps"] == TUNING_STEPS}

    def lr(self, arm: str) -> float | None:
        """The learning rate with the lowest validation perplexity; None if none was tried."""
        tried = self.tuning(arm)
        return min(tried, key=lambda lr: float(tried[lr]["validation"])) if tried else None

    def has_grid(self, arm: str) -> bool:
        """Whether the arm was run at its best rate, and both a larger and a smaller one were tried."""
        tried, best, run = self.tuning(arm), self.lr(arm), self.reported(arm)
        at_best = all(float(row["lr"]) == best for row in run.values())
        return best is not None and at_best and min(tried) < best < max(tried)

    def reported(self, arm: str, steps: int = 100) -> dict[int, dict[str, str]]:
        """The row of each seed at the best learning rate, but of seeds that tuning rows have.

        It is that of the tuning rows; or else, of the rates with the most of these seeds, the one that is lower on
        their validation articles.
        """
        found = [row for row in self._rows if row["arm"] == arm and row["tuning"] == "False"]
        found = [row for row in found if row["steps"] in ("0", str(steps))]
        found = [row for row in found if row["steps"] == "0" or row["seed"] not in self._chosen_on]
        if not found:
            return {}
        validation = defaultdict(list)
        for row in found:
            validation[float(row["lr"])].append(float(row["validation"]))
        rates = sorted(validation, key=lambda lr: (-len(validation[lr]), statistics.mean(validation[lr])))
        best = self.lr(arm) if self.lr(arm) in rates else rates[0]
        return {int(row["seed"]): row for row in found if float(row["lr"]) == best}

    def at_other_rates(self) -> dict[tuple[str, int, float], dict[int, dict[str, str]]]:
        """Rows of runs that ``reported`` leaves out, seed by seed, by arm, steps and learning rate."""
        found: dict[tuple[str, int, float], dict[int, dict[str, str]]] = defaultdict(dict)
        for row in self._rows:
            arm, seed, steps = row["arm"], int(row["seed"]), int(row["steps"])
            counts = row["tuning"] == "False" and steps > 0 and row["seed"] not in self._chosen_on
            if counts and self.reported(arm, steps).get(seed) != row:
                found[arm, steps, float(row["lr"])][seed] = row
        return found

    def values(self, arm: str, text: str, steps: int = 100) -> dict[int, float]:
        """Perplexity of each seed."""
        return {seed: float(row[text]) for seed, row in self.reported(arm, steps).items() if row[text]}

    def mean(self, arm: str, text: str = "heldout", steps: int = 100) -> float | None:
        """Mean perplexity over seeds."""
        values = self.values(arm, text, steps)
        return statistics.mean(values.values()) if values else None

    def best(self, arms: Iterable[str]) -> str | None:
        """The arm with the lowest perplexity on validation articles, which are not reported.

        Compared by tuning rows if all of the arms have some, otherwise by the runs that are reported on other texts.
        """
        run = [arm for arm in arms if self.reported(arm)]
        rows = {arm: list(self.tuning(arm).values()) for arm in run}
        if all(rows.values()):
            found = {arm: min(float(row["validation"]) for row in rows[arm]) for arm in run}
        else:
            found = {arm: statistics.mean(self.values(arm, "validation").values()) for arm in run}
        return min(found, key=lambda arm: found[arm]) if found else None

    def change(self, arm: str, other: str, text: str = "heldout", steps: int = 100) -> tuple[float, list[float]] | None:
        """The paired changes of perplexity, in percent of ``other``, over the seeds of both: mean, and each one."""
        ours, theirs = self.values(arm, text, steps), self.values(other, text, steps)
        paired = [100 * (ours[seed] / theirs[seed] - 1) for seed in sorted(ours.keys() & theirs.keys())]
        return (statistics.mean(paired), paired) if paired else None
