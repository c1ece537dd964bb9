"""Changes on connections that are lost: what waits, what is sent again, when, and what a flush vouches for."""

from __future__ import annotations

import errno
import os
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from cachefs.backends.nbd import Nbd
from cachefs.errors import BackendTimeout, NoSpaceError, PermanentError, StoreError
from cachefs.layers.base import Environment
from cachefs.nbd.client import DEPTH
from cachefs.nbd.handshake import Flag
from cachefs.nbd.protocol import FUA, NO_HOLE
from cachefs.nbd.unflushed import Kind, Ranges, Unflushed, body_size, next_wave, without_superseded
from cachefs.survivor import Survivors
from cachefs.testing.nbdscript import (
    BLOCK_STATUS,
    DISCONNECT,
    EXPORT,
    FLAGS,
    FLUSH,
    READ,
    WRITE,
    WRITE_ZEROES,
    Changing,
    Heard,
    Network,
    Reading,
    Server,
    done,
    opened,
)

pytestmark = pytest.mark.logs("connection lost, making a new one", "are to be sent again", "is void")

MULTI = replace(EXPORT, flags=FLAGS | Flag.CAN_MULTI_CONN)


@pytest.fixture
def network() -> Network:
    return Network()


def start(nursery: trio.Nursery, operation: Any, *arguments: Any) -> Changing:
    change = Changing()
    nursery.start_soon(change.run, operation, *arguments)
    return change


class Applied:
    """A server's disk of one block, to which requests are applied as they arrive."""

    def __init__(self) -> None:
        self.bytes = bytearray(8)

    def apply(self, heard: Heard) -> None:
        assert heard.command == WRITE
        self.bytes[heard.offset : heard.offset + heard.length] = heard.data


# ---- the fence


async def test_a_write_that_arrives_late_does_not_replace_a_later_one(
    network: Network, autojump_clock: MockClock
) -> None:
    """The race: a slow connection is lost, its write sent again, a later one acknowledged, then the slow one arrives."""
    applied = Applied()
    async with opened(network, fence="30s") as (disk, slow), trio.open_nursery() as nursery:
        first = start(nursery, disk.write, 0, memoryview(b"11111111"))
        late = await slow.hear()  # the server has it, and takes its time
        lost_at = trio.current_time()
        slow.close()
        server = await network.accept()
        second = start(nursery, disk.write, 0, memoryview(b"22222222"))

        async def deliver_late() -> None:
            await trio.sleep(29)
            applied.apply(late)

        nursery.start_soon(deliver_late)
        for expected in (b"11111111", b"22222222"):
            heard = await server.hear(limit_s=100)
            assert heard.data == expected
            assert trio.current_time() - lost_at >= 30
            applied.apply(heard)
            await server.answer(heard)
        await wait_all_tasks_blocked()
        assert first.is_done
        assert second.is_done
        assert (first.raised, second.raised) == (None, None)
        assert applied.bytes == b"22222222"
        await done(server, disk.flush)


async def test_only_what_overlaps_waits_for_the_fence(network: Network, autojump_clock: MockClock) -> None:
    async with opened(network, fence="30s") as (disk, server), trio.open_nursery() as nursery:
        start(nursery, disk.write, 512, memoryview(bytes(512)))
        await server.hear()
        lost_at = trio.current_time()
        server.close()
        second = await network.accept()
        overlapping = [Reading(disk, 1023, 2), Reading(disk, 0, 513)]
        for reading in overlapping:
            nursery.start_soon(reading.run)
        asking = start(nursery, disk.extents, 1000, 8)
        trimming = start(nursery, disk.trim, 0, 4096)
        for offset, length in ((0, 512), (1024, 512)):
            beside = Reading(disk, offset, length)
            nursery.start_soon(beside.run)
            heard = await second.hear()
            assert (heard.offset, heard.length) == (offset, length)
            await second.answer(heard, bytes(length))
            await done(second, disk.write, offset, memoryview(bytes(length)))
        assert trio.current_time() - lost_at < 1
        again = await second.hear(limit_s=100)
        assert trio.current_time() - lost_at >= 30
        assert (again.command, again.offset, again.length) == (WRITE, 512, 512)
        assert not any((*(reading.is_done for reading in overlapping), asking.is_done, trimming.is_done))
        await second.answer(again)
        behind = [await second.hear() for _ in range(4)]
        assert sorted(one.command for one in behind) == [READ, READ, WRITE_ZEROES, BLOCK_STATUS]
        for one in behind:
            data = bytes(one.length) if one.command == READ else b""
            await second.answer(one, data, error=errno.EINVAL if one.command == BLOCK_STATUS else 0)
        await wait_all_tasks_blocked()
        await done(second, disk.flush)


async def test_one_whose_client_is_gone_is_not_sent_again(network: Network, autojump_clock: MockClock) -> None:
    async with opened(network, fence="30s") as (disk, server), trio.open_nursery() as nursery:
        change = start(nursery, disk.write, 0, memoryview(b"never"))
        await server.hear()
        server.close()
        second = await network.accept()
        change.scope.cancel()
        await wait_all_tasks_blocked()
        assert change.scope.cancelled_caught
        lost_at = trio.current_time()
        reading = Reading(disk, 0, 5)
        nursery.start_soon(reading.run)
        heard = await second.hear(limit_s=100)
        assert heard.command == READ
        assert trio.current_time() - lost_at >= 29  # it may still arrive until then
        await second.answer(heard, b"-----")


