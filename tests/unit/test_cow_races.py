"""Races of the overlay, each scripted: one operation is held, others run, and every byte is looked at afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.errors import NoSpaceError
from cachefs.store.blockmap import State
from cachefs.testing.gate import Held
from cachefs.testing.model import (
    Model,
    Op,
    Trim,
    Write,
    Zero,
    check_extents,
    check_possible,
    perform,
    read,
    read_all,
    run_one,
    write,
)
from cachefs.testing.stacks import Bench, Case, Stack, cow_layer
from cachefs.testing.strategies import patterns

SIZE, BLOCK, SECTOR = 130000, 4096, 512

cleared = pytest.mark.parametrize("clear", [Trim, Zero])


@pytest.fixture
def bench() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as folder:
        yield Bench(Case("cow", SIZE, cow_layer()), Path(folder))


@pytest.fixture
async def stack(bench: Bench) -> AsyncIterator[Stack]:
    async with bench.open() as opened:
        yield opened


async def race(stack: Stack, hold: Callable[[], Held], first: Op, *then: Op) -> None:
    """*first* runs into *hold*; then each of *then* is started and goes as far as it can; then the hold is opened.

    Afterwards every byte is one that some order leaves.
    """
    before = await read_all(stack.top)
    held = hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(perform, stack.top, first)
        await held.wait_until_held()
        for op in then:
            nursery.start_soon(perform, stack.top, op)
            await wait_all_tasks_blocked()
        assert held.is_held
        held.open()
    assert stack.cow is not None
    await stack.cow.store.wait_punched()
    after = await read_all(stack.top)
    changes = [op for op in (first, *then) if isinstance(op, (Write, Trim, Zero))]
    check_possible(after, 0, changes, before, old_allowed=False)
    await check_extents(stack.top, 0, SIZE, Model(after))
    await stack.top.flush()
    assert stack.outside() == after


# ---- held in the base read


@cleared
async def test_cow_keeps_writes_made_while_an_unaligned_write_reads_the_base(
    stack: Stack, clear: type[Trim | Zero]
) -> None:
    """A: write of a part of sector 0, held in its base read. B: sectors 4 to 7 of the block. C: the block is cleared."""
    await race(
        stack,
        partial(stack.gate.hold, "read_into", end=BLOCK),
        Write(10, patterns(1, 100)),
        Write(2048, patterns(2, 2048)),
        clear(0, BLOCK),
    )


async def test_cow_keeps_both_unaligned_writes_of_one_block(stack: Stack) -> None:
    await race(
        stack,
        partial(stack.gate.hold, "read_into", end=BLOCK),
        Write(10, patterns(1, 100)),
        Write(2048, patterns(2, 2048)),
    )


async def test_cow_keeps_full_block_write_made_while_an_unaligned_write_reads_the_base(stack: Stack) -> None:
    await race(
        stack,
        partial(stack.gate.hold, "read_into", end=BLOCK),
        Write(10, patterns(1, 100)),
        Write(0, patterns(2, BLOCK)),
    )


async def test_cow_keeps_block_cleared_while_an_unaligned_write_reads_the_base(stack: Stack) -> None:
    await race(stack, partial(stack.gate.hold, "read_into", end=BLOCK), Write(10, patterns(1, 100)), Trim(0, BLOCK))


async def test_cow_keeps_write_whose_two_ends_read_the_base(stack: Stack) -> None:
    span = Write(BLOCK + 10, patterns(1, 2 * BLOCK))
    await race(
        stack,
        partial(stack.gate.hold, "read_into", start=3 * BLOCK, end=4 * BLOCK),
        span,
        Write(BLOCK, b"\x33" * 10),
        Write(2 * BLOCK, patterns(2, BLOCK)),
        Trim(13000, 100),
    )


async def test_cow_keeps_edges_of_a_trim_held_in_its_base_read(stack: Stack) -> None:
    await race(
        stack,
        partial(stack.gate.hold, "read_into", end=BLOCK),
        Trim(1000, 10000),
        Write(0, patterns(1, 900)),
        Write(11000, patterns(2, 1000)),
    )


async def test_cow_write_of_another_block_does_not_wait_for_a_base_read(stack: Stack) -> None:
    held = stack.gate.hold("read_into", end=BLOCK)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, stack.top, 10, b"x")
        await held.wait_until_held()
        with trio.fail_after(5):
            await stack.top.write(BLOCK + 10, memoryview(b"y"))
        assert held.is_held
        held.open()


async def test_cow_write_of_another_block_does_not_wait_for_a_reader_of_the_base_behind_a_trim(stack: Stack) -> None:
    """R: a read of block 0, held in the base. T: blocks 0 to 20 are trimmed, and punched some time. W: part of block 10.

    The punch waits for readers of the overlay's file; W must not wait behind it for a reader of the base.
    """
    held = stack.gate.hold("read_into", end=BLOCK)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, stack.top, 0, BLOCK)
        await held.wait_until_held()
        await stack.top.trim(0, 20 * BLOCK)
        await wait_all_tasks_blocked()
        with trio.fail_after(5):
            await stack.top.write(10 * BLOCK + 10, memoryview(b"y"))
            await stack.top.write(10, memoryview(b"x"))
        assert held.is_held
        held.open()


async def test_cow_flush_does_not_wait_for_a_write_that_reads_the_base(stack: Stack) -> None:
    held = stack.gate.hold("read_into", end=BLOCK)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, stack.top, 10, b"x")
        await held.wait_until_held()
        with trio.fail_after(5):
            await stack.top.flush()
        held.open()


# ---- held in a thread


@cleared
async def test_cow_shows_no_old_byte_after_a_trim_beside_a_partial_write(
    stack: Stack, clear: type[Trim | Zero]
) -> None:
    """A: part of a data block, held in its thread. B: the block is cleared. C: another sector of it is written."""
    assert stack.file is not None
    await run_one(stack.top, Write(0, patterns(9, BLOCK)), Model(await read_all(stack.top)))
    await race(
        stack,
        partial(stack.file.hold, "write", end=BLOCK),
        Write(512, patterns(1, 512)),
        clear(0, BLOCK),
        Write(2048, patterns(2, 512)),
    )


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_cow_keeps_what_is_written_while_a_block_write_is_in_its_thread(stack: Stack, after: bool) -> None:
    assert stack.file is not None
    await race(
        stack,
        partial(stack.file.hold, "write", end=2 * BLOCK, after=after),
        Write(0, patterns(1, 2 * BLOCK)),
        Write(4000, patterns(2, 200)),
        Trim(BLOCK, BLOCK),
    )


async def test_cow_fills_a_trimmed_block_that_is_not_punched_yet(stack: Stack) -> None:
    """A: the block is trimmed, its punch held in its thread. B: part of it is written: the rest is zeros, not what was."""
    assert stack.file is not None
    await write(stack.top, 0, patterns(9, BLOCK))
    await race(stack, partial(stack.file.hold, "punch"), Trim(0, BLOCK), Write(512, patterns(1, 512)))


async def test_cow_does_not_punch_what_was_written_after_the_trim(stack: Stack) -> None:
    """The punch of blocks 0 to 3 is held up by the punch of block 9; block 1 is written before its turn."""
    assert stack.cow is not None
    assert stack.file is not None
    await write(stack.top, 0, patterns(9, 10 * BLOCK))
    held = stack.file.hold("punch")
    await stack.top.trim(9 * BLOCK, BLOCK)
    await held.wait_until_held()
    await stack.top.trim(0, 4 * BLOCK)
    await write(stack.top, BLOCK, patterns(1, BLOCK))
    held.open()
    await stack.cow.store.wait_punched()
    assert await read(stack.top, 0, 4 * BLOCK) == bytes(BLOCK) + patterns(1, BLOCK) + bytes(2 * BLOCK)


async def test_cow_does_not_punch_what_was_written_while_the_punch_waited_for_the_lock(stack: Stack) -> None:
    assert stack.cow is not None
    assert stack.file is not None
    locks = stack.cow.store.locks
    await write(stack.top, 0, patterns(9, BLOCK))
    held = stack.file.hold("write")
    async with trio.open_nursery() as nursery:
        await stack.top.trim(0, BLOCK)
        nursery.start_soon(write, stack.top, 0, patterns(1, BLOCK))  # has the lock when the punch comes and finds zeros
        await held.wait_until_held()
        with trio.fail_after(5):
            while not locks.statistics()["locks_waiting"]:
                await trio.lowlevel.checkpoint()
        held.open()
    await stack.cow.store.wait_punched()
    assert await read(stack.top, 0, BLOCK) == patterns(1, BLOCK)


async def test_cow_read_of_the_overlay_keeps_the_punch_away(stack: Stack) -> None:
    """A read that found data and is in its thread gets the data or zeros that a trim left, and the punch waits for it."""
    assert stack.cow is not None
    assert stack.file is not None
    await write(stack.top, 0, patterns(9, BLOCK))
    held = stack.file.hold("read")
    got = bytearray(BLOCK)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stack.top.read_into, 0, memoryview(got))
        await held.wait_until_held()
        await stack.top.trim(0, BLOCK)
        await wait_all_tasks_blocked()
        assert stack.cow.store.punched_bytes == 0
        held.open()
    assert got == patterns(9, BLOCK)
    await stack.cow.store.wait_punched()
    assert stack.cow.store.punched_bytes >= BLOCK  # twice when the scan of the opening found it too


async def test_cow_read_of_data_and_base_gets_the_data_it_found(stack: Stack) -> None:
    """R: blocks 0 (base) and 1 (data), held in the base read. T: block 1 is trimmed and punched. W: it is written anew."""
    await write(stack.top, BLOCK, patterns(9, BLOCK))
    held = stack.gate.hold("read_into", end=BLOCK)
    before = await read(stack.top, BLOCK, BLOCK)
    got = bytearray(2 * BLOCK)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stack.top.read_into, 0, memoryview(got))
        await held.wait_until_held()
        await stack.top.trim(BLOCK, BLOCK)
        await wait_all_tasks_blocked()
        await write(stack.top, BLOCK, patterns(1, BLOCK))
        held.open()
    changes = [Trim(BLOCK, BLOCK), Write(BLOCK, patterns(1, BLOCK))]
    whole_before = await read(stack.top, 0, BLOCK) + before
    check_possible(bytes(got), 0, changes, whole_before, old_allowed=True)
    assert await read(stack.top, BLOCK, BLOCK) == patterns(1, BLOCK)


# ---- durability beside writes


async def test_cow_flush_covers_a_write_acknowledged_while_another_flush_ran(stack: Stack, bench: Bench) -> None:
    """F: a flush, held behind its syncs. W: a write, acknowledged meanwhile. G: a flush after W returns when W is durable."""
    assert stack.file is not None
    model = Model(bench.content)
    await run_one(stack.top, Write(0, patterns(1, BLOCK)), model)
    held = stack.file.hold("sync", after=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stack.top.flush)
        await held.wait_until_held()
        await run_one(stack.top, Write(8 * BLOCK, patterns(2, BLOCK)), model)
        done = trio.Event()

        async def second_flush() -> None:
            await stack.top.flush()
            assert stack.outside() == model.content
            done.set()

        nursery.start_soon(second_flush)
        await wait_all_tasks_blocked()
        assert not done.is_set()
        held.open()
    assert done.is_set()


async def test_cow_cancelled_write_in_its_thread_is_published(stack: Stack) -> None:
    assert stack.cow is not None
    assert stack.file is not None
    held = stack.file.hold("write")
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, stack.top, 0, patterns(1, BLOCK))
            await held.wait_until_held()
            scope.cancel()
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()
                assert stack.cow.store.locks.is_locked(0, 1)  # the thread still writes
                held.open()
    assert stack.cow.store.map.state(0) is State.DATA
    assert await read(stack.top, 0, BLOCK) == patterns(1, BLOCK)
    assert not stack.cow.store.locks.held


async def test_cow_limit_holds_for_writes_at_the_same_time() -> None:
    """Room for one block, two partial writes in their base reads: one gets it, the other is told that there is none."""
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as folder:
        bench = Bench(Case("cow", SIZE, cow_layer(limit=BLOCK)), Path(folder))
        refused = 0

        async def attempt(stack: Stack, offset: int) -> None:
            nonlocal refused
            try:
                await write(stack.top, offset, b"x")
            except NoSpaceError:
                refused += 1

        async with bench.open() as stack:
            assert stack.file is not None
            reading, writing = stack.gate.hold("read_into", once=False), stack.file.hold("write")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(attempt, stack, 10)
                nursery.start_soon(attempt, stack, 5 * BLOCK + 10)
                await wait_all_tasks_blocked()
                reading.open()
                await writing.wait_until_held()
                await wait_all_tasks_blocked()
                writing.open()
            assert refused == 1
            assert stack.cow is not None
            assert stack.cow.store.map.data_blocks == 1
