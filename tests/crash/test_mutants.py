"""Every mutant is noticed, by the scenario that was written for it and by the random search: else those say nothing."""

from __future__ import annotations

import pytest
import scenarios
from mutants import MUTANTS, applied
from powercut import Counted
from scenarios import Scenario, run_scenario
from search import search_on

BROKEN = r"cut after entry \d+: (sector \d+ holds|nobody touched)"

NOTICED_BY: dict[str, Scenario] = {
    "data-not-synced": scenarios.write_and_flush,
    "map-before-data": scenarios.write_and_flush,
    "copied-after-sync": scenarios.write_during_the_sync,
    "live-sectors-written": scenarios.write_during_the_sync,
    "map-not-synced": scenarios.write_and_flush,
    "failed-round-forgotten": scenarios.no_room_for_the_map,
    "running-round-joined": scenarios.flush_during_the_sync,
    "published-before-written": scenarios.flush_beside_a_write_in_its_thread,
    "punched-without-looking": scenarios.trimmed_and_written_again,
    "old-bytes-under-zeros": scenarios.trimmed_and_written_in_part,
    "failed-sync-tried-again": scenarios.sync_fails,
}
# The search finds these when a write comes between a trim and its punch, which it does not arrange.
BY_LUCK = {"old-bytes-under-zeros", "punched-without-looking"}


@pytest.mark.parametrize("mutant", MUTANTS)
async def test_a_scenario_notices(mutant: str) -> None:
    with applied(mutant), pytest.raises(AssertionError, match=BROKEN):
        await run_scenario(NOTICED_BY[mutant])


@pytest.mark.slow
@pytest.mark.parametrize("mutant", sorted(MUTANTS.keys() - BY_LUCK))
def test_the_search_notices(mutant: str) -> None:
    counted = Counted()
    with applied(mutant), pytest.raises(AssertionError, match=BROKEN):
        search_on(range(30), counted)  # the first few are enough as a rule
    print(f"{mutant}: {counted}")
