"""A layer that does nothing, for test layers to override; one that has no fast path, and one that suspends everywhere.

State: none. Concurrency: the child's.
"""

from __future__ import annotations

import trio

from cachefs.extent import Extent
from cachefs.layers.base import Done, Later, Layer, Slow, Statistics

OPERATIONS = (
    "try_read_into",
    "try_write",
    "try_read_later",
    "try_flush",
    "try_extent",
    "read_into",
    "write",
    "flush",
    "trim",
    "zero",
    "extents",
    "prefetch",
    "allocated_bytes",
    "pending_error",
    "statistics",
)
"""Every operation of the layer protocol."""


class Wrapper:
    """Passes everything to *child*."""

    def __init__(self, child: Layer) -> None:
        self.child = child
        self.name = child.name
        self.geometry = child.geometry
        self.caps = child.caps
        self.identity = child.identity

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return self.child.try_read_into(offset, buffer)

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        return self.child.try_read_later(offset, buffer, done)

    def try_write(self, offset: int, data: memoryview) -> bool:
        return self.child.try_write(offset, data)

    def try_flush(self, done: Done) -> bool:
        return self.child.try_flush(done)

    def try_extent(self, offset: int, length: int) -> Extent | None:
        return self.child.try_extent(offset, length)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self.child.read_into(offset, buffer)

    async def write(self, offset: int, data: memoryview) -> None:
        await self.child.write(offset, data)

    async def flush(self) -> None:
        await self.child.flush()

    async def trim(self, offset: int, length: int) -> None:
        await self.child.trim(offset, length)

    async def zero(self, offset: int, length: int) -> None:
        await self.child.zero(offset, length)

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        return await self.child.extents(offset, length, limit)

    async def prefetch(self, offset: int, length: int) -> None:
        await self.child.prefetch(offset, length)

    def allocated_bytes(self) -> int:
        return self.child.allocated_bytes()

    def pending_error(self) -> Exception | None:
        return self.child.pending_error()

    def statistics(self) -> Statistics:
        return self.child.statistics()


class SlowOnly(Slow, Wrapper):
    """Never the fast path: what is tested is the async operations."""


class Yielding(SlowOnly):
    """Suspends before and after every operation, as a device would; the operations of the layer above can then be
    cancelled there, and others run in between.
    """

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        await self.child.read_into(offset, buffer)
        await trio.lowlevel.checkpoint()

    async def write(self, offset: int, data: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        await self.child.write(offset, data)
        await trio.lowlevel.checkpoint()

    async def trim(self, offset: int, length: int) -> None:
        await trio.lowlevel.checkpoint()
        await self.child.trim(offset, length)
        await trio.lowlevel.checkpoint()

    async def zero(self, offset: int, length: int) -> None:
        await trio.lowlevel.checkpoint()
        await self.child.zero(offset, length)
        await trio.lowlevel.checkpoint()

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        await trio.lowlevel.checkpoint()
        found = await self.child.extents(offset, length, limit)
        await trio.lowlevel.checkpoint()
        return found
