"""When something that failed is tried again."""

from __future__ import annotations

import pytest

from cachefs.pool.health import FIRST_PAUSE_S, LONGEST_PAUSE_S, Health


@pytest.fixture
def health() -> Health:
    return Health("writing")


def test_it_works_until_it_fails(health: Health) -> None:
    assert health.works
    assert health.may_try(0)
    assert health.fail("full", 10)
    assert not health.works
    assert health.reason == "full"
    assert not health.may_try(10)


def test_pause_doubles_with_each_try_that_fails_up_to_the_longest(health: Health) -> None:
    now = 0.0
    pauses = []
    for _ in range(9):
        health.fail("full", now)
        pause = next(step / 4 for step in range(1000) if health.may_try(now + step / 4))
        pauses.append(pause)
        now += pause
    assert pauses[:4] == [FIRST_PAUSE_S, 2, 4, 8]
    assert pauses[-2:] == [LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    assert health.failures == 9


def test_only_the_first_failure_is_news(health: Health) -> None:
    assert health.fail("full", 0)
    assert not health.fail("full", 5)
    assert health.succeed(7)
    assert not health.succeed(7)
    assert health.fail("full", 8)


def test_success_of_a_call_that_began_before_the_pause_was_over_says_nothing(health: Health) -> None:
    health.fail("full", 5)
    assert not health.succeed(4.9)
    assert not health.succeed(5.5)
    assert not health.works
    assert health.succeed(5 + FIRST_PAUSE_S)
    assert health.works


def test_calls_that_were_under_way_when_it_failed_make_no_pause_longer(health: Health) -> None:
    health.fail("full", 0)
    for _ in range(5):
        health.fail("full", 0.5)
    assert health.failures == 1
    assert health.may_try(FIRST_PAUSE_S)


def test_success_begins_the_pauses_anew(health: Health) -> None:
    for now in (0, 2, 6, 12):
        health.fail("full", now)
    health.succeed(20)
    assert health.may_try(20)
    health.fail("full", 21)
    assert health.may_try(21 + FIRST_PAUSE_S)


def test_one_try_at_a_time(health: Health) -> None:
    health.fail("hung", 0)
    assert health.may_try(5)
    health.begin_try()
    assert not health.may_try(100)
    health.fail("hung", 100)
    assert health.may_try(102)
    health.begin_try()
    assert health.succeed(102)
    assert health.may_try(102)
