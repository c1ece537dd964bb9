"""Read-ahead as the child sees it: how many requests, how large, and when there are none beyond what was asked for."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest
from trio.testing import wait_all_tasks_blocked

from cachefs.layers.cache import MAX_FETCH
from cachefs.pool import pool as pool_module
from cachefs.testing.caches import CacheBench, Opened
from cachefs.testing.model import assert_same, read
from cachefs.testing.rules import Rule
from cachefs.testing.strategies import patterns

BLOCK = 64 << 10
SIZE = (16 << 20) + 1000
CONTENT = patterns(7, SIZE)


@pytest.fixture
def bench(folder: Path) -> CacheBench:
    return CacheBench(folder, CONTENT, block_size=BLOCK)


async def scan(opened: Opened, step: int, end: int = SIZE) -> None:
    for at in range(0, end, step):
        length = min(step, SIZE - at)
        assert_same(await read(opened.top, at, length), CONTENT[at : at + length], at)


def asked(opened: Opened) -> list[int]:
    return [length for _, length in opened.disk.recorder.reads]


@pytest.mark.parametrize("step", [4 << 10, 128 << 10])
async def test_sequential_reader_costs_few_large_requests(bench: CacheBench, step: int) -> None:
    async with bench.open() as opened:
        await scan(opened, step)
        await opened.settled()
        assert opened.read_below == SIZE
        assert len(asked(opened)) < 40  # 257 blocks
        assert 512 << 10 <= max(asked(opened)) <= MAX_FETCH


async def test_read_ahead_asks_for_nothing_beyond_the_end(bench: CacheBench) -> None:
    async with bench.open() as opened:
        await scan(opened, 128 << 10)
        await opened.settled()
        assert all(at + length <= SIZE for at, length in opened.disk.recorder.reads)


async def test_reader_at_random_gets_little_that_it_did_not_ask_for(bench: CacheBench) -> None:
    order = random.Random(1)
    blocks = order.sample(range(SIZE // BLOCK), 100)
    async with bench.open() as opened:
        for block in blocks:
            await read(opened.top, block * BLOCK + 100, 4096)
        await opened.settled()
        assert opened.read_below <= 100 * BLOCK + (1 << 20) + 100 * BLOCK // 10


async def test_what_was_read_ahead_and_not_used_is_counted(folder: Path) -> None:
    bench = CacheBench(folder, CONTENT, 4 << 20, BLOCK)
    async with bench.open() as opened:
        for at in range(0, SIZE - (1 << 20), 1 << 20):  # a little of each MiB, in order
            await read(opened.top, at, 4096)
            await read(opened.top, at + 4096, 4096)
        await opened.settled()
        for _ in range(2):
            for at in range(SIZE - (6 << 20), SIZE - BLOCK, BLOCK):
                await read(opened.top, at, BLOCK)
            await opened.settled()
        values = opened.disk.cache.statistics().values
        assert int(values["read_ahead_wasted_blocks"]) > 0
        assert opened.image.ahead.unproven >= 0


async def test_nothing_is_read_ahead_when_the_pool_is_full_and_evicts_nothing(folder: Path) -> None:
    bench = CacheBench(folder, CONTENT, 2 << 20, BLOCK, evict="never")
    async with bench.open() as opened:
        await scan(opened, BLOCK, 6 << 20)
        await opened.settled()
        opened.disk.recorder.reads.clear()
        for at in range(8 << 20, 10 << 20, 4096):
            await read(opened.top, at, 4096)
        assert set(asked(opened)) == {4096}


@pytest.mark.logs("writing the cache failed")
async def test_nothing_is_read_ahead_while_writing_the_pool_does_not_work(bench: CacheBench) -> None:
    bench.gate.faults.append((Rule("write", once=False), OSError(errno.ENOSPC, "")))
    async with bench.open() as opened:
        await read(opened.top, 0, 4096)
        await wait_all_tasks_blocked()
        await opened.image.wait_idle()
        opened.disk.recorder.reads.clear()
        for at in range(8 << 20, 9 << 20, 4096):
            await read(opened.top, at, 4096)
        assert set(asked(opened)) == {4096}


async def test_nothing_is_read_ahead_while_half_of_the_backlog_waits(
    bench: CacheBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "BACKLOG_BYTES", 4 << 20)
    async with bench.open() as opened:
        held = bench.gate.hold("write", once=False)
        await scan(opened, BLOCK, 3 << 20)
        while opened.pool.backlog_bytes * 2 < 4 << 20:
            await read(opened.top, len(asked(opened)) * BLOCK, 4096)
        opened.disk.recorder.reads.clear()
        for at in range(10 << 20, 11 << 20, 4096):
            await read(opened.top, at, 4096)
        assert max(asked(opened)) <= BLOCK
        held.open()


async def test_hint_to_prefetch_the_whole_image_takes_no_more_memory_than_the_backlog(
    bench: CacheBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "BACKLOG_BYTES", 4 << 20)
    async with bench.open() as opened:
        held = opened.disk.below.hold("read_into", once=False)
        await opened.disk.cache.prefetch(0, SIZE)
        await wait_all_tasks_blocked()
        on_the_way = {
            id(flight): opened.image.length_of(flight.start, flight.end) for flight in opened.image.flights.values()
        }
        assert 0 < sum(on_the_way.values()) <= 4 << 20
        held.open()
