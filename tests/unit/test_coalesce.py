"""The coalescer over a memory backend that is watched, held and made to fail: every scenario is also one for its mutants."""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from unittest import mock

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.backends.memory import Memory
from cachefs.errors import BackendError, CachefsError, NoSpaceError, PermanentError, StoreError
from cachefs.extent import Extent, ExtentKind
from cachefs.layers.base import Environment, Layer
from cachefs.layers.checked import Checked
from cachefs.layers.coalesce import Coalesce, CoalesceConfig
from cachefs.rangelock import RangeLocks
from cachefs.store.clusters import Clusters, Slot
from cachefs.testing.faults import Faults
from cachefs.testing.gate import Held
from cachefs.testing.model import Model, Write, assert_same, read, read_all, write
from cachefs.testing.stacks import Bench, Case, Stack, coalesce_layer
from cachefs.testing.strategies import patterns
from cachefs.testing.wrapper import SlowOnly

CLUSTER, SECTOR = 64 << 10, 512
SIZE = 20 * CLUSTER + 1000
FIVE = "360KiB"  # room for five clusters


class Watched(SlowOnly):
    """Notes the writes that arrive, and spoils nothing."""

    def __init__(self, child: Layer) -> None:
        super().__init__(child)
        self.writes: list[tuple[int, bytes]] = []
        self.reads = 0

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads += 1
        await self.child.read_into(offset, buffer)

    async def write(self, offset: int, data: memoryview) -> None:
        self.writes.append((offset, bytes(data)))
        await self.child.write(offset, data)
        assert bytes(data) == self.writes[-1][1], "what is being written was changed"


class Opened:
    """stack: open. below: the watched layer right over the backend. faults: above that."""

    def __init__(self, stack: Stack, below: Watched, faults: Faults, content: bytes) -> None:
        self.stack = stack
        self.top = stack.top
        self.gate = stack.gate
        self.below = below
        self.faults = faults
        self.model = Model(content)

    async def write(self, offset: int, data: bytes) -> None:
        await write(self.top, offset, data)
        self.model.apply(Write(offset, data))

    async def check(self) -> None:
        """What is read is what the model says."""
        assert_same(await read_all(self.top), self.model.content, 0)

    def check_outside(self) -> None:
        outside = self.stack.outside()
        assert outside is not None
        assert_same(outside, self.model.content, 0)


@asynccontextmanager
async def coalesced(*, buffer: str = "1MiB", max_delay: str = "1h", alignment: int = SECTOR) -> AsyncIterator[Opened]:
    layers = coalesce_layer(cluster="64KiB", buffer=buffer, max_delay=max_delay)
    made: list[tuple[Watched, Faults]] = []

    def between(backend: Layer) -> Layer:
        watched = Watched(backend)
        faults = Faults(watched)
        made.append((watched, faults))
        return faults

    with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as folder:
        bench = Bench(Case("coalesce", SIZE, layers, alignment=alignment), Path(folder))
        async with bench.open(between) as stack:
            yield Opened(stack, *made[0], bench.content)


# ---- gathering


