"""The cache when the files of its pool fail or hang: no read fails, none waits, and it comes back by itself."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from cachefs.pool import pool as pool_module
from cachefs.pool.summap import State
from cachefs.testing.caches import CacheBench, Opened, disk_bytes
from cachefs.testing.model import read, read_all
from cachefs.testing.rules import Rule
from cachefs.testing.strategies import patterns

# Where a test moves the clock, a sync that was under way in a real thread seems to have taken that long.
pytestmark = pytest.mark.logs("writing the cache failed: no answer in")

BLOCK = 4096
SIZE = 60 * BLOCK + 1000
CONTENT = patterns(7, SIZE)
SMALL_QUOTA = 160 << 10  # some 20 blocks

unexpected = pytest.param(RuntimeError("a bug"), marks=pytest.mark.logs("made to fail|a bug|could not be|failed"))
any_error = pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "made to fail"), OSError(errno.ENOSPC, "made to fail"), unexpected], ids=repr
)


@pytest.fixture
def bench(folder: Path) -> CacheBench:
    return CacheBench(folder, CONTENT, block_size=BLOCK)


async def check(opened: Opened) -> None:
    """Every byte is right, read in pieces that are none of blocks."""
    for at in range(0, SIZE, 10000):
        assert await read(opened.top, at, min(10000, SIZE - at)) == CONTENT[at : at + 10000]


async def wait_for(condition: Callable[[], object]) -> None:
    """For what threads bring about; the clock of the loop may stand still."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await trio.lowlevel.checkpoint()


def values(opened: Opened) -> dict[str, object]:
    return dict(opened.disk.cache.statistics().values)


# ---- writes that fail


@pytest.mark.logs("writing the cache failed")
@any_error
async def test_cache_serves_every_read_while_no_write_of_the_pool_succeeds(bench: CacheBench, error: Exception) -> None:
    bench.gate.faults.append((Rule("write", once=False), error))
    async with bench.open() as opened:
        for _ in range(2):
            await check(opened)
            await opened.settled()
        assert opened.image.blocks.cached == opened.image.map.held
        opened.pool.policy.check()


