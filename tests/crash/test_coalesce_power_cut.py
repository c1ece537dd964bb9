"""The power fails under a coalescer over a file, direct or not: what was flushed is there, the rest is old or new per sector.

The file is the disk, so nothing is opened after the cut: its bytes are what a guest would find.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
from loopmounts import fresh_file_system
from powercut import Group, play, request

from cachefs.errors import CachefsError
from cachefs.layers.coalesce import Coalesce
from cachefs.layers.writeouts import WriteOuts
from cachefs.store.clusters import Slot
from cachefs.testing.model import Flush, Op, Trim, Write, Zero
from cachefs.testing.rules import Rule
from cachefs.testing.stacks import Bench, Case, Stack, coalesce_layer
from cachefs.testing.strategies import patterns
from cachefs.testing.writelog import Keep, Promises, Replay, WriteLog, at_random, everything, nothing

CLUSTER = 64 << 10
SIZE = 2 * CLUSTER + 1000
LAYERS = coalesce_layer(cluster="64KiB", buffer="360KiB", max_delay="1ms")
BUFFERED = Case("coalesce-file", SIZE, LAYERS, backend="file", slow=True)
DIRECT = Case("coalesce-direct", SIZE, LAYERS, backend="file", direct=True, on_disk=True)
LARGE = replace(DIRECT, name="coalesce-large", layers=coalesce_layer(cluster="4MiB", buffer="20MiB", max_delay="1ms"))
VARIANTS: tuple[Keep, ...] = (nothing, everything)
EIO = OSError(5, "Input/output error")


def cut_everywhere(log: WriteLog, content: bytes, dice: random.Random) -> int:
    """How many cuts were compared with the promises. Raises AssertionError."""
    replay, promises = Replay(log), Promises(content, log.entries)
    cuts = 0
    for at in range(len(log.entries)):
        replay.advance(at)
        for keep in (*VARIANTS, *[at_random(dice)] * 2):
            promises.check(replay.files(keep).get("base.raw", content), at)
            cuts += 1
    return cuts


async def record(
    case: Case, act: Callable[[Stack, WriteLog], Awaitable[None]], root: Path | None = None
) -> tuple[WriteLog, bytes]:
    """What happened to the file while *act* was at work on the disk, closing included. root: where it lies."""
    root = root if root is not None or case.on_disk else Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir=root) as folder:
        bench = Bench(case, Path(folder, "bench"))
        log = WriteLog(bench.folder)
        with log.recording():
            async with bench.open() as stack:
                with contextlib.suppress(CachefsError):
                    await act(stack, log)
        return log, bench.content


def some_op(dice: random.Random) -> Op:
    if dice.random() < 0.3:
        return Flush()
    near = dice.choice((0, CLUSTER - 3000, CLUSTER, 2 * CLUSTER - 500))
    offset = min(SIZE - 1, near + dice.randrange(6000))
    length = min(SIZE - offset, dice.choice((1, 100, 512, 3000, 4096, CLUSTER)))
    if dice.random() < 0.25:
        return dice.choice((Trim, Zero))(offset, length)
    return Write(offset, patterns(dice.randrange(1, 250), length))


def some_groups(dice: random.Random) -> Sequence[Group]:
    return [Group(tuple(some_op(dice) for _ in range(dice.randint(2, 6)))) for _ in range(dice.randint(1, 4))]


async def search(case: Case, seed: int, root: Path | None = None) -> int:
    dice = random.Random(seed)

    async def act(stack: Stack, log: WriteLog) -> None:
        if dice.random() < 0.3:
            log.faults.append((Rule("write base.raw", nth=dice.randint(1, 4)), EIO))
        for nth in range(1, dice.randint(1, 4)):
            stack.gate.hold("write", nth=nth)
        await play(stack, log, some_groups(dice), dice)

    log, content = await record(case, act, root)
    return cut_everywhere(log, content, dice)


@pytest.mark.logs("a write-out failed", "the last flush failed")
@pytest.mark.parametrize("case", [BUFFERED, DIRECT], ids=lambda case: case.name)
async def test_some_power_cuts_lose_nothing_that_was_flushed(case: Case) -> None:
    assert sum([await search(case, seed) for seed in range(3)]) > 100


@pytest.mark.slow
@pytest.mark.logs("a write-out failed", "the last flush failed")
@pytest.mark.parametrize("case", [BUFFERED, DIRECT], ids=lambda case: case.name)
async def test_thousands_of_power_cuts_lose_nothing_that_was_flushed(case: Case) -> None:
    dice = random.Random()
    cuts = 0
    while cuts < 3000:
        seed = dice.randrange(1 << 32)
        print(f"seed {seed}")  # shown when the test fails
        cuts += await search(case, seed)


ALONE = Case("direct", SIZE, backend="file", direct=True, on_disk=True)


@pytest.mark.slow
@pytest.mark.logs("a write-out failed", "the last flush failed")
@pytest.mark.parametrize("case", [DIRECT, LARGE, ALONE], ids=lambda case: case.name)
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
async def test_power_cuts_on_a_file_system_of_its_own_lose_nothing(case: Case, kind: str, tmp_path: Path) -> None:
    dice = random.Random()
    with fresh_file_system(kind, tmp_path / kind) as (root, _):
        cuts = 0
        while cuts < 500:
            seed = dice.randrange(1 << 32)
            print(f"seed {seed}")  # shown when the test fails
            cuts += await search(case, seed, root)


# ---- mutants


async def write_flush_and_write(stack: Stack, log: WriteLog) -> None:
    for seed in (1, 2):
        await request(stack.top, Write(100, patterns(seed, 5000)), log)
        await request(stack.top, Write(CLUSTER, patterns(seed + 2, CLUSTER)), log)
        await request(stack.top, Flush(), log)


async def flush_beside_a_write_out(stack: Stack, log: WriteLog) -> None:
    held = stack.gate.hold("write")
    await request(stack.top, Write(0, patterns(1, CLUSTER)), log)
    await held.wait_until_held()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(request, stack.top, Flush(), log)
        await trio.testing.wait_all_tasks_blocked()
        held.open()


async def flush_after_a_write_out_failed(stack: Stack, log: WriteLog) -> None:
    log.faults.append((Rule("write base.raw"), EIO))
    await request(stack.top, Write(0, patterns(1, 4096)), log)
    for _ in range(2):
        with contextlib.suppress(CachefsError):
            await request(stack.top, Flush(), log)


async def _flush_here_only(layer: Coalesce) -> None:
    for write_out in [layer.write_outs.ask(cluster) for cluster in {*layer.clusters.open, *layer.clusters.frozen}]:
        await write_out.done.wait()
        if write_out.error is not None:
            raise write_out.error


async def _flush_open_ones(layer: Coalesce) -> None:
    for write_out in [layer.write_outs.ask(cluster) for cluster in layer.clusters.open]:
        await write_out.done.wait()
        if write_out.error is not None:
            raise write_out.error
    await layer.child.flush()


async def _flush_first(layer: Coalesce) -> None:
    await layer.child.flush()
    await _flush_here_only(layer)


async def _forget_errors(write_outs: WriteOuts, slot: Slot) -> None:
    await _write_out(write_outs, slot)


async def _complete_with_rubbish(write_outs: WriteOuts, slot: Slot, start: int, end: int) -> None:
    for first, last in slot.gaps(start, end):
        slot.put(first, b"\x5a" * (last - first))


_write_out = WriteOuts._write_out
MUTANTS: dict[str, tuple[type, str, Any, Callable[[Stack, WriteLog], Awaitable[None]]]] = {
    "store-not-flushed": (Coalesce, "flush", _flush_here_only, write_flush_and_write),
    "store-flushed-first": (Coalesce, "flush", _flush_first, write_flush_and_write),
    "write-out-not-waited-for": (Coalesce, "flush", _flush_open_ones, flush_beside_a_write_out),
    "errors-hidden": (WriteOuts, "_write_out", _forget_errors, flush_after_a_write_out_failed),
    "padded-with-rubbish": (WriteOuts, "_complete_units", _complete_with_rubbish, write_flush_and_write),
}


@pytest.mark.logs("a write-out failed")
@pytest.mark.parametrize("case", [BUFFERED, DIRECT], ids=lambda case: case.name)
@pytest.mark.parametrize("scenario", [write_flush_and_write, flush_beside_a_write_out, flush_after_a_write_out_failed])
async def test_nothing_is_lost_in(case: Case, scenario: Callable[[Stack, WriteLog], Awaitable[None]]) -> None:
    log, content = await record(case, scenario)
    assert cut_everywhere(log, content, random.Random(1)) >= 20


@pytest.mark.logs("a write-out failed")
@pytest.mark.parametrize("mutant", MUTANTS)
async def test_a_scenario_notices(mutant: str) -> None:
    owner, name, instead, scenario = MUTANTS[mutant]
    with mock.patch.object(owner, name, instead):
        log, content = await record(DIRECT, scenario)
    with pytest.raises(AssertionError, match=r"cut after entry \d+: (sector \d+ holds|nobody touched)"):
        cut_everywhere(log, content, random.Random(1))