@pytest.mark.parametrize("length", [512, 3000, 4096, 50000])
async def test_sequential_writes_are_one_aligned_write_for_each_cluster(length: int) -> None:
    count = 3 * CLUSTER // length + 2
    async with coalesced() as disk:
        for index in range(count):
            await disk.write(index * length, patterns(index % 250 + 1, length))
        await disk.top.flush()
        assert len(disk.below.writes) == -(-count * length // CLUSTER)
        assert all(offset % SECTOR == 0 and len(data) % SECTOR == 0 for offset, data in disk.below.writes)
        assert sorted(offset for offset, _ in disk.below.writes) == list(range(0, count * length, CLUSTER))
        disk.check_outside()


async def test_interleaved_streams_are_gathered_each_by_itself() -> None:
    async with coalesced() as disk:
        for step in range(2 * CLUSTER // 1024):
            for stream in range(4):
                await disk.write(stream * 4 * CLUSTER + step * 1024, patterns(step % 60 + stream * 60 + 1, 1024))
        await disk.top.flush()
        assert sorted(offset for offset, _ in disk.below.writes) == [
            (stream * 4 + index) * CLUSTER for stream in range(4) for index in range(2)
        ]
        assert {len(data) for _, data in disk.below.writes} == {CLUSTER}
        disk.check_outside()


async def test_a_finished_cluster_is_written_at_once_and_an_unfinished_one_is_not() -> None:
    async with coalesced() as disk:
        await disk.write(0, patterns(1, CLUSTER + 100))
        await wait_all_tasks_blocked()
        assert [(offset, len(data)) for offset, data in disk.below.writes] == [(0, CLUSTER)]


async def test_an_unfinished_cluster_is_written_after_max_delay(autojump_clock: trio.testing.MockClock) -> None:
    async with coalesced(max_delay="3s") as disk:
        await disk.write(100, patterns(1, 50))
        await trio.sleep(2.9)
        await disk.write(200, patterns(2, 50))  # which does not put it off
        assert not disk.below.writes
        await trio.sleep(0.2)
        assert len(disk.below.writes) == 1
        disk.check_outside()


@pytest.mark.parametrize("alignment", [1, 512, 4096])
async def test_nothing_but_what_was_there_surrounds_an_unaligned_write(alignment: int) -> None:
    async with coalesced(alignment=alignment) as disk:
        for offset, length in ((5000, 3), (5100, 100), (CLUSTER - 1, 2), (3 * CLUSTER + 511, 4098), (SIZE - 7, 7)):
            await disk.write(offset, patterns(offset % 250 + 1, length))
        await disk.check()
        await disk.top.flush()
        disk.check_outside()
        unit = max(SECTOR, alignment)
        for offset, data in disk.below.writes:
            assert offset % unit == 0
            assert len(data) % unit == 0 or offset + len(data) == SIZE


async def test_clusters_smaller_than_what_is_below_takes_are_refused() -> None:
    child = Checked(Memory("vm1/memory", SIZE, alignment=1 << 20))
    with pytest.raises(StoreError, match="make the clusters as large"):
        async with Coalesce.open(CoalesceConfig(cluster=CLUSTER), child, Environment("vm1", Path("/nonexistent"))):
            pass


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"cluster": "32KiB"}, "power of two from 64KiB to 4MiB"),
        ({"cluster": "96KiB"}, "power of two from 64KiB to 4MiB"),
        ({"cluster": "4MiB", "buffer": "16MiB"}, "give it 20MiB at least"),
        ({"max_delay": "0s"}, "greater than 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        CoalesceConfig.model_validate(options)


# ---- reading


async def reads_see_every_write(disk: Opened) -> None:
    """Before, during and after write-out, within a cluster and across its edges."""
    await disk.write(CLUSTER - 700, patterns(1, 2000))
    await disk.check()
    held = disk.gate.hold("write", once=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.top.flush)
        await held.wait_until_held()
        await disk.check()
        await disk.write(CLUSTER - 100, patterns(2, 300))
        await disk.check()
        assert await read(disk.top, CLUSTER - 701, 1500) == disk.model.content[CLUSTER - 701 : CLUSTER + 799]
        held.open()
    await disk.check()
    await disk.top.flush()
    await disk.check()
    disk.check_outside()


async def a_read_that_the_child_keeps_waiting_sees_what_was_written_before(disk: Opened) -> None:
    await disk.write(1000, patterns(1, 100))
    held = disk.gate.hold("read_into", end=CLUSTER, after=True)
    got: list[bytes] = []

    async def look() -> None:
        got.append(await read(disk.top, 0, 4096))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await held.wait_until_held()
        await disk.top.flush()
        held.open()
    assert_same(got[0], disk.model.content[:4096], 0)


# ---- write-out


async def appends_during_a_write_out_are_kept_and_not_torn(disk: Opened) -> None:
    await disk.write(0, patterns(1, CLUSTER))
    held = disk.gate.hold("write", start=CLUSTER, end=2 * CLUSTER)
    await disk.write(CLUSTER, patterns(2, 1024))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.top.flush)
        await held.wait_until_held()
        await disk.write(CLUSTER + 1024, patterns(3, 1024))  # append,
        await disk.write(CLUSTER + 100, patterns(4, 200))  # and over what is being written
        await disk.write(500, patterns(5, 1000))
        await disk.check()
        held.open()
    await disk.check()
    await disk.top.flush()
    disk.check_outside()