async def test_one_whose_client_goes_while_it_waits_for_a_connection_is_not_sent_again(
    network: Network, autojump_clock: MockClock
) -> None:
    async with opened(network, fence="1s") as (disk, server), trio.open_nursery() as nursery:
        change = start(nursery, disk.write, 0, memoryview(b"never"))
        await server.hear()
        network.trouble = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        server.close()
        await trio.sleep(10)  # the fence is behind it
        change.scope.cancel()
        await wait_all_tasks_blocked()
        network.trouble = None
        second = await network.accept()
        reading = Reading(disk, 0, 5)
        nursery.start_soon(reading.run)
        heard = await second.hear()
        assert heard.command == READ
        await second.answer(heard, b"-----")


async def test_losses_in_which_no_copy_was_under_way_do_not_prolong_the_fence(
    network: Network, autojump_clock: MockClock
) -> None:
    async with opened(network, fence="30s") as (disk, server), trio.open_nursery() as nursery:
        start(nursery, disk.write, 0, memoryview(b"write"))
        await server.hear()
        server.close()
        lost_at = trio.current_time()
        for _ in range(3):
            (await network.accept()).close()
            await trio.sleep(5)
        (await network.accept()).close()
        last = await network.accept()
        heard = await last.hear(limit_s=100)
        assert 30 <= trio.current_time() - lost_at < 36
        await last.answer(heard)
        await wait_all_tasks_blocked()
        await done(last, disk.flush)


async def test_a_second_copy_that_is_lost_is_fenced_too(network: Network, autojump_clock: MockClock) -> None:
    async with opened(network, fence="30s") as (disk, server), trio.open_nursery():
        await done(server, disk.write, 0, memoryview(b"write"))
        server.close()
        second = await network.accept()
        assert (await second.hear()).data == b"write"  # at once: no copy was under way
        second.close()
        lost_at = trio.current_time()
        third = await network.accept()
        heard = await third.hear(limit_s=100)
        assert trio.current_time() - lost_at >= 30
        await third.answer(heard)
        await wait_all_tasks_blocked()
        await done(third, disk.flush)


async def test_a_silent_server_is_given_half_a_fence_while_a_change_is_under_way(
    network: Network, autojump_clock: MockClock
) -> None:
    async with opened(network, timeout="3s", fence="20s") as (disk, server), trio.open_nursery() as nursery:
        change = start(nursery, disk.write, 0, memoryview(b"abcd"))
        heard = await server.hear()
        await trio.sleep(9)
        await server.answer(heard)
        await wait_all_tasks_blocked()
        assert change.is_done
        start(nursery, disk.write, 0, memoryview(b"efgh"))
        began = trio.current_time()
        await server.hear()
        second = await network.accept()
        assert 10 <= trio.current_time() - began < 11
        for _ in range(2):
            await second.answer(await second.hear(limit_s=100))
            await wait_all_tasks_blocked()
        await done(second, disk.flush)


# ---- what was acknowledged


async def test_what_no_flush_vouched_for_is_sent_again_in_order(network: Network) -> None:
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        await done(server, disk.write, 0, memoryview(b"flushed"))
        assert (await done(server, disk.flush)).command == FLUSH
        await done(server, disk.write, 0, memoryview(b"first"))
        await done(server, disk.trim, 0, 4096)
        await done(server, disk.zero, 2, 4096)
        await done(server, disk.write, 4, memoryview(b"last"))
        server.close()
        reading = Reading(disk, 0, 1)
        nursery.start_soon(reading.run)
        second = await network.accept()
        again = []
        for _ in range(4):
            again.append(await second.hear())
            await second.answer(again[-1])
        assert [(one.command, one.flags, one.offset, one.length, one.data) for one in again] == [
            (WRITE, 0, 0, 5, b"first"),
            (WRITE_ZEROES, 0, 0, 4096, b""),
            (WRITE_ZEROES, NO_HOLE, 2, 4096, b""),
            (WRITE, 0, 4, 4, b"last"),
        ]
        heard = await second.hear()  # the read comes behind them
        assert heard.command == READ
        await second.answer(heard, b"x")
        assert (await done(second, disk.flush)).command == FLUSH
        assert disk.pending_error() is None


async def test_a_loss_after_a_flush_costs_nothing(network: Network) -> None:
    async with opened(network) as (disk, server):
        await done(server, disk.write, 0, memoryview(b"abcd"))
        assert (await done(server, disk.flush)).command == FLUSH
        server.close()
        second = await network.accept()
        await wait_all_tasks_blocked()
        await disk.flush()  # there is nothing to flush
        results: list[Exception | None] = []
        assert disk.try_flush(results.append)
        assert results == [None]
        assert (await done(second, disk.write, 0, memoryview(b"abcd"))).data == b"abcd"
        await done(second, disk.flush)


