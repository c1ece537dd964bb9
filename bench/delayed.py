#!/usr/bin/env python3
"""cachefs with one more layer, `delayed: {seconds: S}`: a store that takes so long for each read. For bench/cache.py.

Reads overlap, as they do in nbdkit's delay filter.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cachefs.layers import LAYERS
from cachefs.layers.base import Environment, Layer, Options
from cachefs.testing.wrapper import SlowOnly


class DelayedConfig(Options):
    seconds: float


class Delayed(SlowOnly):
    Config = DelayedConfig

    def __init__(self, child: Layer, seconds: float, owner: str) -> None:
        super().__init__(child)
        self.name = f"{owner}/delayed"
        self._seconds = seconds

    @classmethod
    @asynccontextmanager
    async def open(cls, config: DelayedConfig, child: Layer, env: Environment) -> AsyncIterator[Delayed]:
        yield cls(child, config.seconds, env.owner)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await trio.sleep(self._seconds)
        await self.child.read_into(offset, buffer)


LAYERS["delayed"] = Delayed

if __name__ == "__main__":
    from cachefs.cli import main

    main()
