"""Which rows of benchmarks/quality.csv are reported, and at which learning rate: ``Runs``.

An arm is reported, at each length, at the learning rate at which most seeds were run; of several, at the one that is
lower on the validation articles of these runs. Short tuning runs on other seeds say which rates to run. Nothing is
chosen on other texts.
"""

import copy
import statistics
from collections import defaultdict
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
        found = [row for row in rows.read(path) if row.get("tokens_a_step", "2048") == str(tokens_a_step)]
        # a row that was run again, for a text that it lacked, counts once
        key = ("arm", "seed", "steps", "lr", "tuning")
        self._rows = list({tuple(row[name] for name in key): row for row in found}.values())
        self._chosen_on = {row["seed"] for row in self._rows if row["tuning"] == "True"}

    def at(self, lr: float) -> "Runs":
        """Without runs at other rates of arms that were run at this one: to compare settings at one rate."""
        runs = copy.copy(self)
        final = [row for row in self._rows if row["tuning"] == "False"]
        there = {row["arm"] for row in final if float(row["lr"]) == lr}
        others = [row for row in final if row["arm"] in there and float(row["lr"]) != lr]
        runs._rows = [row for row in self._rows if row not in others]
        return runs

    def tuning(self, arm: str) -> dict[float, dict[str, str]]:
        """The tuning row of each learning rate that was tried."""
        found = [row for row in self._rows if row["arm"] == arm and row["tuning"] == "True"]
        return {float(row["lr"]): row for row in found if row["steps"] == TUNING_STEPS}

    def lr(self, arm: str) -> float | None:
        """The learning rate with the lowest validation perplexity; None if none was tried."""
        tried = self.tuning(arm)
        return min(tried, key=lambda lr: float(tried[lr]["validation"])) if tried else None

    def has_grid(self, arm: str, steps: int = 100) -> bool:
        """Whether both a larger and a smaller rate were tried than the one that is reported."""
        tried = {float(row["lr"]) for row in self._rows if row["arm"] == arm}
        return all(min(tried) < float(row["lr"]) < max(tried) for row in self.reported(arm, steps).values())

    def reported(self, arm: str, steps: int = 100) -> dict[int, dict[str, str]]:
        """The row of each seed at the best learning rate, but of seeds that tuning rows have."""
        found = [row for row in self._rows if row["arm"] == arm and row["tuning"] == "False"]
        found = [row for row in found if row["steps"] in ("0", str(steps))]
        rates: dict[float, dict[int, dict[str, str]]] = defaultdict(dict)
        for row in found:
            if row["steps"] == "0" or row["seed"] not in self._chosen_on:
                rates[float(row["lr"])][int(row["seed"])] = row
        return min(rates.values(), key=_preferred, default={})

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

    def change(self, arm: str, other: str, text: str = "heldout", steps: int = 100) -> tuple[float, list[float]] | None:
        """The paired changes of perplexity, in percent of ``other``, over the seeds of both: mean, and each one."""
        ours, theirs = self.values(arm, text, steps), self.values(other, text, steps)
        paired = [100 * (ours[seed] / theirs[seed] - 1) for seed in sorted(ours.keys() & theirs.keys())]
        return (statistics.mean(paired), paired) if paired else None


def _preferred(runs: dict[int, dict[str, str]]) -> tuple[int, float]:
    """What is least for the rate to report: most seeds, then the lowest perplexity on validation articles."""
    return -len(runs), statistics.mean(float(row["validation"]) for row in runs.values())