async def failed_write_outs_fail_every_flush_until_one_succeeds(disk: Opened) -> None:
    await disk.write(100, patterns(1, 1000))
    await disk.write(5 * CLUSTER, patterns(2, 1000))
    rule = disk.faults.add("write", start=0, end=CLUSTER, once=False)
    for _ in range(3):
        with pytest.raises(BackendError) as caught:
            await disk.top.flush()
        assert caught.value.errno == errno.EIO
        assert disk.top.pending_error() is not None
        await disk.check()
    await disk.write(300, patterns(3, 1000))
    disk.faults.rules.clear()
    assert rule.hits == 3
    await disk.top.flush()
    assert disk.top.pending_error() is None
    disk.check_outside()


async def writes_during_a_write_out_that_fails_stay_newer(disk: Opened) -> None:
    await disk.write(0, patterns(1, 2000))
    disk.faults.add("write")
    held = disk.gate.hold("write")
    async with trio.open_nursery() as nursery:

        async def flush() -> None:
            with pytest.raises(BackendError):
                await disk.top.flush()

        nursery.start_soon(flush)
        await held.wait_until_held()
        await disk.write(1000, patterns(2, 2000))
        held.open()
    await disk.check()
    await disk.top.flush()
    disk.check_outside()


@pytest.mark.logs("a write-out failed")
async def test_no_space_is_told_as_such_and_goes_away_by_itself(autojump_clock: trio.testing.MockClock) -> None:
    async with coalesced() as disk:
        await disk.write(0, patterns(1, CLUSTER))
        disk.faults.add("write", NoSpaceError("disk/memory", "full"), once=False)
        with pytest.raises(NoSpaceError):
            await disk.top.flush()
        disk.faults.rules.clear()
        await trio.sleep(1.1)
        assert disk.top.pending_error() is None
        disk.check_outside()


@pytest.mark.logs("a write-out failed", "a bug in the write-out")
async def test_a_bug_below_costs_flushes_and_no_bytes() -> None:
    async with coalesced() as disk:
        await disk.write(0, patterns(1, 100))
        bug = mock.patch.object(Watched, "write", mock.AsyncMock(side_effect=ZeroDivisionError))
        with bug, pytest.raises(BackendError, match="ZeroDivisionError"):
            await disk.top.flush()
        await disk.top.flush()
        disk.check_outside()


@pytest.mark.logs("a write-out failed", "the last flush failed")
async def test_what_cannot_be_written_at_close_is_an_error() -> None:
    async def write_and_close() -> None:
        async with coalesced() as disk:
            await disk.write(0, patterns(1, 100))
            disk.faults.add("write", once=False)

    with pytest.raises(BackendError, match="made to fail"):
        await write_and_close()


async def test_what_is_on_its_way_goes_down_also_when_all_is_cancelled() -> None:
    """As when another disk's bug ends the daemon: whoever takes over must not find the memory gone and bytes missing."""
    with trio.CancelScope() as everything:
        async with coalesced() as disk:
            await disk.write(100, patterns(1, 1000))
            held = disk.gate.hold("write")
            await disk.write(3 * CLUSTER, patterns(2, CLUSTER))
            await held.wait_until_held()
            everything.cancel()
            held.open()
            await trio.sleep_forever()
    disk.check_outside()


# ---- flush


async def a_flush_waits_for_the_write_out_under_way(disk: Opened) -> None:
    held = disk.gate.hold("write")
    await disk.write(0, patterns(1, CLUSTER))
    await held.wait_until_held()
    flushed = trio.Event()

    async def flush() -> None:
        await disk.top.flush()
        flushed.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flush)
        await wait_all_tasks_blocked()
        assert not flushed.is_set(), "the flush returned before the write-out did"
        held.open()
    disk.check_outside()


async def a_flush_has_what_was_written_beside_a_write_out(disk: Opened) -> None:
    held = disk.gate.hold("write")
    await disk.write(0, patterns(1, CLUSTER))
    await held.wait_until_held()
    await disk.write(10, patterns(2, 100))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.top.flush)
        await wait_all_tasks_blocked()
        held.open()
    disk.check_outside()