async def test_a_flush_vouches_only_for_what_was_answered_before_it(network: Network) -> None:
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        await done(server, disk.write, 0, memoryview(b"abcd"))
        flushing = start(nursery, disk.flush)
        heard = await server.hear()
        await done(server, disk.write, 0, memoryview(b"efgh"))  # between the flush and its answer
        await server.answer(heard)
        await wait_all_tasks_blocked()
        assert flushing.is_done
        assert flushing.raised is None
        server.close()
        second = await network.accept()
        again = await second.hear()
        assert again.data == b"efgh"
        await second.answer(again)
        await wait_all_tasks_blocked()
        await done(second, disk.flush)


async def test_a_flush_is_asked_for_again_when_another_connection_was_lost_meanwhile(
    network: Network, autojump_clock: MockClock
) -> None:
    network.export = MULTI
    async with opened(network, connections=2) as (disk, server), trio.open_nursery() as nursery:
        other = await network.accept()
        await wait_all_tasks_blocked()
        start(nursery, disk.write, 0, memoryview(b"abcd"))
        await server.answer(await server.hear())
        await wait_all_tasks_blocked()
        flushing = start(nursery, disk.flush)
        heard = await server.hear()
        other.close()
        await wait_all_tasks_blocked()
        with pytest.raises((OSError, trio.BrokenResourceError)):  # it was given up with the other
            await server.answer(heard)
        second, third = await network.accept(), await network.accept()
        server = await _who_hears(second, third)
        again = await server.hear()
        assert again.data == b"abcd"
        await server.answer(again)
        server = await _who_hears(second, third)
        again = await server.hear()
        assert again.command == FLUSH
        assert not flushing.is_done
        await server.answer(again)
        await wait_all_tasks_blocked()
        assert flushing.raised is None


async def test_a_flush_that_waited_for_a_connection_comes_behind_what_is_to_be_sent_again(
    network: Network, autojump_clock: MockClock
) -> None:
    """Its answer counted for nothing, its error neither: what a failed flush dropped in between was vouched for by the next."""
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        await done(server, disk.write, 0, memoryview(b"before"))
        filling = [Reading(disk, 1, 1) for _ in range(DEPTH)]
        for reading in filling:
            nursery.start_soon(reading.run)
        await wait_all_tasks_blocked()
        flushing = start(nursery, disk.flush)
        await wait_all_tasks_blocked()
        for reading in filling:
            reading.scope.cancel()
        server.close()
        second = await network.accept()
        again = await second.hear()
        assert again.data == b"before"
        await wait_all_tasks_blocked()
        with pytest.raises(BlockingIOError):  # nothing else yet
            second.stream.socket._sock.recv(1)
        await second.answer(again)
        heard = await second.hear()
        assert heard.command == FLUSH
        await second.answer(heard)
        await wait_all_tasks_blocked()
        assert (flushing.is_done, flushing.raised) == (True, None)


async def _who_hears(*servers: Server) -> Server:
    """The one to which something was sent."""
    found: list[Server] = []
    async with trio.open_nursery() as nursery:

        async def wait(server: Server) -> None:
            await trio.lowlevel.wait_readable(server.stream.socket)
            found.append(server)
            nursery.cancel_scope.cancel()

        for server in servers:
            nursery.start_soon(wait, server)
    return found[0]


@pytest.mark.logs("flush: the server says: input/output error")
async def test_what_a_failed_flush_may_have_dropped_is_sent_again(network: Network) -> None:
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        await done(server, disk.write, 0, memoryview(b"abcd"))
        flushing = start(nursery, disk.flush)
        await server.answer(await server.hear(), error=errno.EIO)
        again = await server.hear()
        assert again.data == b"abcd"
        assert isinstance(flushing.raised, PermanentError)
        assert disk.pending_error() is flushing.raised
        await server.answer(again)
        await wait_all_tasks_blocked()
        await done(server, disk.flush)
        assert disk.pending_error() is None


@pytest.mark.logs("which it had acknowledged before", "last flush", "no space left")
async def test_what_the_server_refuses_to_take_again_is_kept(network: Network, autojump_clock: MockClock) -> None:
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        await done(server, disk.write, 0, memoryview(b"abcd"))
        server.close()
        second = await network.accept()
        await second.answer(await second.hear(), error=errno.ENOSPC)
        await wait_all_tasks_blocked()
        assert "refuses write 0+4" in str(disk.pending_error())
        flushing = start(nursery, disk.flush)
        again = await second.hear()
        assert again.data == b"abcd"
        await second.answer(again)
        await second.answer(await second.hear())
        await wait_all_tasks_blocked()
        assert flushing.is_done
        assert disk.pending_error() is None


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.ESHUTDOWN])
async def test_a_server_that_cannot_take_it_again_just_now_is_no_error_of_the_disk(
    network: Network, autojump_clock: MockClock, error: int
) -> None:
    async with opened(network, fence="1s") as (disk, server):
        await done(server, disk.write, 0, memoryview(b"abcd"))
        server.close()
        second = await network.accept()
        await second.answer(await second.hear(), error=error)
        third = await network.accept() if error == errno.ESHUTDOWN else second
        again = await third.hear()
        assert again.data == b"abcd"
        assert disk.pending_error() is None
        await third.answer(again)
        await wait_all_tasks_blocked()
        await done(third, disk.flush)