@pytest.mark.logs("writing the cache failed")
async def test_cache_logs_a_failure_once_counts_it_and_says_it_in_its_statistics(
    bench: CacheBench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.gate.faults.append((Rule("write", once=False), OSError(errno.ENOSPC, "")))
    async with bench.open() as opened:
        for _ in range(3):
            await check(opened)
            await opened.settled()
        lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(lines) == 1
        assert "writing the cache failed: No space left on device; served from below" in lines[0].getMessage()
        assert values(opened)["bypass"] == "writing: No space left on device"
        assert values(opened)["failures"] == 1


@pytest.mark.logs("writing the cache failed")
async def test_cache_tries_writing_again_after_a_growing_pause_and_heals(
    bench: CacheBench, mock_clock: MockClock
) -> None:
    fault = Rule("write", once=False)
    bench.gate.faults.append((fault, OSError(errno.EIO, "")))
    async with bench.open() as opened:

        async def look() -> None:
            await read(opened.top, 0, 10)
            await wait_all_tasks_blocked()
            await opened.image.wait_idle()

        await look()
        assert fault.hits == 1
        for pause, tries in ((0.9, 1), (0.2, 2), (1.8, 2), (0.3, 3), (3.5, 3), (0.6, 4)):
            mock_clock.jump(pause)
            await look()
            assert fault.hits == tries, f"after {pause}"
        bench.gate.faults.clear()
        mock_clock.jump(10)
        await look()
        await opened.image.wait_installed()
        assert opened.image.map.state(0) is State.DATA
        assert values(opened)["bypass"] == "no"


@pytest.mark.logs("writing the cache failed: no answer in 20 s")
async def test_cache_read_waits_for_no_write_that_hangs(bench: CacheBench, mock_clock: MockClock) -> None:
    async with bench.open() as opened:
        held = bench.gate.hold("write", once=False)
        await check(opened)
        await held.wait_until_held()
        await check(opened)
        mock_clock.jump(26)
        await wait_all_tasks_blocked()
        assert "no answer" in str(values(opened)["bypass"])
        await check(opened)
        held.open()
        await wait_all_tasks_blocked()
        await wait_for(lambda: not opened.image.calls)
        mock_clock.jump(61)
        await wait_all_tasks_blocked()
        await check(opened)
        await opened.settled()
        assert values(opened)["bypass"] == "no"
        assert opened.image.map.state(3) is State.DATA
        assert opened.image.blocks.cached == opened.image.map.held


async def test_cache_holds_no_more_in_memory_than_the_backlog_while_a_write_hangs(
    bench: CacheBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "BACKLOG_BYTES", 10 * BLOCK)
    async with bench.open() as opened:
        held = bench.gate.hold("write", once=False)
        below = opened.disk.below.hold("read_into", once=False)
        async with trio.open_nursery() as nursery:
            for block in range(0, bench.blocks - 1, 2):  # all of them are on their way before the first is there
                nursery.start_soon(read, opened.top, block * BLOCK, BLOCK)
            await wait_all_tasks_blocked()
            below.open()
        await check(opened)
        await wait_all_tasks_blocked()
        waiting = {id(flight): len(flight.buffer) for flight in opened.image.flights.values()}
        assert 0 < sum(waiting.values()) <= 10 * BLOCK
        assert values(opened)["not_installed_blocks"]
        assert values(opened)["bypassed"]
        held.open()
        await opened.settled()
        assert opened.pool._backlog == 0
        assert not opened.image.flights
        await check(opened)


# ---- reads that fail


@pytest.mark.logs("reading the cache failed", "a bug|made to fail")
@any_error
async def test_cache_reads_below_what_the_pool_fails_to_read(bench: CacheBench, error: Exception) -> None:
    async with bench.open() as opened:
        await check(opened)
        await opened.settled()
        bench.gate.faults.append((Rule("read", once=False), error))
        await check(opened)
        assert str(values(opened)["bypass"]).startswith("reading: ")
        assert values(opened)["corrupt_blocks"] == 0


@pytest.mark.logs("reading the cache failed: no answer in 20 s")
async def test_cache_gives_a_read_up_that_hangs_and_asks_below(bench: CacheBench, mock_clock: MockClock) -> None:
    async with bench.open() as opened:
        await check(opened)
        await opened.settled()
        opened.disk.recorder.reads.clear()
        held = bench.gate.hold("read", once=False)
        got: list[bytes] = []

        async def look() -> None:
            got.append(await read(opened.top, 10, 100))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await held.wait_until_held()
            mock_clock.jump(19)
            await wait_all_tasks_blocked()
            assert not got
            mock_clock.jump(1.1)
        assert got == [CONTENT[10:110]]
        assert opened.disk.recorder.reads == [(10, 100)]
        with trio.fail_after(1):  # and none waits after it
            await opened.disk.cache.read_into(0, memoryview(bytearray(BLOCK)))
        held.open()
        await wait_all_tasks_blocked()
        mock_clock.jump(5.1)  # the watch looks again
        await wait_for(lambda: values(opened)["bypass"] == "no")
        before = opened.read_below
        await check(opened)
        assert opened.read_below == before


@pytest.mark.logs("reading the cache failed")
async def test_cache_stuck_read_writes_into_no_answer(bench: CacheBench, mock_clock: MockClock) -> None:
    """The thread of the read that was given up goes on when the client's buffer has long been used for something else."""
    async with bench.open() as opened:
        await check(opened)
        await opened.settled()
        held = bench.gate.hold("read")
        buffer = bytearray(100)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(opened.top.read_into, 10, memoryview(buffer))
            await held.wait_until_held()
            mock_clock.jump(21)
        buffer[:] = b"\xee" * 100
        held.open()
        await wait_for(lambda: bench.gate.calls["read"])
        await trio.to_thread.run_sync(lambda: None)
        assert buffer == b"\xee" * 100


@pytest.mark.logs("reading the cache failed")
async def test_cache_tries_reading_again_by_itself(bench: CacheBench, mock_clock: MockClock) -> None:
    async with bench.open() as opened:
        await check(opened)
        await opened.settled()
        bench.gate.faults.append((Rule("read"), OSError(errno.EIO, "")))
        await read(opened.top, 0, 10)
        await wait_all_tasks_blocked()
        assert values(opened)["bypass"] != "no"
        for _ in range(2):
            mock_clock.jump(5.1)
            await wait_all_tasks_blocked()
        await wait_for(lambda: values(opened)["bypass"] == "no")


@pytest.mark.logs("reading the cache failed")
async def test_cache_tries_a_read_that_hangs_with_one_thread_at_a_time(
    bench: CacheBench, mock_clock: MockClock
) -> None:
    async with bench.open() as opened:
        await check(opened)
        await opened.settled()
        held = bench.gate.hold("read", once=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, opened.top, 0, 10)
            await held.wait_until_held()
            mock_clock.jump(21)
        before = bench.gate.calls["read"]
        for _ in range(4):  # the watch looks more often than a try may take
            mock_clock.jump(5.1)
            await wait_all_tasks_blocked()
            await trio.to_thread.run_sync(lambda: None)
        assert bench.gate.calls["read"] == before + 1
        held.open()


# ---- sync


@pytest.mark.logs("writing the cache failed: sync: Input/output error; 3 blocks are fetched anew")
async def test_cache_drops_what_was_installed_since_the_last_good_sync_when_one_fails(bench: CacheBench) -> None:
    async with bench.open() as opened:
        await read(opened.top, 0, 5 * BLOCK)
        await opened.settled()
        first = {block for block in range(bench.blocks) if opened.image.map.state(block) is State.DATA}
        await opened.image.sync()
        for block in (20, 30, 40):
            await opened.disk.cache.prefetch(block * BLOCK, 1)
        await wait_all_tasks_blocked()
        await opened.settled()
        bench.gate.faults.append((Rule("sync"), OSError(errno.EIO, "")))
        await opened.image.sync()
        assert {block for block in range(bench.blocks) if opened.image.map.state(block) is State.DATA} == first
        assert opened.image.map.state(20) is State.SPOILED
        await check(opened)
    async with bench.open() as opened:
        await check(opened)
        assert values(opened)["corrupt_blocks"] == 0


@pytest.mark.logs("writing the cache failed: sync")
async def test_cache_writes_the_map_again_when_its_sync_failed(bench: CacheBench, mock_clock: MockClock) -> None:
    async with bench.open() as opened:
        await read(opened.top, 0, BLOCK)
        await opened.settled()
        bench.gate.faults.append((Rule("map-sync"), OSError(errno.EIO, "")))
        await opened.image.sync()
        assert opened.image.map.dirty_sectors
        mock_clock.jump(2)
        await read(opened.top, 0, BLOCK)
        await wait_for(lambda: not opened.image.flights)
        await opened.image.sync()
        assert not opened.image.map.dirty_sectors
    async with bench.open() as opened:
        assert await read(opened.top, 0, BLOCK) == CONTENT[:BLOCK]
        assert opened.read_below == 0


@pytest.mark.logs("writing the cache failed: sync")
async def test_cache_forgets_no_zeros_when_a_sync_failed(folder: Path, mock_clock: MockClock) -> None:
    bench = CacheBench(folder, bytes(SIZE), block_size=BLOCK)
    async with bench.open() as opened:
        await read_all(opened.top)
        await opened.settled()
        bench.gate.faults.append((Rule("map-sync"), OSError(errno.EIO, "")))
        await opened.image.sync()
        assert opened.image.map.dirty_sectors
        mock_clock.jump(2)
    async with bench.open() as opened:
        assert await read_all(opened.top) == bytes(SIZE)
        assert opened.disk.recorder.asked == 0


@pytest.mark.logs("the sync failed", "writing the cache failed: sync: RuntimeError")
async def test_cache_remembers_what_is_not_synced_after_a_bug_in_a_sync(bench: CacheBench) -> None:
    async with bench.open() as opened:
        await read(opened.top, 0, BLOCK)
        await opened.settled()
        unsynced = set(opened.image.unsynced)
        bench.gate.faults.append((Rule("sync"), RuntimeError("a bug")))
        await opened.image.sync()
        assert opened.image.unsynced == unsynced
        assert opened.image.map.dirty_sectors


# ---- punches


@pytest.mark.logs("writing the cache failed: cannot free space", "a bug")
@any_error
async def test_cache_keeps_in_the_account_what_could_not_be_punched(
    bench: CacheBench, error: Exception, mock_clock: MockClock
) -> None:
    bench.quota = SMALL_QUOTA
    bench.gate.faults.append((Rule("punch", once=False), error))
    async with bench.open() as opened:
        for _ in range(3):
            await check(opened)
            await wait_for(lambda: not opened.image.calls)
            mock_clock.jump(25)
            await wait_all_tasks_blocked()
            await wait_for(lambda: not opened.image.calls)
        assert bench.disk_bytes() <= opened.pool.account.used <= SMALL_QUOTA
        states = {opened.image.map.state(block) for block in range(bench.blocks)}
        assert State.EVICTING not in states
        assert len(opened.pool.policy) == opened.image.map.held
        opened.pool.policy.check()
        bench.gate.faults.clear()
        mock_clock.jump(120)
        await wait_all_tasks_blocked()
        await check(opened)
        await wait_for(lambda: values(opened)["evicted_blocks"])


@pytest.mark.logs("writing the cache failed: cannot free space")
async def test_cache_does_not_try_to_punch_without_pause_when_it_fails(
    bench: CacheBench, mock_clock: MockClock
) -> None:
    bench.quota = SMALL_QUOTA
    bench.gate.faults.append((Rule("punch", once=False), OSError(errno.EIO, "")))
    async with bench.open() as opened:
        await check(opened)
        for _ in range(30):
            await wait_all_tasks_blocked()
            mock_clock.jump(0.03)
        assert bench.gate.calls["punch"] <= 3
        assert opened.image.map.held


# ---- all of it


async def scenario(bench: CacheBench) -> None:
    """Two openings, more blocks than there is room for, a sync in between."""
    for _ in range(2):
        async with bench.open() as opened:
            for block in range(0, bench.blocks, 3):
                at = block * BLOCK
                assert await read(opened.top, at, min(5000, SIZE - at)) == CONTENT[at : at + 5000]
                if block % 12 == 0:
                    await opened.settled()
                if block == 30:
                    await opened.image.sync()
                assert disk_bytes(opened.pool.path) <= opened.pool.account.used
            await check(opened)
            opened.pool.policy.check()
            assert opened.pool.account.used <= SMALL_QUOTA


@pytest.mark.slow
@pytest.mark.logs("failed", "a bug", "could not be", "disagrees", "dropped", "damaged")
@pytest.mark.parametrize("error", [OSError(errno.EIO, "made to fail"), RuntimeError("a bug")], ids=repr)
async def test_cache_reads_are_right_whichever_call_to_the_pool_fails(
    folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachefs.pool.health.FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr("cachefs.pool.health.LONGEST_PAUSE_S", 0.0)
    nth = 0
    while True:
        nth += 1
        bench = CacheBench(folder / str(nth), CONTENT, SMALL_QUOTA, BLOCK, patience_s=0.5, slow=True)
        rule = Rule("any", nth)
        bench.gate.faults.append((rule, error))
        await scenario(bench)
        if not rule.hits:
            break
    assert nth > 60


@pytest.mark.slow
@pytest.mark.logs("failed", "dropped", "cannot free")
@pytest.mark.parametrize("op", ["read", "write", "punch", "sync", "map-write", "map-sync", "extents"])
async def test_cache_reads_are_right_while_one_kind_of_call_always_fails(folder: Path, op: str) -> None:
    bench = CacheBench(folder, CONTENT, SMALL_QUOTA, BLOCK, patience_s=0.5, slow=True)
    bench.gate.faults.append((Rule(op, once=False), OSError(errno.EIO, "made to fail")))
    await scenario(bench)