async def test_an_endless_writer_does_not_keep_a_flush_from_returning() -> None:
    async with coalesced() as disk, trio.open_nursery() as nursery:

        async def write_for_ever() -> None:
            while True:
                await write(disk.top, 0, patterns(1, CLUSTER + 5000))
                await trio.lowlevel.checkpoint()

        nursery.start_soon(write_for_ever)
        for _ in range(3):
            await trio.lowlevel.checkpoint()
            with trio.fail_after(5):
                await disk.top.flush()
        nursery.cancel_scope.cancel()


async def test_a_flush_that_the_child_fails_fails() -> None:
    async with coalesced() as disk:
        await disk.write(0, patterns(1, 100))
        disk.faults.add("flush")
        with pytest.raises(BackendError):
            await disk.top.flush()
        assert disk.below.writes
        await disk.top.flush()


# ---- room


async def test_writers_wait_when_the_buffer_is_full_and_go_on() -> None:
    async with coalesced(buffer=FIVE) as disk:
        held = disk.gate.hold("write", once=False)
        done: list[int] = []

        async def one(index: int) -> None:
            await disk.write(index * CLUSTER + 100, patterns(index + 1, 1000))
            done.append(index)

        async with trio.open_nursery() as nursery:
            for index in range(12):
                nursery.start_soon(one, index)
                await wait_all_tasks_blocked()
            assert done == [0, 1, 2, 3, 4]
            await disk.check()
            held.open()
        assert sorted(done) == list(range(12))
        await disk.top.flush()
        disk.check_outside()


async def test_a_write_that_is_cancelled_while_it_waits_for_room_is_dropped() -> None:
    async with coalesced(buffer=FIVE) as disk:
        held = disk.gate.hold("write", once=False)
        for index in range(5):
            await disk.write(index * CLUSTER + 100, patterns(index + 1, 1000))
        with trio.move_on_after(0.01) as scope:
            await write(disk.top, 7 * CLUSTER, patterns(9, 1000))
        assert scope.cancelled_caught
        held.open()
        await disk.check()
        await disk.top.flush()
        disk.check_outside()


@pytest.mark.logs("a write-out failed")
async def test_a_buffer_full_of_what_cannot_be_written_is_an_error_and_no_hang() -> None:
    async with coalesced(buffer=FIVE) as disk:
        disk.faults.add("write", NoSpaceError("disk/memory", "full"), once=False)
        for index in range(5):
            await disk.write(index * CLUSTER + 100, patterns(index + 1, 1000))
        for _ in range(2):
            with trio.fail_after(5), pytest.raises(NoSpaceError):
                await write(disk.top, 9 * CLUSTER, patterns(9, 1000))
        await disk.write(CLUSTER, patterns(8, 500))  # what needs no room is taken
        await disk.check()
        disk.faults.rules.clear()
        await disk.write(9 * CLUSTER, patterns(9, 1000))
        await disk.top.flush()
        disk.check_outside()


@pytest.mark.logs("a write-out failed")
async def test_one_bad_place_does_not_keep_others_from_being_written() -> None:
    async with coalesced(buffer=FIVE) as disk:
        disk.faults.add("write", end=CLUSTER, once=False)
        for index in range(20):
            await disk.write(index * CLUSTER + 100, patterns(index + 1, 1000))
        await disk.check()
        disk.faults.rules.clear()
        await disk.top.flush()
        disk.check_outside()


# ---- past the buffer, when it is full and gathering does not pay


async def scatter_and_fill(disk: Opened) -> list[Held]:
    """Small write-outs, of late; then clusters 0 to 13 take every slot, and none but the last goes down until it is let go."""
    for index in range(24):
        await disk.write(index % 14 * CLUSTER, patterns(index + 1, 4096))
        await disk.top.flush()
    holds = [disk.gate.hold("write", start=index * CLUSTER, end=(index + 1) * CLUSTER) for index in range(13)]
    for index in range(14):
        await disk.write(index * CLUSTER + 100, patterns(index + 50, 512))
    return holds


