"""Flush rounds: any number of flushes share one run of the work that makes things durable.

A flush joins only a round that has not begun, because one that has begun may have looked past its writes already. One
round runs at a time, in a thread of its own; whoever asked is told from that thread, so that the reply to an FSYNC goes
out without a way back through the event loop (the way there and back costs as much as the sync). Every waiter of a
round gets its result, error included; one that has gone away concerns nobody else.

    loop     ask -> begin() ........................................ end(job, error) -> begin() of the next round
    thread          '-> work(job) -> done(error) of every waiter -'
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

import trio

Job = TypeVar("Job")
Done = Callable[[Exception | None], None]
"""Told how a flush ended: None, or why it failed. Called in any thread; must not block and must not raise."""


class WorkThread:
    """A thread that runs what it is handed, in order. Begins with the first piece of work, ends with `close`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._queue.put(work)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            work()

    def close(self) -> None:
        """It ends when it has done what it was handed."""
        self._queue.put(None)


class FlushRounds(Generic[Job]):
    """begin: takes, on the loop, what the round is to make durable. work: does it, in the thread; what it raises every
    waiter gets. end: called on the loop with the job and the error. Made inside the event loop.
    """

    def __init__(
        self,
        name: str,
        begin: Callable[[], Job],
        work: Callable[[Job], None],
        end: Callable[[Job, Exception | None], None],
    ) -> None:
        self._begin_job = begin
        self._work = work
        self._end_job = end
        self._thread = WorkThread(f"flush {name}")
        self._token = trio.lowlevel.current_trio_token()
        self._running = False
        self._next: list[Done] = []  # of the round that has not begun
        self._idle = trio.Event()
        self._idle.set()
        self.completed = 0

    def ask(self, done: Done) -> None:
        """Have *done* called when everything written before this call is durable, or why it is not."""
        if self._running:
            self._next.append(done)
        else:
            self._begin([done])

    async def flush(self) -> None:
        """`ask`, and wait. Raises: what the round raised. A cancelled wait ends itself and nothing else."""
        over = trio.Event()
        errors: list[Exception | None] = []

        def done(error: Exception | None) -> None:
            errors.append(error)
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(over.set)

        self.ask(done)
        await over.wait()
        if errors[0] is not None:
            raise errors[0]

    async def wait_idle(self) -> None:
        """Until no round runs and none is asked for."""
        await self._idle.wait()

    def close(self) -> None:
        """After `wait_idle`: end the thread."""
        self._thread.close()

    def _begin(self, waiters: list[Done]) -> None:
        try:
            job = self._begin_job()
        except Exception as exc:  # a bug; those who asked are told, and the next flush tries again
            self._running = False
            self._idle.set()
            for done in waiters:
                done(exc)
            return
        if not self._running:
            self._running = True
            self._idle = trio.Event()
        self._thread.submit(lambda: self._run(job, waiters))

    def _run(self, job: Job, waiters: list[Done]) -> None:
        error: Exception | None = None
        try:
            self._work(job)
        except Exception as exc:  # an unexpected one too: it belongs to those who asked, not to the daemon
            error = exc
        for done in waiters:
            done(error)
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._ended, job, error)

    def _ended(self, job: Job, error: Exception | None) -> None:
        self._end_job(job, error)
        self.completed += error is None
        if self._next:
            waiters, self._next = self._next, []
            self._begin(waiters)
        else:
            self._running = False
            self._idle.set()
