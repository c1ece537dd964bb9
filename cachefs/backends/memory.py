"""memory: a disk in the daemon's memory, zeros at first, gone at the end. The reference that tests compare with.

Each chunk of 64 KiB is allocated at its first write and dropped when a trim covers it. Nothing blocks, so the async
operations do what the fast path does. `alignment` makes it refuse requests like a device would.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated

import pydantic

from cachefs.extent import Extent, ExtentKind, merge_extents
from cachefs.layers.base import ALL_CAPS, Done, Environment, Geometry, Later, Options, Statistics
from cachefs.store.identity import Identity
from cachefs.units import Size, is_power_of_two

CHUNK = 64 << 10


def _check_alignment(value: int) -> int:
    if not is_power_of_two(value) or value > CHUNK:
        raise ValueError("must be a power of two up to 64KiB")
    return value


class MemoryConfig(Options):
    size: Annotated[Size, pydantic.Field(gt=0)]
    """Size of the disk."""
    alignment: Annotated[Size, pydantic.AfterValidator(_check_alignment)] = 1
    """Offsets and lengths that it takes are multiples of this; anything else is completed above it."""


class Memory:
    """An open memory disk. *chunks* of the same object may be handed to a second one, for tests that reopen."""

    Config = MemoryConfig

    def __init__(self, name: str, size: int, alignment: int = 1, chunks: dict[int, bytearray] | None = None) -> None:
        self.name = name
        self.geometry = Geometry(size, alignment)
        self.caps = ALL_CAPS
        self.identity = Identity("memory", {"size": str(size)})
        self._chunks: dict[int, bytearray] = {} if chunks is None else chunks

    @classmethod
    @asynccontextmanager
    async def open(cls, config: MemoryConfig, env: Environment) -> AsyncIterator[Memory]:
        yield cls(f"{env.owner}/memory", config.size, config.alignment)

    @staticmethod
    def _parts(offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """(chunk index, start in the chunk, start in the request, length) of each chunk that the range touches."""
        at = 0
        while at < length:
            index, start = divmod(offset + at, CHUNK)
            count = min(CHUNK - start, length - at)
            yield index, start, at, count
            at += count

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        for index, start, at, count in self._parts(offset, len(buffer)):
            chunk = self._chunks.get(index)
            buffer[at : at + count] = bytes(count) if chunk is None else memoryview(chunk)[start : start + count]
        return True

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        return False

    def try_write(self, offset: int, data: memoryview) -> bool:
        for index, start, at, count in self._parts(offset, len(data)):
            chunk = self._chunks.get(index)
            if chunk is None:
                chunk = self._chunks[index] = bytearray(CHUNK)
            chunk[start : start + count] = data[at : at + count]
        return True

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self.try_read_into(offset, buffer)

    async def write(self, offset: int, data: memoryview) -> None:
        self.try_write(offset, data)

    def try_flush(self, done: Done) -> bool:
        done(None)
        return True

    async def flush(self) -> None:
        """Nothing here outlives the process."""

    async def trim(self, offset: int, length: int) -> None:
        for index, start, _, count in self._parts(offset, length):
            if count == CHUNK:
                self._chunks.pop(index, None)
            elif (chunk := self._chunks.get(index)) is not None:
                chunk[start : start + count] = bytes(count)

    async def zero(self, offset: int, length: int) -> None:
        await self.trim(offset, length)

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        found = (
            Extent(offset + at, count, ExtentKind.DATA if index in self._chunks else ExtentKind.HOLE)
            for index, _, at, count in self._parts(offset, length)
        )
        return merge_extents(found)[:limit]

    def try_extent(self, offset: int, length: int) -> Extent | None:
        index, _, _, count = next(self._parts(offset, length))
        return Extent(offset, count, ExtentKind.DATA if index in self._chunks else ExtentKind.HOLE)

    async def prefetch(self, offset: int, length: int) -> None:
        """Everything is here."""

    def allocated_bytes(self) -> int:
        return len(self._chunks) * CHUNK

    def pending_error(self) -> Exception | None:
        return None

    def statistics(self) -> Statistics:
        return Statistics(self.name, {"allocated_bytes": self.allocated_bytes()})