async def crowd(disk: Opened) -> None:
    """Several clients at once go past the full buffer; then all of it is below."""
    holds = await scatter_and_fill(disk)
    held = disk.gate.hold("write", start=15 * CLUSTER, once=False)
    async with trio.open_nursery() as nursery:
        for index in range(15, 18):
            nursery.start_soon(disk.write, index * CLUSTER, patterns(index, 4096))
        await wait_all_tasks_blocked()
        for one in (held, *holds):
            one.open()
    await disk.top.flush()


async def what_goes_past_the_buffer_is_there(disk: Opened) -> None:
    holds = await scatter_and_fill(disk)
    before = len(disk.below.writes)
    with trio.fail_after(5):
        await disk.write(17 * CLUSTER + 512, patterns(1, 4096))
    assert disk.below.writes[before:] == [(17 * CLUSTER + 512, patterns(1, 4096))]
    await disk.check()
    assert disk.stack.coalesce is not None
    await disk.stack.coalesce.write(13 * CLUSTER, patterns(2, 4096))  # there was room for it all the time
    disk.model.apply(Write(13 * CLUSTER, patterns(2, 4096)))
    await disk.check()
    for held in holds:
        held.open()
    await disk.top.flush()
    disk.check_outside()


async def what_goes_past_the_buffer_waits_for_a_write_out_below_it(disk: Opened) -> None:
    holds = await scatter_and_fill(disk)  # cluster 0, bytes 100 to 612, is on its way down and held there
    await wait_all_tasks_blocked()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.write, 0, patterns(7, 4096))
        await wait_all_tasks_blocked()
        for held in holds:
            held.open()
    await disk.top.flush()
    await disk.check()
    disk.check_outside()


async def a_write_beside_one_past_the_buffer_stays_newer(disk: Opened) -> None:
    holds = await scatter_and_fill(disk)
    past = disk.gate.hold("write", start=17 * CLUSTER)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.write, 17 * CLUSTER, patterns(1, 4096))
        await past.wait_until_held()
        for held in holds:
            held.open()
        await wait_all_tasks_blocked()
        await write(disk.top, 17 * CLUSTER + 100, patterns(2, 512))
        nursery.start_soon(disk.top.flush)
        await wait_all_tasks_blocked()
        past.open()
    disk.model.apply(Write(17 * CLUSTER + 100, patterns(2, 512)))
    await disk.check()
    await disk.top.flush()
    disk.check_outside()


async def test_scattered_writes_of_several_clients_go_on_past_the_buffer_and_those_of_one_do_not() -> None:
    async with coalesced() as disk:
        await crowd(disk)
        assert disk.stack.coalesce is not None
        clusters = disk.stack.coalesce.clusters
        assert clusters.free == clusters.slots
        await disk.write(18 * CLUSTER, patterns(1, 4096))
        assert disk.below.writes[-1] == (18 * CLUSTER, patterns(1, 4096))
        for index in range(24):
            await disk.write(index % 14 * CLUSTER + 8192, patterns(index + 1, 4096))
        assert clusters.buffered_bytes > 0
        await disk.top.flush()
        disk.check_outside()


