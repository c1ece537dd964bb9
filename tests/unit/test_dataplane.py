"""Requests of bytes, without a kernel: a socket pair stands for /dev/fuse."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.backends.memory import Memory
from cachefs.disk import Disk
from cachefs.errors import CachefsError, NoSpaceError
from cachefs.extent import Extent, ExtentKind
from cachefs.fuse import clients
from cachefs.fuse import dataplane as module
from cachefs.fuse.boundary import Boundary
from cachefs.fuse.buffers import REQUEST_AT, Buffer
from cachefs.fuse.dataplane import DATA_OPCODES, Dataplane
from cachefs.fuse.protocol import (
    FALLOCATE_IN,
    IN_HEADER,
    LSEEK_IN,
    MAX_WRITE,
    OUT_HEADER,
    READ_IN,
    WRITE_IN,
    Opcode,
)
from cachefs.graph import edge
from cachefs.layers.base import Done, Later
from cachefs.limits import BUFFERS_PER_DISK

SIZE = 100_000
VM, READ_ONLY, NOBODY = 2, 3, 99  # inodes
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE = 1, 2, 8, 16


class Scripted(Memory):
    """A memory disk that notes flushes, and raises `error` from the operations in `fails`."""

    def __init__(self) -> None:
        super().__init__("vm1/memory", SIZE)
        self.fails: set[str] = set()
        self.error: Exception = RuntimeError("on demand")
        self.pending: Exception | None = None
        self.fast = True
        self.takes_later = False
        self.later: list[tuple[int, memoryview, Later]] = []
        self.hangs: trio.Event | None = None
        self.flushes = 0

    def _meet(self, operation: str) -> None:
        if operation in self.fails:
            raise self.error

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        self._meet("try_read")
        return self.fast and super().try_read_into(offset, buffer)

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        self._meet("try_later")
        if self.takes_later:
            self.later.append((offset, buffer, done))
        return self.takes_later

    def try_write(self, offset: int, data: memoryview) -> bool:
        self._meet("try_write")
        return self.fast and super().try_write(offset, data)

    def try_flush(self, done: Done) -> bool:
        self._meet("try_flush")
        return False

    def try_extent(self, offset: int, length: int) -> Extent | None:
        self._meet("try_extent")
        return super().try_extent(offset, length) if self.fast else None

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self._meet("read")
        if self.hangs is not None:
            await self.hangs.wait()
        super().try_read_into(offset, buffer)

    async def write(self, offset: int, data: memoryview) -> None:
        self._meet("write")
        super().try_write(offset, data)

    async def flush(self) -> None:
        self._meet("flush")
        self.flushes += 1

    async def trim(self, offset: int, length: int) -> None:
        self._meet("trim")
        await super().trim(offset, length)

    def pending_error(self) -> Exception | None:
        self._meet("pending_error")
        return self.pending

    def content(self) -> bytes:
        buffer = bytearray(SIZE)
        super().try_read_into(0, memoryview(buffer))
        return bytes(buffer)


class Rig:
    """A data plane of two disks over one layer; inode VM may be written."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.layer = Scripted()
        self.kernel, self.device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.kernel, self.device):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.boundary = Boundary()
        disks = [
            Disk(name, edge(self.layer), inode, writable=inode == VM, mode=0o600, uid=0, gid=0)
            for name, inode in (("vm1", VM), ("golden", READ_ONLY))
        ]
        self.dataplane = Dataplane(self.device.fileno(), disks, nursery, self.boundary)
        self.unique = 0

    def send(self, opcode: int, body: bytes = b"", node: int = VM, cut: int | None = None) -> bool:
        """What `handle` says of the request, of which only the first *cut* bytes arrive."""
        self.unique += 2
        request = IN_HEADER.pack(IN_HEADER.size + len(body), opcode, self.unique, node, 0, 0, 0, 0, 0) + body
        request = request[:cut]
        buffer = Buffer()
        buffer.view[REQUEST_AT : REQUEST_AT + len(request)] = request
        return self.dataplane.handle(buffer, len(request), opcode, self.unique, node)

    async def answer(self) -> tuple[int, bytes]:
        """(errno, body) of the reply to the last request."""
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(self.kernel)
        reply = self.kernel.recv(2 << 20)
        length, error, unique = OUT_HEADER.unpack_from(reply)
        assert (length, unique) == (len(reply), self.unique)
        return -error, reply[OUT_HEADER.size :]

    async def ask(self, opcode: int, body: bytes = b"", node: int = VM, cut: int | None = None) -> tuple[int, bytes]:
        self.send(opcode, body, node, cut)
        return await self.answer()

    async def read(self, offset: int, size: int) -> tuple[int, bytes]:
        return await self.ask(Opcode.READ, READ_IN.pack(1, offset, size, 0, 0, 0, 0))

    async def write(self, offset: int, data: bytes, flags: int = 0, node: int = VM) -> tuple[int, int | None]:
        body = WRITE_IN.pack(1, offset, len(data), 0, 0, flags, 0) + data
        code, answer = await self.ask(Opcode.WRITE, body, node)
        return code, int.from_bytes(answer[:4], "little") if answer else None

    def nothing_to_hear(self) -> bool:
        try:
            self.kernel.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False


