"""A network whose other end is a script: what the nbd backend says arrives at a test, which answers as it likes."""

from __future__ import annotations

import errno
import socket
import struct
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from cachefs.backends.nbd import Nbd
from cachefs.backends.nbdoptions import NbdConfig
from cachefs.layers.base import Environment
from cachefs.nbd.handshake import Export, Flag
from cachefs.nbd.transport import Plain, Transport
from cachefs.store.identity import SAMPLES
from cachefs.survivor import Survivors

SIZE = 1 << 20
FLAGS = Flag.HAS_FLAGS | Flag.SEND_FLUSH | Flag.SEND_WRITE_ZEROES
EXPORT = Export(SIZE, FLAGS, True, 7, 1, 4096, 32 << 20)
READ, WRITE, DISCONNECT, FLUSH, WRITE_ZEROES, BLOCK_STATUS = 0, 1, 2, 3, 6, 7


@dataclass(frozen=True)
class Heard:
    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    data: bytes


class Server:
    """One connection, as its server sees it."""

    def __init__(self, connected: socket.socket) -> None:
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(connected))

    async def _exactly(self, count: int) -> bytes:
        got = b""
        while len(got) < count:
            more = await self.stream.receive_some(count - len(got))
            assert more, "the client closed the connection"
            got += more
        return got

    async def hear(self, limit_s: float = 20) -> Heard:
        with trio.fail_after(limit_s):
            magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", await self._exactly(28))
            assert magic == 0x25609513
            data = await self._exactly(length) if command == WRITE else b""
        return Heard(command, flags, cookie, offset, length, data)

    async def say(self, said: bytes) -> None:
        await self.stream.send_all(said)

    async def answer(self, heard: Heard, data: bytes = b"", error: int = 0) -> None:
        await self.say(answer(heard, data, error))

    def close(self) -> None:
        self.stream.socket.close()


def answer(heard: Heard, data: bytes = b"", error: int = 0) -> bytes:
    if error:
        return struct.pack(">IHHQIIH", 0x668E33EF, 1, 0x8001, heard.cookie, 6, error, 0)
    if heard.command != READ:
        return struct.pack(">IHHQI", 0x668E33EF, 1, 0, heard.cookie, 0)
    assert len(data) == heard.length
    return struct.pack(">IHHQIQ", 0x668E33EF, 1, 1, heard.cookie, 8 + len(data), heard.offset) + data


class Network:
    """Where the client's connections arrive. trouble: what dialling raises."""

    def __init__(self) -> None:
        self.trouble: Exception | None = None
        self.export = EXPORT
        self.all: list[Server] = []
        self._send, self._receive = trio.open_memory_channel[Server](100)

    async def dial(self) -> tuple[Transport, Export]:
        await trio.lowlevel.checkpoint()
        if self.trouble is not None:
            raise self.trouble
        ours, theirs = socket.socketpair()
        self.all.append(Server(theirs))
        self._send.send_nowait(self.all[-1])
        return Plain(ours), self.export

    async def accept(self, limit_s: float = 20) -> Server:
        with trio.fail_after(limit_s):
            return await self._receive.receive()

    def close(self) -> None:
        self.trouble = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        for server in self.all:
            server.close()


@asynccontextmanager
async def opened(
    network: Network,
    *,
    writable: bool = True,
    forced_stop: trio.Event | None = None,
    survivors: Survivors | None = None,
    state_dir: Path | None = None,
    **options: Any,
) -> AsyncIterator[tuple[Nbd, Server]]:
    """The backend and the server of its first connection, the sample of a read-only one already taken.

    survivors: what a daemon before has left, of the same options and state_dir. command, among the options: started in place
    of a server, which the network plays all the same.
    """
    uri = {} if "command" in options else {"uri": "nbd://store/disk"}
    config = NbdConfig.model_validate({**uri, **options})
    forced_stop = trio.Event() if forced_stop is None else forced_stop
    survivors = Survivors() if survivors is None else survivors
    server: Server | None = None
    is_accepted = trio.Event()

    async def serve_sample() -> None:
        nonlocal server
        server = await network.accept(limit_s=float("inf"))  # a clock that jumps does not wait for threads
        is_accepted.set()
        for _ in range(0 if writable else SAMPLES):
            heard = await server.hear()
            await server.answer(heard, bytes(heard.length))

    with tempfile.TemporaryDirectory() as folder:
        env = Environment(
            "disk", state_dir or Path(folder), writable=writable, forced_stop=forced_stop, survivors=survivors
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_sample)
            async with Nbd.open(config, env, network.dial) as disk:
                await is_accepted.wait()
                assert server is not None
                try:
                    yield disk, server
                finally:
                    network.close()
                    forced_stop.set()  # what the test has left unflushed is not waited for


class Reading:
    """A read under way: `async with Reading(disk, offset, length) as reading`, which waits for its end."""

    def __init__(self, disk: Nbd, offset: int, length: int) -> None:
        self.buffer = bytearray(b"?" * length)
        self.scope = trio.CancelScope()
        self.is_done = False
        self._disk, self._offset = disk, offset

    async def run(self) -> None:
        with self.scope:
            await self._disk.read_into(self._offset, memoryview(self.buffer))
            self.is_done = True


class Changing:
    """A change under way, and what it raised."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.raised: Exception | None = None
        self.is_done = False

    async def run(self, operation: Any, *arguments: Any) -> None:
        with self.scope:
            try:
                await operation(*arguments)
            except Exception as exc:
                self.raised = exc
            self.is_done = True


async def done(server: Server, operation: Any, *arguments: Any) -> Heard:
    """*operation*, answered at once."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(operation, *arguments)
        heard = await server.hear()
        await server.answer(heard)
    return heard
