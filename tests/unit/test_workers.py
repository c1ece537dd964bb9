"""Threads that run calls for the loop: results, errors, as many as let through, and what a cancellation ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.store.workers import Workers

LIMIT = 3


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers("test", trio.CapacityLimiter(LIMIT))
    yield made
    made.close()


async def test_results_and_errors_come_back_from_another_thread(workers: Workers) -> None:
    assert await workers.run(threading.get_ident) != threading.get_ident()
    assert await workers.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await workers.run(divmod, 1, 0)
    assert await workers.run(len, "goes on") == 7


async def test_a_thread_that_is_idle_is_used_again(workers: Workers) -> None:
    assert len({await workers.run(threading.get_ident) for _ in range(20)}) == 1


async def test_as_many_run_at_once_as_the_limiter_lets_through(workers: Workers) -> None:
    go_on = threading.Event()
    entered = threading.Semaphore(0)

    def hang() -> None:
        entered.release()
        assert go_on.wait(20)

    async with trio.open_nursery() as nursery:
        for _ in range(LIMIT + 2):
            nursery.start_soon(workers.run, hang)
        for _ in range(LIMIT):
            assert await trio.to_thread.run_sync(entered.acquire, True, 20)
        assert not entered.acquire(blocking=False)
        go_on.set()


async def test_a_call_that_runs_is_waited_for_and_one_that_waits_is_dropped(workers: Workers) -> None:
    go_on, ran = threading.Event(), []

    def hang() -> None:
        assert go_on.wait(20)
        ran.append("running")

    async def cancelled_soon(scope: trio.CancelScope, call: object) -> None:
        with scope:
            await workers.run(call)  # type: ignore[arg-type]
            await trio.lowlevel.checkpoint()

    scopes = [trio.CancelScope() for _ in range(LIMIT + 1)]
    async with trio.open_nursery() as nursery:
        for scope in scopes[:LIMIT]:
            nursery.start_soon(cancelled_soon, scope, hang)
        await wait_all_tasks_blocked()
        nursery.start_soon(cancelled_soon, scopes[LIMIT], lambda: ran.append("dropped"))
        await wait_all_tasks_blocked()
        for scope in scopes:
            scope.cancel()
        await wait_all_tasks_blocked()
        assert not ran
        go_on.set()
    assert ran == ["running"] * LIMIT
    assert all(scope.cancelled_caught for scope in scopes)
