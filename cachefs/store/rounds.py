"""Flush rounds: any number of flushes share one run of the work that makes things durable.

A flush joins only a round that has not begun, because one that has begun may have looked past its writes already. A round
runs in the nursery of the store, not in the task that asked: cancelling a waiter ends its wait and nothing else, and
every waiter of a round gets its result, error included.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from cachefs.errors import CachefsError


class _Round:
    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: Exception | None = None


class FlushRounds:
    """*work* is one round; what it raises every waiter gets."""

    def __init__(self, nursery: trio.Nursery, work: Callable[[], Awaitable[None]], name: str) -> None:
        self._nursery = nursery
        self._work = work
        self._name = name
        self._running = False
        self._next: _Round | None = None  # asked for, not begun
        self.completed = 0

    async def flush(self) -> None:
        if self._next is None:
            self._next = _Round()
            if not self._running:
                self._running = True
                self._nursery.start_soon(self._run)
        mine = self._next
        await mine.done.wait()
        if mine.error is not None:
            raise mine.error

    async def _run(self) -> None:
        """Rounds, one after the other, while somebody waits for one."""
        try:
            while self._next is not None:
                current, self._next = self._next, None  # from here on a flush gets the next one
                # What is left when the task is torn down before the work's end; overwritten by its result.
                current.error = CachefsError(self._name, "the flush was broken off; what it covers may not be durable")
                try:
                    with trio.CancelScope(shield=True):
                        await self._work()
                    current.error = None
                    self.completed += 1
                except Exception as exc:  # an unexpected one too: it belongs to those who asked, not to the daemon
                    current.error = exc
                finally:
                    current.done.set()
        finally:
            self._running = False
