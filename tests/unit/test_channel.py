"""The channel between two socket pairs: one stands for /dev/fuse, the other is libfuse's."""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.backends.memory import Memory
from cachefs.disk import Disk
from cachefs.fuse.boundary import Boundary
from cachefs.fuse.channel import BATCH, Channel
from cachefs.fuse.dataplane import DATA_OPCODES, Dataplane
from cachefs.fuse.protocol import (
    IN_HEADER,
    INIT_REPLY,
    INIT_REPLY_SIZE,
    OPEN_REPLY,
    OUT_HEADER,
    READ_IN,
    WANTED,
    Init,
    Opcode,
    Open,
    compose_init_reply,
)
from cachefs.graph import edge
from cachefs.mountstate import open_state
from cachefs.survivor import Survivors

DISK, OTHER = 2, 3
FLAGS = {DISK: Open.DIRECT_IO | Open.PARALLEL_DIRECT_WRITES}


def request(opcode: int, unique: int, body: bytes = b"", node: int = DISK) -> bytes:
    return IN_HEADER.pack(IN_HEADER.size + len(body), opcode, unique, node, 0, 0, 0, 0, 0) + body


def read_request(unique: int, size: int = 512) -> bytes:
    return request(Opcode.READ, unique, READ_IN.pack(1, 0, size, 0, 0, 0, 0))


class Rig:
    def __init__(self, nursery: trio.Nursery) -> None:
        kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        device.setblocking(False)
        device.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        disk = Disk("vm1", edge(Memory("vm1/memory", 4096)), DISK, writable=True, mode=0o600, uid=0, gid=0)
        self.dataplane = Dataplane(device.fileno(), [disk], nursery, Boundary())
        self.channel = Channel(device.detach(), self.dataplane, dict(FLAGS), 0.0, open_state(Survivors()))
        path = self.channel.hand_over()
        assert re.fullmatch(r"/dev/fd/\d+", path)
        self.kernel = trio.socket.from_stdlib_socket(kernel)
        self.libfuse = trio.socket.from_stdlib_socket(socket.socket(fileno=int(path.rpartition("/")[2])))
        nursery.start_soon(self.channel.serve_requests)
        nursery.start_soon(self.channel.serve_replies)

    async def send(self, message: bytes) -> None:
        await self.kernel.send(message)

    async def hear(self) -> bytes:
        with trio.fail_after(5):
            return await self.kernel.recv(1 << 21)

    async def libfuse_hears(self) -> bytes:
        with trio.fail_after(5):
            return await self.libfuse.recv(1 << 21)


@asynccontextmanager
async def rig() -> AsyncIterator[Rig]:
    made: Rig | None = None
    async with trio.open_nursery() as nursery:
        made = Rig(nursery)
        with made.kernel, made.libfuse:
            yield made
            nursery.cancel_scope.cancel()
    made.channel.close()


async def test_data_goes_to_the_data_plane_and_the_rest_to_libfuse_unchanged() -> None:
    async with rig() as wires:
        await wires.send(read_request(7))
        assert await wires.hear() == OUT_HEADER.pack(16 + 512, 0, 7) + bytes(512)
        lookup = request(Opcode.LOOKUP, 9, b"vm1\0", 1)
        await wires.send(lookup)
        assert await wires.libfuse_hears() == lookup
        reply = OUT_HEADER.pack(16, -2, 9)
        await wires.libfuse.send(reply)
        assert await wires.hear() == reply
        assert wires.dataplane.statistics() == {"LOOKUP": 1, "READ": 1}


async def test_more_than_a_batch_is_served() -> None:
    async with rig() as wires, trio.open_nursery() as nursery:

        async def send_all() -> None:
            for unique in range(3 * BATCH):
                await wires.send(read_request(unique, 1))

        nursery.start_soon(send_all)
        for unique in range(3 * BATCH):
            assert OUT_HEADER.unpack_from(await wires.hear())[2] == unique


