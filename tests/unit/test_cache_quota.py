"""The quota: what lies on disk is never more, and what has to go is what may go."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from cachefs.errors import StoreError
from cachefs.pool.evict import EVICTING, STATE_MASK
from cachefs.pool.image import PoolImage
from cachefs.pool.summap import State
from cachefs.store.identity import Identity
from cachefs.testing.caches import CacheBench, Opened, disk_bytes
from cachefs.testing.model import assert_same, read, read_all
from cachefs.testing.strategies import patterns

BLOCK = 4096
SIZE = 400 * BLOCK + 1000
CONTENT = patterns(7, SIZE)
QUOTA = 512 << 10  # some 100 blocks


@pytest.fixture
def bench(folder: Path) -> CacheBench:
    return CacheBench(folder, CONTENT, QUOTA, BLOCK)


def check(opened: Opened, quota: int = QUOTA) -> None:
    """On disk there is no more than was counted, and that is no more than the quota."""
    assert disk_bytes(opened.pool.path) <= opened.pool.account.used <= opened.pool.account.limit < quota
    assert len(opened.pool.policy) <= sum(image.map.held for image in opened.pool.images.values())


async def look(opened: Opened, offset: int, length: int) -> None:
    length = min(length, SIZE - offset)
    assert_same(await read(opened.top, offset, length), CONTENT[offset : offset + length], offset)


@pytest.mark.parametrize("seed", range(3))
async def test_pool_is_never_above_its_quota_whatever_is_read(bench: CacheBench, seed: int) -> None:
    order = random.Random(seed)
    async with bench.open(2) as opened:
        for step in range(400):
            disk = opened.disks[step % 2]
            at = order.randrange(SIZE)
            length = min(order.choice((100, BLOCK, 30000, 200000)), SIZE - at)
            assert_same(await read(disk.top, at, length), CONTENT[at : at + length], at)
            check(opened)
            if step % 50 == 49:
                await opened.settled()
                opened.pool.policy.check()
                assert opened.pool.account.used == opened.pool._room_of(opened.image) + (32 << 10)
        assert opened.image.evicted_blocks > 100
        assert opened.disks[0].cache.hits + opened.disks[1].cache.hits > 0


async def test_pool_keeps_most_of_what_fits(bench: CacheBench) -> None:
    """A cache that keeps nothing would pass every other test here."""
    async with bench.open() as opened:
        for _ in range(2):
            for block in range(60):
                await look(opened, block * BLOCK, BLOCK)
            await opened.settled()
        assert opened.read_below <= 62 * BLOCK


async def test_pool_shares_its_quota_among_images(bench: CacheBench) -> None:
    other = CacheBench(bench.folder, patterns(9, SIZE), QUOTA, BLOCK, identity=Identity("file", {"inode": "8"}))
    async with bench.open() as opened, other.open_disk(opened.pool, "other") as disk:
        for _ in range(2):
            assert_same(await read_all(opened.top), CONTENT, 0)
            check(opened)
            assert_same(await read_all(disk.top), other.content, 0)
            check(opened)
            await opened.settled()
        assert opened.image.map.held + disk.cache.image.map.held > 60
        check(opened)


@pytest.mark.parametrize("evict", ["sieve", "never"])
@pytest.mark.parametrize("killed", [False, True])
async def test_pool_opened_with_a_smaller_quota_is_below_it_before_anybody_uses_it(
    bench: CacheBench, evict: str, killed: bool
) -> None:
    async with bench.open() as opened:
        await read_all(opened.top)
        await opened.settled()
        await opened.image.sync()
        crashed = bench.crash()
    again = crashed if killed else bench
    again.quota = QUOTA // 2
    again.evict = "never" if evict == "never" else "sieve"
    async with again.open_pool() as pool:
        assert disk_bytes(again.pool_path) <= pool.account.used <= pool.account.limit
        assert len(pool.policy) > 10
        async with again.open_disk(pool) as disk:
            assert_same(await read_all(disk.top), CONTENT, 0)
            await disk.cache.image.wait_installed()
            assert disk_bytes(again.pool_path) <= pool.account.used <= pool.account.limit


@pytest.mark.parametrize("times", [3])
async def test_pool_is_never_above_its_quota_across_kills(bench: CacheBench, times: int) -> None:
    order = random.Random(5)
    for number in range(times):
        async with bench.open() as opened:
            for step in range(120):
                await look(opened, order.randrange(SIZE), order.choice((100, 30000)))
                check(opened)
                if step == 60:
                    await opened.image.sync()
            bench = bench.crash(f"crash{number}")
            crashed_bytes = disk_bytes(bench.pool_path)
        assert crashed_bytes <= QUOTA
    async with bench.open() as opened:
        await opened.image.wait_settled()
        assert_same(await read_all(opened.top), CONTENT, 0)
        check(opened)


async def test_pool_that_evicts_nothing_stops_keeping_and_reads_no_more_than_was_asked(folder: Path) -> None:
    bench = CacheBench(folder, CONTENT, QUOTA, BLOCK, evict="never")
    async with bench.open() as opened:
        await read_all(opened.top)
        await opened.settled()
        held = opened.image.map.held
        assert held > 60
        check(opened)
        opened.disk.recorder.reads.clear()
        await look(opened, 399 * BLOCK + 10, 100)
        assert opened.disk.recorder.reads == [(399 * BLOCK + 10, 100)]
        assert opened.image.map.held == held
        assert opened.image.evicted_blocks == 0
        kept = next(block for block in range(400) if opened.image.map.state(block) is State.DATA)
        opened.disk.recorder.reads.clear()
        await look(opened, kept * BLOCK, BLOCK)
        assert not opened.disk.recorder.reads


async def test_pool_keeps_a_block_while_a_thread_reads_it_and_evicts_all_others(bench: CacheBench) -> None:
    async with bench.open() as opened:
        await look(opened, 0, 10)
        await opened.settled()
        held = bench.gate.hold("read", end=BLOCK)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look, opened, 0, 100)
            await held.wait_until_held()
            for _ in range(3):
                for block in range(5, 400):
                    await look(opened, block * BLOCK, BLOCK)
            await opened.settled()
            assert opened.image.evicted_blocks > 100
            assert opened.image.map.state(0) is State.DATA
            held.open()


async def evict_one(opened: Opened) -> int:
    """A block whose punch is held in its thread."""
    held = opened.gate.hold("punch")
    with trio.fail_after(10):
        for block in range(399):
            await look(opened, block * BLOCK, BLOCK)
            await wait_all_tasks_blocked()
            if held.is_held:
                break
        await held.wait_until_held()
    return next(block for block in range(400) if opened.image.map.state(block) is State.EVICTING)


async def test_pool_reads_a_block_that_is_being_evicted_from_below_and_installs_nothing_over_it(
    bench: CacheBench,
) -> None:
    async with bench.open() as opened:
        block = await evict_one(opened)
        before = opened.read_below
        assert not opened.top.try_read_into(block * BLOCK, memoryview(bytearray(10)))
        await look(opened, block * BLOCK, BLOCK)
        assert opened.read_below > before
        await wait_all_tasks_blocked()
        assert opened.image.map.state(block) is State.EVICTING
        check(opened)
        bench.gate.open_all()
        await opened.settled()
        await look(opened, block * BLOCK, BLOCK)
        await opened.settled()
        await look(opened, block * BLOCK, BLOCK)
        check(opened)


async def test_pool_counts_a_block_until_it_is_punched(bench: CacheBench) -> None:
    async with bench.open() as opened:
        await evict_one(opened)
        evicting = [block for block in range(400) if opened.image.map.state(block) is State.EVICTING]
        used = opened.pool.account.used
        assert opened.pool._room_of(opened.image) + (32 << 10) == used
        held = opened.image.map.held
        bench.gate.open_all()
        await opened.settled()
        with trio.fail_after(5):
            while opened.image.map.state(evicting[0]) is State.EVICTING:
                await trio.lowlevel.checkpoint()
        assert opened.image.evicted_blocks >= len(evicting)
        assert opened.image.map.held <= held + 20


async def test_pool_read_waits_for_no_room(bench: CacheBench) -> None:
    async with bench.open() as opened:
        await evict_one(opened)
        with trio.fail_after(5):
            for block in range(399):
                await look(opened, block * BLOCK, BLOCK)
        check(opened)
        bench.gate.open_all()


async def test_pool_gives_space_back_when_its_file_system_has_less_than_it_shall_keep_free(
    bench: CacheBench, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    bench.min_free = 1 << 20
    free = 10 << 20
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=free // 4096, f_frsize=4096))
    async with bench.open() as opened:
        await look(opened, 0, 80 * BLOCK)
        await opened.settled()

        async def watch() -> None:
            mock_clock.jump(5.1)
            for _ in range(3):
                await wait_all_tasks_blocked()
                await trio.to_thread.run_sync(lambda: None)
            await wait_all_tasks_blocked()
            await opened.settled()

        await watch()
        before = opened.image.map.held
        assert before >= 80
        free = (1 << 20) - (100 << 10)
        await watch()
        assert opened.image.map.held <= before - 25
        await look(opened, 300 * BLOCK, BLOCK)
        free = 10 << 20
        await watch()
        await look(opened, 310 * BLOCK, BLOCK)
        await opened.settled()
        assert opened.image.map.state(310) is State.DATA


async def test_pool_makes_room_for_one_more_image(bench: CacheBench) -> None:
    other = CacheBench(bench.folder, patterns(9, SIZE), QUOTA, BLOCK, identity=Identity("file", {"inode": "8"}))
    async with bench.open() as opened:
        await read_all(opened.top)
        await opened.settled()
        opened.pool.account.withhold(4096)  # as near the limit as it gets
        async with other.open_disk(opened.pool, "other") as disk:
            assert_same(await read_all(disk.top), other.content, 0)
            check(opened)


async def test_pool_without_room_for_one_more_image_says_so_and_counts_nothing(folder: Path) -> None:
    bench = CacheBench(folder, CONTENT, 40 << 10, BLOCK)
    with pytest.raises(BaseException) as caught:
        async with bench.open():
            pass
    assert caught.group_contains(StoreError, match="no room for one more image; raise it")


async def test_pool_counts_nothing_for_an_image_that_could_not_be_made(
    bench: CacheBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench.open_pool() as pool:
        before = pool.account.used

        def fail(*arguments: object) -> None:
            raise StoreError("images", "made to fail")

        monkeypatch.setattr("cachefs.store.files.create", fail)
        with pytest.raises(StoreError):
            async with bench.open_disk(pool):
                pass
        assert pool.account.used == before


async def test_pool_counts_a_dropped_image_no_more(bench: CacheBench) -> None:
    bench.identity = Identity("memory", {})
    async with bench.open_pool() as pool:
        before = pool.account.used
        tasks = len(pool._nursery.child_tasks)
        for _ in range(3):
            async with bench.open_disk(pool) as disk:
                await read(disk.top, 0, 50 * BLOCK)
                await disk.cache.image.wait_installed()
                assert pool.account.used > before + 40 * BLOCK
        assert pool.account.used == before
        assert not list((bench.pool_path / "images").iterdir())
        await wait_all_tasks_blocked()
        assert len(pool._nursery.child_tasks) == tasks  # nobody works for what is gone


async def test_pool_counts_blocks_once_that_are_evicted_while_their_image_is_dropped(bench: CacheBench) -> None:
    bench.identity = Identity("memory", {})
    async with bench.open_pool() as pool:
        before = pool.account.used
        async with trio.open_nursery() as nursery, bench.open_disk(pool) as disk:
            opened = Opened(pool, bench.gate, [disk])
            await evict_one(opened)

            async def later() -> None:
                with trio.fail_after(5):
                    while not opened.image.is_leaving:
                        await trio.lowlevel.checkpoint()
                bench.gate.open_all()

            nursery.start_soon(later)
        assert pool.account.used == before


async def test_a_victim_is_not_read_any_more_while_those_of_another_image_are_punched_out(folder: Path) -> None:
    """Victims of one look belong to several images, which are punched one after the other, each with a wait."""
    bench = CacheBench(folder, CONTENT, QUOTA, BLOCK, slow=True)
    other = CacheBench(folder, patterns(9, SIZE), QUOTA, BLOCK, identity=Identity("file", {"inode": "8"}), slow=True)
    async with bench.open() as opened, other.open_disk(opened.pool, "other") as disk:
        images = {opened.disk.cache.image: (opened.top, CONTENT), disk.cache.image: (disk.top, other.content)}

        async def look_again(image: PoolImage, block: int) -> None:
            top, content = images[image]
            assert_same(
                await read(top, block * BLOCK, BLOCK), content[block * BLOCK : (block + 1) * BLOCK], block * BLOCK
            )

        punches, block = bench.gate.hold("punch"), 0
        async with trio.open_nursery() as nursery:
            while not punches.is_held:
                for image in images:
                    nursery.start_soon(look_again, image, block)
                await wait_all_tasks_blocked(0.001)
                block += 1
            reads = bench.gate.hold("read", once=False)
            leaving = [
                (image, number)
                for image in images
                for number in range(block)
                if image.blocks.words[number] & STATE_MASK == EVICTING
            ]
            assert {image for image, _ in leaving} == set(images)
            for image, number in leaving:
                nursery.start_soon(look_again, image, number)
            await wait_all_tasks_blocked(0.01)
            punches.open()
            while any(image.blocks.words[number] & STATE_MASK == EVICTING for image, number in leaving):
                await wait_all_tasks_blocked(0.001)
            reads.open()
