#!/usr/bin/env python3
"""cachefs with one more layer, `gated`: a disk whose store hangs. Runs instead of `python -m cachefs`; see bench/hung.py.

What a gated disk is asked to read or write waits from SIGUSR2 (close) until SIGUSR1 (open). It is open at first; while it is,
the layer only passes on.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from cachefs.cli import main
from cachefs.layers import LAYERS
from cachefs.layers.base import Environment, Later, Layer, Options
from cachefs.testing.wrapper import Wrapper


class GatedConfig(Options):
    @property
    def passes_writes(self) -> bool:
        return True


class Gated(Wrapper):
    """One disk of a process at most: the signals are of the one that was opened last."""

    Config = GatedConfig

    def __init__(self, child: Layer) -> None:
        super().__init__(child)
        self.opened: trio.Event | None = None  # None: nothing waits

    @classmethod
    @asynccontextmanager
    async def open(cls, config: GatedConfig, child: Layer, env: Environment) -> AsyncIterator[Gated]:
        layer = cls(child)
        loop = trio.lowlevel.current_trio_token()
        signal.signal(signal.SIGUSR1, lambda *_: loop.run_sync_soon(layer.open_gate))
        signal.signal(signal.SIGUSR2, lambda *_: loop.run_sync_soon(layer.close_gate))
        yield layer

    def open_gate(self) -> None:
        if self.opened is not None:
            self.opened.set()
            self.opened = None

    def close_gate(self) -> None:
        self.opened = self.opened or trio.Event()

    async def _wait_until_open(self) -> None:
        if self.opened is not None:
            await self.opened.wait()

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return self.opened is None and super().try_read_into(offset, buffer)

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        return self.opened is None and super().try_read_later(offset, buffer, done)

    def try_write(self, offset: int, data: memoryview) -> bool:
        return self.opened is None and super().try_write(offset, data)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self._wait_until_open()
        await super().read_into(offset, buffer)

    async def write(self, offset: int, data: memoryview) -> None:
        await self._wait_until_open()
        await super().write(offset, data)


if __name__ == "__main__":
    LAYERS["gated"] = Gated
    main()
