"""coalesce: gathers small and unaligned writes into aligned clusters, for stores that are slow at them.

A write is copied into the buffer of its cluster and acknowledged. A finished cluster is written at once, in the
background; an unfinished one at a flush, after `max_delay`, or when most of the buffer holds unfinished ones: the write-outs
are those of `cachefs.layers.writeouts`, the states of a cluster those of `cachefs.store.clusters`. A write that finds no room
waits for it, unless what is written out of late is as small as itself: then gathering does not pay, and it goes straight below.

Every flush fails until what it covers is below. A writer that finds the buffer full of what cannot be written gets its error.

Locks: write-outs and trims lock their clusters, writes that go straight below their bytes, so that none overtakes another
one; reads and other writes take no lock. While a cluster is written out or trimmed its bytes are frozen, and writes go to
a second buffer of it. Lock order: one range here, then the child's own.

Cancellation: a write that waits for room is dropped; write-outs belong to the layer and are never cancelled before its end.

Survives power loss: what was flushed. Survives the daemon: every acknowledged byte, in survivor memory, where there is a
successor that takes it over.
Source: the idea is QEMU's proposed seqcache filter, which gathers the writes of a compressed backup.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated

import pydantic
import trio

from cachefs.errors import CachefsError, StoreError
from cachefs.extent import Extent, clip_extents, merge_extents, with_data
from cachefs.layers.base import ALL_CAPS, Caps, Done, Environment, Geometry, Later, Layer, Options, Statistics
from cachefs.layers.writeouts import AT_ONCE, WriteOuts
from cachefs.store.clusters import Clusters, Range, body_size, slots_within
from cachefs.survivor import SurvivorMemory
from cachefs.units import Duration, Size, align_down, align_up, format_size, is_power_of_two, split_aligned

log = logging.getLogger(__name__)

MEMORY_KIND = "coalesce"
RECENT_ENDS = 16  # of writes that went straight below, or filled a cluster's end: what begins there goes on a stream
CROWD_DECAY = 1 / 16  # for each write that goes straight below
LAYOUT = 1  # of the survivor memory: see cachefs.store.clusters


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


class Coalesce:
    """An open coalescer; `Coalesce.open` makes it. Takes any byte range (alignment 1), over a child of any alignment."""

    Config = CoalesceConfig

    def __init__(self, name: str, config: CoalesceConfig, child: Layer, clusters: Clusters) -> None:
        self.name = name
        self.child = child
        self.identity = child.identity
        size = child.geometry.size
        self.geometry = Geometry(size, alignment=1, preferred_io=max(4096, child.geometry.preferred_io))
        self.caps = ALL_CAPS if Caps.WRITE in child.caps else Caps.FLUSH | Caps.EXTENTS
        self.clusters = clusters
        self.write_outs = WriteOuts(name, child, clusters, config.max_delay, self._tell_room)
        self._size = size
        self._alignment = child.geometry.alignment
        self._unit_mask = self.write_outs.unit - 1
        self._most_open = clusters.slots * 3 // 4
        self._room = trio.lowlevel.ParkingLot()
        self._passing = 0  # writes that go straight below,
        self._crowd: float = 0  # and how many of them at the same time, of late
        self._ends: dict[int, None] = {}  # the oldest first
        self._bytes_in = self._waits = self._written_through = 0

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
            layer = cls(name, config, child, clusters)
            async with layer.write_outs.running():
                for cluster in clusters.open:
                    layer.write_outs.ask(cluster)
                try:
                    yield layer
                finally:
                    problem = await layer._flush_last(env.forced_stop)
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
            if slot.is_full and slot.cluster not in self.write_outs.errors:
                self.write_outs.ask(slot.cluster)
            self._note_end_of_cluster(offset + len(data))
            return True
        lacks = self.clusters.lacks(offset, len(data))
        if lacks and (lacks > self.clusters.free or len(self._room) or self._is_better_below(offset, data)):
            return False  # nobody overtakes who waits for room
        self._put(offset, data)
        return True

    def try_flush(self, done: Done) -> bool:
        if self.clusters.open or self.clusters.frozen:
            return False
        return self.child.try_flush(done)

    def _put(self, offset: int, data: memoryview | bytes) -> None:
        """There is room."""
        begun, finished = self.clusters.put(offset, data)
        self._bytes_in += len(data)
        for cluster in begun:
            self.write_outs.ask_in_time(cluster)
        for cluster in finished:
            self.write_outs.ask(cluster)
        self._note_end_of_cluster(offset + len(data))
        excess = len(self.clusters.open) - self.write_outs.queued - self._most_open
        if begun and excess > 0:
            self.write_outs.ask_oldest(excess)

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
        clusters = self.clusters.span(offset, len(data))
        if len(clusters) == 1:
            await self._write_part(clusters[0], offset, data)
        else:
            end = offset + len(data)
            for cluster in clusters:
                base = cluster * self.clusters.cluster_size
                start, stop = self.clusters.within(cluster, offset, end)
                await self._write_part(cluster, base + start, data[base + start - offset : base + stop - offset])
        if self._room and (self.clusters.free or self.write_outs.is_idle):
            self._room.unpark()  # the next one finds more room, or asks for it

    async def _write_part(self, cluster: int, offset: int, data: memoryview | bytes) -> None:
        """What lies in *cluster*."""
        if self._is_better_below(offset, data) and await self._write_through(cluster, offset, data):
            return
        await self._wait_for_room(cluster)
        self._put(offset, data)

    def _is_better_below(self, offset: int, data: memoryview | bytes) -> bool:
        """Whether to gather it would not pay: of late a write-out was hardly more than this alone, and there is no room.

        Where several at the same time go down so, they go on when there is room: it would cost more, and gain nothing. What
        goes on a stream is gathered; one client alone is, too.
        """
        length = len(data)
        if self.write_outs.mean >= 2 * length or offset in self._ends:
            return False
        end = offset + length
        if (offset | end) & self._unit_mask and (offset & self._unit_mask or end != self._size):
            return False
        return self._crowd >= 2 or not self.clusters.free

    def _note_end_of_cluster(self, end: int) -> None:
        """Within one its slot says that a stream goes on."""
        if not end & self.clusters.cluster_size - 1:
            self._note_end(end)

    def _note_end(self, end: int) -> None:
        self._ends.pop(end, None)  # the newest is the last one
        self._ends[end] = None
        if len(self._ends) > RECENT_ENDS:
            del self._ends[next(iter(self._ends))]

    async def _write_through(self, cluster: int, offset: int, data: memoryview | bytes) -> bool:
        """Write whole units straight below; False: there is something of their cluster here, which would lie over them."""
        length, locks = len(data), self.write_outs.locks
        end = offset + length
        hold = locks.acquire_nowait(offset, end) or await locks.acquire(offset, end)
        try:
            if cluster in self.clusters.open:
                return False
            self._passing += 1
            self._crowd = max(self._passing, self._crowd - CROWD_DECAY)
            try:
                # What is put into the cluster from here on overlaps this write in time, and is written out behind it.
                await self.child.write(offset, memoryview(data))
            finally:
                self._passing -= 1
        finally:
            locks.release(hold)
        self.write_outs.note_write(length)
        self._note_end(end)
        self._bytes_in += length
        self._written_through += 1
        return True

    async def _wait_for_room(self, cluster: int) -> None:
        """Raises: the error of what fills the buffer and cannot be written."""
        has_tried = False
        while cluster not in self.clusters.open and not self.clusters.free:
            self._waits += 1
            if self.write_outs.is_idle:
                self.write_outs.ask_oldest(AT_ONCE)
            if self.write_outs.is_idle:  # all of it is what could not be written
                errors = self.write_outs.errors
                if has_tried:
                    raise next(iter(errors.values()))
                has_tried = True
                for failed in errors:
                    self.write_outs.ask(failed)
            await self._room.park()

    def _tell_room(self, error: CachefsError | None) -> None:
        """A slot may be free, or there is nothing more to wait for."""
        if error is None:
            self._room.unpark()
        else:
            self._room.unpark_all()

    # ---- the rest

    async def flush(self) -> None:
        # A write-out that has frozen its cluster already may lack bytes: one that has not is asked for, and is behind it.
        asked = [self.write_outs.ask(cluster) for cluster in {*self.clusters.open, *self.clusters.frozen}]
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
        head, body, tail = split_aligned(offset, length, self.write_outs.unit)
        if tail.length and tail.end == self._size:  # the disk's last unit, whole
            body, tail = body._replace(length=body.length + tail.length), tail._replace(length=0)
        for edge in (head, tail):
            if edge.length:
                await self.write(edge.offset, bytes(edge.length))
        if not body.length:
            return
        try:
            async with self.write_outs.changing(self.clusters.span(body.offset, body.length)) as slots:
                # Zeros until the child has them: if it fails, they are what was acknowledged or what was asked for.
                for slot in slots:
                    slot.zero(*self.clusters.within(slot.cluster, body.offset, body.end))
                await below(body.offset, body.length)
                for slot in slots:
                    slot.drop(*self.clusters.within(slot.cluster, body.offset, body.end))
        finally:
            self._room.unpark_all()

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
                found += [(base + first, base + last) for first, last in slot.units(self.write_outs.unit)]
        return sorted((max(first, offset), min(last, end)) for first, last in found if last > offset and first < end)

    async def prefetch(self, offset: int, length: int) -> None:
        start = align_down(offset, self._alignment)
        await self.child.prefetch(start, min(align_up(offset + length, self._alignment), self._size) - start)

    def allocated_bytes(self) -> int:
        return self.child.allocated_bytes() + self.clusters.buffered_bytes

    def pending_error(self) -> Exception | None:
        return next(iter(self.write_outs.errors.values()), None) or self.child.pending_error()

    def statistics(self) -> Statistics:
        values: dict[str, int | float | str] = {
            "buffered_bytes": self.clusters.buffered_bytes,
            "free_clusters": self.clusters.free,
            "clusters": self.clusters.slots,
            "bytes_in": self._bytes_in,
            "waits_for_room": self._waits,
            "written_through": self._written_through,
            **self.write_outs.statistics(),
        }
        return Statistics(self.name, values, self.child.statistics())


def _open_memory(name: str, env: Environment, child: Layer, length: int) -> AbstractAsyncContextManager[SurvivorMemory]:
    """The memory of this disk's gathered writes, as long as the store below is the same. Raises: StoreError."""
    facts = [f"{key}={value}" for key, value in sorted(child.identity.facts.items()) if "time" not in key]
    return env.memory(name, MEMORY_KIND, LAYOUT, " ".join([child.identity.kind, *facts]), length)