async def test_one_that_is_refused_when_it_is_sent_again_fails_its_writer(
    network: Network, autojump_clock: MockClock
) -> None:
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        change = start(nursery, disk.write, 0, memoryview(b"abcd"))
        await server.hear()
        server.close()
        second = await network.accept()
        await second.answer(await second.hear(limit_s=100), error=errno.ENOSPC)
        await wait_all_tasks_blocked()
        assert isinstance(change.raised, NoSpaceError)
        await disk.flush()  # there is nothing


async def test_when_the_memory_is_full_a_flush_makes_room(network: Network, autojump_clock: MockClock) -> None:
    async with opened(network, unflushed="4MiB") as (disk, server), trio.open_nursery() as nursery:
        data = memoryview(bytes(1 << 20))
        for _ in range(4):
            await done(server, disk.write, 0, data)
        fifth = start(nursery, disk.write, 0, data)
        heard = await server.hear()
        assert heard.command == FLUSH
        assert not fifth.is_done
        await server.answer(heard)
        heard = await server.hear()
        assert (heard.command, heard.length) == (WRITE, 1 << 20)
        await server.answer(heard)
        await wait_all_tasks_blocked()
        await done(server, disk.flush)


async def test_a_flush_that_may_fail_after_its_connection_was_lost_is_fenced(
    network: Network, autojump_clock: MockClock
) -> None:
    """A server that cannot write drops what it holds, which a later flush knows nothing of: what was sent meanwhile too."""
    async with opened(network, fence="30s") as (disk, server), trio.open_nursery() as nursery:
        await done(server, disk.write, 0, memoryview(b"before"))
        flushing = start(nursery, disk.flush)
        assert (await server.hear()).command == FLUSH
        lost_at = trio.current_time()
        server.close()
        second = await network.accept()
        await done(second, disk.write, 512, memoryview(b"meanwhile"))  # the flush fails after it
        again = [await second.hear(limit_s=100), await second.hear()]
        assert trio.current_time() - lost_at >= 30
        assert sorted(one.data for one in again) == [b"before", b"meanwhile"]
        assert not flushing.is_done
        for one in again:
            await second.answer(one)
        heard = await second.hear()
        assert heard.command == FLUSH
        await second.answer(heard)


@pytest.mark.logs("flush: the server says")
async def test_a_flush_that_fails_for_nobody_is_heard_of(network: Network, autojump_clock: MockClock) -> None:
    """Its caller was cancelled; the next flush would vouch for what this one has dropped."""
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        await done(server, disk.write, 0, memoryview(b"dropped"))
        cancelled = start(nursery, disk.flush)
        heard = await server.hear()
        cancelled.scope.cancel()
        await wait_all_tasks_blocked()
        flushing = start(nursery, disk.flush)
        await server.answer(heard, error=errno.EIO)
        again = await server.hear()
        assert again.data == b"dropped"
        await server.answer(again)
        heard = await server.hear()
        assert heard.command == FLUSH
        assert not flushing.is_done
        await server.answer(heard)


async def test_a_server_without_flush_is_asked_for_fua_and_believed(network: Network) -> None:
    network.export = replace(EXPORT, flags=Flag.HAS_FLAGS | Flag.SEND_FUA | Flag.SEND_WRITE_ZEROES)
    async with opened(network) as (disk, server):
        assert (await done(server, disk.write, 0, memoryview(b"abcd"))).flags == FUA
        assert (await done(server, disk.zero, 0, 4096)).flags == FUA | NO_HOLE
        await disk.flush()
        server.close()
        second = await network.accept()
        await wait_all_tasks_blocked()
        assert (await done(second, disk.trim, 0, 4096)).flags == FUA


# ---- a server of our own


async def test_what_was_sent_before_a_silent_server_was_ended_is_sent_again(network: Network) -> None:
    """Over another connection, between the moment in which the silence was noticed and the end of the server."""
    network.export = MULTI
    sent: list[bytes] = []

    async def serve(server: Server) -> None:
        with suppress(AssertionError, OSError, trio.BrokenResourceError):
            while True:
                heard = await server.hear()
                sent.append(heard.data)
                await server.answer(heard, bytes(4) if heard.command == READ else b"")

    async def write_at_the_loss(disk: Nbd) -> None:
        while not disk.statistics().values["lost_connections"]:
            await trio.lowlevel.checkpoint()
        await disk.write(0, memoryview(b"abcd"))

    async with (
        opened(network, command=["sleep", "infinity"], connections=2, timeout="300ms") as (disk, silent),
        trio.open_nursery() as nursery,
    ):
        other = await network.accept()
        await wait_all_tasks_blocked()
        reading = Reading(disk, 0, 4)
        nursery.start_soon(reading.run)
        await silent.hear()
        with trio.fail_after(20):
            async with trio.open_nursery() as writing:
                writing.start_soon(write_at_the_loss, disk)
                assert (await other.hear()).data == b"abcd"
                for _ in range(2):
                    nursery.start_soon(serve, await network.accept())
        assert b"abcd" in sent
        await disk.flush()
        nursery.cancel_scope.cancel()