async def test_a_stream_among_scattered_writes_is_gathered_from_its_second_write_on() -> None:
    async with coalesced() as disk:
        await crowd(disk)
        before = len(disk.below.writes)
        for offset in range(18 * CLUSTER, 20 * CLUSTER, 4096):
            await disk.write(offset, patterns(offset // 4096 % 250 + 1, 4096))
        await disk.top.flush()
        lengths = [len(data) for _, data in disk.below.writes[before:]]
        assert sorted(lengths) == [4096, CLUSTER - 4096, CLUSTER]
        disk.check_outside()


async def test_a_write_past_the_buffer_that_fails_tells_its_writer_alone() -> None:
    async with coalesced() as disk:
        holds = await scatter_and_fill(disk)
        disk.faults.add("write", start=17 * CLUSTER)
        with pytest.raises(PermanentError):
            await write(disk.top, 17 * CLUSTER, patterns(1, 4096))
        for held in holds:
            held.open()
        await disk.top.flush()
        disk.check_outside()


async def test_a_stream_that_outruns_its_store_is_gathered_all_the_same() -> None:
    async with coalesced(buffer=FIVE) as disk, trio.open_nursery() as nursery:
        held = disk.gate.hold("write", once=False)

        async def stream() -> None:
            for offset in range(0, 20 * CLUSTER, 4096):
                await disk.write(offset, patterns(offset // 4096 % 250 + 1, 4096))

        nursery.start_soon(stream)
        await wait_all_tasks_blocked()
        held.open()
    assert {len(data) for _, data in disk.below.writes} == {CLUSTER}
    disk.check_outside()


# ---- trim and zero


async def a_trim_comes_after_the_write_out_under_way(disk: Opened) -> None:
    held = disk.gate.hold("write")
    await disk.write(0, patterns(1, CLUSTER))
    await held.wait_until_held()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.top.trim, 1024, 10240)
        await wait_all_tasks_blocked()
        held.open()
    disk.model.content[1024:11264] = bytes(10240)
    await disk.check()
    await disk.top.flush()
    disk.check_outside()


async def a_write_beside_a_trim_is_kept(disk: Opened) -> None:
    """It comes last: the trim is held before, or after, the child has done it."""
    for after in (False, True):
        await disk.write(4096, patterns(1, 4096))
        held = disk.gate.hold("trim", after=after)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.top.trim, 0, CLUSTER)
            await held.wait_until_held()
            disk.model.content[:CLUSTER] = bytes(CLUSTER)
            await disk.write(5000, patterns(2, 100))
            assert await read(disk.top, 5000, 100) == patterns(2, 100)
            held.open()
        await disk.check()
        await disk.top.flush()
        disk.check_outside()


async def a_trim_that_fails_leaves_what_was_written_or_zeros(disk: Opened) -> None:
    before = bytes(disk.model.content)
    await disk.write(4096, patterns(1, 8192))
    disk.faults.add("trim")
    with pytest.raises(PermanentError):
        await disk.top.trim(6144, 4096)
    for _ in range(2):
        got = await read_all(disk.top)
        assert_same(got[:4096], before[:4096], 0)
        assert_same(got[4096:6144], patterns(1, 2048), 4096)
        for at in range(6144, 10240, SECTOR):
            sector = got[at : at + SECTOR]
            assert sector in (bytes(SECTOR), disk.model.content[at : at + SECTOR]), f"the old bytes are back at {at}"
        await disk.top.flush()


async def test_trimmed_clusters_are_not_written_any_more() -> None:
    async with coalesced() as disk:
        await disk.write(100, patterns(1, 1000))
        await disk.write(CLUSTER, patterns(2, 1000))
        await disk.top.trim(0, 2 * CLUSTER)
        await disk.top.flush()
        assert not disk.below.writes
        disk.model.content[: 2 * CLUSTER] = bytes(2 * CLUSTER)
        disk.check_outside()


async def test_what_a_trim_left_over_is_written_in_time(autojump_clock: trio.testing.MockClock) -> None:
    async with coalesced(max_delay="3s") as disk:
        await disk.write(0, patterns(1, 4096))
        held = disk.gate.hold("trim")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.top.trim, 0, 2048)
            await held.wait_until_held()
            await trio.sleep(4)
            held.open()
        await trio.sleep(4)
        disk.model.content[:2048] = bytes(2048)
        disk.check_outside()


# ---- extents


async def test_what_is_buffered_over_a_hole_is_data_also_when_it_is_written_out_meanwhile() -> None:
    async with coalesced() as disk:
        await disk.top.trim(0, SIZE)
        disk.model.content[:] = bytes(SIZE)
        await disk.write(CLUSTER + 4096, patterns(1, 100))
        held = disk.gate.hold("extents", after=True)
        async with trio.open_nursery() as nursery:

            async def look() -> None:
                found = await disk.top.extents(0, SIZE)
                assert [one.kind for one in found if one.offset <= CLUSTER + 4096 < one.end] == [ExtentKind.DATA]
                assert found[0].kind is not ExtentKind.DATA

            nursery.start_soon(look)
            await held.wait_until_held()
            await disk.top.flush()
            held.open()


@pytest.mark.timeout(20)
async def test_the_map_of_a_huge_disk_costs_what_is_buffered_and_not_its_size(tmp_path: Path) -> None:
    size = 1 << 50
    below = Watched(Checked(Memory("disk/memory", size, SECTOR, {})))
    hole = mock.AsyncMock(return_value=[Extent(0, size, ExtentKind.HOLE)])
    with mock.patch.object(below, "extents", hole):
        async with Coalesce.open(CoalesceConfig(), below, Environment("disk", tmp_path)) as layer:
            await layer.write(size - 100, patterns(1, 100))
            found = await layer.extents(0, size)
    assert [(one.offset, one.kind) for one in found] == [(0, ExtentKind.HOLE), (size - SECTOR, ExtentKind.DATA)]


# ---- mutants: each of them is noticed by the scenario that was written for it

Scenario = Callable[[Opened], Awaitable[None]]

SCENARIOS: tuple[Scenario, ...] = (
    reads_see_every_write,
    a_read_that_the_child_keeps_waiting_sees_what_was_written_before,
    appends_during_a_write_out_are_kept_and_not_torn,
    failed_write_outs_fail_every_flush_until_one_succeeds,
    writes_during_a_write_out_that_fails_stay_newer,
    a_flush_waits_for_the_write_out_under_way,
    a_flush_has_what_was_written_beside_a_write_out,
    what_goes_past_the_buffer_is_there,
    a_write_beside_one_past_the_buffer_stays_newer,
    what_goes_past_the_buffer_waits_for_a_write_out_below_it,
    a_trim_comes_after_the_write_out_under_way,
    a_write_beside_a_trim_is_kept,
    a_trim_that_fails_leaves_what_was_written_or_zeros,
)


@pytest.mark.logs("a write-out failed", "the last flush failed")
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.__name__)
async def test_nothing_is_lost_when(scenario: Scenario) -> None:
    async with coalesced() as disk:
        await scenario(disk)


