"""cachefs with one more layer, `faulty`, that does on demand what no layer should. Runs instead of `python -m cachefs`.

    layers:
      - faulty: {rules: ["OPERATION OFFSET WHAT", "OPERATION OFFSET WHAT once", ...]}

OPERATION: try_read, try_write, try_flush, try_extent, read, write, flush, trim, zero, extents, pending_error, allocated_bytes,
statistics, open or close. OFFSET: the number of the request's first byte, or * for any. WHAT: RuntimeError,
CachefsError (EIO), ENOSPC and ENOSYS (CachefsErrors of that errno), OSError (errno ENOSYS), ExceptionGroup; or hang: the
request waits until the daemon gets SIGUSR1, after which none waits any more until SIGUSR2. A rule with `once` counts for
one request.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from cachefs.errors import CachefsError
from cachefs.extent import Extent
from cachefs.layers import LAYERS
from cachefs.layers.base import Done, Environment, Later, Layer, Options, Statistics

ERRORS = {
    "RuntimeError": lambda: RuntimeError("on demand"),
    "OSError": lambda: OSError(errno.ENOSYS, "on demand"),
    "ExceptionGroup": lambda: ExceptionGroup("on demand", [RuntimeError("inside")]),
    "CachefsError": lambda: CachefsError("faulty", "on demand"),
    "ENOSPC": lambda: CachefsError("faulty", "on demand", errno.ENOSPC),
    "ENOSYS": lambda: CachefsError("faulty", "on demand", errno.ENOSYS),
}
GATE = trio.Event()  # what hangs, of all disks, waits for it


def close_gate() -> None:
    """What comes from now on hangs, until the next SIGUSR1."""
    global GATE
    GATE = trio.Event()


class FaultyConfig(Options):
    rules: list[str]

    @property
    def passes_writes(self) -> bool:
        return True


class Faulty:
    Config = FaultyConfig

    def __init__(self, config: FaultyConfig, child: Layer, owner: str) -> None:
        self.name = f"{owner}/faulty"
        self.child = child
        self.geometry = child.geometry
        self.caps = child.caps
        self.identity = child.identity
        self.rules = [rule.split() for rule in config.rules]
        self.hanging = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, config: FaultyConfig, child: Layer, env: Environment) -> AsyncIterator[Faulty]:
        layer = cls(config, child, env.owner)
        loop = trio.lowlevel.current_trio_token()
        before = signal.signal(signal.SIGUSR1, lambda *_: loop.run_sync_soon(lambda: GATE.set()))
        before2 = signal.signal(signal.SIGUSR2, lambda *_: loop.run_sync_soon(close_gate))
        await layer.meet("open")
        yield layer
        signal.signal(signal.SIGUSR1, before)
        signal.signal(signal.SIGUSR2, before2)
        await layer.meet("close")

    def _find(self, operation: str, offset: int) -> str | None:
        for rule in self.rules:
            if rule[0] == operation and rule[1] in ("*", str(offset)):
                if rule[3:] == ["once"]:
                    self.rules.remove(rule)
                return rule[2]
        return None

    def meet_now(self, operation: str, offset: int = 0) -> None:
        what = self._find(operation, offset)
        if what is not None:
            raise ERRORS[what]()

    async def meet(self, operation: str, offset: int = 0) -> None:
        what = self._find(operation, offset)
        if what == "hang":
            self.hanging += 1
            try:
                await GATE.wait()
            finally:
                self.hanging -= 1
        elif what is not None:
            raise ERRORS[what]()

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        self.meet_now("try_read", offset)
        if any(rule[0] == "read" for rule in self.rules):
            return False
        return self.child.try_read_into(offset, buffer)

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        if any(rule[0] == "read" for rule in self.rules):
            return False
        return self.child.try_read_later(offset, buffer, done)

    def try_write(self, offset: int, data: memoryview) -> bool:
        self.meet_now("try_write", offset)
        if any(rule[0] == "write" for rule in self.rules):
            return False
        return self.child.try_write(offset, data)

    def try_flush(self, done: Done) -> bool:
        self.meet_now("try_flush")
        if any(rule[0] == "flush" for rule in self.rules):
            return False
        return self.child.try_flush(done)

    def try_extent(self, offset: int, length: int) -> Extent | None:
        self.meet_now("try_extent", offset)
        if any(rule[0] == "extents" for rule in self.rules):
            return None
        return self.child.try_extent(offset, length)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self.meet("read", offset)
        await self.child.read_into(offset, buffer)

    async def write(self, offset: int, data: memoryview) -> None:
        await self.meet("write", offset)
        await self.child.write(offset, data)

    async def flush(self) -> None:
        await self.meet("flush")
        await self.child.flush()

    async def trim(self, offset: int, length: int) -> None:
        await self.meet("trim", offset)
        await self.child.trim(offset, length)

    async def zero(self, offset: int, length: int) -> None:
        await self.meet("zero", offset)
        await self.child.zero(offset, length)

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        await self.meet("extents", offset)
        return await self.child.extents(offset, length, limit)

    async def prefetch(self, offset: int, length: int) -> None:
        await self.child.prefetch(offset, length)

    def allocated_bytes(self) -> int:
        self.meet_now("allocated_bytes")
        return self.child.allocated_bytes()

    def pending_error(self) -> Exception | None:
        self.meet_now("pending_error")
        return self.child.pending_error()

    def statistics(self) -> Statistics:
        self.meet_now("statistics")
        return Statistics(self.name, {"hanging": self.hanging}, self.child.statistics())


LAYERS["faulty"] = Faulty  # type: ignore[assignment]

if __name__ == "__main__":
    from cachefs.cli import main

    main()
