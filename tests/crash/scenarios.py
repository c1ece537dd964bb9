"""Scripted scenarios, one for each way to get the order wrong: see `mutants.MUTANTS`."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from examples import BLOCK, CASES
from powercut import FAULTS, Counted, cut_everywhere, make, request
from trio.testing import wait_all_tasks_blocked

from cachefs.errors import BackendError, NoSpaceError
from cachefs.store.blockmap import BLOCKS_PER_SECTOR
from cachefs.testing.gate import Held
from cachefs.testing.model import Flush, Trim, Write
from cachefs.testing.rules import Rule
from cachefs.testing.stacks import Case, Stack, cow_layer
from cachefs.testing.strategies import patterns
from cachefs.testing.writelog import WriteLog

FAST, SLOW = CASES[0], CASES[1]
LARGE = Case("cow-two-map-sectors", (BLOCKS_PER_SECTOR + 1) * BLOCK + 500, cow_layer())
ONE, TWO = Write(0, patterns(1, BLOCK)), Write(BLOCK, patterns(2, BLOCK))

Scenario = Callable[[Stack, WriteLog], Awaitable[None]]


@asynccontextmanager
async def held(hold: Held) -> AsyncIterator[trio.Nursery]:
    """Wait for *hold*, started in the nursery that is given; open it afterwards and wait for all."""
    async with trio.open_nursery() as nursery:
        yield nursery
        hold.open()


async def write_and_flush(stack: Stack, log: WriteLog) -> None:
    for seed in (1, 2):
        await request(stack.top, Write(100, patterns(seed, BLOCK)), log)
        await request(stack.top, Flush(), log)


async def write_during_the_sync(stack: Stack, log: WriteLog) -> None:
    await request(stack.top, ONE, log)
    hold = log.hold("sync data")
    async with held(hold) as nursery:
        nursery.start_soon(request, stack.top, Flush(), log)
        await hold.wait_until_held()
        await request(stack.top, TWO, log)


async def flush_during_the_sync(stack: Stack, log: WriteLog) -> None:
    await request(stack.top, ONE, log)
    hold = log.hold("sync data")
    async with held(hold) as nursery:
        nursery.start_soon(request, stack.top, Flush(), log)
        await hold.wait_until_held()
        await request(stack.top, TWO, log)
        nursery.start_soon(request, stack.top, Flush(), log)
        await wait_all_tasks_blocked()


async def write_during_the_sync_of_the_map(stack: Stack, log: WriteLog) -> None:
    await request(stack.top, ONE, log)
    hold = log.hold("sync map")
    async with held(hold) as nursery:
        nursery.start_soon(request, stack.top, Flush(), log)
        await hold.wait_until_held()
        await request(stack.top, Trim(0, BLOCK), log)
        await request(stack.top, Write(512, patterns(2, 512)), log)
        nursery.start_soon(request, stack.top, Flush(), log)
        await wait_all_tasks_blocked()


async def no_room_for_the_map(stack: Stack, log: WriteLog) -> None:
    await request(stack.top, ONE, log)
    log.faults.append((Rule("write map"), FAULTS["write map"]))
    with contextlib.suppress(NoSpaceError):
        await request(stack.top, Flush(), log)
    await request(stack.top, Flush(), log)


async def sync_fails(stack: Stack, log: WriteLog) -> None:
    await request(stack.top, ONE, log)
    log.faults.append((Rule("sync data"), FAULTS["sync data"]))
    for _ in range(2):
        with contextlib.suppress(BackendError):
            await request(stack.top, Flush(), log)


async def flush_beside_a_write_in_its_thread(stack: Stack, log: WriteLog) -> None:
    assert stack.file is not None
    hold = stack.file.hold("write")
    async with held(hold) as nursery:
        nursery.start_soon(request, stack.top, ONE, log)
        await hold.wait_until_held()
        await request(stack.top, Flush(), log)


async def trimmed_and_written_again(stack: Stack, log: WriteLog) -> None:
    assert stack.cow is not None
    assert stack.file is not None
    await request(stack.top, ONE, log)
    hold = stack.file.hold("punch")
    async with held(hold) as nursery:  # whose lock keeps the write away
        await request(stack.top, Trim(0, BLOCK), log)
        await hold.wait_until_held()
        nursery.start_soon(request, stack.top, ONE, log)
        await wait_all_tasks_blocked()
    await stack.cow.store.wait_punched()
    await request(stack.top, Flush(), log)


async def trimmed_and_written_in_part(stack: Stack, log: WriteLog) -> None:
    assert stack.file is not None
    await request(stack.top, ONE, log)
    await request(stack.top, Flush(), log)
    hold = stack.file.hold("write")
    async with held(hold) as nursery:  # whose lock keeps the punch away
        nursery.start_soon(request, stack.top, Write(512, patterns(3, 512)), log)
        await hold.wait_until_held()
        nursery.start_soon(request, stack.top, Trim(0, BLOCK), log)
        await wait_all_tasks_blocked()
        nursery.start_soon(request, stack.top, Write(1024, patterns(2, 512)), log)
        await wait_all_tasks_blocked()
    await request(stack.top, Flush(), log)


async def change_two_sectors_of_the_map(stack: Stack, log: WriteLog) -> None:
    """A cut may keep either of them."""
    for seed in (3, 4):
        await request(stack.top, Write((BLOCKS_PER_SECTOR - 1) * BLOCK + 100, patterns(seed, 2 * BLOCK)), log)
        await request(stack.top, Trim(5 * BLOCK, BLOCK), log)
        await request(stack.top, Flush(), log)
        await request(stack.top, Write(5 * BLOCK, patterns(seed + 2, BLOCK)), log)


SCENARIOS: dict[Scenario, Case] = {
    write_and_flush: FAST,
    write_during_the_sync: FAST,
    flush_during_the_sync: FAST,
    write_during_the_sync_of_the_map: FAST,
    no_room_for_the_map: FAST,
    sync_fails: FAST,
    flush_beside_a_write_in_its_thread: SLOW,
    trimmed_and_written_again: FAST,
    trimmed_and_written_in_part: FAST,
    change_two_sectors_of_the_map: LARGE,
}


async def run_scenario(scenario: Scenario) -> Counted:
    """Play it and cut the power everywhere. Raises AssertionError when a promise is broken."""
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as folder:
        disk = await make(SCENARIOS[scenario], Path(folder))
        with disk.log.recording():
            async with disk.bench().open() as stack:
                await scenario(stack, disk.log)
        await cut_everywhere(disk, random.Random(1))
        return disk.counted
