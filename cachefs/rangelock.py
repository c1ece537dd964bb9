"""Async locks and pins on half-open ranges of blocks: first come, first served, and safe to cancel.

A *lock* excludes other locks that overlap it; a *pin* says "these blocks are being read from the store" and excludes
nobody but a lock that asks to wait for pins (what frees space: a punch, an eviction). The synchronous fast path takes
neither: it asks `is_locked` and stands back.

    asks \\ held or queued before    lock    pin
    lock                             waits   passes
    lock, wait_for_pins              waits   waits
    pin                              passes  passes

A pin never waits, so a reader cannot be held up by a writer, and one that frees space cannot be starved: it first makes
the blocks read as something else, so that no new pin is taken on them.

Lock order: one lock per operation and store; a layer that holds one may call its child, never itself. State is plain
lists (a few dozen entries at most while requests are slow), changed only between checkpoints of one event loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Hold:
    """A lock that is held or waited for. `granted` is set once nothing before it overlaps it."""

    __slots__ = ("end", "granted", "start", "wait_for_pins")

    def __init__(self, start: int, end: int, wait_for_pins: bool) -> None:
        self.start = start
        self.end = end
        self.wait_for_pins = wait_for_pins
        self.granted: trio.Event | None = None  # made only by those who wait


class RangeLocks:
    """The locks and pins of one store. *start* and *end* are block indices, half-open."""

    def __init__(self) -> None:
        self.held: list[Hold] = []  # empty means that the fast path need not look further
        self._waiting: list[Hold] = []
        self._pins: list[tuple[int, int]] = []

    def is_locked(self, start: int, end: int) -> bool:
        """Whether a lock that overlaps the range is held now (one that only waits does not count)."""
        # a loop: `any` over a generator costs three times as much, and this is on the way of every write
        for hold in self.held:  # noqa: SIM110
            if hold.start < end and start < hold.end:
                return True
        return False

    @contextmanager
    def pin(self, start: int, end: int) -> Iterator[None]:
        """Keep what frees space away from the range."""
        entry = (start, end)
        self._pins.append(entry)
        try:
            yield
        finally:
            self._pins.remove(entry)
            if self._waiting:
                self._grant(start, end)

    def acquire_nowait(self, start: int, end: int, *, wait_for_pins: bool = False) -> Hold | None:
        """`acquire` if it need not wait, else None."""
        for other in self.held:  # most often nothing else bars it
            if other.start < end and start < other.end:
                return None
        hold = Hold(start, end, wait_for_pins)
        if (self._waiting or wait_for_pins) and self._is_barred(hold, self._waiting):
            return None
        self.held.append(hold)
        return hold

    async def acquire(self, start: int, end: int, *, wait_for_pins: bool = False) -> Hold:
        """Wait for the range and lock it; give it back with `release`. A cancelled wait leaves nothing behind.

        A checkpoint only when it has to wait.
        """
        if (free := self.acquire_nowait(start, end, wait_for_pins=wait_for_pins)) is not None:
            return free
        hold = Hold(start, end, wait_for_pins)
        granted = hold.granted = trio.Event()
        self._waiting.append(hold)
        try:
            await granted.wait()
        except trio.Cancelled:
            if granted.is_set():  # granted and cancelled in the same pass of the scheduler
                self.release(hold)
            else:
                self._waiting.remove(hold)
                self._grant(start, end)
            raise
        return hold

    def release(self, hold: Hold) -> None:
        self.held.remove(hold)
        if self._waiting:
            self._grant(hold.start, hold.end)

    def _is_barred(self, hold: Hold, before: list[Hold]) -> bool:
        start, end = hold.start, hold.end
        if self.is_locked(start, end):
            return True
        if before and any(other.start < end and start < other.end for other in before):
            return True
        return hold.wait_for_pins and any(first < end and start < last for first, last in self._pins)

    def _grant(self, start: int, end: int) -> None:
        """A barrier of this range is gone: grant what waits for it and is overlapped by nothing else before it.

        Only those that overlap the range are looked at, so that thousands which wait for a hung device cost each
        other nothing.
        """
        granted = False
        for index, hold in enumerate(self._waiting):
            if hold.start < end and start < hold.end and not self._is_barred(hold, self._waiting[:index]):
                self.held.append(hold)
                assert hold.granted is not None
                hold.granted.set()
                granted = True
        if granted:
            self._waiting = [hold for hold in self._waiting if hold.granted is not None and not hold.granted.is_set()]

    def statistics(self) -> dict[str, int]:
        return {"locks_held": len(self.held), "locks_waiting": len(self._waiting), "pins": len(self._pins)}
