"""Stands at the top of a disk while its stack is not open: in a successor, before it is, and where it cannot be.

    opening    requests wait until the stack is open
    refused    requests fail with EIO and the reason, at once

A flush is refused too: what was acknowledged is in survivor memory and files, and neither is touched meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from cachefs.errors import BackendError
from cachefs.extent import Extent
from cachefs.layers.base import ALL_CAPS, Geometry, Layer, Slow, Statistics
from cachefs.store.identity import Identity


class Unopened(Slow):
    """*size* bytes, as the mount showed them before. on_resume: called when a request that waited goes on."""

    def __init__(self, disk: str, size: int, on_resume: Callable[[], None]) -> None:
        self._on_resume = on_resume
        self.name = f"{disk}/unopened"
        self.geometry = Geometry(size)
        self.caps = ALL_CAPS
        self.identity = Identity("unopened", {})
        self.reason = ""
        self._is_refused = False
        self._top: Layer | None = None
        self._changed = trio.Event()

    # ---- for who opens the stack

    def wait(self, reason: str) -> None:
        """It cannot be opened yet, because of *reason*; requests wait."""
        self.reason = reason

    def refuse(self, reason: str) -> None:
        """Requests fail, those that wait too."""
        self.reason = reason
        self._is_refused = True
        self._wake()

    def open(self, top: Layer) -> None:
        """Those that wait go on with *top*."""
        self._top = top
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # ---- for requests

    @property
    def state(self) -> str:
        return "refused" if self._is_refused else "opening"

    async def _opened(self) -> Layer:
        """Raises: BackendError when it is refused."""
        while self._top is None:
            if self._is_refused:
                raise BackendError(self.name, self.reason)
            await self._changed.wait()
        self._on_resume()
        return self._top

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await (await self._opened()).read_into(offset, buffer)

    async def write(self, offset: int, data: memoryview) -> None:
        await (await self._opened()).write(offset, data)

    async def flush(self) -> None:
        await (await self._opened()).flush()

    async def trim(self, offset: int, length: int) -> None:
        await (await self._opened()).trim(offset, length)

    async def zero(self, offset: int, length: int) -> None:
        await (await self._opened()).zero(offset, length)

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        return await (await self._opened()).extents(offset, length, limit)

    async def prefetch(self, offset: int, length: int) -> None:
        await (await self._opened()).prefetch(offset, length)

    def allocated_bytes(self) -> int:
        return 0

    def pending_error(self) -> Exception | None:
        return BackendError(self.name, self.reason) if self._is_refused else None

    def statistics(self) -> Statistics:
        return Statistics(self.name, {"state": self.state, "reason": self.reason})
