"""Requests that could not be finished at once: they are admitted or queued, run in tasks, and answered exactly once.

`table` holds every request that the kernel still waits for; whoever takes one out of it answers it: the task or thread that
did the work, the layer that was waited for, or `watch_clients`, which every LOOK_S gives up on requests whose client was
killed. Giving up answers EINTR at once and cancels the task; what was handed to the kernel, or begun without a task, runs to
its end, and its buffer stays in use until then.

    arrives -> RUN: begun without a task, if the stack can, else a task with its buffer -> answered -> the oldest that is
               queued takes its place
            -> QUEUE: header, or data (`cachefs.fuse.spill`)
            -> REFUSE: EIO (`cachefs.limits` says when)
"""

from __future__ import annotations

import errno
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from cachefs.disk import Disk
from cachefs.errors import BackendTimeout
from cachefs.fuse import clients
from cachefs.fuse.boundary import Boundary
from cachefs.fuse.buffers import DATA_AT, Buffer, BufferPool, read_reply
from cachefs.fuse.protocol import OPCODE_NAMES, Opcode, error_reply
from cachefs.fuse.spill import Piece, Spill
from cachefs.layers.base import Later
from cachefs.limits import Admission, Verdict

log = logging.getLogger(__name__)

LOOK_S = 0.25  # between two looks at who waits
BRISK_S = 0.1  # whoever has waited this long does not mind that the channel polls a moment before it comes to them
REFUSALS_SAID_S = 10.0  # between two log lines about refused requests of one disk


class Request:
    """A data request. flags: for a WRITE whether it is synchronous, for FALLOCATE the mode, for LSEEK whence."""

    __slots__ = (
        "buffer",
        "client",
        "disk",
        "flags",
        "looked",
        "offset",
        "opcode",
        "pid",
        "piece",
        "scope",
        "size",
        "unique",
    )

    def __init__(
        self, disk: Disk, opcode: int, unique: int, pid: int, offset: int = 0, size: int = 0, flags: int = 0
    ) -> None:
        self.disk = disk
        self.opcode = opcode
        self.unique = unique
        self.pid = pid
        self.offset = offset
        self.size = size
        self.flags = flags
        self.buffer: Buffer | None = None  # while it runs in a task
        self.piece: Piece | None = None  # the data of a WRITE that was queued
        self.scope: trio.CancelScope | None = None
        self.looked = False
        self.client: clients.Client | None = None

    def __str__(self) -> str:
        where = "" if self.opcode == Opcode.FSYNC else f" {self.offset}+{self.size}"
        return f"{OPCODE_NAMES[self.opcode]}{where} of {self.disk.name}"


Begin = Callable[[Request, Later], bool]
Work = Callable[[Request], Awaitable[bytes | memoryview]]


