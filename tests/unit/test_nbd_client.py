"""What the nbd backend does when a server does what real ones rarely do: scripted servers behind socket pairs."""

from __future__ import annotations

import errno
import select
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.backends.nbd import Nbd, NbdConfig
from cachefs.errors import BackendTimeout, PermanentError, ReadOnlyError, StoreError
from cachefs.layers.base import Environment
from cachefs.nbd.client import DEPTH
from cachefs.nbd.connection import Ledger
from cachefs.nbd.handshake import Export, Flag, RefusedError
from cachefs.nbd.protocol import NO_HOLE
from cachefs.nbd.transport import Plain, Transport
from cachefs.store.identity import SAMPLES

SIZE = 1 << 20
FLAGS = Flag.HAS_FLAGS | Flag.SEND_FLUSH | Flag.SEND_WRITE_ZEROES
EXPORT = Export(SIZE, FLAGS, True, 7, 1, 4096, 32 << 20)
READ, WRITE, DISCONNECT, FLUSH, WRITE_ZEROES = 0, 1, 2, 3, 6

pytestmark = pytest.mark.logs("connection lost, making a new one", "while the server held writes")


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

    async def hear(self) -> Heard:
        with trio.fail_after(20):
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

    async def accept(self) -> Server:
        with trio.fail_after(20):
            return await self._receive.receive()

    def close(self) -> None:
        self.trouble = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        for server in self.all:
            server.close()


@asynccontextmanager
async def opened(network: Network, *, writable: bool = True, **options: Any) -> AsyncIterator[tuple[Nbd, Server]]:
    """The backend and the server of its first connection, the sample of the contents already taken."""
    config = NbdConfig.model_validate({"uri": "nbd://store/disk", **options})
    env = Environment("disk", Path("/nonexistent"), writable=writable)
    server: Server | None = None

    async def serve_sample() -> None:
        nonlocal server
        server = await network.accept()
        for _ in range(SAMPLES):
            heard = await server.hear()
            await server.answer(heard, bytes(heard.length))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_sample)
        async with Nbd.open(config, env, network.dial) as disk:
            assert server is not None
            try:
                yield disk, server
            finally:
                network.close()


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


@pytest.fixture
def network() -> Network:
    return Network()


# ---- answers


async def test_answers_in_another_order_reach_their_reads(network: Network) -> None:
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        readings = [Reading(disk, number * 100, 4) for number in range(3)]
        for reading in readings:
            nursery.start_soon(reading.run)
            await wait_all_tasks_blocked()
        heard = [await server.hear() for _ in readings]
        for one in reversed(heard):
            await server.answer(one, b"%04d" % one.offset)
        await wait_all_tasks_blocked()
        assert [bytes(reading.buffer) for reading in readings] == [b"0000", b"0100", b"0200"]


async def test_large_read_is_received_into_its_buffer_in_pieces(network: Network) -> None:
    data = bytes(range(256)) * 4096
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        reading = Reading(disk, 0, len(data))
        nursery.start_soon(reading.run)
        said = answer(await server.hear(), data)
        for at in (0, 1, 30, 5000, 70000, len(said) - 1):
            following = {0: 1, 1: 30, 30: 5000, 5000: 70000, 70000: len(said) - 1}.get(at, len(said))
            await server.say(said[at:following])
            await wait_all_tasks_blocked()
        assert reading.is_done
        assert reading.buffer == data


