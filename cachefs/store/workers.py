"""A few threads of one file that run its calls for the event loop, cheaper than a way through `trio.to_thread`.

    loop      run() -> limiter -> queue ........ rescheduled
    threads                         '-> call() -'

A call that waits for the limiter can be cancelled; one that was handed over runs to its end, and its caller waits for it.
Threads are started when none is idle, as many as the limiter lets calls through, and end with `close`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar, cast

import trio

T = TypeVar("T")


class _Call:
    __slots__ = ("arguments", "call", "error", "result", "task", "token")

    def __init__(self, call: Callable[..., object], arguments: tuple[object, ...]) -> None:
        self.call = call
        self.arguments = arguments
        self.task = trio.lowlevel.current_task()
        self.token = trio.lowlevel.current_trio_token()
        self.result: object = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.call(*self.arguments)
        except BaseException as exc:  # the caller's, whatever it is
            self.error = exc
        with contextlib.suppress(trio.RunFinishedError):
            self.token.run_sync_soon(trio.lowlevel.reschedule, self.task)


class Workers:
    """Threads called *name*, behind *limiter*."""

    def __init__(self, name: str, limiter: trio.CapacityLimiter) -> None:
        self._name = name
        self._limiter = limiter
        self._queue: SimpleQueue[_Call | None] = SimpleQueue()
        self._threads = 0
        self._under_way = 0

    async def run(self, call: Callable[..., T], *arguments: object) -> T:
        """What *call* returns or raises, run in a thread."""
        async with self._limiter:
            work = _Call(call, arguments)
            self._under_way += 1
            if self._under_way > self._threads:
                self._start()
            self._queue.put(work)
            await trio.lowlevel.wait_task_rescheduled(_go_on)
            self._under_way -= 1
        if work.error is not None:
            raise work.error
        return cast("T", work.result)

    def _start(self) -> None:
        self._threads += 1
        threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            work.run()

    def close(self) -> None:
        """The threads end when they have done what was handed to them."""
        for _ in range(self._threads):
            self._queue.put(None)


def _go_on(_: Any) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED
