"""align: takes any byte range over a child that needs aligned ones, by read-modify-write of the edges.

Put in by the graph where a layer takes less than the one above may send. Aligned requests pass through; of the others,
reads go into a buffer of whole units, and writes, trims and zeros complete their first and last unit under a range lock
(one unit is one "block" of it). The fast path passes aligned requests and stands back from locked units.

Concurrency: a write locks exactly its own units, aligned ones too (an edge's read-modify-write of a neighbour must not undo
them). Lock order: one range here, then the child's own.
"""

from __future__ import annotations

from cachefs.extent import Extent, clip_extents
from cachefs.layers.base import Done, Geometry, Later, Layer, Statistics
from cachefs.rangelock import RangeLocks
from cachefs.units import align_down, align_up, split_aligned


class Align:
    """See the module. The unit is the child's alignment; the last unit of the disk may be shorter."""

    def __init__(self, child: Layer) -> None:
        self.child = child
        self.name = f"{child.name}+align"
        self.identity = child.identity
        self.caps = child.caps
        self._unit = child.geometry.alignment
        self._mask = self._unit - 1
        self._size = child.geometry.size
        self.geometry = Geometry(self._size, 1, max(self._unit, child.geometry.preferred_io), child.geometry.max_io)
        self._locks = RangeLocks()
        self._read_modify_writes = 0

    def _is_aligned(self, offset: int, length: int) -> bool:
        end = offset + length
        return not offset & self._mask and (not end & self._mask or end == self._size)

    def _units(self, offset: int, length: int) -> tuple[int, int]:
        return offset // self._unit, (offset + length - 1) // self._unit + 1

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return self._is_aligned(offset, len(buffer)) and self.child.try_read_into(offset, buffer)

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        return self._is_aligned(offset, len(buffer)) and self.child.try_read_later(offset, buffer, done)

    def try_write(self, offset: int, data: memoryview) -> bool:
        if not self._is_aligned(offset, len(data)) or self._locks.is_locked(*self._units(offset, len(data))):
            return False
        return self.child.try_write(offset, data)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        if self._is_aligned(offset, len(buffer)):
            await self.child.read_into(offset, buffer)
            return
        start = align_down(offset, self._unit)
        whole = await self._read_units(start, offset + len(buffer))
        buffer[:] = whole[offset - start : offset - start + len(buffer)]

    async def _read_units(self, start: int, end: int) -> memoryview:
        """Whole units from *start* (aligned) to beyond *end*."""
        end = min(align_up(end, self._unit), self._size)
        whole = memoryview(bytearray(end - start))
        await self.child.read_into(start, whole)
        return whole

    async def write(self, offset: int, data: memoryview) -> None:
        hold = await self._locks.acquire(*self._units(offset, len(data)))
        try:
            if self._is_aligned(offset, len(data)):
                await self.child.write(offset, data)
            else:
                await self._write_completed(offset, data)
        finally:
            self._locks.release(hold)

    async def _write_completed(self, offset: int, data: memoryview) -> None:
        """Read what surrounds *data* in its first and last unit and write whole units; the caller holds their lock."""
        self._read_modify_writes += 1
        end = offset + len(data)
        start, stop = align_down(offset, self._unit), min(align_up(end, self._unit), self._size)
        whole = memoryview(bytearray(stop - start))
        last = align_down(end - 1, self._unit)
        if offset > start:
            await self.child.read_into(start, whole[: min(self._unit, stop - start)])
        if end < stop and not (offset > start and last == start):
            await self.child.read_into(last, whole[last - start :])
        whole[offset - start : end - start] = data
        await self.child.write(start, whole)

    async def trim(self, offset: int, length: int) -> None:
        await self._clear(offset, length, trim=True)

    async def zero(self, offset: int, length: int) -> None:
        await self._clear(offset, length, trim=False)

    async def _clear(self, offset: int, length: int, *, trim: bool) -> None:
        below = self.child.trim if trim else self.child.zero
        hold = await self._locks.acquire(*self._units(offset, length))
        try:
            if self._is_aligned(offset, length):
                await below(offset, length)
                return
            head, body, tail = split_aligned(offset, length, self._unit)
            if tail.length and tail.offset + tail.length == self._size:  # the disk's last unit, whole
                body, tail = body._replace(length=body.length + tail.length), tail._replace(length=0)
            if body.length:
                await below(body.offset, body.length)
            for edge in (head, tail):
                if edge.length:
                    await self._write_completed(edge.offset, memoryview(bytes(edge.length)))
        finally:
            self._locks.release(hold)

    def try_flush(self, done: Done) -> bool:
        return self.child.try_flush(done)

    async def flush(self) -> None:
        await self.child.flush()

    def try_extent(self, offset: int, length: int) -> Extent | None:
        start = align_down(offset, self._unit)
        found = self.child.try_extent(start, min(align_up(offset + length, self._unit), self._size) - start)
        if found is None or found.end <= offset:
            return None
        return Extent(offset, min(found.end, offset + length) - offset, found.kind)

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        start = align_down(offset, self._unit)
        end = min(align_up(offset + length, self._unit), self._size)
        found: list[Extent] = []
        while start <= offset:  # a prefix that ends before what was asked for says nothing
            found = await self.child.extents(start, end - start, limit)
            start = found[-1].end
        return clip_extents(found, offset, offset + length)

    async def prefetch(self, offset: int, length: int) -> None:
        start = align_down(offset, self._unit)
        await self.child.prefetch(start, min(align_up(offset + length, self._unit), self._size) - start)

    def allocated_bytes(self) -> int:
        return self.child.allocated_bytes()

    def pending_error(self) -> Exception | None:
        return self.child.pending_error()

    def statistics(self) -> Statistics:
        values = {"read_modify_writes": self._read_modify_writes, **self._locks.statistics()}
        return Statistics(self.name, values, self.child.statistics())