# ---- how long


async def test_held_requests_wait_beyond_the_deadline_and_are_carried_out(
    network: Network, autojump_clock: MockClock
) -> None:
    async with opened(network, deadline="10s", fence="1s", on_failure="hold") as (disk, server):
        async with trio.open_nursery() as nursery:
            await done(server, disk.write, 8, memoryview(b"kept"))
            writing = start(nursery, disk.write, 0, memoryview(b"abcd"))
            await server.hear()
            network.trouble = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
            server.close()
            reading = Reading(disk, 100, 4)
            nursery.start_soon(reading.run)
            flushing = start(nursery, disk.flush)
            await trio.sleep(3600)
            assert disk.statistics().values["state"] == "holding"
            assert not any((writing.is_done, reading.is_done, flushing.is_done))
            network.trouble = None
            second = await network.accept()
            for _ in range(3):
                heard = await second.hear()
                await second.answer(heard, b"read" if heard.command == READ else b"")
            heard = await second.hear()
            assert heard.command == FLUSH
            await second.answer(heard)
        assert [one.raised for one in (writing, flushing)] == [None, None]
        assert reading.buffer == b"read"
        assert disk.statistics().values["state"] == "ok"
        await disk.flush()  # nothing is left


@pytest.mark.logs("flush: not done within")
async def test_at_the_deadline_requests_fail_then_at_once_until_the_store_is_back(
    network: Network, autojump_clock: MockClock
) -> None:
    async with opened(network, deadline="10s", fence="1s") as (disk, server), trio.open_nursery() as nursery:
        await done(server, disk.write, 8, memoryview(b"kept"))
        network.trouble = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        server.close()
        began = trio.current_time()
        changes = [
            start(nursery, disk.write, 0, memoryview(b"abcd")),
            start(nursery, disk.trim, 0, 4096),
            start(nursery, disk.flush),
            start(nursery, disk.read_into, 0, memoryview(bytearray(4))),
        ]
        await trio.sleep(9.9)
        assert not any(change.is_done for change in changes)
        assert disk.statistics().values["state"] == "reconnecting"
        await trio.sleep(0.2)
        assert all(isinstance(change.raised, BackendTimeout) for change in changes)
        await trio.sleep(1)
        assert disk.statistics().values["state"] == "failing"
        with pytest.raises(BackendTimeout, match=r"refused, the store could not be reached for 11s: .*refused"):
            await disk.write(0, memoryview(b"abcd"))
        assert trio.current_time() - began < 11.2
        network.trouble = None
        second = await network.accept()
        again = await second.hear()
        assert again.data == b"kept"  # the writes that failed are not sent
        await second.answer(again)
        assert (await done(second, disk.flush)).command == FLUSH
        assert disk.pending_error() is None


@pytest.mark.logs("flush: not done within")
@pytest.mark.parametrize("operation", ["write", "flush"])
async def test_what_was_sent_late_and_is_not_answered_fails_at_the_deadline_of_its_request(
    network: Network, autojump_clock: MockClock, operation: str
) -> None:
    """It is not taken back from a connection, and the connection was given half a fence, or a deadline, from then on."""
    async with opened(network, deadline="30s", fence="60s") as (disk, server), trio.open_nursery() as nursery:
        if operation == "flush":
            await done(server, disk.write, 8, memoryview(b"kept"))
        network.trouble = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        server.close()
        await trio.sleep(1)
        late = start(nursery, *((disk.flush,) if operation == "flush" else (disk.write, 0, memoryview(b"late"))))
        began = trio.current_time()
        await trio.sleep(15)
        network.trouble = None
        second = await network.accept()
        if operation == "flush":
            await second.answer(await second.hear())
        assert (await second.hear()).command == (FLUSH if operation == "flush" else WRITE)
        for _ in range(32 - int(trio.current_time() - began)):  # it goes on with other things
            reading = Reading(disk, 512, 4)
            nursery.start_soon(reading.run)
            with suppress(AssertionError):
                await second.answer(await second.hear(), b"read")
            await trio.sleep(1)
        assert isinstance(late.raised, BackendTimeout)
        third = await network.accept()
        while operation == "flush" and disk.statistics().values["unflushed_bytes"]:
            heard = await third.hear(limit_s=100)
            await third.answer(heard, b"read" if heard.command == READ else b"")
            if heard.command == WRITE:
                await wait_all_tasks_blocked()
                start(nursery, disk.flush)
            await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("command", ["read", "write", "extents"])
