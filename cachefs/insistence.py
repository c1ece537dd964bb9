"""Trying again: how long to wait between tries, when to stop, and when not even to begin.

An operation is tried until it is done, for as long as what it meets is a TransientError, with growing pauses in between that
chance shortens. That ends at a deadline, with an error; or never, where requests are *held*, so that a guest stands still
instead of failing. Cancelling ends any of these waits.

The *breaker* keeps a store that is gone from costing every request a whole deadline: once nothing was heard of it for that
long, those that wait fail, and others at once, until it is there again. It never opens where requests are held.

Those that wait, too, because they may have begun late: Linux has the writes of a file wait for an fsync of it, and whoever
sent both would wait for one deadline after the other.

    closed --(lost)--> waiting --(deadline passes)--> open, or holding
       ^---(reached)------'---------(reached)----------'
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import trio

from cachefs.errors import BackendTimeout, TransientError
from cachefs.units import format_duration

BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0

Result = TypeVar("Result")


def backoff(rng: Callable[[], float] = random.random) -> Iterator[float]:
    """Seconds to wait before each try but the first: doubling, up to a limit, each shortened by chance."""
    pause = BACKOFF_S
    while True:
        yield pause * (0.5 + rng() / 2)
        pause = min(2 * pause, MAX_BACKOFF_S)


class Breaker:
    """Pure; the module draws its states. Times are seconds of one clock. on_change: `opens_at` is another one now."""

    def __init__(self, deadline_s: float, *, holds: bool, on_change: Callable[[], None] = lambda: None) -> None:
        self._deadline_s = deadline_s
        self._holds = holds
        self._on_change = on_change
        self._lost_at: float | None = None

    @property
    def opens_at(self) -> float:
        return float("inf") if self._holds or self._lost_at is None else self._lost_at + self._deadline_s

    def lost(self, now: float) -> None:
        """The store cannot be reached, from now on or still."""
        if self._lost_at is None:
            self._lost_at = now
            self._on_change()

    def reached(self) -> None:
        if self._lost_at is not None:
            self._lost_at = None
            self._on_change()

    def is_open(self, now: float) -> bool:
        """Whether requests fail at once."""
        return now >= self.opens_at

    def state(self, now: float) -> str:
        """For status: ok, reconnecting, or what a deadline without the store has led to."""
        if self._lost_at is None:
            return "ok"
        if not self._is_late(now):
            return "reconnecting"
        return "holding" if self._holds else "failing"

    def away_s(self, now: float) -> float:
        return 0.0 if self._lost_at is None else now - self._lost_at

    def _is_late(self, now: float) -> bool:
        return self._lost_at is not None and now >= self._lost_at + self._deadline_s


class Insistence:
    """Carries operations out on a store that fails at times. trouble: says what is wrong with it, for a sentence."""

    def __init__(self, name: str, deadline_s: float, *, holds: bool, trouble: Callable[[], str]) -> None:
        self.breaker = Breaker(deadline_s, holds=holds, on_change=self._limit)
        self.retries = 0
        self._name = name
        self._deadline_s = deadline_s
        self.patience_s = float("inf") if holds else deadline_s
        """Seconds that an operation may take; without end where it is held."""
        self._trouble = trouble
        self._waiting: dict[trio.CancelScope, float] = {}  # and when each fails at the latest

    def _limit(self) -> None:
        for scope, latest in self._waiting.items():
            scope.deadline = min(latest, self.breaker.opens_at)

    async def insist(self, attempt: Callable[[], Awaitable[Result]], what: str) -> Result:
        """What *attempt* returns; it is awaited anew after each TransientError.

        Raises: BackendTimeout at the deadline, or when the breaker opens or is open; what else *attempt* raises.
        """
        last = ""
        self._raise_if_open(what)
        latest = trio.current_time() + self.patience_s
        scope = trio.CancelScope(deadline=min(latest, self.breaker.opens_at))
        self._waiting[scope] = latest
        try:
            with scope:
                for pause in backoff():
                    try:
                        return await attempt()
                    except TransientError as exc:
                        last = exc.detail
                    self.retries += 1
                    await trio.sleep(pause)
        finally:
            del self._waiting[scope]
        if trio.current_time() < latest:
            self._raise_if_open(what)
        raise BackendTimeout(
            self._name,
            f"{what}: not done within {format_duration(self._deadline_s)}: {last or self._trouble()}",
        )

    def _raise_if_open(self, what: str) -> None:
        now = trio.current_time()
        if self.breaker.is_open(now):
            away = format_duration(round(self.breaker.away_s(now)))
            raise BackendTimeout(
                self._name, f"{what}: refused, the store could not be reached for {away}: {self._trouble()}"
            )
