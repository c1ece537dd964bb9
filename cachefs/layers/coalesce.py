"""coalesce: gathers small and unaligned writes into aligned clusters, for stores that are slow at them.

A write is copied into the buffer of its cluster and acknowledged. A finished cluster is written at once, in the
background; an unfinished one at a flush, after `max_delay`, or when most of the buffer holds unfinished ones. What is written
is whole units of the child (at least sectors); the bytes that complete the first and last of them are read first. The
states of a cluster are those of `cachefs.store.clusters`.

A write-out that fails loses nothing: the bytes stay, are read from here, and are written again, at the next flush and at
growing intervals; every flush fails until they are below. A writer that finds the buffer full of such bytes gets their error.

Locks: a write-out or trim locks its clusters, so that none overtakes another one; reads and writes take no lock. While a
cluster is locked its bytes are frozen, and writes go to a second buffer of it. A write waits only for room.
Lock order: one range here, then the child's own.

Cancellation: a write that waits for room is dropped; write-outs belong to the layer and are never cancelled before its end.

Survives power loss: what was flushed. Survives the daemon: every acknowledged byte, in survivor memory, where there is a
successor that takes it over.
Source: the idea is QEMU's proposed seqcache filter, which gathers the writes of a compressed backup.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated

import pydantic
import trio

from cachefs.errors import BackendError, CachefsError, StoreError
from cachefs.extent import Extent, clip_extents, merge_extents, with_data
from cachefs.layers.base import ALL_CAPS, Caps, Done, Environment, Geometry, Later, Layer, Options, Statistics
from cachefs.rangelock import RangeLocks
from cachefs.store.clusters import Clusters, Range, Slot, body_size, slots_within
from cachefs.survivor import SurvivorMemory
from cachefs.units import Duration, Size, align_down, align_up, format_size, is_power_of_two, split_aligned

log = logging.getLogger(__name__)

SECTOR = 512
MEMORY_KIND = "coalesce"
LAYOUT = 1  # of the survivor memory: see cachefs.store.clusters
WRITE_OUTS = 16  # at the same time
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 30.0


def _check_cluster(value: int) -> int:
    if not 64 << 10 <= value <= 4 << 20 or not is_power_of_two(value):
        raise ValueError("must be a power of two from 64KiB to 4MiB")
    return value


class CoalesceConfig(Options):
    cluster: Annotated[Size, pydantic.AfterValidator(_check_cluster)] = 1 << 20
    """Bytes that are written at once when they are all there, 64KiB to 4MiB, a power of two."""
    buffer: Size = 64 << 20
    """Most bytes of memory for what is gathered; room for five clusters at least. Writers wait when it is full."""
    max_delay: Annotated[Duration, pydantic.Field(gt=0)] = 1.0
    """How long an unfinished cluster waits for more before it is written all the same."""

    @pydantic.model_validator(mode="after")
    def _check_room(self) -> CoalesceConfig:
        if slots_within(self.buffer, self.cluster) < 4:
            least = format_size(5 * self.cluster)
            raise ValueError(
                f"buffer is too small for clusters of {format_size(self.cluster)}: give it {least} at least"
            )
        return self

    @property
    def passes_writes(self) -> bool:
        return True

    @property
    def aligns(self) -> bool:
        return True


class _WriteOut:
    """One of a cluster. done: set at its end, when `error` says why it failed."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: CachefsError | None = None