class Waiting:
    """The requests of a mount that wait.

    begin: does a READ without a task, as `Layer.try_read_later`, or returns False. work: what a task awaits for a request,
    returning its reply.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        pool: BufferPool,
        boundary: Boundary,
        reply: Callable[[bytes | memoryview], None],
        begin: Begin,
        work: Work,
        background: int,
        spill: Spill,
    ) -> None:
        self._nursery = nursery
        self._pool = pool
        self._boundary = boundary
        self._reply = reply
        self._begin = begin
        self._work = work
        self._spill = spill
        self.admission: Admission[Request] = Admission(background, spill.limit)
        self.table: dict[int, Request] = {}
        self.given_up = 0
        self.on_waiting: Callable[[int, bool], None] = lambda inode, waiting: None
        """Told the inode of a disk that has requests in tasks from here on, or has none any more."""
        self._in_tasks: Counter[int] = Counter()
        self._refusals_said: dict[int, float] = {}
        self._without_task = 0
        self._drained = trio.Event()
        self._is_stopped = False
        self._something_waits = trio.Event()
        self._newest = 0.0  # when the last request was registered, time.perf_counter()

    def is_brisk(self, now: float) -> bool:
        """Whether something waits that may be over soon. now: time.perf_counter().

        What a disk that hangs collects is not: it must cost the other disks nothing.
        """
        return bool(self.table) and now - self._newest < BRISK_S

    def add(self, request: Request, buffer: Buffer) -> bool:
        """Take *request* over, with the *buffer* that it came in. True: the buffer may be used again."""
        data_bytes = request.size if request.opcode == Opcode.WRITE else 0
        verdict = self.admission.ask(request.disk.inode, data_bytes)
        if verdict is Verdict.REFUSE:
            self._refuse(request)
            return True
        self.register(request)
        if verdict is Verdict.RUN:
            self._start(request, buffer)
            return False
        if data_bytes:
            request.piece = self._spill.put(bytes(buffer.view[DATA_AT : DATA_AT + data_bytes]))
        self.admission.put(request.disk.inode, request, data_bytes)
        return True

    def register(self, request: Request) -> None:
        """Note a request that somebody else will `finish`."""
        self.table[request.unique] = request
        self._newest = time.perf_counter()
        if len(self.table) == 1:
            self._something_waits.set()

    def finish(self, request: Request, reply: bytes | memoryview) -> None:
        """Answer *request*, unless it was given up. Called in any thread."""
        if self.table.pop(request.unique, None) is not None:
            self._reply(reply)

    def _start(self, request: Request, buffer: Buffer) -> None:
        request.buffer = buffer
        try:
            begun = self._begin(request, partial(self._heard, request, buffer))
        except Exception as exc:
            self._boundary.errno_of(exc, str(request))
            begun = False  # `work` finds out what is wrong
        if begun:
            self._without_task += 1
        else:
            self._run_in_task(request, buffer)

    def _run_in_task(self, request: Request, buffer: Buffer, until: float = math.inf) -> None:
        request.scope = trio.CancelScope(deadline=until)
        inode = request.disk.inode
        self._in_tasks[inode] += 1
        if self._in_tasks[inode] == 1:
            self.on_waiting(inode, True)
        self._nursery.start_soon(self._run, request, buffer, request.scope)

    def _heard(self, request: Request, buffer: Buffer, until: float | None) -> None:
        """What a READ that was begun without a task has come to: its data, or a task that may try until *until*."""
        self._without_task -= 1
        if until is None:
            self._end(request, buffer, read_reply(buffer.view, request.unique, request.size))
        elif request.unique in self.table and not self._is_stopped:
            self._run_in_task(request, buffer, until)
        else:  # nobody waits for it any more
            self._end(request, buffer, b"")
        if not self._without_task:
            self._drained.set()

    async def _run(self, request: Request, buffer: Buffer, scope: trio.CancelScope) -> None:
        """Do the work and answer; afterwards the buffer is free, whatever happened, and the next one may run."""
        reply: bytes | memoryview = error_reply(request.unique, errno.EIO)  # for one that a forced stop cancels
        try:
            with scope:
                if request.piece is not None:
                    await self._spill.take(request.piece, buffer.view[DATA_AT : DATA_AT + request.piece.length])
                reply = await self._work(request)
            if scope.cancelled_caught and request.unique in self.table:
                raise BackendTimeout(request.disk.name, "it was not answered in time")
        except Exception as exc:
            reply = error_reply(request.unique, self._boundary.errno_of(exc, str(request)))
        finally:
            self._in_tasks[request.disk.inode] -= 1
            if not self._in_tasks[request.disk.inode]:
                self.on_waiting(request.disk.inode, False)
            self._end(request, buffer, reply)

    def _end(self, request: Request, buffer: Buffer, reply: bytes | memoryview) -> None:
        """Answer *request*; its buffer is free, and the next one may run."""
        self.finish(request, reply)
        self._pool.give_back(buffer)
        successor = self.admission.done(request.disk.inode)
        if successor is not None and not self._is_stopped:
            self._start(successor, self._pool.take())

    async def drain(self) -> None:
        """Wait until nothing runs that was begun without a task."""
        while self._without_task:
            self._drained = trio.Event()
            await self._drained.wait()

    def stop(self) -> None:
        """Begin nothing any more; whoever still waits gets EIO."""
        self._is_stopped = True
        for request in list(self.table.values()):
            self.finish(request, error_reply(request.unique, errno.EIO))

    def _refuse(self, request: Request) -> None:
        self._reply(error_reply(request.unique, errno.EIO))
        now = time.monotonic()
        if now - self._refusals_said.get(request.disk.inode, -REFUSALS_SAID_S) >= REFUSALS_SAID_S:
            self._refusals_said[request.disk.inode] = now
            log.error(
                "%s refused with EIO: too many requests of this disk wait already (%d of all disks); its store does not "
                "keep up or hangs",
                request,
                self.admission.requests,
            )

    # ---- clients that are gone

    async def watch_clients(self) -> None:
        """Give up on requests of killed clients, for ever."""
        while True:
            if not self.table:
                self._something_waits = trio.Event()
                await self._something_waits.wait()
            await trio.sleep(LOOK_S)
            self._look()

    def _look(self) -> None:
        found: dict[int, clients.Client | None] = {}  # many requests, few clients
        dead: dict[clients.Client, bool] = {}
        for request in list(self.table.values()):
            if not request.looked:
                request.looked = True
                if request.pid not in found:
                    found[request.pid] = clients.resolve(request.pid)
                request.client = found[request.pid]
            client = request.client
            if client is None:
                continue
            if client not in dead:
                dead[client] = clients.is_dead(client)
            if dead[client]:
                self._give_up(request)

    def _give_up(self, request: Request) -> None:
        self.given_up += 1
        self.finish(request, error_reply(request.unique, errno.EINTR))
        if request.scope is not None:
            request.scope.cancel()
        elif self.admission.take_queued(request.disk.inode, request) and request.piece is not None:
            self._spill.forget(request.piece)

    def statistics(self) -> dict[str, int]:
        return {
            **self.admission.statistics(),
            "queued_memory_bytes": self._spill.memory_bytes,
            "spilled_bytes": self._spill.spilled_bytes,
            "given_up_requests": self.given_up,
        }
