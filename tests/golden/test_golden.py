"""Every scenario ends with the recorded bits; resumed and streamed ones with those of their twin, on any machine."""

from collections import defaultdict
from typing import Any

import pytest

from tests.golden import digests, ranks
from tests.golden.fingerprint import difference
from tests.golden.scenarios import SCENARIOS


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return digests.recorded()


@pytest.fixture(scope="module")
def of_ranks() -> digests.Digests:
    return digests.run_ranks()


def skip_elsewhere(recorded: dict[str, Any]) -> None:
    elsewhere = difference(recorded["fingerprint"])
    if elsewhere is not None:
        pytest.skip(elsewhere)


@pytest.mark.parametrize("name", SCENARIOS)
def test_one_process(name, recorded):
    if name in digests.EQUAL:
        assert digests.run_here(name) == digests.run_here(digests.EQUAL[name])
    skip_elsewhere(recorded)
    assert digests.run_here(name) == recorded["scenarios"][name]


@pytest.mark.parametrize("name", ranks.NAMES)
def test_two_processes(name, recorded, of_ranks):
    if name in digests.EQUAL:
        assert of_ranks[name] == of_ranks[digests.EQUAL[name]]
    skip_elsewhere(recorded)
    assert of_ranks[name] == recorded["scenarios"][name]


def test_what_a_scenario_is_named_for_makes_a_difference(recorded):
    assert list(recorded["scenarios"]) == digests.NAMES
    same = defaultdict(set)
    for name in SCENARIOS:
        same[recorded["scenarios"][name]["masks"]].add(digests.EQUAL.get(name, name))
    assert not [names for names in same.values() if len(names) > 1]
