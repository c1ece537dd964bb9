"""Calls of a pool's image in threads, each watched: one that takes too long makes its kind of I/O count as failed."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import TypeVar, cast

import trio

from cachefs.store.localfile import LocalFile

T = TypeVar("T")


class _Call:
    """A call in a thread that may be given up: then it does not begin, or `ended` says when it is over."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._lock = threading.Lock()
        self._begun = self._given_up = False
        self.ended = threading.Event()

    def __call__(self) -> object:
        with self._lock:
            if self._given_up:
                return None
            self._begun = True
        try:
            return self._call()
        finally:
            self.ended.set()

    def give_up(self) -> bool:
        """Whether it goes on all the same."""
        with self._lock:
            self._given_up = True
            return self._begun


class Calls:
    """Those on *file*. patience_s: how long one may take. on_end: told in the event loop of the end of each.

    True while one is under way, given up ones included.
    """

    def __init__(self, file: LocalFile, patience_s: float, on_end: Callable[[], None]) -> None:
        self._file = file
        self._patience_s = patience_s
        self._on_end = on_end
        self._due: dict[_Call, float] = {}  # those under way, and when they count as hung

    def __bool__(self) -> bool:
        return bool(self._due)

    async def run(self, call: Callable[..., T], *arguments: object, patience_s: float = 0.0) -> T:
        """Run *call* in a thread to its end, watched by the pool. Raises OSError. Only the end of the pool gives it up.

        patience_s: how long it may take, where that is more than the pool's patience.
        """
        token = _Call(functools.partial(call, *arguments))
        self._due[token] = trio.current_time() + max(patience_s, self._patience_s)
        try:
            with self._file.file_system.busy():
                result = await trio.to_thread.run_sync(
                    token, abandon_on_cancel=True, limiter=self._file.file_system.limiter
                )
        except trio.Cancelled:
            if not token.give_up():
                self._ended(token)
            raise  # else its thread still runs: the call stays in the list, and the descriptors stay open
        except BaseException:
            self._ended(token)
            raise
        self._ended(token)
        return cast("T", result)

    def _ended(self, token: _Call) -> None:
        del self._due[token]
        self._on_end()

    def wait_for_threads(self, deadline: float) -> None:
        """Until those that were given up have ended, or *deadline* on time.monotonic() has passed. Blocks."""
        for token in list(self._due):
            if token.ended.wait(max(0.0, deadline - time.monotonic())):
                del self._due[token]

    @property
    def is_stalled(self) -> bool:
        """Whether some call takes longer than it may."""
        return any(trio.current_time() > due for due in self._due.values())