async def test_a_server_that_shuts_down_is_left_and_asked_again(
    network: Network, autojump_clock: MockClock, command: str
) -> None:
    """nbdkit waits for its clients to go, and answers whatever they ask with that."""
    async with opened(network, fence="1s") as (disk, server), trio.open_nursery() as nursery:
        operation = {
            "read": (disk.read_into, 0, memoryview(bytearray(4))),
            "write": (disk.write, 0, memoryview(b"abcd")),
            "extents": (disk.extents, 0, 4),
        }[command]
        asking = start(nursery, *operation)
        await server.answer(await server.hear(), error=108)
        second = await network.accept()
        heard = await second.hear()
        await second.answer(
            heard, bytes(4) if heard.command == READ else b"", errno.EINVAL if command == "extents" else 0
        )
        await wait_all_tasks_blocked()
        assert asking.is_done
        assert asking.raised is None
        if command == "write":
            await done(second, disk.flush)


# ---- cancelling


async def test_a_write_under_way_is_waited_for_when_it_is_cancelled(network: Network) -> None:
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        data = bytes(range(256)) * 4096
        change = start(nursery, disk.write, 0, memoryview(data))
        await wait_all_tasks_blocked()  # it does not fit into the socket: sent in part
        change.scope.cancel()
        heard = await server.hear()
        assert heard.data == data
        await wait_all_tasks_blocked()
        assert not change.is_done
        await server.answer(heard)
        await wait_all_tasks_blocked()
        assert change.is_done
        await done(server, disk.flush)


async def test_a_write_that_is_cancelled_before_it_was_sent_never_lands(network: Network) -> None:
    async with opened(network) as (disk, server), trio.open_nursery() as nursery:
        start(nursery, disk.write, 0, memoryview(bytes(1 << 20)))
        await wait_all_tasks_blocked()
        second = start(nursery, disk.write, 0, memoryview(b"never"))
        await wait_all_tasks_blocked()
        second.scope.cancel()
        await wait_all_tasks_blocked()
        await server.answer(await server.hear())
        await done(server, disk.trim, 0, 512)  # what comes next is not the write
        assert second.scope.cancelled_caught
        assert (await done(server, disk.flush)).command == FLUSH


async def test_a_write_that_waited_for_a_connection_is_barred_by_a_loss_meanwhile(
    network: Network, autojump_clock: MockClock
) -> None:
    """It might land before the one that is to be sent again."""
    async with opened(network, fence="30s") as (disk, server), trio.open_nursery() as nursery:
        first = start(nursery, disk.write, 0, memoryview(b"1"))
        await wait_all_tasks_blocked()
        filling = [Reading(disk, 1, 1) for _ in range(DEPTH - 1)]
        for reading in filling:
            nursery.start_soon(reading.run)
        await wait_all_tasks_blocked()
        second = start(nursery, disk.write, 0, memoryview(b"2"))
        await wait_all_tasks_blocked()
        for reading in filling:
            reading.scope.cancel()
        server.close()
        network_after = await network.accept()
        for expected in (b"1", b"2"):
            heard = await network_after.hear(limit_s=100)
            assert heard.data == expected
            await network_after.answer(heard)
        await wait_all_tasks_blocked()
        assert first.is_done
        assert second.is_done
        await done(network_after, disk.flush)


async def test_a_cancelled_owner_still_flushes_when_it_closes(network: Network) -> None:
    heard: list[int] = []

    async def serve(server: Server) -> None:
        while (one := await server.hear()).command != DISCONNECT:
            heard.append(one.command)
            await server.answer(one, bytes(one.length) if one.command == READ else b"")

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as owner:
            async with opened(network) as (disk, server):
                nursery.start_soon(serve, server)
                await disk.write(0, memoryview(b"abcd"))
                network.close = lambda: None  # type: ignore[method-assign]
                owner.cancel()
                await trio.sleep_forever()
    assert heard[-2:] == [WRITE, FLUSH]
    Network.close(network)


async def test_a_request_that_began_during_an_outage_fails_with_those_that_began_before(
    network: Network, autojump_clock: MockClock
) -> None:
    """Behind an fsync, Linux lets a write begin when the fsync has failed; it then waited for a deadline of its own."""
    async with opened(network, deadline="10s", fence="1s") as (disk, server), trio.open_nursery() as nursery:
        network.trouble = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        server.close()
        await trio.sleep(9)
        late = start(nursery, disk.write, 0, memoryview(b"abcd"))
        await trio.sleep(1.1)
        assert isinstance(late.raised, BackendTimeout)
        assert "refused, the store could not be reached for 10s" in str(late.raised)


async def test_a_store_that_is_back_has_the_whole_deadline_again(network: Network, autojump_clock: MockClock) -> None:
    async with opened(network, deadline="10s", fence="1s") as (disk, server), trio.open_nursery() as nursery:
        network.trouble = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        server.close()
        await trio.sleep(5)
        late = start(nursery, disk.write, 0, memoryview(b"abcd"))
        await trio.sleep(0.1)
        network.trouble = None
        heard = await (await network.accept()).hear()
        await trio.sleep(4)  # within its deadline, and beyond that of the outage
        assert not late.is_done
        assert heard.data == b"abcd"
        await network.all[-1].answer(heard)
        await wait_all_tasks_blocked()
        assert (late.is_done, late.raised) == (True, None)
        await done(network.all[-1], disk.flush)