def _drop(clusters: Clusters, slot: Slot) -> None:
    """In place of `thaw`: what could not be written is forgotten."""
    clusters.complete(slot)


def _freeze_nothing(clusters: Clusters, cluster: int) -> Slot | None:
    """Writes still go to the slot that is being written out."""
    slot = _freeze(clusters, cluster)
    if slot is not None:
        clusters.open[cluster] = slot
    return slot


def _complete_all(clusters: Clusters, slot: Slot) -> None:
    clusters.open.pop(slot.cluster, None)
    _complete(clusters, slot)


def _forget_newer(clusters: Clusters, slot: Slot) -> None:
    """In place of `complete`: what came meanwhile goes with it."""
    _complete(clusters, slot)
    newer = clusters.open.pop(slot.cluster, None)
    if newer is not None:
        clusters._give_back(newer)


async def _flush_open_ones(layer: Coalesce) -> None:
    for write_out in [layer.write_outs.ask(cluster) for cluster in layer.clusters.open]:
        await write_out.done.wait()
        if write_out.error is not None:
            raise write_out.error
    await layer.child.flush()


async def _flush_and_wait(layer: Coalesce) -> None:
    """For nothing."""
    for cluster in [*layer.clusters.open]:
        layer.write_outs.ask(cluster)
    await layer.child.flush()


async def _flush_and_raise_nothing(layer: Coalesce) -> None:
    try:
        await _flush(layer)
    except CachefsError:
        await layer.child.flush()


def _merge_the_wrong_way(clusters: Clusters, slot: Slot) -> None:
    newer = clusters.open.get(slot.cluster)
    if newer is not None:
        clusters.open[slot.cluster], clusters.frozen[slot.cluster] = slot, newer
        slot = newer
    _thaw(clusters, slot)


async def _clear_at_once(
    layer: Coalesce, offset: int, length: int, below: Callable[[int, int], Awaitable[None]]
) -> None:
    locks, layer.write_outs.locks = layer.write_outs.locks, RangeLocks()
    await _clear(layer, offset, length, below)
    layer.write_outs.locks = locks


def _drop_early(slot: Slot, start: int, end: int) -> None:
    """In place of `zero`: the bytes of the child show, until it has trimmed them."""
    slot.drop(start, end)


