"""Tables to which each finished run adds a row, measured times, and the pages that show them."""

import csv
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

LOAD = os.getloadavg()[0]
"""Of the minute before this process, which says whether the machine was idle."""


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header; none if there is no file."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def append(path: Path, row: Any) -> None:
    """Append a dataclass as a row, with a header if the file is new."""
    columns, there = [field.name for field in fields(row)], read(path)
    if there and list(there[0]) != columns:
        raise SystemExit(f"{path} has the columns {', '.join(there[0])}, and a row has {', '.join(columns)}.")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(asdict(row))


def record(path: str | None, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What a benchmark has measured, with the machine; also put into a JSON file, if one is named, whose other parts
    stay."""
    from sparse_train.environment import machine, versions

    where = {"load": round(LOAD, 1), **machine(), "torch": versions()["torch"]}
    part = {"machine": where, **found}
    if path is not None:
        file = Path(path)
        parts = json.loads(file.read_text()) if file.exists() else {}
        parts[name] = part
        file.write_text(json.dumps(parts, indent=1) + "\n")
    return part


def steps_of_a_run(found: Mapping[str, list[float]], k: int) -> list[float]:
    """Seconds of a re-pruned step in each round: half of the steps before an update are recorded, at least one, and
    each has its share of the update."""
    recorded = -(-k // 2) / k
    rounds = zip(found["re-pruned"], found["re-pruned, not recorded"], found["update"], strict=True)
    return [recorded * a + (1 - recorded) * b + update / k for a, b, update in rounds]


def ratio_of_a_run(found: Mapping[str, list[float]], k: int) -> float:
    """The median over rounds of a re-pruned step, with its share of an update, against the dense one."""
    return median(own / dense for own, dense in zip(steps_of_a_run(found, k), found["dense"], strict=True))


def mean_of_a_run(found: Mapping[str, list[float]], k: int) -> tuple[float, float]:
    """The mean over rounds of such a step against the mean of all dense steps, and its standard error."""
    own, dense = steps_of_a_run(found, k), found["dense"] + found["dense, again"]
    errors = [stdev(times) / len(times) ** 0.5 / mean(times) for times in (own, dense)]
    ratio = mean(own) / mean(dense)
    return ratio, ratio * math.hypot(*errors)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)) + "\n"


def print_or_write(made: str, page: Path, begin: str, end: str) -> None:
    """What the modules of tables do: print, or with --write show on a page."""
    if "--write" in sys.argv:
        show(page, begin, end, made)
    else:
        print(made)


def show(page: Path, begin: str, end: str, made: str) -> None:
    """Put ``made`` between two marks of a page; each mark must be there exactly once."""
    text = page.read_text()
    assert text.count(begin) == text.count(end) == 1, f"{page} needs {begin} and {end}, once each"
    before, _, rest = text.partition(begin)
    page.write_text(f"{before}{begin}\n{made}{end}{rest.partition(end)[2]}")