@asynccontextmanager
async def rig() -> AsyncIterator[Rig]:
    async with trio.open_nursery() as nursery:
        made = Rig(nursery)
        with made.kernel, made.device:
            yield made
            with trio.fail_after(5):
                while made.dataplane.waiting.table:
                    await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()


both_paths = pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])


@both_paths
async def test_read_and_write(fast: bool) -> None:
    async with rig() as plane:
        plane.layer.fast = fast
        assert await plane.write(1000, b"hello") == (0, 5)
        assert await plane.read(999, 7) == (0, b"\0hello\0")
        assert plane.layer.content()[1000:1005] == b"hello"


async def test_a_hit_leaves_the_buffer_and_a_miss_takes_it() -> None:
    async with rig() as plane:
        request = READ_IN.pack(1, 0, 512, 0, 0, 0, 0)
        assert plane.send(Opcode.READ, request)
        await plane.answer()
        plane.layer.fast = False
        assert not plane.send(Opcode.READ, request)
        assert (await plane.answer())[1] == bytes(512)


def begin_reads(plane: Rig, count: int) -> None:
    """READs of 512 bytes at 0, 512, ... that the layer begins without a task, as far as they are let in."""
    plane.layer.fast, plane.layer.takes_later = False, True
    for number in range(count):
        plane.send(Opcode.READ, READ_IN.pack(1, number * 512, 512, 0, 0, 0, 0))


async def test_a_read_without_a_task_is_answered_when_the_layer_has_filled_its_buffer() -> None:
    async with rig() as plane:
        begin_reads(plane, 1)
        assert plane.nothing_to_hear()
        offset, buffer, done = plane.layer.later.pop()
        assert (offset, len(buffer)) == (0, 512)
        buffer[:] = b"x" * 512
        done(None)
        assert await plane.answer() == (0, b"x" * 512)
        assert plane.dataplane._disks[VM].top.statistics().values["later_reads"] == 1
        assert plane.dataplane.waiting.statistics()["waiting_requests"] == 0


async def test_a_read_that_could_not_be_done_without_a_task_gets_one() -> None:
    async with rig() as plane:
        await plane.write(0, b"hello")
        begin_reads(plane, 1)
        plane.layer.later.pop()[2](trio.current_time() + 10)
        assert (await plane.answer())[1][:6] == b"hello\0"


@pytest.mark.logs("it was not answered in time")
async def test_the_task_of_a_read_that_began_without_one_has_until_its_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig() as plane:
        plane.layer.hangs = trio.Event()
        begin_reads(plane, 1)
        began = trio.current_time()
        plane.layer.later.pop()[2](began + 10)
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(9.9)
        assert plane.nothing_to_hear()
        await trio.sleep(0.2)
        assert await plane.answer() == (errno.EIO, b"")


async def test_reads_without_a_task_count_as_those_with_one() -> None:
    async with rig() as plane:
        begin_reads(plane, BUFFERS_PER_DISK + 2)
        assert len(plane.layer.later) == BUFFERS_PER_DISK
        plane.layer.later[0][2](None)
        assert len(plane.layer.later) == BUFFERS_PER_DISK + 1
        plane.layer.takes_later = False
        plane.layer.later[1][2](None)  # the last one that is queued gets a task
        await trio.testing.wait_all_tasks_blocked()
        for _, _, done in plane.layer.later[2:]:
            done(None)
        statistics = plane.dataplane.waiting.statistics()
        assert statistics["waiting_requests"] == statistics["queued_bytes"] == 0