@pytest.mark.parametrize("length", [4096, 200000])
async def test_late_answer_to_a_cancelled_read_leaves_its_buffer_alone(network: Network, length: int) -> None:
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        first, second = Reading(disk, 0, length), Reading(disk, 0, 8)
        nursery.start_soon(first.run)
        heard = await server.hear()
        said = answer(heard, b"x" * length)
        await server.say(said[: length // 2])  # the client is in the middle of its data
        await wait_all_tasks_blocked()
        first.scope.cancel()
        await wait_all_tasks_blocked()
        first.buffer[:] = b"r" * length  # used for something else
        nursery.start_soon(second.run)
        other = await server.hear()
        assert other.cookie != heard.cookie
        await server.say(said[length // 2 :])
        await server.answer(other, b"abcdefgh")
        await wait_all_tasks_blocked()
        assert second.buffer == b"abcdefgh"
        assert first.buffer == b"r" * length
        assert disk.statistics().values["in_flight"] == 0


async def test_no_more_requests_are_in_flight_than_the_depth_and_given_up_ones_count(network: Network) -> None:
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        readings = [Reading(disk, number, 1) for number in range(DEPTH + 2)]
        for reading in readings[:DEPTH]:
            nursery.start_soon(reading.run)
            await wait_all_tasks_blocked()
        heard = [await server.hear() for _ in range(DEPTH)]
        for reading in readings[:DEPTH]:
            reading.scope.cancel()
        await wait_all_tasks_blocked()
        for reading in readings[DEPTH:]:
            nursery.start_soon(reading.run)
            await wait_all_tasks_blocked()
        assert select.select([server.stream.socket], [], [], 0)[0] == []  # nothing was sent
        for one in heard[:2]:  # late answers make room
            await server.answer(one, b"l")
        for _ in range(2):
            await server.answer(await server.hear(), b"n")
        await wait_all_tasks_blocked()
        assert [bytes(reading.buffer) for reading in readings[DEPTH:]] == [b"n", b"n"]


# ---- connections that are lost under reads


@pytest.mark.parametrize(
    "lie",
    [
        lambda heard: answer(replace(heard, cookie=heard.cookie + 1000), bytes(8)),
        lambda heard: answer(replace(heard, offset=heard.offset + 1), bytes(8)),
        lambda heard: b"\0" * 100,
        lambda heard: answer(heard, bytes(8))[:-3],  # and the end of the connection
        lambda heard: b"",
    ],
    ids=["wrong cookie", "wrong offset", "garbage", "reset in the data", "closed"],
)
async def test_read_is_asked_again_over_a_new_connection(network: Network, lie: Any) -> None:
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        reading = Reading(disk, 512, 8)
        nursery.start_soon(reading.run)
        await server.say(lie(await server.hear()))
        await wait_all_tasks_blocked()
        server.close()
        second = await network.accept()
        await second.answer(await second.hear(), b"abcdefgh")
        await wait_all_tasks_blocked()
        assert reading.buffer == b"abcdefgh"
        assert disk.pending_error() is None
        assert disk.statistics().values["lost_connections"] == 1


async def test_read_fails_at_the_deadline_and_the_disk_recovers_by_itself(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with opened(network, deadline="10s") as (disk, server):
        network.trouble = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        server.close()
        began = trio.current_time()
        with pytest.raises(BackendTimeout, match="not answered within 10 s: "):
            await disk.read_into(0, memoryview(bytearray(8)))
        assert trio.current_time() - began == pytest.approx(10)
        assert disk.statistics().values["trouble"] == "cannot connect: Connection refused"
        network.trouble = None
        second = await network.accept()
        async with trio.open_nursery() as nursery:
            reading = Reading(disk, 0, 8)
            nursery.start_soon(reading.run)
            await second.answer(await second.hear(), b"abcdefgh")
        assert reading.buffer == b"abcdefgh"


async def test_silent_server_loses_its_connection_after_the_timeout(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with opened(network, timeout="3s") as (disk, server), trio.open_nursery() as nursery:
        reading = Reading(disk, 0, 8)
        began = trio.current_time()
        nursery.start_soon(reading.run)
        await server.hear()
        second = await network.accept()
        assert 3 <= trio.current_time() - began < 3.2
        await second.answer(await second.hear(), b"abcdefgh")


async def test_server_that_answers_others_is_not_silent(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with opened(network, timeout="3s", deadline="20s") as (disk, server), trio.open_nursery() as nursery:
        slow, others = Reading(disk, 0, 8), [Reading(disk, 8, 8) for _ in range(4)]
        nursery.start_soon(slow.run)
        heard = await server.hear()
        for other in others:
            nursery.start_soon(other.run)
            await trio.sleep(2)
            await server.answer(await server.hear(), bytes(8))
        await server.answer(heard, b"abcdefgh")
        await wait_all_tasks_blocked()
        assert slow.buffer == b"abcdefgh"
        assert disk.statistics().values["lost_connections"] == 0


async def test_export_that_has_another_size_after_the_reconnection_is_not_used(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with opened(network, deadline="10s") as (disk, server):
        network.export = replace(EXPORT, size=2 * SIZE)
        server.close()
        with pytest.raises(BackendTimeout):
            await disk.read_into(0, memoryview(bytearray(8)))
        assert "another one now" in str(disk.statistics().values["trouble"])


# ---- connections that are lost under changes


async def test_write_in_flight_on_a_lost_connection_fails_and_is_not_sent_again(network: Network) -> None:
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        change, waiting = Changing(), Changing()
        nursery.start_soon(change.run, disk.write, 512, memoryview(b"abcdefgh"))
        heard = await server.hear()
        assert (heard.command, heard.offset, heard.data) == (WRITE, 512, b"abcdefgh")
        server.close()
        nursery.start_soon(waiting.run, disk.write, 512, memoryview(b"ABCDEFGH"))
        second = await network.accept()
        await wait_all_tasks_blocked()
        assert isinstance(change.raised, PermanentError)
        assert change.raised.errno == errno.EIO
        assert "not sent again" in change.raised.detail
        assert isinstance(waiting.raised, (PermanentError, ReadOnlyError))
        for refused in (disk.write(0, memoryview(b"x")), disk.trim(0, 512), disk.zero(0, 512)):
            with pytest.raises(ReadOnlyError):
                await refused
        with pytest.raises(PermanentError, match="mounted anew"):
            await disk.flush()
        assert disk.pending_error() is not None
        reading = Reading(disk, 0, 8)
        nursery.start_soon(reading.run)
        heard = await second.hear()
        assert heard.command == READ  # nothing was sent before it
        await second.answer(heard, b"abcdefgh")


async def test_write_that_waited_for_a_connection_is_not_sent_once_the_disk_has_failed(network: Network) -> None:
    """It might land before the one that is unresolved."""
    network.export = replace(EXPORT, flags=FLAGS | Flag.CAN_MULTI_CONN)
    async with opened(network, connections=2) as (disk, server), trio.open_nursery() as nursery:
        other = await network.accept()
        filling = [Reading(disk, 0, 1) for _ in range(2 * DEPTH - 1)]
        first, waiting = Changing(), Changing()
        nursery.start_soon(first.run, disk.write, 0, memoryview(b"1"))
        await wait_all_tasks_blocked()
        for reading in filling:
            nursery.start_soon(reading.run)
        await wait_all_tasks_blocked()
        nursery.start_soon(waiting.run, disk.write, 0, memoryview(b"2"))
        await wait_all_tasks_blocked()
        assert not waiting.is_done
        heard = await server.hear()
        (has_write, has_not) = (server, other) if heard.command == WRITE else (other, server)
        has_write.close()
        await wait_all_tasks_blocked()
        for _ in range(DEPTH // 2):
            heard = await has_not.hear()
            assert heard.command == READ
            await has_not.answer(heard, b"r")
        await wait_all_tasks_blocked()
        assert isinstance(waiting.raised, ReadOnlyError)
        for reading in filling:
            reading.scope.cancel()


async def _done(server: Server, operation: Any, *arguments: Any) -> Heard:
    """*operation*, answered at once."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(operation, *arguments)
        heard = await server.hear()
        await server.answer(heard)
    return heard


async def test_acknowledged_write_that_was_not_flushed_fails_every_flush_after_a_loss(network: Network) -> None:
    async with opened(network) as (disk, server):
        await _done(server, disk.write, 0, memoryview(b"abcd"))
        server.close()
        await network.accept()
        for _ in range(2):
            with pytest.raises(PermanentError, match="may be lost"):
                await disk.flush()
        results: list[Exception | None] = []
        assert disk.try_flush(results.append)
        assert results == [disk.pending_error()]


async def test_loss_after_a_flush_costs_nothing(network: Network) -> None:
    async with opened(network) as (disk, server):
        await _done(server, disk.write, 0, memoryview(b"abcd"))
        assert (await _done(server, disk.flush)).command == FLUSH
        server.close()
        second = await network.accept()
        await wait_all_tasks_blocked()
        await disk.flush()  # there is nothing to flush
        await _done(second, disk.write, 0, memoryview(b"abcd"))
        await _done(second, disk.flush)
        assert disk.pending_error() is None


async def test_flush_vouches_only_for_writes_that_were_answered_before_it(network: Network) -> None:
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        await _done(server, disk.write, 0, memoryview(b"abcd"))
        flushing = Changing()
        nursery.start_soon(flushing.run, disk.flush)
        heard = await server.hear()
        await _done(server, disk.write, 0, memoryview(b"efgh"))  # between the flush and its answer
        await server.answer(heard)
        await wait_all_tasks_blocked()
        assert flushing.is_done
        assert flushing.raised is None
        server.close()
        await network.accept()
        with pytest.raises(PermanentError):
            await disk.flush()


async def test_flush_on_one_connection_does_not_succeed_when_another_was_lost_meanwhile(network: Network) -> None:
    network.export = replace(EXPORT, flags=FLAGS | Flag.CAN_MULTI_CONN)
    async with opened(network, connections=2) as (disk, server), trio.open_nursery() as nursery:
        other = await network.accept()
        await wait_all_tasks_blocked()
        write, flushing = Changing(), Changing()
        nursery.start_soon(write.run, disk.write, 0, memoryview(b"abcd"))
        await server.answer(await server.hear())
        nursery.start_soon(flushing.run, disk.flush)
        heard = await server.hear()
        other.close()
        await wait_all_tasks_blocked()
        await server.answer(heard)
        await wait_all_tasks_blocked()
        assert isinstance(flushing.raised, PermanentError)


async def test_flush_that_the_server_fails_is_final(network: Network) -> None:
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        await _done(server, disk.write, 0, memoryview(b"abcd"))
        flushing = Changing()
        nursery.start_soon(flushing.run, disk.flush)
        await server.answer(await server.hear(), error=5)
        await wait_all_tasks_blocked()
        assert isinstance(flushing.raised, PermanentError)
        assert disk.pending_error() is not None


async def test_silent_server_is_given_the_deadline_while_it_holds_writes(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with opened(network, timeout="3s", deadline="30s") as (disk, server), trio.open_nursery() as nursery:
        change, flushing = Changing(), Changing()
        nursery.start_soon(change.run, disk.write, 0, memoryview(b"abcd"))
        heard = await server.hear()
        await trio.sleep(25)
        await server.answer(heard)
        await wait_all_tasks_blocked()
        assert change.is_done
        assert change.raised is None
        began = trio.current_time()
        nursery.start_soon(flushing.run, disk.flush)
        await server.hear()
        with trio.fail_after(100):
            await network._receive.receive()
        assert 29 < trio.current_time() - began < 31
        assert isinstance(flushing.raised, PermanentError)


# ---- cancelling changes


async def test_started_write_runs_to_its_end_when_it_is_cancelled(network: Network) -> None:
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        change = Changing()
        data = bytes(range(256)) * 4096
        nursery.start_soon(change.run, disk.write, 0, memoryview(data))
        await wait_all_tasks_blocked()  # it does not fit into the socket: sent in part
        change.scope.cancel()
        heard = await server.hear()
        assert heard.data == data
        await wait_all_tasks_blocked()
        assert not change.is_done
        await server.answer(heard)
        await wait_all_tasks_blocked()
        assert change.is_done
        await _done(server, disk.flush)


async def test_write_that_is_cancelled_before_it_was_sent_never_lands(network: Network) -> None:
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        first, second = Changing(), Changing()
        nursery.start_soon(first.run, disk.write, 0, memoryview(bytes(1 << 20)))
        await wait_all_tasks_blocked()
        nursery.start_soon(second.run, disk.write, 0, memoryview(b"never"))
        await wait_all_tasks_blocked()
        second.scope.cancel()
        await wait_all_tasks_blocked()
        await server.answer(await server.hear())
        await _done(server, disk.trim, 0, 512)  # what comes next is not the write
        assert second.scope.cancelled_caught
        assert (await _done(server, disk.flush)).command == FLUSH


async def test_cancelled_owner_still_flushes_when_it_closes(network: Network) -> None:
    heard: list[int] = []
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            server = await network.accept()
            while (one := await server.hear()).command != DISCONNECT:
                heard.append(one.command)
                await server.answer(one, bytes(one.length) if one.command == READ else b"")

        nursery.start_soon(serve)
        with trio.CancelScope() as owner:
            config = NbdConfig.model_validate({"uri": "nbd://store/disk"})
            async with Nbd.open(config, Environment("disk", Path("/nonexistent")), network.dial) as disk:
                await disk.write(0, memoryview(b"abcd"))
                owner.cancel()
                await trio.sleep_forever()
    network.close()
    assert heard[-2:] == [WRITE, FLUSH]


# ---- what is sent


async def test_trim_may_make_holes_and_zero_may_not(network: Network) -> None:
    async with opened(network) as (disk, server):
        trim = await _done(server, disk.trim, 4096, 8192)
        zero = await _done(server, disk.zero, 4096, 8192)
        assert (trim.command, trim.flags, trim.offset, trim.length) == (WRITE_ZEROES, 0, 4096, 8192)
        assert (zero.command, zero.flags, zero.offset, zero.length) == (WRITE_ZEROES, NO_HOLE, 4096, 8192)
        await _done(server, disk.flush)


# ---- opening


async def test_server_that_cannot_be_reached_is_an_error_of_the_store_after_the_deadline(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    network.trouble = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    began = trio.current_time()
    with pytest.raises(
        StoreError, match=r"cannot open 'disk' at store:10809: .*60 s: cannot connect: Connection refused"
    ):
        async with opened_alone(network):
            pytest.fail("opened")
    assert trio.current_time() - began == pytest.approx(60)


@pytest.mark.parametrize(
    ("trouble", "export", "sentence"),
    [
        (RefusedError("the server has no export 'disk'"), EXPORT, "has no export"),
        (None, replace(EXPORT, flags=FLAGS | Flag.READ_ONLY), "read-only: put a cow layer above it"),
        (None, replace(EXPORT, size=0), "is empty"),
    ],
)
async def test_export_that_cannot_be_served_is_refused_at_once(
    network: Network, trouble: Exception | None, export: Export, sentence: str
) -> None:
    network.trouble, network.export = trouble, export
    with trio.fail_after(1), pytest.raises(StoreError, match=sentence):
        async with opened_alone(network):
            pytest.fail("opened")
    network.close()


@asynccontextmanager
async def opened_alone(network: Network) -> AsyncIterator[Nbd]:
    config = NbdConfig.model_validate({"uri": "nbd://store/disk"})
    async with Nbd.open(config, Environment("disk", Path("/nonexistent")), network.dial) as disk:
        yield disk


def test_ledger_counts_what_no_flush_vouches_for() -> None:
    ledger = Ledger()
    assert not ledger.is_unflushed
    ledger.start()
    assert ledger.is_unflushed
    ledger.answer()
    assert ledger.is_unflushed
    ledger.flush(ledger.answered)
    assert not ledger.is_unflushed
    ledger.start()
    ledger.answer()
    ledger.flush(1)
    assert ledger.is_unflushed
