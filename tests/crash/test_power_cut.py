"""The power fails at every moment, and keeps what it likes of what was not synced: what was flushed is there, the rest is old
or new per sector, and the overlay opens."""

from __future__ import annotations

import random

import pytest
from powercut import Counted
from scenarios import SCENARIOS, Scenario, change_two_sectors_of_the_map, run_scenario
from search import search

CUTS = 10_000


@pytest.mark.slow
def test_ten_thousand_power_cuts_lose_nothing_that_was_flushed() -> None:
    dice = random.Random()
    counted = Counted()
    while counted.cuts < CUTS:
        from_seed = dice.randrange(1 << 32)
        print(f"seed {from_seed}")  # shown when the test fails
        search(from_seed, counted)
    print(counted)


def test_some_power_cuts_lose_nothing_that_was_flushed() -> None:
    search(1, Counted())


SLOW = {change_two_sectors_of_the_map}


@pytest.mark.parametrize(
    "scenario",
    [pytest.param(one, marks=pytest.mark.slow if one in SLOW else (), id=one.__name__) for one in SCENARIOS],
)
async def test_nothing_is_lost_in(scenario: Scenario) -> None:
    assert (await run_scenario(scenario)).cuts >= 20
