"""What all power-cut tests do: run requests on an overlay while a log is written, then cut the power everywhere.

`play` runs groups of requests, each group at the same time, its syncs, writes and punches held and let go in any order.
`cut_everywhere` replays the log: after each entry, in each variant, a fresh directory is opened with the real layer, read
whole and compared with what was promised. A violation is an AssertionError.
"""

from __future__ import annotations

import contextlib
import errno
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from cachefs.errors import CachefsError
from cachefs.layers.base import Layer
from cachefs.testing.gate import FileGate, Gate, open_in_random_order
from cachefs.testing.model import Flush, Op, perform, read_all
from cachefs.testing.rules import Rule
from cachefs.testing.stacks import Bench, Case, Stack
from cachefs.testing.writelog import (
    Began,
    Ended,
    Keep,
    Promises,
    Replay,
    SyncBegan,
    WriteLog,
    at_random,
    everything,
    materialise,
    nothing,
    only,
)

EXTREMES: tuple[Keep, ...] = (nothing, everything, only("data"), only("map"))
FAULTS = {  # what a group may meet, once
    "write map": OSError(errno.ENOSPC, "No space left on device"),
    "sync map": OSError(errno.EIO, "Input/output error"),
    "sync data": OSError(errno.EIO, "Input/output error"),
}


@dataclass(frozen=True)
class Group:
    """Requests at the same time, and the fault that the store meets meanwhile; then the guest flushes again."""

    ops: tuple[Op, ...]
    fault: str | None = None


@dataclass
class Counted:
    """cuts: compared with the promises; opened: directories that differed, and were opened and read."""

    cuts: int = 0
    opened: int = 0
    examples: int = 0


@dataclass
class Recorded:
    """A disk in a folder of its own, what it held at first, and the log of what happened to it."""

    case: Case
    folder: Path
    content: bytes
    log: WriteLog
    counted: Counted = field(default_factory=Counted)

    def bench(self) -> Bench:
        return Bench(self.case, self.folder)


def overlays(folder: Path) -> Path:
    """Where a bench in *folder* keeps its stores."""
    return folder / "state" / "overlays"


async def make(case: Case, folder: Path, files: dict[str, bytes] | None = None) -> Recorded:
    """A fresh disk, or the one that a cut left as *files*. Raises AssertionError when it does not open."""
    if files is not None:
        materialise(files, overlays(folder))
    bench = Bench(case, folder)
    try:
        async with bench.open() as stack:
            content = await read_all(stack.top)
    except (CachefsError, ExceptionGroup) as exc:
        raise AssertionError(f"the overlay does not open after the cut: {exc}") from exc
    return Recorded(case, folder, content, WriteLog(overlays(folder)))


async def request(layer: Layer, op: Op, log: WriteLog) -> None:
    """Do *op* and note when it began, and when the guest was told that it is done. Raises: what the layer raises."""
    began = log.note(Began(op))
    if isinstance(op, Flush):
        await _flush(layer, log, began)
    else:
        await perform(layer, op)
        log.note(Ended(began))


async def _flush(layer: Layer, log: WriteLog, began: int) -> None:
    told = trio.Event()
    token = trio.lowlevel.current_trio_token()
    errors: list[Exception | None] = []

    def done(error: Exception | None) -> None:  # in the thread of the rounds: this is when the reply goes out
        if error is None:
            log.note(Ended(began))
        errors.append(error)
        token.run_sync_soon(told.set)

    if not layer.try_flush(done):
        await layer.flush()
        log.note(Ended(began))
        return
    await told.wait()
    if errors[0] is not None:
        raise errors[0]


async def play(stack: Stack, log: WriteLog, groups: Sequence[Group], dice: random.Random) -> None:
    """Run *groups* one after the other. Requests that fail are left as not done."""
    assert stack.file is not None
    gates: tuple[Gate | FileGate | WriteLog, ...] = (stack.gate, stack.file, log)

    async def one(op: Op) -> None:
        for _ in range(dice.randrange(4)):
            await trio.lowlevel.checkpoint()
        with contextlib.suppress(CachefsError):
            await request(stack.top, op, log)

    for group in groups:
        if group.fault is not None:
            log.faults.append((Rule(group.fault), FAULTS[group.fault]))
        for gate, op in (
            (stack.gate, "read_into"),
            (stack.file, "write"),
            (stack.file, "punch"),
            (log, "sync data"),
            (log, "write map"),
            (log, "sync map"),
        ):
            for nth in range(1, dice.randrange(4)):
                gate.hold(op, nth=nth)
        async with trio.open_nursery() as beside:
            beside.start_soon(open_in_random_order, gates, dice)
            async with trio.open_nursery() as nursery:
                for op in group.ops:
                    nursery.start_soon(one, op)
            beside.cancel_scope.cancel()
        log.faults.clear()
        if group.fault is not None:
            await one(Flush())


async def record(disk: Recorded, groups: Sequence[Group], dice: random.Random) -> None:
    """`play` on the opened disk, everything logged, closing included."""
    with disk.log.recording():
        async with disk.bench().open() as stack:
            await play(stack, disk.log, groups, dice)


async def cut_everywhere(disk: Recorded, dice: random.Random, randoms: int = 2, every: int = 1) -> None:
    """Check all variants of a cut after each entry, *randoms* random ones among them, or after each *every*-th."""
    replay, promises = Replay(disk.log), Promises(disk.content, disk.log.entries)
    variants = (*EXTREMES, *[at_random(dice)] * randoms)
    known: dict[tuple[bytes, ...], bytes] = {}
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as folder:
        for at in range(len(disk.log.entries)):
            replay.advance(at)
            if at % every or isinstance(disk.log.entries[at], (Began, SyncBegan)):  # these change nothing
                continue
            for keep in variants:
                files = replay.files(keep)
                key = tuple(files[name] for name in sorted(files) if not name.endswith("/epoch"))
                if key not in known:
                    known[key] = (await make(disk.case, Path(folder) / str(len(known)), files)).content
                promises.check(known[key], at)
                disk.counted.cuts += 1
    disk.counted.opened += len(known)


@dataclass(frozen=True)
class Example:
    """What is tried: requests, a cut anywhere, then one cut from which the disk goes on, more requests, and cuts again."""

    case: Case
    groups: tuple[Group, ...]
    after: tuple[Group, ...]
    seed: int


async def try_example(example: Example, counted: Counted) -> None:
    dice = random.Random(example.seed)
    counted.examples += 1
    place = None if example.case.on_disk else "/dev/shm"
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir=place) as folder:
        disk = await make(example.case, Path(folder, "first"))
        disk.counted = counted
        await record(disk, example.groups, dice)
        await cut_everywhere(disk, dice)
        if not example.after:
            return
        replay = Replay(disk.log)
        replay.advance(dice.randrange(len(disk.log.entries)))
        second = await make(example.case, Path(folder, "second"), replay.files(at_random(dice)))
        second.counted = counted
        await record(second, example.after, dice)
        await cut_everywhere(second, dice, randoms=1)