async def test_the_buffer_of_a_read_whose_client_is_gone_is_the_layers_until_it_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clients, "resolve", lambda pid: "client")
    monkeypatch.setattr(clients, "is_dead", lambda client: True)
    async with rig() as plane:
        waiting, free = plane.dataplane.waiting, plane.dataplane.pool._free
        plane.layer.hangs = trio.Event()
        begin_reads(plane, 2)
        waiting._look()
        assert [-OUT_HEADER.unpack(plane.kernel.recv(100))[1] for _ in range(2)] == [errno.EINTR] * 2
        assert not free
        plane.layer.later[0][2](None)
        plane.layer.later[1][2](trio.current_time() + 10)  # nobody wants it: no task
        await trio.testing.wait_all_tasks_blocked()
        assert len(free) == 2
        assert plane.nothing_to_hear()
        assert waiting.statistics()["waiting_requests"] == 0


async def test_stop_answers_whoever_waits_and_begins_nothing() -> None:
    async with rig() as plane:
        begin_reads(plane, BUFFERS_PER_DISK + 1)
        plane.dataplane.waiting.stop()
        codes = [-OUT_HEADER.unpack(plane.kernel.recv(100))[1] for _ in range(BUFFERS_PER_DISK + 1)]
        assert set(codes) == {errno.EIO}
        for index, (_, _, done) in enumerate(plane.layer.later.copy()):
            done(None if index % 2 else trio.current_time() + 10)
        await trio.testing.wait_all_tasks_blocked()
        assert plane.nothing_to_hear()
        assert len(plane.layer.later) == BUFFERS_PER_DISK


async def test_drain_waits_for_reads_without_a_task() -> None:
    async with rig() as plane, trio.open_nursery() as nursery:
        begin_reads(plane, 2)
        drained = trio.Event()

        async def drain() -> None:
            await plane.dataplane.waiting.drain()
            drained.set()

        nursery.start_soon(drain)
        for _, _, done in plane.layer.later.copy():
            await trio.testing.wait_all_tasks_blocked()
            assert not drained.is_set()
            done(None)
        await drained.wait()


@pytest.mark.logs("failed on a bug in cachefs")
async def test_a_bug_in_the_way_without_a_task_leaves_the_way_with_one() -> None:
    async with rig() as plane:
        plane.layer.fast = False
        plane.layer.fails = {"try_later"}
        assert await plane.read(0, 512) == (0, bytes(512))
        assert plane.boundary.internal_errors == 1


@both_paths
async def test_the_end_of_the_disk(fast: bool) -> None:
    async with rig() as plane:
        plane.layer.fast = fast
        assert await plane.read(SIZE - 10, 4096) == (0, bytes(10))
        assert await plane.read(SIZE, 4096) == (0, b"")
        assert await plane.read(1 << 63, 4096) == (0, b"")
        assert await plane.write(SIZE - 3, b"hello") == (0, 3)
        assert await plane.write(SIZE, b"hello") == (errno.EFBIG, None)
        assert await plane.write((1 << 64) - 1, b"hello") == (errno.EFBIG, None)
        assert plane.layer.content() == bytes(SIZE - 3) + b"hel"


async def test_the_longest_request() -> None:
    async with rig() as plane:
        code, data = await plane.read(0, MAX_WRITE)
        assert (code, len(data)) == (0, SIZE)
        assert await plane.write(0, b"x" * MAX_WRITE) == (0, SIZE)


async def test_a_read_only_disk_refuses_changes() -> None:
    async with rig() as plane:
        assert await plane.write(0, b"x", node=READ_ONLY) == (errno.EROFS, None)
        punch = FALLOCATE_IN.pack(1, 0, 4096, PUNCH_HOLE | KEEP_SIZE, 0)
        assert await plane.ask(Opcode.FALLOCATE, punch, READ_ONLY) == (errno.EROFS, b"")
        assert (await plane.ask(Opcode.FSYNC, bytes(16), READ_ONLY))[0] == 0


