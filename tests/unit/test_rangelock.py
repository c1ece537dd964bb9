from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from cachefs.rangelock import Hold, RangeLocks


class Holder:
    """Tasks that each want a range; `got` says who has it, in the order in which they got it."""

    def __init__(self, nursery: trio.Nursery, locks: RangeLocks) -> None:
        self._nursery = nursery
        self.locks = locks
        self.got: list[str] = []
        self.scopes: dict[str, trio.CancelScope] = {}
        self._let_go: dict[str, trio.Event] = {}

    async def want(self, name: str, start: int, end: int, *, wait_for_pins: bool = False) -> None:
        """Ask in a task of its own; returns when it has the range or waits for it."""
        self._let_go[name] = trio.Event()
        self.scopes[name] = trio.CancelScope()
        self._nursery.start_soon(self._hold, name, start, end, wait_for_pins)
        await wait_all_tasks_blocked()

    async def _hold(self, name: str, start: int, end: int, wait_for_pins: bool) -> None:
        with self.scopes[name]:
            hold = await self.locks.acquire(start, end, wait_for_pins=wait_for_pins)
            self.got.append(name)
            try:
                await self._let_go[name].wait()
            finally:
                self.locks.release(hold)

    async def release(self, name: str) -> None:
        self._let_go[name].set()
        await wait_all_tasks_blocked()

    async def cancel(self, name: str) -> None:
        self.scopes[name].cancel()
        await wait_all_tasks_blocked()


@asynccontextmanager
async def holders() -> AsyncIterator[Holder]:
    async with trio.open_nursery() as nursery:
        holder = Holder(nursery, RangeLocks())
        yield holder
        nursery.cancel_scope.cancel()
    assert holder.locks.statistics() == {"locks_held": 0, "locks_waiting": 0, "pins": 0}


async def test_ranges_that_do_not_overlap_are_held_together() -> None:
    async with holders() as all_:
        await all_.want("a", 0, 4)
        await all_.want("b", 4, 8)
        await all_.want("c", 9, 10)
        assert all_.got == ["a", "b", "c"]
        assert [all_.locks.is_locked(at, at + 1) for at in (0, 3, 4, 7, 8, 9, 10)] == [1, 1, 1, 1, 0, 1, 0]


async def test_overlapping_ranges_are_given_in_the_order_of_asking() -> None:
    async with holders() as all_:
        await all_.want("a", 0, 4)
        await all_.want("b", 2, 6)
        await all_.want("c", 5, 8)  # free, but b asked first for block 5
        await all_.want("d", 8, 9)
        assert all_.got == ["a", "d"]
        assert not all_.locks.is_locked(5, 8)  # who waits holds nothing
        await all_.release("a")
        assert all_.got == ["a", "d", "b"]
        await all_.release("b")
        assert all_.got == ["a", "d", "b", "c"]


async def test_one_release_lets_everybody_in_whom_it_barred() -> None:
    async with holders() as all_:
        await all_.want("a", 0, 10)
        for name, start in (("b", 0), ("c", 3), ("d", 6), ("e", 3)):
            await all_.want(name, start, start + 2)
        await all_.release("a")
        assert sorted(all_.got) == ["a", "b", "c", "d"]
        await all_.release("c")
        assert all_.got[-1] == "e"


async def test_one_who_gives_up_lets_those_behind_pass() -> None:
    async with holders() as all_:
        await all_.want("a", 0, 4)
        await all_.want("b", 3, 6)
        await all_.want("c", 5, 8)
        await all_.cancel("b")
        assert all_.got == ["a", "c"]
        await all_.want("d", 0, 1)
        await all_.cancel("a")  # a holder that is cancelled releases
        assert all_.got == ["a", "c", "d"]