async def test_an_outage_begins_when_a_silent_server_was_last_heard(
    network: Network, autojump_clock: MockClock
) -> None:
    async with opened(network, timeout="6s", deadline="10s") as (disk, server), trio.open_nursery() as nursery:
        waiting = start(nursery, disk.read_into, 0, memoryview(bytearray(4)))
        await server.hear()
        await trio.sleep(5)
        network.trouble = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        await trio.sleep(3)
        late = start(nursery, disk.read_into, 0, memoryview(bytearray(4)))
        await trio.sleep(2.1)
        assert isinstance(waiting.raised, BackendTimeout)
        assert isinstance(late.raised, BackendTimeout)


@pytest.mark.logs("the last flush failed: .*given up")
async def test_a_forced_stop_gives_up_what_is_under_way_and_the_last_flush(
    network: Network, autojump_clock: MockClock
) -> None:
    forced = trio.Event()
    began = trio.current_time()
    writing = Changing()

    async def stop_in_the_middle() -> None:
        async with opened(network, forced_stop=forced, on_failure="hold") as (disk, server):
            await done(server, disk.write, 8, memoryview(b"kept"))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(writing.run, disk.write, 0, memoryview(b"abcd"))
                await server.hear()  # and it is never answered
                forced.set()
                nursery.cancel_scope.cancel()

    with pytest.raises(ExceptionGroup) as caught:
        await stop_in_the_middle()
    assert "the last flush was given up" in str(caught.value.exceptions[0])
    assert not writing.is_done
    assert trio.current_time() - began < 1.5


@pytest.mark.logs("the last flush failed: .*given up")
async def test_a_forced_stop_of_several_disks_takes_no_longer_than_of_one(autojump_clock: MockClock) -> None:
    """Disks are closed one after the other; each gave its dead store half a second of its own."""
    forced = trio.Event()

    async def stop_all() -> None:
        async with AsyncExitStack() as stack:
            for _ in range(8):
                disk, server = await stack.enter_async_context(opened(Network(), forced_stop=forced, on_failure="hold"))
                await done(server, disk.write, 8, memoryview(b"kept"))
            forced.set()
            began.append(trio.current_time())

    began: list[float] = []
    with pytest.raises(ExceptionGroup):
        await stop_all()
    assert trio.current_time() - began[0] < 1


async def test_a_forced_stop_still_flushes_what_can_be(network: Network, autojump_clock: MockClock) -> None:
    forced = trio.Event()
    async with opened(network, forced_stop=forced) as (disk, server):
        await done(server, disk.write, 8, memoryview(b"kept"))
        forced.set()
        heard = await server.hear()
        assert heard.command == FLUSH
        await server.answer(heard)
        await wait_all_tasks_blocked()
        assert disk.try_flush(lambda error: None)


# ---- a daemon that died


@pytest.mark.logs("the last flush failed")
@pytest.mark.parametrize("under_way", ["a write", "a flush", ""], ids=["write", "flush", "all answered"])
async def test_a_successor_sends_again_what_was_acknowledged_and_forgets_the_rest(
    network: Network, autojump_clock: MockClock, tmp_path: Path, under_way: str
) -> None:
    survivors = Survivors()
    left: list[tuple[str, int]] = []

    async def serve_and_die() -> None:
        async with opened(network, survivors=survivors, state_dir=tmp_path) as (disk, server):
            await done(server, disk.write, 0, memoryview(b"flushed"))
            await done(server, disk.flush)
            await done(server, disk.write, 0, memoryview(b"kept"))
            async with trio.open_nursery() as nursery:
                if under_way == "a write":
                    start(nursery, disk.write, 2, memoryview(b"never answered"))
                    await server.hear()
                elif under_way == "a flush":  # it may fail yet
                    start(nursery, disk.flush)
                    await server.hear()
                left.extend((name, os.dup(descriptor)) for name, descriptor in survivors.kept())
                nursery.cancel_scope.cancel()
                network.close()

    with pytest.raises(ExceptionGroup):
        await serve_and_die()
    after = Network()
    began = trio.current_time()
    async with (
        opened(after, survivors=Survivors(left), state_dir=tmp_path) as (disk, server),
        trio.open_nursery() as nursery,
    ):
        reading = Reading(disk, 0, 4)
        nursery.start_soon(reading.run)
        heard = await server.hear(limit_s=100)
        assert (heard.command, heard.data) == (WRITE, b"kept")
        assert (trio.current_time() - began >= 29.9) == bool(
            under_way
        )  # what was under way may still arrive until then
        await server.answer(heard)
        heard = await server.hear()
        assert heard.command == READ
        await server.answer(heard, b"kept")
        await wait_all_tasks_blocked()
        await done(server, disk.flush)
        assert disk.statistics().values["unflushed_bytes"] == 0