@pytest.mark.logs("bug in cachefs")
@pytest.mark.parametrize("flag", [os.O_DSYNC, os.O_SYNC, os.O_SYNC | os.O_RDWR])
async def test_a_synchronous_write_is_flushed_before_its_reply(flag: int) -> None:
    async with rig() as plane:
        assert await plane.write(0, b"x", os.O_RDWR) == (0, 1)
        assert plane.layer.flushes == 0
        assert await plane.write(0, b"x", flag) == (0, 1)
        assert plane.layer.flushes == 1
        plane.layer.fails = {"flush"}
        assert await plane.write(0, b"x", flag) == (errno.EIO, None)


async def test_mtime_moves_with_a_write_and_not_with_a_read() -> None:
    async with rig() as plane:
        disk = plane.dataplane._disks[VM]
        plane.dataplane.now_ns = 77
        before = disk.mtime_ns
        await plane.read(0, 1)
        assert disk.mtime_ns == before
        await plane.write(0, b"x")
        assert disk.mtime_ns == 77


async def test_flush_reports_a_pending_error_and_flushes_nothing() -> None:
    async with rig() as plane:
        assert (await plane.ask(Opcode.FLUSH, bytes(24)))[0] == 0
        plane.layer.pending = NoSpaceError("vm1", "full")
        assert (await plane.ask(Opcode.FLUSH, bytes(24)))[0] == errno.ENOSPC
        plane.layer.pending = RuntimeError()
        assert (await plane.ask(Opcode.FLUSH, bytes(24)))[0] == errno.EIO
        assert plane.layer.flushes == 0


@pytest.mark.parametrize(
    ("mode", "offset", "length", "answer"),
    [
        (0, 0, SIZE, 0),
        (KEEP_SIZE, 0, SIZE, 0),
        (0, 0, SIZE + 1, errno.EFBIG),
        (KEEP_SIZE, SIZE, 1, errno.EOPNOTSUPP),
        (PUNCH_HOLE | KEEP_SIZE, 0, 1 << 62, 0),
        (PUNCH_HOLE | KEEP_SIZE, SIZE + 5, 10, 0),
        (ZERO_RANGE, 0, SIZE, 0),
        (ZERO_RANGE, 0, SIZE + 1, errno.EFBIG),
        (ZERO_RANGE | KEEP_SIZE, 10, SIZE, 0),
        (PUNCH_HOLE, 0, 4096, errno.EOPNOTSUPP),
        (COLLAPSE, 0, 4096, errno.EOPNOTSUPP),
        (0x20, 0, 4096, errno.EOPNOTSUPP),
        (0x40 | KEEP_SIZE, 0, 4096, errno.EOPNOTSUPP),
        (0xFFFFFFFF, 0, 4096, errno.EOPNOTSUPP),
    ],
)
async def test_fallocate(mode: int, offset: int, length: int, answer: int) -> None:
    async with rig() as plane:
        await plane.write(0, b"x" * SIZE)
        body = FALLOCATE_IN.pack(1, offset, length, mode, 0)
        assert await plane.ask(Opcode.FALLOCATE, body) == (answer, b"")
        zeroed = range(offset, min(SIZE, offset + length)) if not answer and mode not in (0, KEEP_SIZE) else range(0)
        expected = bytearray(b"x" * SIZE)
        expected[zeroed.start : zeroed.stop] = bytes(len(zeroed))
        assert plane.layer.content() == bytes(expected)


async def test_lseek() -> None:
    async def seek(offset: int, whence: int) -> tuple[int, int | None]:
        code, body = await plane.ask(Opcode.LSEEK, LSEEK_IN.pack(1, offset, whence, 0))
        return code, int.from_bytes(body, "little") if body else None

    async with rig() as plane:
        await plane.write(65536, b"x")
        assert await seek(0, os.SEEK_DATA) == (0, 65536)
        assert await seek(5, os.SEEK_HOLE) == (0, 5)
        assert await seek(70000, os.SEEK_DATA) == (0, 70000)
        assert await seek(70000, os.SEEK_HOLE) == (0, SIZE)
        assert await seek(SIZE, os.SEEK_DATA) == (errno.ENXIO, None)
        assert await seek((1 << 64) - 1, os.SEEK_HOLE) == (errno.ENXIO, None)
        assert await seek(0, os.SEEK_END) == (errno.EINVAL, None)
        punch = FALLOCATE_IN.pack(1, 0, SIZE, PUNCH_HOLE | KEEP_SIZE, 0)
        await plane.ask(Opcode.FALLOCATE, punch)
        chunk = plane.layer._chunks
        chunk.clear()
        assert await seek(0, os.SEEK_DATA) == (errno.ENXIO, None)


