"""The cache in write-through mode: what is written goes below, and no old byte comes back from the pool."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.errors import PermanentError, ReadOnlyError
from cachefs.pool.summap import State
from cachefs.testing.caches import CacheBench, Opened
from cachefs.testing.gate import Held
from cachefs.testing.model import (
    Changing,
    Op,
    Read,
    Trim,
    Write,
    Zero,
    assert_same,
    check_possible,
    left_by,
    perform,
    read,
    read_all,
    write,
)
from cachefs.testing.strategies import patterns

BLOCK = 4096
SIZE = 40 * BLOCK + 1000
CONTENT = patterns(7, SIZE)

changing = pytest.mark.parametrize(
    "op", [Write(10, patterns(1, 100)), Write(0, patterns(1, 2 * BLOCK)), Trim(5, 9000), Zero(0, BLOCK)], ids=repr
)


@pytest.fixture
def bench(folder: Path) -> CacheBench:
    return CacheBench(folder, CONTENT, block_size=BLOCK, mode="write-through")


def after(*ops: Changing) -> bytes:
    content = bytearray(CONTENT)
    for op in ops:
        content[op.offset : op.offset + op.length] = left_by(op)
    return bytes(content)


async def race(opened: Opened, hold: Callable[[], Held], reader: Read, op: Changing) -> None:
    """The read runs into the hold, the change is done meanwhile; then no read sees what was before it."""
    held = hold()
    async with trio.open_nursery() as nursery:
        got: list[bytes] = []

        async def look() -> None:
            got.append(await perform(opened.top, reader) or b"")

        nursery.start_soon(look)
        await held.wait_until_held()
        with trio.fail_after(5):
            await perform(opened.top, op)
            touched = -(-(op.offset + op.length) // BLOCK) * BLOCK  # other blocks of the fetch are waited for
            assert_same(await read(opened.top, 0, touched), after(op)[:touched], 0)
        held.open()
    check_possible(got[0], reader.offset, [op], CONTENT, old_allowed=True)
    for _ in range(2):
        assert_same(await read_all(opened.top), after(op), 0)
        await opened.settled()


@changing
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
async def test_cache_read_after_a_write_is_not_given_a_fetch_from_before_it(
    bench: CacheBench, op: Changing, late: bool
) -> None:
    async with bench.open() as opened:
        await race(opened, partial(opened.disk.below.hold, "read_into", after=late), Read(0, 3 * BLOCK), op)


async def test_cache_believes_no_hole_that_was_filled_while_it_was_asked_for(folder: Path) -> None:
    bench = CacheBench(folder, bytes(SIZE), block_size=BLOCK, mode="write-through")
    async with bench.open() as opened:
        held = opened.disk.below.hold("extents", after=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, opened.top, 0, 100)
            await held.wait_until_held()
            with trio.fail_after(5):
                await write(opened.top, 100, b"x" * 9000)
            held.open()
        assert await read(opened.top, 0, 10000) == bytes(100) + b"x" * 9000 + bytes(900)


@changing
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
async def test_cache_installs_no_old_bytes_of_a_block_written_while_its_install_is_in_its_thread(
    bench: CacheBench, op: Changing, late: bool
) -> None:
    async with bench.open() as opened:
        held = bench.gate.hold("write", after=late)
        await read(opened.top, 0, 3 * BLOCK)
        await held.wait_until_held()
        await perform(opened.top, op)
        assert_same(await read(opened.top, 0, 3 * BLOCK), after(op)[: 3 * BLOCK], 0)
        held.open()
        for _ in range(2):
            await opened.settled()
            assert_same(await read_all(opened.top), after(op), 0)


@changing
async def test_cache_shows_a_change_of_a_warm_block(bench: CacheBench, op: Changing) -> None:
    async with bench.open() as opened:
        await read_all(opened.top)
        await opened.settled()
        await perform(opened.top, op)
        for _ in range(2):
            assert_same(await read_all(opened.top), after(op), 0)
            await opened.settled()
        assert opened.image.map.state(0) in (State.DATA, State.ZERO)


async def test_cache_counts_the_room_of_blocks_that_became_zeros(bench: CacheBench) -> None:
    async with bench.open() as opened:
        await read_all(opened.top)
        await opened.settled()
        await write(opened.top, 0, bytes(SIZE))
        assert await read_all(opened.top) == bytes(SIZE)
        await opened.settled()
        assert opened.image.data.allocated_bytes() <= opened.image.map.held * BLOCK
        assert opened.pool.account.used >= bench.disk_bytes()


async def test_cache_keeps_a_block_out_while_it_is_written(bench: CacheBench) -> None:
    async with bench.open() as opened:
        await read_all(opened.top)
        await opened.settled()
        op = Write(10, b"x" * 100)
        held = opened.disk.below.hold("write", after=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform, opened.top, op)
            await held.wait_until_held()
            got = await read(opened.top, 0, BLOCK)
            check_possible(got, 0, [op], CONTENT, old_allowed=True)
            await wait_all_tasks_blocked()
            assert opened.image.map.state(0) is State.SPOILED
            held.open()
        assert await read(opened.top, 0, BLOCK) == after(op)[:BLOCK]
        await opened.settled()
        assert opened.image.map.state(0) is State.DATA


async def test_cache_of_a_write_that_failed_holds_what_is_below(bench: CacheBench) -> None:
    async with bench.open() as opened:
        await read_all(opened.top)
        await opened.settled()
        opened.disk.faults.add("write")
        with pytest.raises(PermanentError):
            await write(opened.top, 10, b"x" * 100)
        bench.chunks[0][10:60] = b"x" * 50  # half of it was done
        assert await read(opened.top, 0, 200) == CONTENT[:10] + b"x" * 50 + CONTENT[60:200]


async def test_cache_write_that_is_cancelled_frees_its_blocks(bench: CacheBench) -> None:
    async with bench.open() as opened:
        held = opened.disk.below.hold("write")
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write, opened.top, 10, b"x")
                await held.wait_until_held()
                scope.cancel()
        assert not opened.image.barred
        await read_all(opened.top)
        await opened.settled()
        assert opened.image.map.state(0) is State.DATA


async def test_cache_gives_right_bytes_when_it_is_opened_again_after_writes(bench: CacheBench) -> None:
    op: Op = Write(10, b"x" * 100)
    async with bench.open() as opened:
        await read_all(opened.top)
        await opened.settled()
        await opened.image.sync()
        await perform(opened.top, op)
        crashed = bench.crash()
    crashed.chunks = bench.chunks
    for again in (bench, crashed):
        async with again.open() as opened:
            assert_same(await read_all(opened.top), after(Write(10, b"x" * 100)), 0)
        again.mode = "read-only"
        async with again.open() as opened:
            assert_same(await read_all(opened.top), after(Write(10, b"x" * 100)), 0)


async def test_cache_that_is_read_only_refuses_writes(bench: CacheBench) -> None:
    bench.mode = "read-only"
    async with bench.open() as opened:
        for refused in (write(opened.top, 0, b"x"), opened.top.trim(0, 1), opened.top.zero(0, 1)):
            with pytest.raises(ReadOnlyError):
                await refused