async def _read_late(layer: Coalesce, offset: int, buffer: memoryview) -> None:
    whole = memoryview(bytearray(layer._size))
    await layer._read_below(0, whole)
    buffer[:] = whole[offset : offset + len(buffer)]
    layer.clusters.overlay(offset, buffer)


async def _write_through_over_what_is_here(layer: Coalesce, cluster: int, offset: int, data: memoryview) -> bool:
    hold = await layer.write_outs.locks.acquire(offset, offset + len(data))
    await layer.child.write(offset, data)
    layer.write_outs.locks.release(hold)
    return True


async def _write_through_without_lock(layer: Coalesce, cluster: int, offset: int, data: memoryview) -> bool:
    await layer.child.write(offset, data)
    return True


async def _write_through_beside_a_write_out(layer: Coalesce, cluster: int, offset: int, data: memoryview) -> bool:
    if cluster in layer.clusters.open:
        return False
    await layer.child.write(offset, data)
    return True


_complete, _thaw, _freeze = Clusters.complete, Clusters.thaw, Clusters.freeze
_flush, _clear = Coalesce.flush, Coalesce._clear

Patch = tuple[object, str, object]
MUTANTS: dict[str, tuple[tuple[Patch, ...], Scenario]] = {
    "dropped-on-failure": (((Clusters, "thaw", _drop),), failed_write_outs_fail_every_flush_until_one_succeeds),
    "append-forgotten": (((Clusters, "complete", _forget_newer),), appends_during_a_write_out_are_kept_and_not_torn),
    "append-into-the-frozen": (
        ((Clusters, "freeze", _freeze_nothing), (Clusters, "complete", _complete_all)),
        appends_during_a_write_out_are_kept_and_not_torn,
    ),
    "older-over-newer": (((Clusters, "thaw", _merge_the_wrong_way),), writes_during_a_write_out_that_fails_stay_newer),
    "flush-of-open-ones": (((Coalesce, "flush", _flush_open_ones),), a_flush_waits_for_the_write_out_under_way),
    "flush-does-not-wait": (((Coalesce, "flush", _flush_and_wait),), a_flush_has_what_was_written_beside_a_write_out),
    "flush-hides-errors": (
        ((Coalesce, "flush", _flush_and_raise_nothing),),
        failed_write_outs_fail_every_flush_until_one_succeeds,
    ),
    "past-the-buffer-below-older-bytes": (
        ((Coalesce, "_write_through", _write_through_over_what_is_here),),
        what_goes_past_the_buffer_is_there,
    ),
    "past-the-buffer-without-lock": (
        ((Coalesce, "_write_through", _write_through_without_lock),),
        a_write_beside_one_past_the_buffer_stays_newer,
    ),
    "past-the-buffer-beside-a-write-out": (
        ((Coalesce, "_write_through", _write_through_beside_a_write_out),),
        what_goes_past_the_buffer_waits_for_a_write_out_below_it,
    ),
    "trim-without-lock": (((Coalesce, "_clear", _clear_at_once),), a_trim_comes_after_the_write_out_under_way),
    "dropped-before-trim": (((Slot, "zero", _drop_early),), a_trim_that_fails_leaves_what_was_written_or_zeros),
    "buffer-read-last": (
        ((Coalesce, "read_into", _read_late),),
        a_read_that_the_child_keeps_waiting_sees_what_was_written_before,
    ),
}


@pytest.mark.logs("a write-out failed", "the last flush failed", "a bug in the write-out")
@pytest.mark.parametrize("mutant", MUTANTS)
async def test_the_scenario_notices(mutant: str) -> None:
    patches, scenario = MUTANTS[mutant]

    async def run() -> None:
        async with coalesced() as disk:
            try:
                await scenario(disk)
            finally:
                disk.gate.open_all()

    with contextlib.ExitStack() as stack:
        for owner, name, instead in patches:
            stack.enter_context(mock.patch.object(owner, name, instead))
        with pytest.raises(BaseExceptionGroup) as caught:
            await run()
    assert caught.group_contains((AssertionError, pytest.fail.Exception))
