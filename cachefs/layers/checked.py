"""checked: the edge above every layer and backend: the contract is looked at here, once, and emulation lives here.

On the way down: bounds, alignment, longest request, capabilities (a RequestError is a bug above, never a user's fault). On
the way up: only CachefsErrors come through; anything else is a bug below and becomes one request's EIO at the boundary.
What the layer cannot do itself is done for it: a zero by writing zeros, a trim by a zero, a flush of what cannot be
written by nothing. Requests longer than `max_io` go down in pieces. Empty requests end here.

State: counters. Concurrency: none of its own.
Source: the two-way checks are nbdkit's (server/backend.c).
"""

from __future__ import annotations

from cachefs.errors import ReadOnlyError, RequestError
from cachefs.extent import Extent, ExtentKind
from cachefs.layers.base import ALL_CAPS, Caps, Done, Geometry, Later, Layer, Statistics

_ZEROS = memoryview(bytes(1 << 20))


class Checked:
    """The edge above *child*. Offers every capability of a writable layer when the child can WRITE."""

    def __init__(self, child: Layer) -> None:
        self.child = child
        self.name = child.name
        self.geometry = Geometry(
            child.geometry.size, child.geometry.alignment, child.geometry.preferred_io, max_io=1 << 62
        )
        self.identity = child.identity
        self._is_writable = Caps.WRITE in child.caps
        self.caps = ALL_CAPS if self._is_writable else Caps.FLUSH | Caps.EXTENTS
        self._size = child.geometry.size
        self._mask = child.geometry.alignment - 1
        self._max_io = child.geometry.max_io
        self._try_read_into = child.try_read_into
        self._try_extent = child.try_extent
        self._has_extents = Caps.EXTENTS in child.caps
        self._try_read_later = child.try_read_later
        self._try_write = child.try_write if self._is_writable else _never
        self.fast_reads = self.later_reads = self.fast_writes = self.slow_reads = self.slow_writes = 0
        self.read_bytes = self.written_bytes = self.flushes = self.trims = 0

    def _check(self, offset: int, length: int) -> None:
        end = offset + length
        if offset < 0 or length < 0 or end > self._size:
            raise RequestError(self.name, f"request {offset}+{length} lies outside the disk of {self._size} bytes")
        if self._mask and not self._is_aligned(offset, end):
            raise RequestError(self.name, f"request {offset}+{length} is not aligned to {self._mask + 1} bytes")

    def _is_aligned(self, offset: int, end: int) -> bool:
        return not offset & self._mask and (not end & self._mask or end == self._size)

    def _check_write(self, offset: int, length: int) -> None:
        self._check(offset, length)
        if not self._is_writable:
            raise ReadOnlyError(self.name, "is read-only; put a cow layer above it to write")

    # ---- fast path

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        length = len(buffer)
        if offset < 0 or offset + length > self._size or length > self._max_io or not length:
            return False  # the slow path looks closer
        if self._mask and not self._is_aligned(offset, offset + length):
            return False
        if self._try_read_into(offset, buffer):
            self.fast_reads += 1
            self.read_bytes += length
            return True
        return False

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        length = len(buffer)
        if offset < 0 or offset + length > self._size or length > self._max_io or not length:
            return False
        if self._mask and not self._is_aligned(offset, offset + length):
            return False
        if self._try_read_later(offset, buffer, done):
            self.later_reads += 1
            self.read_bytes += length
            return True
        return False

    def try_write(self, offset: int, data: memoryview) -> bool:
        length = len(data)
        if offset < 0 or offset + length > self._size or length > self._max_io or not length:
            return False
        if self._mask and not self._is_aligned(offset, offset + length):
            return False
        if self._try_write(offset, data):
            self.fast_writes += 1
            self.written_bytes += length
            return True
        return False

    def try_flush(self, done: Done) -> bool:
        if Caps.FLUSH not in self.child.caps:
            done(None)
            return True
        self.flushes += 1
        if self.child.try_flush(done):
            return True
        self.flushes -= 1
        return False

    def try_extent(self, offset: int, length: int) -> Extent | None:
        if offset < 0 or length <= 0 or offset + length > self._size:
            return None  # the slow path looks closer
        if not self._has_extents:
            return Extent(offset, length, ExtentKind.DATA)
        return self._try_extent(offset, length)

    # ---- slow path

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self._check(offset, len(buffer))
        for at in range(0, len(buffer), self._max_io):
            part = buffer[at : at + self._max_io]
            await self.child.read_into(offset + at, part)
            self.slow_reads += 1
            self.read_bytes += len(part)

    async def write(self, offset: int, data: memoryview) -> None:
        length = len(data)
        self._check_write(offset, length)
        for at in range(0, length, self._max_io):
            part = data if length <= self._max_io else data[at : at + self._max_io]
            await self.child.write(offset + at, part)
            self.slow_writes += 1
            self.written_bytes += len(part)

    async def flush(self) -> None:
        if Caps.FLUSH in self.child.caps:
            await self.child.flush()
            self.flushes += 1

    async def trim(self, offset: int, length: int) -> None:
        self._check_write(offset, length)
        self.trims += 1
        if Caps.TRIM not in self.child.caps:
            await self._zero(offset, length)
        elif length:
            await self.child.trim(offset, length)

    async def zero(self, offset: int, length: int) -> None:
        self._check_write(offset, length)
        self.trims += 1
        await self._zero(offset, length)

    async def _zero(self, offset: int, length: int) -> None:
        if Caps.ZERO in self.child.caps:
            if length:
                await self.child.zero(offset, length)
            return
        step = min(self._max_io, len(_ZEROS))
        for at in range(offset, offset + length, step):
            await self.child.write(at, _ZEROS[: min(step, offset + length - at)])

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        if offset < 0 or length <= 0 or offset + length > self._size:
            raise RequestError(self.name, f"extents of {offset}+{length}: empty, or outside {self._size} bytes")
        if not self._has_extents:
            return [Extent(offset, length, ExtentKind.DATA)]
        found = await self.child.extents(offset, length, limit)
        at = offset
        for extent in found:  # what comes back is looked at too: callers loop over it
            if extent.offset != at or extent.length <= 0:
                raise RequestError(
                    self.name, f"extents of {offset}+{length} came back with a gap or an overlap at {at}"
                )
            at = extent.end
        if at == offset or at > offset + length:
            raise RequestError(self.name, f"extents of {offset}+{length} came back empty or too long")
        return found

    async def prefetch(self, offset: int, length: int) -> None:
        self._check(offset, length)
        if length:
            await self.child.prefetch(offset, length)

    def allocated_bytes(self) -> int:
        return self.child.allocated_bytes()

    def pending_error(self) -> Exception | None:
        return self.child.pending_error()

    def statistics(self) -> Statistics:
        below = self.child.statistics()
        edge = {
            "fast_reads": self.fast_reads,
            "later_reads": self.later_reads,
            "slow_reads": self.slow_reads,
            "read_bytes": self.read_bytes,
            "fast_writes": self.fast_writes,
            "slow_writes": self.slow_writes,
            "written_bytes": self.written_bytes,
            "flushes": self.flushes,
            "trims": self.trims,
        }
        return Statistics(below.layer, {**edge, **below.values}, below.child)


def _never(offset: int, data: memoryview) -> bool:
    return False