class Coalesce:
    """An open coalescer; `Coalesce.open` makes it. Takes any byte range (alignment 1), over a child of any alignment."""

    Config = CoalesceConfig

    def __init__(
        self, name: str, config: CoalesceConfig, child: Layer, clusters: Clusters, nursery: trio.Nursery
    ) -> None:
        self.name = name
        self.child = child
        self.identity = child.identity
        size = child.geometry.size
        self.geometry = Geometry(size, alignment=1, preferred_io=max(4096, child.geometry.preferred_io))
        self.caps = ALL_CAPS if Caps.WRITE in child.caps else Caps.FLUSH | Caps.EXTENTS
        self.clusters = clusters
        self._size = size
        self._unit = max(SECTOR, child.geometry.alignment)
        self._alignment = child.geometry.alignment
        self._max_delay = config.max_delay
        self._most_open = clusters.slots * 3 // 4
        self._nursery = nursery
        self._locks = RangeLocks()
        self._writing = 0
        self._turns = trio.lowlevel.ParkingLot()  # of write-outs, while WRITE_OUTS are writing
        self._queued: dict[int, _WriteOut] = {}  # by cluster: those that have not frozen it yet
        self._running = 0  # write-outs and trims that hold frozen slots
        self._room = trio.lowlevel.ParkingLot()
        self._due: dict[int, float] = {}  # by cluster: when an unfinished one is to be written, on trio's clock
        self._due_changed = trio.Event()
        self._wakes_at = math.inf
        self._retry_s: dict[int, float] = {}  # by cluster whose last write-out failed: how long it waited for the next
        self._errors: dict[int, CachefsError] = {}  # the same clusters
        self._bytes_in = self._bytes_out = self._writes_out = self._read_modify_writes = 0
        self._failed_write_outs = self._waits = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, config: CoalesceConfig, child: Layer, env: Environment) -> AsyncIterator[Coalesce]:
        """What a predecessor left in the memory is written out at once. On exit: flushed.

        Raises: StoreError.
        """
        name = f"{env.owner}/coalesce"
        if child.geometry.alignment > config.cluster:
            unit = format_size(child.geometry.alignment)
            raise StoreError(
                name, f"what is below takes writes in units of {unit}; make the clusters as large at least"
            )
        slots = slots_within(config.buffer, config.cluster)
        problem: CachefsError | None = None
        async with _open_memory(name, env, child, body_size(config.cluster, slots)) as memory:
            clusters = Clusters(memory.body, child.geometry.size, config.cluster, slots)
            async with trio.open_nursery() as nursery:
                write_outs: trio.Nursery = await nursery.start(_run_shielded)
                layer = cls(name, config, child, clusters, write_outs)
                for cluster in clusters.open:
                    layer._ask(cluster)
                nursery.start_soon(layer._write_what_is_due)
                try:
                    yield layer
                finally:
                    problem = await layer._flush_last(env.forced_stop)
                    write_outs.cancel_scope.cancel()
                    nursery.cancel_scope.cancel()
        if problem is not None:
            raise problem

    async def _flush_last(self, forced_stop: trio.Event) -> CachefsError | None:
        """Also when we are cancelled, what was acknowledged goes down if it can."""
        if not self.clusters.open and not self.clusters.frozen:
            return None
        with trio.CancelScope(shield=True) as scope:
            async with trio.open_nursery() as nursery:

                async def give_up() -> None:
                    await forced_stop.wait()
                    scope.cancel()

                nursery.start_soon(give_up)
                try:
                    await self.flush()
                except CachefsError as exc:
                    left = self.clusters.buffered_bytes
                    log.error("%s: the last flush failed, %d bytes are not written: %s", self.name, left, exc.detail)
                    return exc
                finally:
                    nursery.cancel_scope.cancel()
        if forced_stop.is_set() and (left := self.clusters.buffered_bytes):
            log.error("%s: stopped by force, %d bytes are not written", self.name, left)
        return None

    # ---- fast path

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        if not self.clusters.holds(offset, len(buffer)):
            return self.child.try_read_into(offset, buffer)
        return not self.clusters.overlay(offset, buffer)

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        return not self.clusters.holds(offset, len(buffer)) and self.child.try_read_later(offset, buffer, done)

    def try_extent(self, offset: int, length: int) -> Extent | None:
        return None

    def try_write(self, offset: int, data: memoryview) -> bool:
        slot = self.clusters.try_put(offset, data)
        if slot is not None:
            self._bytes_in += len(data)
            if slot.is_full and slot.cluster not in self._errors:
                self._ask(slot.cluster)
            return True
        lacks = self.clusters.lacks(offset, len(data))
        if lacks and (lacks > self.clusters.free or len(self._room)):  # nobody overtakes who waits for room
            return False
        self._put(offset, data)
        return True

    def try_flush(self, done: Done) -> bool:
        if self.clusters.open or self.clusters.frozen or self._running:
            return False
        return self.child.try_flush(done)

    def _put(self, offset: int, data: memoryview | bytes) -> None:
        """There is room."""
        begun, finished = self.clusters.put(offset, data)
        self._bytes_in += len(data)
        for cluster in begun:
            self._set_due(cluster, self._max_delay)
        for cluster in finished:
            self._ask(cluster)
        excess = len(self.clusters.open) - len(self._queued) - self._most_open
        if begun and excess > 0:
            self._ask_oldest(excess)

    def _ask_oldest(self, count: int) -> None:
        """Write out what was written to longest ago; what could not be written waits for its time."""
        idle = (one for one in self.clusters.open if one not in self._queued and one not in self._errors)
        for cluster in list(itertools.islice(idle, count)):
            self._ask(cluster)

    # ---- reading

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        # What is here is taken before the first await, and the child is asked for the rest: it has that already, and whatever
        # changes it meanwhile overlaps this read.
        gaps = self.clusters.overlay(offset, buffer)
        if not gaps:
            return
        start, end = align_down(gaps[0][0], self._alignment), align_up(gaps[-1][1], self._alignment)
        end = min(end, self._size)
        if (start, end) == gaps[0]:
            await self._read_below(start, buffer[start - offset : end - offset])
            return
        whole = memoryview(bytearray(end - start))
        await self._read_below(start, whole)
        for first, last in gaps:
            buffer[first - offset : last - offset] = whole[first - start : last - start]

    async def _read_below(self, offset: int, buffer: memoryview) -> None:
        if not self.child.try_read_into(offset, buffer):
            await self.child.read_into(offset, buffer)

    # ---- writing

    async def write(self, offset: int, data: memoryview | bytes) -> None:
        end = offset + len(data)
        for cluster in self.clusters.span(offset, len(data)):
            base = cluster * self.clusters.cluster_size
            start, stop = self.clusters.within(cluster, offset, end)
            await self._wait_for_room(cluster)
            self._put(base + start, data[base + start - offset : base + stop - offset])
        if self.clusters.free or not self._will_change:
            self._room.unpark()  # the next one finds more room, or asks for it

    async def _wait_for_room(self, cluster: int) -> None:
        """Raises: the error of what fills the buffer and cannot be written."""
        has_tried = False
        while cluster not in self.clusters.open and not self.clusters.free:
            self._waits += 1
            if not self._will_change:
                self._ask_oldest(WRITE_OUTS)
            if not self._will_change:  # all of it is what could not be written
                if has_tried:
                    raise next(iter(self._errors.values()))
                has_tried = True
                for failed in self._errors:
                    self._ask(failed)
            await self._room.park()

    @property
    def _will_change(self) -> bool:
        """Whether something is under way at whose end those who wait for room are told."""
        return bool(self._queued or self._running)

    def _ask(self, cluster: int) -> _WriteOut:
        """A write-out of what is buffered of *cluster* now, perhaps with what comes before it begins."""
        write_out = self._queued.get(cluster)
        if write_out is None:
            write_out = self._queued[cluster] = _WriteOut()
            self._nursery.start_soon(self._run, cluster, write_out)
        return write_out

    async def _run(self, cluster: int, write_out: _WriteOut) -> None:
        hold = await self._locks.acquire(cluster, cluster + 1)
        while self._writing >= WRITE_OUTS:
            await self._turns.park()
        del self._queued[cluster]
        slot = self.clusters.freeze(cluster)
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
            self._locks.release(hold)
            write_out.done.set()
            self._tell_room(write_out.error)

    def _tell_room(self, error: CachefsError | None) -> None:
        """A slot may be free, or there is nothing more to wait for."""
        if error is None:
            self._room.unpark()
        else:
            self._room.unpark_all()

    async def _write_out(self, slot: Slot) -> CachefsError | None:
        """Write the frozen *slot*, whose cluster is locked. Why it failed, in which case it is open again."""
        try:
            for start, end in slot.units(self._unit):
                await self._complete_units(slot, start, end)
                await self._write_below(slot, start, end)
        except Exception as exc:
            if not isinstance(exc, CachefsError):
                log.exception("%s: a bug in the write-out of cluster %d", self.name, slot.cluster)
            error = exc if isinstance(exc, CachefsError) else BackendError(self.name, f"{type(exc).__name__}: {exc}")
            self.clusters.thaw(slot)
            self._note_failure(slot.cluster, error)
            return error
        self.clusters.complete(slot)
        self._forget_failure(slot.cluster)
        return None

    async def _complete_units(self, slot: Slot, start: int, end: int) -> None:
        """Read what of the units from *start* to *end* is not here. Only we change that part of the child: it is locked."""
        base = slot.cluster * self.clusters.cluster_size
        for first, last in slot.gaps(start, end):
            self._read_modify_writes += 1
            at = align_down(first, self._alignment)
            whole = memoryview(bytearray(min(align_up(last, self._alignment), slot.length) - at))
            await self._read_below(base + at, whole)
            slot.put(first, whole[first - at : last - at])

    async def _write_below(self, slot: Slot, start: int, end: int) -> None:
        offset = slot.cluster * self.clusters.cluster_size + start
        data = slot.data[start:end]
        if not self.child.try_write(offset, data):
            await self.child.write(offset, data)
        self._writes_out += 1
        self._bytes_out += end - start

    def _note_failure(self, cluster: int, error: CachefsError) -> None:
        self._failed_write_outs += 1
        if cluster not in self._errors:
            log.warning("%s: a write-out failed and will be tried again: %s", self.name, error)
        wait_s = min(LAST_RETRY_S, self._retry_s.get(cluster, FIRST_RETRY_S / 2) * 2)
        self._errors[cluster], self._retry_s[cluster] = error, wait_s
        self._set_due(cluster, wait_s)

    def _forget_failure(self, cluster: int) -> None:
        if self._errors.pop(cluster, None) is not None:
            del self._retry_s[cluster]
            log.info("%s: what could not be written is written now", self.name)

    # ---- time

    def _set_due(self, cluster: int, after_s: float) -> None:
        due = self._due[cluster] = trio.current_time() + after_s
        if due < self._wakes_at:
            self._due_changed.set()

    async def _write_what_is_due(self) -> None:
        while True:
            self._due_changed = trio.Event()
            self._wakes_at = min(self._due.values(), default=math.inf)
            with trio.move_on_at(self._wakes_at):
                await self._due_changed.wait()
            now = trio.current_time()
            for cluster in [cluster for cluster, due in self._due.items() if due <= now]:
                del self._due[cluster]
                if cluster in self.clusters.open:
                    self._ask(cluster)

    # ---- the rest

    async def flush(self) -> None:
        # A write-out that has frozen its cluster already may lack bytes: one that has not is asked for, and is behind it.
        asked = [self._ask(cluster) for cluster in {*self.clusters.open, *self.clusters.frozen}]
        for write_out in asked:
            await write_out.done.wait()
        for write_out in asked:
            if write_out.error is not None:
                raise write_out.error
        await self.child.flush()

    async def trim(self, offset: int, length: int) -> None:
        await self._clear(offset, length, self.child.trim)

    async def zero(self, offset: int, length: int) -> None:
        await self._clear(offset, length, self.child.zero)

    async def _clear(self, offset: int, length: int, below: Callable[[int, int], Awaitable[None]]) -> None:
        """Whole units are cleared below, the edges are writes of zeros: no sector gets a trim before what it had already."""
        head, body, tail = split_aligned(offset, length, self._unit)
        if tail.length and tail.end == self._size:  # the disk's last unit, whole
            body, tail = body._replace(length=body.length + tail.length), tail._replace(length=0)
        for edge in (head, tail):
            if edge.length:
                await self.write(edge.offset, bytes(edge.length))
        if not body.length:
            return
        span = self.clusters.span(body.offset, body.length)
        hold = await self._locks.acquire(span.start, span.stop)
        self._running += 1
        slots = self._freeze_all(span)
        try:
            # Zeros until the child has them: if it fails, they are what was acknowledged or what was asked for.
            for slot in slots:
                slot.zero(*self.clusters.within(slot.cluster, body.offset, body.end))
            await below(body.offset, body.length)
            for slot in slots:
                slot.drop(*self.clusters.within(slot.cluster, body.offset, body.end))
        finally:
            for slot in slots:
                self._thaw(slot)
            self._running -= 1
            self._locks.release(hold)
            self._room.unpark_all()

    def _freeze_all(self, span: range) -> list[Slot]:
        """All open slots of *span*, which is locked."""
        touched = [cluster for cluster in self.clusters.open if cluster in span]
        return [slot for slot in map(self.clusters.freeze, touched) if slot is not None]

    def _thaw(self, slot: Slot) -> None:
        """Behind a trim: what is full by now, or was asked for, is written as ever."""
        cluster = slot.cluster
        self.clusters.thaw(slot)
        if cluster not in self.clusters.open:
            self._errors.pop(cluster, None)
            self._retry_s.pop(cluster, None)
        else:
            if self.clusters.open[cluster].is_full:
                self._ask(cluster)
            self._set_due(cluster, self._max_delay)

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        # Looked up before the child is asked: what is written out meanwhile, the child may not have told of.
        held = self._held_runs(offset, offset + length)
        start = align_down(offset, self._alignment)
        end = min(align_up(offset + length, self._alignment), self._size)
        found: list[Extent] = []
        while start <= offset:  # a prefix that ends before what was asked for says nothing
            found = await self.child.extents(start, end - start, limit)
            start = found[-1].end
        below = clip_extents(found, offset, offset + length)
        return merge_extents(with_data(below, held))[:limit]

    def _held_runs(self, offset: int, end: int) -> list[Range]:
        """The parts of *offset* to *end* of which there are bytes here, coarsely: units, in order."""
        found: list[Range] = []
        span = self.clusters.span(offset, end - offset)
        for slot in (*self.clusters.frozen.values(), *self.clusters.open.values()):
            if slot.cluster in span:
                base = slot.cluster * self.clusters.cluster_size
                found += [(base + first, base + last) for first, last in slot.units(self._unit)]
        return sorted((max(first, offset), min(last, end)) for first, last in found if last > offset and first < end)

    async def prefetch(self, offset: int, length: int) -> None:
        start = align_down(offset, self._alignment)
        await self.child.prefetch(start, min(align_up(offset + length, self._alignment), self._size) - start)

    def allocated_bytes(self) -> int:
        return self.child.allocated_bytes() + self.clusters.buffered_bytes

    def pending_error(self) -> Exception | None:
        return next(iter(self._errors.values()), None) or self.child.pending_error()

    def statistics(self) -> Statistics:
        values: dict[str, int | float | str] = {
            "buffered_bytes": self.clusters.buffered_bytes,
            "free_clusters": self.clusters.free,
            "clusters": self.clusters.slots,
            "bytes_in": self._bytes_in,
            "bytes_out": self._bytes_out,
            "writes_out": self._writes_out,
            "mean_write_bytes": self._bytes_out // self._writes_out if self._writes_out else 0,
            "read_modify_writes": self._read_modify_writes,
            "waits_for_room": self._waits,
            "failed_write_outs": self._failed_write_outs,
            "errors_held": len(self._errors),
            **self._locks.statistics(),
        }
        if self._errors:
            values["error"] = str(next(iter(self._errors.values())))
        return Statistics(self.name, values, self.child.statistics())


async def _run_shielded(task_status: trio.TaskStatus[trio.Nursery]) -> None:
    """A nursery whose tasks go on when we are cancelled, until somebody cancels itself."""
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.shield = True
        task_status.started(nursery)
        await trio.sleep_forever()


def _open_memory(name: str, env: Environment, child: Layer, length: int) -> AbstractAsyncContextManager[SurvivorMemory]:
    """The memory of this disk's gathered writes, as long as the store below is the same. Raises: StoreError."""
    facts = [f"{key}={value}" for key, value in sorted(child.identity.facts.items()) if "time" not in key]
    return env.memory(name, MEMORY_KIND, LAYOUT, " ".join([child.identity.kind, *facts]), length)
