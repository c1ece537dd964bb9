from __future__ import annotations

import threading
from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.errors import BackendError
from cachefs.store.rounds import FlushRounds


class Work:
    """A store whose rounds are held until the test lets them go. `written` is what a round makes durable."""

    def __init__(self) -> None:
        self.written = 0
        self.durable = 0
        self.began: list[int] = []
        self.ended: list[BaseException | None] = []
        self.error: Exception | None = None
        self._token = trio.lowlevel.current_trio_token()
        self._go = threading.Semaphore(0)
        self.rounds = FlushRounds("store", self._begin, self._work, self._end)

    def _begin(self) -> int:
        self.began.append(self.written)
        return self.written

    def _work(self, job: int) -> None:
        assert self._go.acquire(timeout=10)
        if self.error is not None:
            raise self.error
        self.durable = job

    def _end(self, job: int, error: Exception | None) -> None:
        assert job == self.began[len(self.ended)]
        self.ended.append(error)

    def let_go(self, rounds: int = 1) -> None:
        self._go.release(rounds)


@pytest.fixture
async def work() -> AsyncIterator[Work]:
    made = Work()
    yield made
    made.let_go(10)
    await made.rounds.wait_idle()
    made.rounds.close()


async def test_flush_that_comes_during_a_round_gets_the_next_one(work: Work) -> None:
    """The write between the two was not looked at by the round that ran."""
    seen: list[tuple[str, int]] = []

    async def flush(name: str) -> None:
        await work.rounds.flush()
        seen.append((name, work.durable))

    async with trio.open_nursery() as nursery:
        work.written = 1
        nursery.start_soon(flush, "first")
        await wait_all_tasks_blocked()
        work.written = 2
        for name in ("second", "third"):
            nursery.start_soon(flush, name)
        await wait_all_tasks_blocked()
        assert work.began == [1]
        work.let_go()
        while not seen:
            await trio.lowlevel.checkpoint()
        work.let_go()
    assert seen[0] == ("first", 1)
    assert sorted(seen[1:]) == [("second", 2), ("third", 2)]
    await work.rounds.wait_idle()  # who waits is told before the round has ended on the loop
    assert work.rounds.completed == 2  # two of them shared one


async def test_error_goes_to_everybody_who_waits_for_the_round_and_to_nobody_else(work: Work) -> None:
    errors: list[Exception] = []

    async def flush() -> None:
        try:
            await work.rounds.flush()
        except BackendError as exc:
            errors.append(exc)

    work.error = BackendError("store", "made to fail")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flush)
        await wait_all_tasks_blocked()
        for _ in range(2):
            nursery.start_soon(flush)
        await wait_all_tasks_blocked()
        work.let_go(2)
    await work.rounds.wait_idle()  # who waits is told before the round has ended on the loop
    assert errors == [work.error] * 3
    assert work.ended == [work.error] * 2
    work.error = None
    work.let_go()
    await work.rounds.flush()
    await work.rounds.wait_idle()
    assert work.rounds.completed == 1


async def test_an_unexpected_error_costs_those_who_asked_and_not_the_rounds(work: Work) -> None:
    work.error = ZeroDivisionError("a bug")
    work.let_go(2)
    with pytest.raises(ZeroDivisionError):
        await work.rounds.flush()
    work.error = None
    await work.rounds.flush()


async def test_one_who_goes_away_concerns_nobody_else(work: Work) -> None:
    done = False

    async def flush() -> None:
        nonlocal done
        await work.rounds.flush()
        done = True

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as leaving:
                leaving.start_soon(work.rounds.flush)
                leaving.start_soon(work.rounds.flush)
                await wait_all_tasks_blocked()
                nursery.start_soon(flush)
                await wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught
        assert len(work.began) == 1
        work.let_go(2)
    assert done


async def test_who_asks_without_waiting_is_told_in_the_thread(work: Work) -> None:
    told: list[tuple[Exception | None, bool]] = []
    loop = threading.get_ident()
    work.rounds.ask(lambda error: told.append((error, threading.get_ident() == loop)))
    assert told == []
    work.let_go()
    await work.rounds.wait_idle()
    assert told == [(None, False)]


async def test_idle_when_nothing_runs_or_is_asked_for(work: Work) -> None:
    await work.rounds.wait_idle()
    work.rounds.ask(lambda error: None)
    work.rounds.ask(lambda error: None)
    idle = False

    async def wait() -> None:
        nonlocal idle
        await work.rounds.wait_idle()
        idle = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert not idle
        work.let_go(2)
    assert len(work.ended) == 2