async def test_an_lseek_that_waits_too_long_says_data(autojump_clock: trio.testing.MockClock) -> None:
    async def extents(*_: object) -> list[object]:
        await trio.sleep_forever()
        raise AssertionError

    async with rig() as plane:
        plane.layer.fast = False
        plane.layer.extents = extents  # type: ignore[assignment,method-assign]
        for whence, answer in ((os.SEEK_DATA, 7), (os.SEEK_HOLE, SIZE)):
            before = trio.current_time()
            plane.send(Opcode.LSEEK, LSEEK_IN.pack(1, 7, whence, 0))
            await trio.sleep(module.LSEEK_PATIENCE_S - 0.1)
            assert plane.nothing_to_hear()
            await trio.sleep(0.2)
            assert await plane.answer() == (0, answer.to_bytes(8, "little"))
            assert trio.current_time() - before < module.LSEEK_PATIENCE_S + 0.2


# ---- errors


@pytest.mark.logs("bug in cachefs")
@pytest.mark.parametrize(
    "error", [RuntimeError("bug"), OSError(errno.ENOSYS, "bug"), KeyError(1), ExceptionGroup("", [OSError()])]
)
@pytest.mark.parametrize(
    ("operation", "request_"),
    [
        ("try_read", (Opcode.READ, READ_IN.pack(1, 0, 1, 0, 0, 0, 0))),
        ("read", (Opcode.READ, READ_IN.pack(1, 0, 1, 0, 0, 0, 0))),
        ("try_write", (Opcode.WRITE, WRITE_IN.pack(1, 0, 1, 0, 0, 0, 0) + b"x")),
        ("write", (Opcode.WRITE, WRITE_IN.pack(1, 0, 1, 0, 0, 0, 0) + b"x")),
        ("try_flush", (Opcode.FSYNC, bytes(16))),
        ("flush", (Opcode.FSYNC, bytes(16))),
        ("pending_error", (Opcode.FLUSH, bytes(24))),
        ("trim", (Opcode.FALLOCATE, FALLOCATE_IN.pack(1, 0, 10, PUNCH_HOLE | KEEP_SIZE, 0))),
    ],
)
async def test_a_bug_costs_one_request(operation: str, request_: tuple[int, bytes], error: Exception) -> None:
    async with rig() as plane:
        plane.layer.fast = operation.startswith("try")
        plane.layer.fails, plane.layer.error = {operation}, error
        assert await plane.ask(*request_) == (errno.EIO, b"")
        assert plane.boundary.internal_errors == 1
        plane.layer.fails.clear()
        assert (await plane.ask(*request_))[0] == 0
        assert plane.boundary.internal_errors == 1
        assert plane.nothing_to_hear()


@pytest.mark.logs("failed: vm1: full", "failed: vm1: no")
async def test_errors_of_layers_keep_their_errno_except_enosys() -> None:
    async with rig() as plane:
        plane.layer.fails = {"try_write", "flush"}
        plane.layer.error = NoSpaceError("vm1", "full")
        assert await plane.write(0, b"x") == (errno.ENOSPC, None)
        plane.layer.error = CachefsError("vm1", "no", errno.ENOSYS)
        assert (await plane.ask(Opcode.FSYNC, bytes(16)))[0] == errno.EIO
        assert (plane.boundary.request_errors, plane.boundary.internal_errors) == (2, 0)


async def test_a_file_that_is_no_disk() -> None:
    async with rig() as plane:
        for opcode in DATA_OPCODES - {Opcode.INTERRUPT}:
            assert await plane.ask(opcode, bytes(80), NOBODY) == (errno.EBADF, b"")
        for node in (VM, NOBODY):
            assert plane.send(Opcode.INTERRUPT, bytes(8), node)
        assert plane.nothing_to_hear()


# ---- malformed