async def test_a_memory_stays_when_the_store_cannot_be_opened_or_the_daemon_fails_on_a_bug(
    network: Network, tmp_path: Path
) -> None:
    survivors = Survivors()
    env = Environment("disk", tmp_path, survivors=survivors)

    async def fail(error: Exception) -> None:
        async with env.memory("disk/nbd", "nbd", 1, "store", 4096) as memory:
            memory.body[0] = 7
            raise error

    bug = ZeroDivisionError()
    for error in (StoreError("x", "y"), ExceptionGroup("of a nursery", [StoreError("x", "y")]), bug):
        with pytest.raises(type(error)):
            await fail(error)
    with trio.CancelScope() as scope:
        async with env.memory("disk/nbd", "nbd", 1, "store", 4096):
            scope.cancel()
            await trio.lowlevel.checkpoint()
    async with env.memory("disk/nbd", "nbd", 1, "store", 4096) as memory:
        assert memory.is_inherited
        assert memory.body[0] == 7
    assert survivors.kept() == []


async def test_a_memory_is_void_once_the_disk_was_open_without_it(network: Network, tmp_path: Path) -> None:
    survivors = Survivors()
    left: list[tuple[str, int]] = []
    async with opened(network, survivors=survivors, state_dir=tmp_path) as (disk, server):
        await done(server, disk.write, 0, memoryview(b"kept"))
        left.extend((name, os.dup(descriptor)) for name, descriptor in survivors.kept())
        await done(server, disk.flush)
    async with opened(Network(), state_dir=tmp_path):
        pass
    after = Network()
    async with opened(after, survivors=Survivors(left), state_dir=tmp_path) as (disk, server):
        assert (await done(server, disk.write, 0, memoryview(b"new"))).data == b"new"
        await done(server, disk.flush)


# ---- the memory


def test_memory_is_read_by_whoever_takes_it_over() -> None:
    body = memoryview(bytearray(body_size(1 << 20)))
    ours = Unflushed(body, 1 << 20)
    kept = [ours.put(Kind.WRITE, 512 * number, 512, memoryview(bytes([number]) * 512)) for number in range(4)]
    zero = ours.put(Kind.ZERO, 0, 1 << 40, None)
    assert None not in (*kept, zero)
    for change in (kept[0], kept[2], zero):
        ours.answer(change)  # type: ignore[arg-type]
    ours.send_again(kept[2])  # type: ignore[arg-type]
    ours.may_flush = True
    ours.drop(kept[0])  # type: ignore[arg-type]
    theirs = Unflushed(body, 1 << 20)
    assert theirs.may_flush
    found = [(c.kind, c.offset, c.is_answered, c.was_under_way, bytes(c.data or b"")[:1]) for c in theirs]
    assert found == [
        (Kind.WRITE, 512, False, True, b"\1"),
        (Kind.WRITE, 1024, True, True, b"\2"),
        (Kind.WRITE, 1536, False, True, b"\3"),
        (Kind.ZERO, 0, True, False, b""),
    ]
    assert theirs.answered == 2
    more = theirs.put(Kind.WRITE, 0, 512, memoryview(b"m" * 512))
    assert more is not None
    assert [bytes(change.data or b"")[:1] for change in theirs] == [b"\1", b"\2", b"\3", b"", b"m"]
    while theirs.put(Kind.ZERO, 0, 512, None) is not None:
        pass
    assert theirs.may_flush  # whichever slots are taken


def test_ring_gives_room_in_the_order_of_sending() -> None:
    unflushed = Unflushed(memoryview(bytearray(body_size(4096))), 4096)
    changes = [unflushed.put(Kind.WRITE, 0, 1000, memoryview(bytes([number]) * 1000)) for number in range(4)]
    assert unflushed.put(Kind.WRITE, 0, 1000, memoryview(bytes(1000))) is None
    unflushed.drop(changes[1])  # type: ignore[arg-type]
    assert unflushed.put(Kind.WRITE, 0, 1000, memoryview(bytes(1000))) is None  # the oldest holds its place
    unflushed.drop(changes[0])  # type: ignore[arg-type]
    wrapped = unflushed.put(Kind.WRITE, 0, 1500, memoryview(b"w" * 1500))
    assert wrapped is not None
    assert unflushed.put(Kind.WRITE, 0, 500, memoryview(bytes(500))) is None
    assert [bytes(change.data or b"")[:1] for change in unflushed] == [b"\2", b"\3", b"w"]
    for change in list(unflushed):
        unflushed.drop(change)
    assert unflushed.used_bytes == 0
    assert unflushed.put(Kind.WRITE, 0, 4096, memoryview(bytes(4096))) is not None


def test_plans() -> None:
    unflushed = Unflushed(memoryview(bytearray(body_size(4096))), 4096)

    def put(offset: int, length: int, *, answered: bool = True) -> Any:
        change = unflushed.put(Kind.ZERO, offset, length, None)
        assert change is not None
        if answered:
            unflushed.answer(change)
        return change

    first, second, third = put(0, 10), put(10, 10), put(15, 2)
    assert next_wave([first, second, third]) == [first, second]
    again, unanswered = put(0, 10), put(10, 10, answered=False)
    assert without_superseded([first, second, third, again, unanswered]) == [second, third, again, unanswered]
    ranges = Ranges([second, third, first, put(40, 10)])
    cases = [(0, 1), (19, 1), (20, 1), (20, 20), (20, 21), (39, 1), (49, 9), (50, 1)]
    assert [ranges.overlap(*case) for case in cases] == [True, True, False, False, True, False, True, False]
