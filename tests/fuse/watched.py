"""cachefs with one more layer, `watched`, and a pool whose files can be made to hang. Runs instead of `python -m cachefs`.

    layers: [{watched: {log: PATH}}, {cache: {pool: NAME}}, {watched: {log: PATH, word: f, held: true}}]

`watched` appends a line "WORD OFFSET LENGTH" to *log* for each read that reaches it, before it is passed on; the lines of a
daemon that is killed are there. held: reads wait until the daemon gets SIGUSR1, and none waits after that; the statistics
say how many do. delay_s: every read takes so much longer.

SIGUSR2: reads and writes of the pools' data files that are made in threads hang, and no read of them is answered from the
page cache; until SIGUSR1.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from cachefs.layers import LAYERS
from cachefs.layers.base import Environment, Later, Layer, Options, Statistics
from cachefs.testing.wrapper import Wrapper

DEADLINE_S = 60.0  # a thread that nobody let go would keep the daemon from ending

GATE = trio.Event()
pool_answers = threading.Event()
pool_answers.set()


class WatchedConfig(Options):
    log: Path
    word: str = "r"
    held: bool = False
    delay_s: float = 0.0

    @property
    def passes_writes(self) -> bool:
        return True


class Watched(Wrapper):
    Config = WatchedConfig

    def __init__(self, config: WatchedConfig, child: Layer, owner: str) -> None:
        super().__init__(child)
        self.name = f"{owner}/watched"
        self.word = config.word
        self.held = config.held
        self.delay_s = config.delay_s
        self.waiting = 0
        self.log = os.open(config.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    @classmethod
    @asynccontextmanager
    async def open(cls, config: WatchedConfig, child: Layer, env: Environment) -> AsyncIterator[Watched]:
        loop = trio.lowlevel.current_trio_token()

        def let_go(*_: object) -> None:
            pool_answers.set()
            loop.run_sync_soon(GATE.set)

        signal.signal(signal.SIGUSR1, let_go)
        yield cls(config, child, env.owner)

    def _note(self, offset: int, length: int) -> None:
        os.write(self.log, b"%s %d %d\n" % (self.word.encode(), offset, length))

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        if self.held or self.delay_s or not self.child.try_read_into(offset, buffer):
            return False
        self._note(offset, len(buffer))
        return True

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        return False

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self._note(offset, len(buffer))
        if self.held:
            self.waiting += 1
            await GATE.wait()
            self.waiting -= 1
        if self.delay_s:
            await trio.sleep(self.delay_s)
        await self.child.read_into(offset, buffer)

    def statistics(self) -> Statistics:
        return Statistics(self.name, {"waiting": self.waiting}, self.child.statistics())


LAYERS["watched"] = Watched  # type: ignore[assignment]


def hangs_with_the_pool(call: Callable[..., Any]) -> Callable[..., Any]:
    def instead(descriptor: int, *arguments: Any) -> Any:
        if not pool_answers.is_set() and "/images/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            if threading.current_thread() is threading.main_thread():
                raise BlockingIOError(errno.EAGAIN, "not in the page cache")
            assert pool_answers.wait(DEADLINE_S)
        return call(descriptor, *arguments)

    return instead


if __name__ == "__main__":
    from cachefs.cli import main

    os.preadv, os.pwritev = hangs_with_the_pool(os.preadv), hangs_with_the_pool(os.pwritev)
    signal.signal(signal.SIGUSR2, lambda *_: pool_answers.clear())
    main()