async def test_cancelled_before_it_asks_nobody_holds_anything() -> None:
    locks = RangeLocks()
    with trio.CancelScope() as scope:
        scope.cancel()
        hold = await locks.acquire(0, 4)  # free: no checkpoint
        locks.release(hold)
        taken = await locks.acquire(0, 4)
        try:
            await locks.acquire(2, 3)
        finally:
            locks.release(taken)
    assert scope.cancelled_caught
    assert locks.statistics() == {"locks_held": 0, "locks_waiting": 0, "pins": 0}


async def test_one_that_was_granted_and_cancelled_at_once_leaves_nothing_behind() -> None:
    locks = RangeLocks()
    first = await locks.acquire(0, 4)
    passed = False

    async def wait(scope: trio.CancelScope) -> None:
        nonlocal passed
        with scope:
            locks.release(await locks.acquire(0, 4))
            passed = True

    for release_first in (True, False):
        scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, scope)
            await wait_all_tasks_blocked()
            if release_first:
                locks.release(first)
                scope.cancel()
            else:
                scope.cancel()
                locks.release(first)
        assert locks.statistics()["locks_held"] == locks.statistics()["locks_waiting"] == 0
        first = await locks.acquire(0, 4)
    assert passed  # the first time: what was granted is not taken back


async def test_pin_keeps_away_only_those_who_wait_for_pins() -> None:
    async with holders() as all_:
        with all_.locks.pin(0, 4):
            await all_.want("writer", 0, 1)
            await all_.want("punch", 3, 5, wait_for_pins=True)
            await all_.want("other punch", 4, 6, wait_for_pins=True)  # behind the punch
            with all_.locks.pin(3, 4):  # never waits, not even behind a lock that does
                assert all_.got == ["writer"]
            await wait_all_tasks_blocked()
            assert all_.got == ["writer"]
        await wait_all_tasks_blocked()
        assert all_.got == ["writer", "punch"]
        await all_.release("punch")
        assert all_.got == ["writer", "punch", "other punch"]


async def test_equal_pins_are_counted_one_by_one() -> None:
    async with holders() as all_:
        with all_.locks.pin(0, 4):
            with all_.locks.pin(0, 4):
                await all_.want("punch", 0, 1, wait_for_pins=True)
            await wait_all_tasks_blocked()
            assert all_.got == []
        await wait_all_tasks_blocked()
        assert all_.got == ["punch"]


wants = st.tuples(st.integers(0, 12), st.integers(1, 6), st.booleans(), st.sampled_from(["keep", "cancel"]))


@given(
    st.lists(wants, min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4)), max_size=3),
    st.randoms(),
)
@settings(max_examples=80, deadline=None)
async def test_no_two_overlapping_locks_are_ever_held(
    asked: list[tuple[int, int, bool, str]], pins: list[tuple[int, int]], order: object
) -> None:
    locks = RangeLocks()
    held: list[tuple[int, int]] = []
    waits: list[trio.CancelScope] = []
    finished = 0

    async def one(start: int, length: int, wait_for_pins: bool, scope: trio.CancelScope) -> None:
        nonlocal finished
        with scope:
            hold: Hold = await locks.acquire(start, start + length, wait_for_pins=wait_for_pins)
            mine = (start, start + length)
            try:
                assert not any(first < mine[1] and mine[0] < last for first, last in held)
                held.append(mine)
                for _ in range(order.randint(0, 3)):  # type: ignore[attr-defined]
                    await trio.lowlevel.checkpoint()
            finally:
                held.remove(mine)
                locks.release(hold)
        finished += 1

    async def pin(start: int, length: int) -> None:
        with locks.pin(start, start + length):
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for start, length, wait_for_pins, fate in asked:
            scope = trio.CancelScope()
            nursery.start_soon(one, start, length, wait_for_pins, scope)
            if fate == "cancel":
                waits.append(scope)
        for start, length in pins:
            nursery.start_soon(pin, start, length)
        for scope in waits:
            await trio.lowlevel.checkpoint()
            scope.cancel()
    assert finished == len(asked)
    assert locks.statistics() == {"locks_held": 0, "locks_waiting": 0, "pins": 0}