@pytest.mark.logs("malformed")
@pytest.mark.parametrize(
    ("opcode", "body"),
    [
        (Opcode.READ, READ_IN.pack(1, 0, 512, 0, 0, 0, 0)),
        (Opcode.WRITE, WRITE_IN.pack(1, 0, 8, 0, 0, 0, 0) + b"12345678"),
        (Opcode.FALLOCATE, FALLOCATE_IN.pack(1, 0, 512, PUNCH_HOLE | KEEP_SIZE, 0)),
        (Opcode.LSEEK, LSEEK_IN.pack(1, 0, os.SEEK_DATA, 0)),
    ],
)
async def test_truncated_requests_are_answered_eio(opcode: int, body: bytes) -> None:
    async with rig() as plane:
        plane.layer.try_write(0, memoryview(b"before"))
        for cut in range(IN_HEADER.size, IN_HEADER.size + len(body)):
            assert await plane.ask(opcode, body, cut=cut) == (errno.EIO, b"")
        assert plane.dataplane.malformed == len(body)
        assert plane.layer.content()[:6] == b"before"
        assert (await plane.ask(opcode, body))[0] == 0


@pytest.mark.logs("malformed")
async def test_a_write_that_lies_about_its_size_changes_nothing() -> None:
    async with rig() as plane:
        for claimed in (0, 3, 5, MAX_WRITE, (1 << 32) - 1):
            body = WRITE_IN.pack(1, 0, claimed, 0, 0, 0, 0) + b"four"
            assert await plane.ask(Opcode.WRITE, body) == (errno.EIO, b"")
        assert plane.layer.content() == bytes(SIZE)


numbers: Callable[[int], st.SearchStrategy[int]] = lambda bits: st.one_of(  # noqa: E731
    st.sampled_from([0, 1, 511, 512, SIZE - 1, SIZE, SIZE + 1, MAX_WRITE, (1 << bits) - 1, 1 << (bits - 1)]),
    st.integers(0, (1 << bits) - 1),
).map(lambda value: value & ((1 << bits) - 1))


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Fields of any value, then perhaps cut, padded, or all noise."""
    fields = [draw(numbers(64)), draw(numbers(64)), draw(numbers(32)), draw(numbers(32))]
    body = b"".join(value.to_bytes(8 if index < 2 else 4, "little") for index, value in enumerate(fields))
    return draw(st.one_of(st.just(body), st.binary(max_size=120).map(body.__add__), st.binary(max_size=120)))


@pytest.mark.slow
@pytest.mark.logs("malformed")
@settings(max_examples=120, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DATA_OPCODES)), bodies(), st.sampled_from([VM, READ_ONLY, NOBODY, 0])),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
)
async def test_no_bytes_raise_and_every_request_has_one_answer(
    requests: list[tuple[int, bytes, int]], fast: bool
) -> None:
    async with rig() as plane:
        plane.layer.fast = fast
        for opcode, body, node in requests:
            plane.send(opcode, body, node)
            if opcode != Opcode.INTERRUPT:
                await plane.answer()
        assert plane.nothing_to_hear()
        assert plane.boundary.internal_errors == plane.boundary.request_errors == 0
        plane.layer.fast = True
        assert await plane.write(0, b"goes on") == (0, 7)
        assert await plane.read(0, 7) == (0, b"goes on")


async def test_an_lseek_that_gives_up_says_data_only_of_what_is_not_known(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The first two extents are told, what follows never."""
    told = [Extent(0, 4096, ExtentKind.HOLE), Extent(4096, 4096, ExtentKind.DATA)]

    async def extents(offset: int, *_: object) -> list[Extent]:
        found = [one for one in told if one.end > offset]
        if not found:
            await trio.sleep_forever()
        return [Extent(offset, found[0].end - offset, found[0].kind)]

    async with rig() as plane:
        plane.layer.fast = False
        plane.layer.extents = extents  # type: ignore[assignment,method-assign]
        for at, whence, answer in (
            (0, os.SEEK_DATA, 4096),
            (0, os.SEEK_HOLE, 0),
            (4096, os.SEEK_HOLE, 8192),
            (8192, os.SEEK_HOLE, SIZE),
            (8192, os.SEEK_DATA, 8192),
        ):
            plane.send(Opcode.LSEEK, LSEEK_IN.pack(1, at, whence, 0))
            await trio.sleep(module.LSEEK_PATIENCE_S + 0.1)
            assert await plane.answer() == (0, answer.to_bytes(8, "little"))