async def test_requests_wait_for_a_libfuse_that_does_not_read() -> None:
    async with rig() as wires:
        big = bytes(60_000)
        for unique in range(200):  # 12 MB, more than the socket takes
            await wires.send(request(Opcode.SETXATTR, unique, big))
        await wires.send(read_request(999))
        assert OUT_HEADER.unpack_from(await wires.hear())[2] == 999  # data does not wait behind them
        for unique in range(200):
            assert IN_HEADER.unpack_from(await wires.libfuse_hears())[2] == unique
            await wires.libfuse.send(OUT_HEADER.pack(16, 0, unique))  # a reply gives the next one its turn
            assert OUT_HEADER.unpack(await wires.hear())[2] == unique


async def test_the_reply_to_init_is_composed() -> None:
    async with rig() as wires:
        offered = WANTED | Init.WRITEBACK_CACHE | Init.AUTO_INVAL_DATA
        body = b"".join(
            value.to_bytes(4, "little") for value in (7, 45, 131072, offered & 0xFFFFFFFF, offered >> 32)
        ).ljust(64, b"\0")
        await wires.send(request(Opcode.INIT, 1, body, 0))
        assert await wires.libfuse_hears() == request(Opcode.INIT, 1, body, 0)
        answer = INIT_REPLY.pack(INIT_REPLY_SIZE, 0, 1, 7, 40, 131072, 0xFFFFFFFF, 12, 9, 4096, 1, 0, 0, 0, 0)
        answer = answer.ljust(INIT_REPLY_SIZE, b"\0")
        await wires.libfuse.send(answer)
        heard = await wires.hear()
        assert heard == compose_init_reply(answer, offered)
        assert heard != answer
        # only that one: what has the same bytes later is somebody else's
        await wires.libfuse.send(answer)
        assert await wires.hear() == answer


async def test_the_reply_to_the_open_of_a_disk_says_how_it_is_cached() -> None:
    async with rig() as wires:
        for node, expected in ((DISK, FLAGS[DISK]), (OTHER, 0)):
            await wires.send(request(Opcode.OPEN, node * 10, bytes(8), node))
            await wires.libfuse_hears()
            await wires.libfuse.send(OPEN_REPLY.pack(OPEN_REPLY.size, 0, node * 10, 55, 0, 0))
            assert OPEN_REPLY.unpack(await wires.hear()) == (OPEN_REPLY.size, 0, node * 10, 55, expected, 0)


async def test_an_open_that_is_refused_stays_refused() -> None:
    async with rig() as wires:
        await wires.send(request(Opcode.OPEN, 10, bytes(8)))
        await wires.libfuse_hears()
        await wires.libfuse.send(OUT_HEADER.pack(16, -30, 10))
        assert await wires.hear() == OUT_HEADER.pack(16, -30, 10)


async def test_a_notification_passes_through() -> None:
    async with rig() as wires:
        notification = OUT_HEADER.pack(16 + 8, 2, 0) + bytes(8)
        await wires.libfuse.send(notification)
        assert await wires.hear() == notification


async def test_closing_leaves_libfuses_descriptor_to_libfuse() -> None:
    async with rig() as wires:
        pass
    # `with` closed it as libfuse would; had the channel closed it too, that would have raised EBADF, or hit another file
    assert wires.libfuse.fileno() == -1


@pytest.mark.slow
@pytest.mark.logs("malformed", "shorter than any header")
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=39),
            st.binary(min_size=40, max_size=200),
            st.builds(
                lambda opcode, node, body: request(opcode, 5, body, node),
                st.sampled_from([*sorted(DATA_OPCODES), *map(int, Opcode), 0, 63, 64, 4096, 0xFFFFFFFF]),
                st.sampled_from([DISK, OTHER, 0, (1 << 64) - 1]),
                st.binary(max_size=80),
            ),
        ),
        max_size=8,
    )
)
async def test_no_request_stops_the_loop(messages: list[bytes]) -> None:
    async with rig() as wires:
        for message in messages:
            await wires.send(message)
        await wires.send(read_request(0xABCDEF))
        while OUT_HEADER.unpack_from(await wires.hear())[2] != 0xABCDEF:
            pass


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=120), min_size=1, max_size=8))
async def test_no_reply_of_libfuse_stops_the_loop(messages: list[bytes]) -> None:
    async with rig() as wires:
        await wires.send(request(Opcode.OPEN, 10, bytes(8)))
        await wires.libfuse_hears()
        for message in messages:
            await wires.libfuse.send(message)
            assert await wires.hear() == message
