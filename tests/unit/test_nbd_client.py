"""What the nbd backend does when a server does what real ones rarely do: scripted servers behind socket pairs."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from nbdservers import free_port
from trio.testing import wait_all_tasks_blocked

from cachefs.backends.nbd import Nbd
from cachefs.backends.nbdoptions import NbdConfig
from cachefs.errors import BackendTimeout, StoreError
from cachefs.layers.base import Environment
from cachefs.nbd.client import CROWD, DEPTH
from cachefs.nbd.handshake import Export, Flag, RefusedError
from cachefs.testing.nbdscript import (
    EXPORT,
    FLAGS,
    READ,
    SIZE,
    WRITE,
    Changing,
    Network,
    Reading,
    answer,
    done,
    opened,
)

pytestmark = pytest.mark.logs("connection lost, making a new one")

MULTI = FLAGS | Flag.CAN_MULTI_CONN


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


@pytest.mark.parametrize("step", [511, 20000, 65536, 150000, 1 << 20])
async def test_long_and_short_reads_come_behind_each_other_in_any_pieces(network: Network, step: int) -> None:
    lengths = (100000, 5, 70000, 16384, 200000, 1)
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        readings = [Reading(disk, number, length) for number, length in enumerate(lengths)]
        for reading in readings:
            nursery.start_soon(reading.run)
            await wait_all_tasks_blocked()
        heard = [await server.hear() for _ in readings]
        readings[2].scope.cancel()
        await wait_all_tasks_blocked()
        said = b"".join(answer(one, bytes([one.offset]) * one.length) for one in heard)
        for at in range(0, len(said), step):
            await server.say(said[at : at + step])
            if step < 1000 and at % 50 == 0:
                await trio.lowlevel.checkpoint()
            elif step > 1000:
                await wait_all_tasks_blocked()
        await wait_all_tasks_blocked()
        for number, (reading, length) in enumerate(zip(readings, lengths, strict=True)):
            assert reading.buffer == (b"?" if number == 2 else bytes([number])) * length
            assert reading.is_done is (number != 2)


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


# ---- reads without a task


def read_later(disk: Nbd, offset: int, length: int) -> tuple[bytearray, list[float | None]]:
    """The buffer of a read that was begun, and what it will be told."""
    buffer, told = bytearray(b"?" * length), list[float | None]()
    assert disk.try_read_later(offset, memoryview(buffer), told.append)
    assert told == []
    return buffer, told


async def test_read_without_a_task_is_told_when_its_buffer_is_filled(network: Network) -> None:
    async with opened(network) as (disk, server):
        reads = [read_later(disk, number * 8, 8) for number in range(3)]
        heard = [await server.hear() for _ in reads]
        assert [one.offset for one in heard] == [0, 8, 16]
        await server.answer(heard[1], b"second!!")
        await wait_all_tasks_blocked()
        assert [told for _, told in reads] == [[], [None], []]
        assert reads[1][0] == b"second!!"
        assert reads[0][0] == b"?" * 8
        for one in (heard[2], heard[0]):
            await server.answer(one, b"%08d" % one.offset)
        await wait_all_tasks_blocked()
        assert reads[2] == (b"00000016", [None])
        assert disk.statistics().values["in_flight"] == 0


async def test_read_without_a_task_that_fails_may_be_tried_until_the_deadline_that_it_began_with(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with opened(network, timeout="3s", deadline="10s") as (disk, server):
        began = trio.current_time()
        _, refused = read_later(disk, 0, 8)
        buffer, unanswered = read_later(disk, 8, 8)
        await server.answer(await server.hear(), error=errno.EIO)
        await wait_all_tasks_blocked()
        assert refused == [pytest.approx(began + 10)]
        await server.hear()
        second = await network.accept()  # it was silent for too long
        assert trio.current_time() - began >= 3
        assert unanswered == [pytest.approx(began + 10)]
        assert buffer == b"?" * 8
        async with trio.open_nursery() as nursery:
            reading = Reading(disk, 8, 8)
            nursery.start_soon(reading.run)
            await second.answer(await second.hear(), b"abcdefgh")
        assert reading.buffer == b"abcdefgh"


async def test_reads_without_a_task_are_told_of_a_loss_once_the_connection_is_not_used_any_more(
    network: Network,
) -> None:
    async with opened(network) as (disk, server):
        again: list[bool] = []

        def told(until: float | None) -> None:
            again.append(disk.try_read_later(0, memoryview(bytearray(1)), told))

        assert disk.try_read_later(0, memoryview(bytearray(1)), told)
        assert disk.try_read_later(0, memoryview(bytearray(1)), told)
        server.close()
        await wait_all_tasks_blocked()
        assert again == [False, False]


async def test_what_is_sent_while_the_socket_is_full_comes_whole_and_in_order(network: Network) -> None:
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        first, second = Changing(), Changing()
        nursery.start_soon(first.run, disk.write, 0, memoryview(b"1" * SIZE))
        await wait_all_tasks_blocked()  # in the middle of its data
        reads = [read_later(disk, offset, 1) for offset in (7, 8)]
        nursery.start_soon(second.run, disk.write, 9, memoryview(b"2" * (SIZE - 9)))
        await wait_all_tasks_blocked()
        reads.append(read_later(disk, 10, 1))
        heard = [await server.hear() for _ in range(5)]
        assert heard[0].data == b"1" * SIZE
        assert {(one.command, one.offset) for one in heard[1:]} == {(READ, 7), (READ, 8), (WRITE, 9), (READ, 10)}
        for one in heard:
            await server.answer(one, b"r" if one.command == READ else b"")
        await wait_all_tasks_blocked()
        assert [told for _, told in reads] == [[None]] * 3
        assert first.raised is second.raised is None
        await done(server, disk.flush)


async def test_nothing_is_sent_in_the_middle_of_what_is_being_sent(network: Network) -> None:
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        change = Changing()
        nursery.start_soon(change.run, disk.write, 0, memoryview(b"1" * SIZE))
        await wait_all_tasks_blocked()
        got = os.read(server.stream.socket.fileno(), 28 + SIZE)  # there is room, and who waits for it has not run
        assert len(got) < 28 + SIZE
        read_later(disk, 7, 1)
        got += await server._exactly(28 + SIZE - len(got))
        assert got[28:] == b"1" * SIZE
        heard = await server.hear()
        assert (heard.command, heard.offset) == (READ, 7)
        change.scope.cancel()
        await server.say(struct.pack(">IHHQI", 0x668E33EF, 1, 0, struct.unpack_from(">Q", got, 8)[0], 0))
        await wait_all_tasks_blocked()
        await done(server, disk.flush)


async def test_reads_without_a_task_fill_a_socket_and_go_on_when_there_is_room(network: Network) -> None:
    network.export = replace(EXPORT, flags=MULTI)
    async with opened(network, connections=2) as (disk, server):
        other = await network.accept()
        for one in network.all:
            one.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        reads = [read_later(disk, offset, 1) for offset in range(2 * DEPTH)]
        assert not disk.try_read_later(0, memoryview(bytearray(1)), lambda until: None)
        for one in (server, other):
            for _ in range(DEPTH):
                heard = await one.hear()
                await one.answer(heard, b"%c" % heard.offset)
        await wait_all_tasks_blocked()
        assert [(bytes(buffer), told) for buffer, told in reads] == [(b"%c" % n, [None]) for n in range(2 * DEPTH)]


async def test_long_reads_go_over_several_connections_and_a_few_short_ones_over_one(network: Network) -> None:
    network.export = replace(EXPORT, flags=MULTI)
    async with opened(network, connections=2) as (disk, server):
        other = await network.accept()
        await wait_all_tasks_blocked()
        for _ in range(CROWD):
            read_later(disk, 0, 1)
        for _ in range(CROWD):
            assert (await server.hear()).length == 1
        read_later(disk, 1, SIZE - 1)
        assert (await other.hear()).length == SIZE - 1
    network = Network()
    network.export = replace(EXPORT, flags=MULTI)
    async with opened(network, connections=2) as (disk, server):
        other = await network.accept()
        await wait_all_tasks_blocked()
        for _ in range(2):
            read_later(disk, 0, SIZE)
        assert [(await one.hear()).length for one in (server, other)] == [SIZE, SIZE]


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


async def test_why_nobody_answers_at_an_address_is_said() -> None:
    config = NbdConfig.model_validate({"uri": f"nbd://127.0.0.1:{free_port()}/", "deadline": "200ms"})
    with pytest.raises(StoreError, match=r"cannot connect: .*Connection refused"):
        async with Nbd.open(config, Environment("disk", Path("/nonexistent"), writable=False)):
            pass


async def test_read_fails_at_the_deadline_and_the_disk_recovers_by_itself(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with opened(network, deadline="10s") as (disk, server):
        network.trouble = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        server.close()
        began = trio.current_time()
        with pytest.raises(BackendTimeout, match="not done within 10s: "):
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


async def test_server_that_answered_while_the_daemon_stood_still_is_not_silent(
    mock_clock: trio.testing.MockClock,
) -> None:
    for _ in range(10):  # trio takes what is due in any order
        async with opened(Network(), timeout="3s") as (disk, server), trio.open_nursery() as nursery:
            reading = Reading(disk, 0, 8)
            nursery.start_soon(reading.run)
            heard = await server.hear()
            mock_clock.rate = 1
            await trio.sleep(0.01)
            mock_clock.rate = 0
            os.write(server.stream.socket.fileno(), answer(heard, b"abcdefgh"))
            mock_clock.jump(30)
            mock_clock.rate = 10
            await trio.sleep(1)
            assert disk.statistics().values["lost_connections"] == 0
            assert reading.buffer == b"abcdefgh"


async def test_server_that_falls_silent_after_a_pause_loses_its_connection_after_the_timeout(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with opened(network, timeout="3s") as (disk, server):
        await trio.sleep(100)
        began = trio.current_time()
        _, told = read_later(disk, 0, 8)
        await server.hear()
        await network.accept()
        assert 3 <= trio.current_time() - began < 3.2
        assert len(told) == 1


async def test_request_that_is_never_answered_loses_its_connection_at_the_deadline(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with opened(network, timeout="3s", deadline="20s") as (disk, server):
        began = trio.current_time()
        _, told = read_later(disk, 0, 8)
        await server.hear()
        for _ in range(10):
            await trio.sleep(1.9)
            assert told == []
            read_later(disk, 8, 8)
            await server.answer(await server.hear(), bytes(8))
        await network.accept()
        assert 20 <= trio.current_time() - began < 20.2
        assert told == [pytest.approx(began + 20)]


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


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"size": 2 * SIZE}, f"{2 * SIZE} bytes, it had {SIZE}"),
        ({"maximum": 4096}, "requests of 1 to 4096 bytes, it took 1 to 33554432"),
        ({"flags": FLAGS}, "it differs in CAN_MULTI_CONN"),  # a flush would not vouch for all connections any more
        ({"flags": MULTI & ~Flag.SEND_FLUSH}, "it differs in SEND_FLUSH"),
        ({"flags": MULTI | Flag.READ_ONLY}, "it differs in READ_ONLY"),
    ],
)
async def test_export_that_is_another_one_after_the_reconnection_is_not_used(
    network: Network, autojump_clock: trio.testing.MockClock, change: dict[str, Any], what: str
) -> None:
    network.export = replace(EXPORT, flags=MULTI)
    async with opened(network, deadline="10s", connections=1) as (disk, server):
        network.export = replace(network.export, **change)
        server.close()
        with pytest.raises(BackendTimeout):
            await disk.read_into(0, memoryview(bytearray(8)))
        assert disk.statistics().values["trouble"] == f"the export is another one now ({what}): mount it anew"


async def test_a_disk_that_is_not_written_needs_no_flush_of_a_server_that_comes_back(network: Network) -> None:
    async with opened(network, writable=False) as (disk, server):
        network.export = replace(EXPORT, flags=Flag.HAS_FLAGS | Flag.READ_ONLY)
        server.close()
        reading = Reading(disk, 0, 4)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reading.run)
            second = await network.accept()
            await second.answer(await second.hear(), b"base")
        assert reading.buffer == b"base"


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
    with tempfile.TemporaryDirectory() as folder:
        async with Nbd.open(config, Environment("disk", Path(folder)), network.dial) as disk:
            yield disk
