"""The write-outs of `coalesce`: clusters go down in the background, a few at the same time, and again when that failed.

    ask -> queued -> locked, a turn -> frozen, completed, written -> done: no error, the cluster is below
                                                           '-------> done: error, thawed, asked for again later

What is written is whole units of the child (at least sectors); the bytes that complete the first and last of them are read
first. A write-out that fails loses nothing: the bytes stay, and are written again at the next flush and at growing intervals.

Locks: a write-out locks its cluster, and whoever else changes the child locks what it changes, so that none overtakes another
one. Whoever holds the lock of a whole cluster may freeze it, and nobody else. Lock order: one range here, then the child's own.

Cancellation: never of a write-out, but by the end of the layer.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from cachefs.errors import BackendError, CachefsError
from cachefs.layers.base import Layer
from cachefs.rangelock import RangeLocks
from cachefs.store.clusters import Clusters, Slot
from cachefs.units import align_down, align_up

log = logging.getLogger(__name__)

SECTOR = 512
AT_ONCE = 16
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 30.0
RECENT = 8  # writes below that the mean of their sizes remembers


class WriteOut:
    """One of a cluster. done: set at its end, when `error` says why it failed."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: CachefsError | None = None


class WriteOuts:
    """Those of *clusters* to *child*, for the layer *name*. max_delay: seconds that an unfinished cluster waits for more.
    ended: called at the end of each, with its error.
    """

    def __init__(
        self,
        name: str,
        child: Layer,
        clusters: Clusters,
        max_delay: float,
        ended: Callable[[CachefsError | None], None],
    ) -> None:
        self.unit = max(SECTOR, child.geometry.alignment)
        """In which the child is written."""
        self.locks = RangeLocks()
        """In bytes of the disk."""
        self.errors: dict[int, CachefsError] = {}
        """By cluster whose last write-out failed."""
        self.mean = float(clusters.cluster_size)
        """Bytes of a write below, of late."""
        self._name = name
        self._child = child
        self._alignment = child.geometry.alignment
        self._clusters = clusters
        self._max_delay = max_delay
        self._ended = ended
        self._nursery: trio.Nursery
        self._queued: dict[int, WriteOut] = {}  # by cluster: those that have not frozen it yet
        self._running = 0  # those that have, and others that hold frozen slots
        self._writing = 0
        self._turns = trio.lowlevel.ParkingLot()  # while AT_ONCE are writing
        self._due: dict[int, float] = {}  # by cluster: when an unfinished one is to be written, on trio's clock
        self._due_changed = trio.Event()
        self._wakes_at = math.inf
        self._retry_s: dict[int, float] = {}  # by cluster whose last write-out failed: how long it waited for the next
        self._bytes_out = self._writes_out = self._read_modify_writes = self._failed = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """They go on when we are cancelled, and end with us."""
        async with trio.open_nursery() as nursery:
            self._nursery = await nursery.start(_open_shielded)
            nursery.start_soon(self._ask_when_due)
            try:
                yield
            finally:
                self._nursery.cancel_scope.cancel()
                nursery.cancel_scope.cancel()

    @property
    def queued(self) -> int:
        """How many clusters have been asked for and not begun."""
        return len(self._queued)

    @property
    def is_idle(self) -> bool:
        """Nothing is under way at whose end `ended` is called."""
        return not self._queued and not self._running

    # ---- asked for

    def ask(self, cluster: int) -> WriteOut:
        """A write-out of what is buffered of *cluster* now, perhaps with what comes before it begins."""
        write_out = self._queued.get(cluster)
        if write_out is None:
            write_out = self._queued[cluster] = WriteOut()
            self._nursery.start_soon(self._run, cluster, write_out)
        return write_out

    def ask_oldest(self, count: int) -> None:
        """For what was written to longest ago; what could not be written waits for its time."""
        idle = (one for one in self._clusters.open if one not in self._queued and one not in self.errors)
        for cluster in list(itertools.islice(idle, count)):
            self.ask(cluster)

    def ask_in_time(self, cluster: int) -> None:
        """It waits for more, for `max_delay` at most."""
        self._ask_after(cluster, self._max_delay)

    def _ask_after(self, cluster: int, seconds: float) -> None:
        due = self._due[cluster] = trio.current_time() + seconds
        if due < self._wakes_at:
            self._due_changed.set()

    async def _ask_when_due(self) -> None:
        while True:
            self._due_changed = trio.Event()
            self._wakes_at = min(self._due.values(), default=math.inf)
            with trio.move_on_at(self._wakes_at):
                await self._due_changed.wait()
            now = trio.current_time()
            for cluster in [cluster for cluster, due in self._due.items() if due <= now]:
                del self._due[cluster]
                if cluster in self._clusters.open:
                    self.ask(cluster)

    # ---- run

    async def _run(self, cluster: int, write_out: WriteOut) -> None:
        size = self._clusters.cluster_size
        hold = await self.locks.acquire(cluster * size, (cluster + 1) * size)
        while self._writing >= AT_ONCE:
            await self._turns.park()
        del self._queued[cluster]
        slot = self._clusters.freeze(cluster)
        self._running += 1
        self._writing += 1
        try:
            if slot is not None:
                self._due.pop(cluster, None)
                write_out.error = await self._write_out(slot)
        finally:
            self._running -= 1
            self._writing -= 1
            self._turns.unpark()
            self.locks.release(hold)
            write_out.done.set()
            self._ended(write_out.error)

    async def _write_out(self, slot: Slot) -> CachefsError | None:
        """Write the frozen *slot*, whose cluster is locked. Why it failed, in which case it is open again."""
        try:
            for start, end in slot.units(self.unit):
                await self._complete_units(slot, start, end)
                await self._write_units(slot, start, end)
        except Exception as exc:
            if not isinstance(exc, CachefsError):
                log.exception("%s: a bug in the write-out of cluster %d", self._name, slot.cluster)
            error = exc if isinstance(exc, CachefsError) else BackendError(self._name, f"{type(exc).__name__}: {exc}")
            self._clusters.thaw(slot)
            self._note_failure(slot.cluster, error)
            return error
        self._clusters.complete(slot)
        self._forget_failure(slot.cluster)
        return None

    async def _complete_units(self, slot: Slot, start: int, end: int) -> None:
        """Read what of the units from *start* to *end* is not here. Only we change that part of the child: it is locked."""
        base = slot.cluster * self._clusters.cluster_size
        for first, last in slot.gaps(start, end):
            self._read_modify_writes += 1
            at = align_down(first, self._alignment)
            whole = memoryview(bytearray(min(align_up(last, self._alignment), slot.length) - at))
            if not self._child.try_read_into(base + at, whole):
                await self._child.read_into(base + at, whole)
            slot.put(first, whole[first - at : last - at])

    async def _write_units(self, slot: Slot, start: int, end: int) -> None:
        offset, data = slot.cluster * self._clusters.cluster_size + start, slot.data[start:end]
        if not self._child.try_write(offset, data):
            await self._child.write(offset, data)
        self.note_write(len(data))

    def note_write(self, length: int) -> None:
        """One below, of so many bytes."""
        self._writes_out += 1
        self._bytes_out += length
        self.mean += (length - self.mean) / RECENT

    def _note_failure(self, cluster: int, error: CachefsError) -> None:
        self._failed += 1
        if cluster not in self.errors:
            log.warning("%s: a write-out failed and will be tried again: %s", self._name, error)
        wait_s = min(LAST_RETRY_S, self._retry_s.get(cluster, FIRST_RETRY_S / 2) * 2)
        self.errors[cluster], self._retry_s[cluster] = error, wait_s
        self._ask_after(cluster, wait_s)

    def _forget_failure(self, cluster: int) -> None:
        if self.errors.pop(cluster, None) is not None:
            del self._retry_s[cluster]
            log.info("%s: what could not be written is written now", self._name)

    # ---- beside them

    @asynccontextmanager
    async def changing(self, span: range) -> AsyncIterator[list[Slot]]:
        """Clusters of which the child is changed otherwise, locked: their slots, frozen. What is left of them then goes on."""
        size = self._clusters.cluster_size
        hold = await self.locks.acquire(span.start * size, span.stop * size)
        self._running += 1
        touched = [cluster for cluster in self._clusters.open if cluster in span]
        slots = [slot for slot in map(self._clusters.freeze, touched) if slot is not None]
        try:
            yield slots
        finally:
            for slot in slots:
                self._thaw(slot)
            self._running -= 1
            self.locks.release(hold)

    def _thaw(self, slot: Slot) -> None:
        """What is full by now, or was asked for, is written as ever."""
        cluster = slot.cluster
        self._clusters.thaw(slot)
        if cluster not in self._clusters.open:
            self.errors.pop(cluster, None)
            self._retry_s.pop(cluster, None)
            return
        if self._clusters.open[cluster].is_full:
            self.ask(cluster)
        self.ask_in_time(cluster)

    def statistics(self) -> dict[str, int | float | str]:
        values: dict[str, int | float | str] = {
            "bytes_out": self._bytes_out,
            "writes_out": self._writes_out,
            "mean_write_bytes": self._bytes_out // self._writes_out if self._writes_out else 0,
            "read_modify_writes": self._read_modify_writes,
            "failed_write_outs": self._failed,
            "errors_held": len(self.errors),
            **self.locks.statistics(),
        }
        if self.errors:
            values["error"] = str(next(iter(self.errors.values())))
        return values


async def _open_shielded(task_status: trio.TaskStatus[trio.Nursery]) -> None:
    """A nursery whose tasks go on when we are cancelled, until it is cancelled itself."""
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.shield = True
        task_status.started(nursery)
        await trio.sleep_forever()
