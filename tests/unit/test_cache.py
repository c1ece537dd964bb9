"""The cache's flights: who fetches what, who waits for whom, and what is kept of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.errors import PermanentError
from cachefs.layers.cache import MAX_FETCH
from cachefs.pool.evict import Sieve
from cachefs.pool.summap import State
from cachefs.testing.caches import CacheBench, disk_bytes
from cachefs.testing.model import read, read_all
from cachefs.testing.strategies import patterns

BLOCK = 4096
SIZE = 40 * BLOCK + 1000
CONTENT = patterns(7, SIZE)


@pytest.fixture
def bench(folder: Path) -> CacheBench:
    return CacheBench(folder, CONTENT, block_size=BLOCK)


def part(start: int, end: int) -> bytes:
    """What blocks *start* to *end* hold."""
    return CONTENT[start * BLOCK : end * BLOCK]


# ---- one fetch for all


@pytest.mark.parametrize("disks", [1, 2])
async def test_cache_fetches_a_block_once_for_two_readers_that_both_wait(bench: CacheBench, disks: int) -> None:
    async with bench.open(disks) as opened:
        held = opened.disk.below.hold("read_into")
        got: list[bytes] = []

        async def look(number: int, offset: int) -> None:
            got.append(await read(opened.disks[number % disks].top, offset, 100))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look, 0, 10)
            await held.wait_until_held()
            nursery.start_soon(look, 1, 10)
            await wait_all_tasks_blocked()
            assert not got
            held.open()
        assert got == [CONTENT[10:110]] * 2
        assert sum(len(disk.recorder.reads) for disk in opened.disks) == 1


async def test_cache_reads_the_image_once_for_eight_disks_that_read_all_of_it(bench: CacheBench) -> None:
    async with bench.open(8) as opened:

        async def boot(top: int) -> None:
            for block in range(bench.blocks):
                at = (block * 7 + top) % bench.blocks * BLOCK
                assert await read(opened.disks[top].top, at, min(BLOCK, SIZE - at)) == CONTENT[at : at + BLOCK]

        async with trio.open_nursery() as nursery:
            for top in range(8):
                nursery.start_soon(boot, top)
        assert opened.read_below == SIZE


async def test_cache_warms_every_disk_over_the_image(bench: CacheBench) -> None:
    async with bench.open(2) as opened:
        await read_all(opened.top)
        await opened.settled()
        assert await read_all(opened.disks[1].top) == CONTENT
        assert opened.disks[1].top.try_read_into(0, memoryview(bytearray(BLOCK)))
        assert opened.disks[1].recorder.read_bytes == 0


async def test_cache_keeps_images_apart_that_have_other_identities(folder: Path) -> None:
    async with CacheBench(folder, CONTENT, block_size=BLOCK).open() as opened:
        await read_all(opened.top)
        await opened.settled()
        other = CacheBench(folder, patterns(9, SIZE), block_size=BLOCK)
        other.identity = type(other.identity)("file", {"inode": "8"})
        async with other.open_disk(opened.pool, "other") as disk:
            assert await read_all(disk.top) == patterns(9, SIZE)
            assert disk.recorder.read_bytes == SIZE


async def test_cache_joins_neighbours_that_are_read_at_the_same_time_into_one_request(bench: CacheBench) -> None:
    async with bench.open() as opened:
        async with trio.open_nursery() as nursery:
            for block in (3, 4, 5, 9):
                nursery.start_soon(read, opened.top, block * BLOCK + 5, 10)
        asked = opened.disk.recorder.reads
        assert len(asked) <= 3  # the tasks run in any order: two flights that grow towards each other stay two
        assert max(length for at, length in asked if at <= 5 * BLOCK) >= 2 * BLOCK


async def test_cache_asks_below_for_a_whole_request_at_once_up_to_the_longest(folder: Path) -> None:
    size = 2 * MAX_FETCH + 3 * BLOCK
    async with CacheBench(folder, patterns(7, size), block_size=BLOCK).open() as opened:
        assert await read_all(opened.top) == patterns(7, size)
        assert (0, MAX_FETCH) in opened.disk.recorder.reads
        assert opened.read_below == size
        assert max(length for _, length in opened.disk.recorder.reads) == MAX_FETCH


async def test_cache_fetches_nothing_twice_for_a_request_over_kept_and_missing_blocks(bench: CacheBench) -> None:
    async with bench.open() as opened:
        for block in (2, 5):
            await read(opened.top, block * BLOCK, 1)
        await opened.settled()
        opened.disk.recorder.reads.clear()
        assert await read(opened.top, BLOCK, 6 * BLOCK) == part(1, 7)
        fetched = {
            block
            for at, length in opened.disk.recorder.reads
            for block in range(at // BLOCK, -(-(at + length) // BLOCK))
        }
        assert {2, 5}.isdisjoint(fetched) or opened.read_below < 6 * BLOCK
        assert opened.disk.cache.statistics().values["corrupt_blocks"] == 0


# ---- the pool is not on the way to an answer


async def test_cache_answers_before_the_block_is_in_the_pool(bench: CacheBench) -> None:
    async with bench.open(2) as opened:
        held = bench.gate.hold("write")
        with trio.fail_after(5):
            assert await read(opened.top, 10, 20) == CONTENT[10:30]
        await held.wait_until_held()
        assert opened.image.map.state(0) is not State.DATA
        with trio.fail_after(5):  # from the flight, which waits to be written
            assert await read(opened.disks[1].top, 100, 20) == CONTENT[100:120]
        assert opened.read_below == opened.disk.recorder.read_bytes <= 2 * BLOCK
        held.open()
        await opened.settled()
        assert opened.image.map.state(0) is State.DATA


async def test_cache_goes_on_with_a_fetch_whose_reader_was_cancelled(bench: CacheBench) -> None:
    async with bench.open(2) as opened:
        held = opened.disk.below.hold("read_into")
        got: list[bytes] = []

        async def look() -> None:
            got.append(await read(opened.disks[1].top, 10, 20))

        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as first:
                async with trio.open_nursery() as inner:
                    inner.start_soon(read, opened.top, 0, 100)
                    await held.wait_until_held()
                    nursery.start_soon(look)
                    await wait_all_tasks_blocked()
                    first.cancel()
            assert first.cancelled_caught
            assert not got
            held.open()
        assert got == [CONTENT[10:30]]
        await opened.settled()
        assert opened.image.map.state(0) is State.DATA
        assert len(opened.disk.recorder.reads) == 1


async def test_cache_keeps_what_was_fetched_for_a_reader_that_is_gone(bench: CacheBench) -> None:
    async with bench.open() as opened:
        held = opened.disk.below.hold("read_into")
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, opened.top, 0, 100)
                await held.wait_until_held()
                scope.cancel()
        held.open()
        await opened.settled()
        assert opened.top.try_read_into(0, memoryview(bytearray(BLOCK)))


async def test_cache_disk_that_is_closed_fails_nobody_who_joined_its_fetch(bench: CacheBench) -> None:
    async with bench.open_pool() as pool, bench.open_disk(pool) as staying:
        got: list[bytes] = []

        async def look() -> None:
            got.append(await read(staying.top, 10, 20))

        async with trio.open_nursery() as nursery, bench.open_disk(pool) as leaving:
            held = leaving.below.hold("read_into")
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as inner:
                    inner.start_soon(read, leaving.top, 0, 100)
                    await held.wait_until_held()
                    scope.cancel()
            nursery.start_soon(look)
            await wait_all_tasks_blocked()
            assert not got
        assert got == [CONTENT[10:30]]


# ---- errors from below


async def test_cache_fails_only_the_reader_whose_own_bytes_cannot_be_read(bench: CacheBench) -> None:
    """One request for blocks 3 to 5; the sectors of block 4 are bad. Three readers, one for each."""
    async with bench.open() as opened:
        bad = PermanentError("base", "bad sector")
        opened.disk.faults.add("read_into", bad, start=4 * BLOCK, end=5 * BLOCK, once=False)
        told: dict[int, object] = {}

        async def look(block: int) -> None:
            try:
                told[block] = await read(opened.top, block * BLOCK + 5, 100)
            except PermanentError as exc:
                told[block] = str(exc)

        async with trio.open_nursery() as nursery:
            for block in (3, 4, 5):
                nursery.start_soon(look, block)
        assert told[3] == CONTENT[3 * BLOCK + 5 :][:100]
        assert told[4] == "base: bad sector"
        assert told[5] == CONTENT[5 * BLOCK + 5 :][:100]
        await opened.settled()
        assert opened.image.map.state(4) is State.ABSENT


async def test_cache_fetches_anew_what_could_not_be_fetched(bench: CacheBench) -> None:
    async with bench.open() as opened:
        opened.disk.faults.add("read_into", start=0, end=BLOCK)
        opened.disk.faults.add("read_into", start=0, end=BLOCK)  # met by the second read, which the reader does itself
        with pytest.raises(PermanentError, match="made to fail"):
            await read(opened.top, 0, 100)
        assert await read(opened.top, 0, 100) == CONTENT[:100]
        await opened.settled()
        assert opened.image.map.state(0) is State.DATA
        assert opened.disk.cache.statistics().values["failed_fetches"] == 1


async def test_cache_error_of_what_was_only_read_ahead_fails_nobody(folder: Path) -> None:
    size = 8 << 20
    bench = CacheBench(folder, patterns(7, size), block_size=BLOCK)
    async with bench.open() as opened:
        bad = 5 << 20
        opened.disk.faults.add("read_into", start=bad, end=size, once=False)
        at = 0
        while at + (64 << 10) <= bad:
            assert await read(opened.top, at, 64 << 10) == bench.content[at : at + (64 << 10)]
            at += 64 << 10
        assert opened.disk.faults.rules[0][0].hits  # it did read ahead, into the bad part
        with pytest.raises(PermanentError):
            await read(opened.top, bad, 1)


@pytest.mark.logs("a fetch of blocks 0 to . failed")
async def test_cache_bug_in_a_fetch_is_logged_and_the_reader_asks_for_itself(
    bench: CacheBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench.open() as opened:

        async def broken(*arguments: object) -> None:
            raise RuntimeError("made to fail")

        monkeypatch.setattr(opened.disk.cache, "_fill", broken)
        assert await read(opened.top, 0, 100) == CONTENT[:100]
        monkeypatch.undo()
        assert await read(opened.top, 0, 100) == CONTENT[:100]


# ---- zeros


def sparse(size: int, *data: tuple[int, int]) -> bytes:
    content = bytearray(size)
    for start, end in data:
        content[start:end] = patterns(3, end - start)
    return bytes(content)


async def test_cache_records_holes_as_zeros_without_fetching_or_storing_them(folder: Path) -> None:
    content = sparse(2 << 20, (0, 65536), (1 << 20, (1 << 20) + 65536))
    async with CacheBench(folder, content, block_size=BLOCK).open() as opened:
        assert await read_all(opened.top) == content
        await opened.settled()
        assert opened.read_below == 2 * 65536
        assert opened.image.map.held == 32
        assert opened.image.data.allocated_bytes() == 2 * 65536
        assert opened.image.map.state(100) is State.ZERO
        assert opened.top.try_read_into(65000, memoryview(bytearray(20000)))
        assert opened.disk.recorder.asked <= 3
        assert isinstance(opened.pool.policy, Sieve)
        assert len(opened.pool.policy._ahead) + opened.pool.policy.ring_blocks == 32  # zeros take no memory there


async def test_cache_asks_once_for_the_holes_of_the_whole_image(folder: Path) -> None:
    content = sparse(4 << 20, (0, 65536))
    async with CacheBench(folder, content, block_size=BLOCK).open() as opened:
        for at in range(0, len(content), 256 << 10):
            await read(opened.top, at, 100)
        assert opened.disk.recorder.asked == 1


async def test_cache_gives_no_room_to_zeros_that_only_reading_shows(folder: Path) -> None:
    content = sparse(10 * BLOCK, (0, BLOCK), (9 * BLOCK, 10 * BLOCK))  # one chunk of memory: the backend knows no hole
    async with CacheBench(folder, content, block_size=BLOCK).open() as opened:
        assert await read_all(opened.top) == content
        await opened.settled()
        assert opened.read_below == len(content)
        assert opened.image.map.held == len(opened.pool.policy) == 2
        assert opened.image.data.allocated_bytes() == 2 * BLOCK
        assert opened.pool.account.used >= disk_bytes(opened.pool.path)
        opened.disk.recorder.reads.clear()
        assert await read_all(opened.top) == content
        assert opened.read_below == 0


async def test_cache_remembers_zeros_when_it_is_opened_again(folder: Path) -> None:
    content = sparse(2 << 20, (0, 65536))
    bench = CacheBench(folder, content, block_size=BLOCK)
    async with bench.open() as opened:
        await read_all(opened.top)
        await opened.settled()
    async with bench.open() as opened:
        assert await read_all(opened.top) == content
        assert opened.read_below == 0
        assert opened.disk.recorder.asked == 0


async def test_cache_does_without_the_extents_of_a_child_that_fails_to_tell_them(folder: Path) -> None:
    content = sparse(1 << 20, (0, 65536))
    async with CacheBench(folder, content, block_size=BLOCK).open() as opened:
        opened.disk.faults.add("extents", once=False)
        assert await read_all(opened.top) == content


# ---- what others see


async def test_cache_hint_to_prefetch_fills_the_pool(bench: CacheBench) -> None:
    async with bench.open() as opened:
        await opened.top.prefetch(BLOCK + 1, 2 * BLOCK)
        await wait_all_tasks_blocked()
        await opened.settled()
        assert [opened.image.map.state(block) is State.DATA for block in range(5)] == [False, True, True, True, False]


async def test_cache_statistics_say_what_was_hit_and_what_was_fetched(bench: CacheBench) -> None:
    async with bench.open() as opened:
        await read(opened.top, 0, BLOCK)
        await opened.settled()
        await read(opened.top, 0, BLOCK)
        values = opened.disk.cache.statistics().values
        assert (values["hits"], values["misses"], values["bypassed"]) == (1, 1, 0)
        assert values["fetches"] == 1
        assert values["fetched_bytes"] == opened.read_below
        assert values["bypass"] == "no"


async def test_cache_of_one_block_and_less(folder: Path) -> None:
    for size in (1, 511, BLOCK, BLOCK + 1):
        bench = CacheBench(folder / str(size), patterns(5, size), block_size=BLOCK)
        for _ in range(2):
            async with bench.open() as opened:
                assert await read_all(opened.top) == bench.content
                await opened.settled()
                assert await read_all(opened.top) == bench.content


async def test_cache_keeps_the_image_when_a_disk_is_closed_and_opened(bench: CacheBench) -> None:
    async with bench.open_pool() as pool:
        async with bench.open_disk(pool) as disk:
            await read_all(disk.top)
            await disk.cache.image.wait_installed()
        async with bench.open_disk(pool) as disk:
            assert await read_all(disk.top) == CONTENT
            assert disk.recorder.read_bytes == 0
