"""Runs scenarios by name, and keeps their digests in ``digests.json``."""

import functools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tests.golden import ranks
from tests.golden.fingerprint import difference, fingerprint
from tests.golden.outcome import digests, one_thread
from tests.golden.scenarios import SCENARIOS

FILE = Path(__file__).with_name("digests.json")
NAMES = [*SCENARIOS, *ranks.NAMES]
EQUAL = {f"{name}{mark}": name for mark in (", resumed", ", from disk") for name in NAMES if f"{name}{mark}" in NAMES}
"""Scenarios that end with the very bits of another: resumed and uninterrupted, from disk and in memory."""

Digests = dict[str, dict[str, str]]


class NotComparable(Exception):
    """Digests were recorded where floating point differs."""


@functools.cache
def run_here(name: str) -> dict[str, str]:
    """The digests of a scenario of one process."""
    with one_thread():
        return digests(SCENARIOS[name]())


def run_ranks(names: Collection[str] = ranks.NAMES) -> Digests:
    """The digests of scenarios of several processes."""
    return {name: digests(outcome) for name, outcome in ranks.outcomes(names).items()}


def run(names: Collection[str]) -> Digests:
    """The digests of scenarios of both kinds."""
    found = {name: run_here(name) for name in names if name in SCENARIOS}
    several = [name for name in names if name in ranks.NAMES]
    return found | (run_ranks(several) if several else {})


def recorded() -> dict[str, Any]:
    """The content of ``digests.json``: "fingerprint" and "scenarios"."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def record() -> None:
    """Write the digests of all scenarios."""
    content = {"fingerprint": fingerprint(), "scenarios": run(NAMES)}
    FILE.write_text(json.dumps(content, indent=1) + "\n")


def check(names: Collection[str]) -> str:
    """How the digests of scenarios differ from the recorded ones, in lines of text; "" = they do not.

    Raises:
        NotComparable: they cannot be compared, because floating point differs here.
    """
    before = recorded()
    elsewhere = difference(before["fingerprint"])
    if elsewhere is not None:
        raise NotComparable(f"{elsewhere} Record at the commit to compare with, and check here.")
    found, expected = run(names), before["scenarios"]
    return "\n".join(
        f"{name}: {what} differ"
        for name, digest in found.items()
        for what in digest
        if digest[what] != expected.get(name, {}).get(what)
    )
