"""Stores killed at every step and taken over: what the successor finds, and what is left when the power is cut then.

Runs as a program of its own, because it forks: `python killing.py SCENARIO EVERY FIRST [MUTANT]`. For n = FIRST, FIRST + EVERY,
...: a child opens the stores, does the requests of the scenario and kills itself (SIGKILL) at the n-th *step*; a second child
takes over what its keeper holds,

- reads everything: every request that was acknowledged has happened, the one under way is done or not, per sector;
- does the one under way again, as the kernel would have it, and flushes; then the power is cut: nothing is missing.

Steps are the system calls that change files, before and after each, and every line of the modules whose order matters. Both
children write one log (`cachefs.testing.writelog`), which outlives them. It ends when a child came to its end. The output:
`steps N`, or what is wrong and exit code 1.
"""

from __future__ import annotations

import itertools
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import succession_mutants
import trio
from succession_mutants import applied

from cachefs.layers import cow as cow_module
from cachefs.pool import image as image_module
from cachefs.pool import summap as summap_module
from cachefs.pool.summap import State
from cachefs.store import blockmap, blockstore, localfile, sectors
from cachefs.survivor import Survivors
from cachefs.testing.caches import CacheBench, Opened, disk_bytes
from cachefs.testing.keeper import Keeper
from cachefs.testing.model import Flush, Op, Trim, Write, perform, read_all
from cachefs.testing.stacks import Bench, Case, cow_layer
from cachefs.testing.strategies import patterns
from cachefs.testing.writelog import (
    Began,
    Ended,
    Entry,
    Promises,
    Replay,
    WriteLog,
    at_random,
    everything,
    materialise,
    nothing,
    only,
)

BLOCK = 4096
SIZE = 6 * BLOCK + 1000
TRACED = {
    module.__file__
    for module in (cow_module, blockmap, blockstore, sectors, summap_module, image_module, succession_mutants)
}
DEADLINE_S = 20.0

Work = Callable[[Path, Survivors, "SharedLog", bool], Awaitable[None]]
"""Open the stores in a folder and do the requests; or, as a successor, look at what is there. Raises AssertionError."""


class SharedLog(WriteLog):
    """A log that outlives the process: each entry is appended to *file* at once."""

    def __init__(self, folder: Path, file: Path) -> None:
        super().__init__(folder)
        self._file_path = file
        if file.exists():
            with file.open("rb") as reader:
                while reader.peek(1):
                    kind, content = pickle.load(reader)
                    if kind == "initial":
                        self.initial.update(content)
                    else:
                        self.entries.append(content)
                        self.times.append(0)
        self._output = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def _append(self, entry: Entry) -> int:
        _os_write(self._output, pickle.dumps(("entry", entry)))
        return super()._append(entry)

    def _file(self, descriptor: int) -> str | None:
        known = len(self.initial)
        name = super()._file(descriptor)
        if len(self.initial) > known:
            _os_write(self._output, pickle.dumps(("initial", dict(self.initial))))
        return name


_os_write = os.write


class Steps:
    """Counts them, and kills the process at the *last* one."""

    def __init__(self, last: int, counter: Any) -> None:
        self._last = last
        self._counter = counter
        self._lock = threading.Lock()

    def step(self) -> None:
        with self._lock:
            self._counter[0] += 1
            if self._counter[0] == self._last:
                os.kill(os.getpid(), signal.SIGKILL)

    def _around(self, call: Callable[..., Any], *arguments: Any) -> Any:
        self.step()
        try:
            return call(*arguments)
        finally:
            self.step()

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            self.step()
        return self._trace

    @contextmanager
    def counting(self) -> Iterator[None]:
        calls = [(os, name) for name in ("pwrite", "pwritev", "fdatasync", "fsync")]
        with mock.patch.object(localfile._libc, "fallocate", partial(self._around, localfile._libc.fallocate)):
            patches = [
                mock.patch.object(owner, name, partial(self._around, getattr(owner, name))) for owner, name in calls
            ]
            for patch in patches:
                patch.start()
            threading.settrace(self._trace)
            sys.settrace(self._trace)
            try:
                yield
            finally:
                sys.settrace(None)
                threading.settrace(None)  # type: ignore[arg-type]
                for patch in patches:
                    patch.stop()


# ---- overlays

OVERLAY: tuple[Op, ...] = (
    Write(0, patterns(1, 2 * BLOCK)),  # absent to data, on the loop
    Write(2 * BLOCK + 100, patterns(2, 500)),  # a part of an absent block
    Trim(BLOCK, BLOCK),  # data to zero
    Flush(),
    Write(BLOCK + 512, patterns(3, 1024)),  # a part of a zero block
    Trim(0, 3 * BLOCK),
    Write(0, patterns(4, BLOCK)),
    Flush(),
    Write(5 * BLOCK, patterns(5, BLOCK + 1000)),  # the last block, which is short
    Write(0, patterns(6, 3 * BLOCK)),  # data again, and zero to data
)


def overlay_case(ephemeral: bool = False) -> Case:
    return Case("cow", SIZE, cow_layer(ephemeral=True) if ephemeral else cow_layer())


async def overlay(
    folder: Path, survivors: Survivors, log: SharedLog, is_successor: bool, case: Case | None = None
) -> None:
    bench = Bench(case or overlay_case(), folder, survivors=survivors)
    with log.recording():
        async with bench.open() as stack:
            if is_successor:
                await look_at_overlay(bench, stack.top, log, folder)
                return
            for op in OVERLAY:
                await request(stack.top, op, log)
            await stack.cow.store.wait_punched()  # type: ignore[union-attr]
            os._exit(0)


async def request(top: Any, op: Op, log: WriteLog) -> None:
    began = log.note(Began(op))
    if isinstance(op, Flush):
        await top.flush()
    else:
        await perform(top, op)
    log.note(Ended(began))


async def look_at_overlay(bench: Bench, top: Any, log: SharedLog, folder: Path) -> None:
    begun = {index: entry for index, entry in enumerate(log.entries) if isinstance(entry, Began)}
    ended = {entry.began for entry in log.entries if isinstance(entry, Ended)}
    under_way = [entry.op for index, entry in begun.items() if index not in ended]
    as_if_flushed = [*log.entries, Began(Flush())]
    as_if_flushed.append(Ended(len(as_if_flushed) - 1))
    content = await read_all(top)
    Promises(bench.content, as_if_flushed).check(content, len(as_if_flushed) - 1)
    for op in under_way:
        await request(top, op, log)
    await request(top, Flush(), log)
    await check_power_cut(bench, log, folder)
    if bench.case == overlay_case(ephemeral=True):
        return


async def check_power_cut(bench: Bench, log: SharedLog, folder: Path) -> None:
    replay, promises = Replay(log), Promises(bench.content, log.entries)
    at = len(log.entries) - 1
    replay.advance(at)
    for number, keep in enumerate((nothing, everything, only("data"), only("map"), at_random(random.Random(1)))):
        copy = folder.with_name(f"{folder.name}-cut-{number}")
        materialise(replay.files(keep), copy / "state" / "overlays")
        async with Bench(bench.case, copy).open() as stack:
            promises.check(await read_all(stack.top), at)
        shutil.rmtree(copy)


async def ephemeral(folder: Path, survivors: Survivors, log: SharedLog, is_successor: bool) -> None:
    """It makes no promise for a power cut, and the same one for the death of the daemon."""
    with mock.patch(f"{__name__}.check_power_cut", _no_check):
        await overlay(folder, survivors, log, is_successor, overlay_case(ephemeral=True))


async def _no_check(*_: Any) -> None: ...


# ---- pools

BLOCKS = 180
IMAGE = patterns(7, BLOCKS * BLOCK)
QUOTA = 512 << 10  # some 100 blocks


async def pool(folder: Path, survivors: Survivors, log: SharedLog, is_successor: bool) -> None:
    """Installs, evictions and syncs; afterwards every byte is right and the pool within its quota."""
    bench = CacheBench(folder, IMAGE, quota=QUOTA, survivors=survivors)
    async with bench.open() as opened:
        image = opened.image
        if is_successor:
            evicting = [block for block in range(image.count) if image.map.state(block) is State.EVICTING]
            assert not evicting, f"blocks {evicting} are still being evicted"
        check_room(bench, opened)
        for start in (0, BLOCKS // 2, BLOCKS // 4):
            for block in range(start, start + BLOCKS // 2):
                got = memoryview(bytearray(BLOCK))
                if not opened.top.try_read_into(block * BLOCK, got):
                    await opened.top.read_into(block * BLOCK, got)
                assert got == IMAGE[block * BLOCK : (block + 1) * BLOCK], f"block {block} is wrong"
            await opened.settled()
            check_room(bench, opened)
        await image.sync()
        if not is_successor:
            assert image.evicted_blocks > 10
            os._exit(0)


def check_room(bench: CacheBench, opened: Opened) -> None:
    account = opened.pool.account
    held = disk_bytes(bench.pool_path)
    assert held <= account.used <= account.limit, (
        f"{held} bytes on disk, counted {account.used}, may be {account.limit}"
    )


SCENARIOS: dict[str, Work] = {"overlay": overlay, "ephemeral": ephemeral, "pool": pool}


# ---- killing


def run_child(work: Callable[[], None], keeper: Keeper) -> int:
    """Fork, do *work*, and serve as its keeper meanwhile; its exit code, minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    keeper.main_pid = pid
    descriptor = os.pidfd_open(pid)
    ended = keeper.wait(lambda: _readable(descriptor), DEADLINE_S)
    os.close(descriptor)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    keeper.turn()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not ended:
        raise AssertionError("it hangs")
    return code


def _readable(descriptor: int) -> bool:
    import select

    return bool(select.select([descriptor], [], [], 0)[0])


def kill_at(scenario: Work, last: int, folder: Path, counter: Any) -> int:
    """The exit code of the one that was to be killed. Raises AssertionError when its successor is not content."""
    keeper = Keeper(folder / "notify")
    stores = folder / "stores"
    log_file = folder / "log"
    os.environ["NOTIFY_SOCKET"] = str(keeper.path)

    def victim() -> None:
        steps = Steps(last, counter)
        log = SharedLog(stores / "state" / "overlays", log_file)
        with steps.counting():
            trio.run(scenario, stores, Survivors(), log, False)

    def successor() -> None:
        log = SharedLog(stores / "state" / "overlays", log_file)
        trio.run(scenario, stores, Survivors(keeper.kept), log, True)

    try:
        counter[0] = 0
        code = run_child(victim, keeper)
        assert code in (0, -signal.SIGKILL), f"the first one ended with {code}"
        assert run_child(successor, keeper) == 0, "the successor is not content; see above"
        return code
    finally:
        keeper.close()


def run(name: str, every: int, first: int = 1) -> int:
    """The number of steps. Raises AssertionError with the step at which the kill did harm."""
    import mmap

    counter = memoryview(mmap.mmap(-1, 4096)).cast("q")
    for last in itertools.count(first, every):
        with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as folder:
            try:
                if kill_at(SCENARIOS[name], last, Path(folder), counter) == 0:
                    return int(counter[0])
            except AssertionError as exc:
                raise AssertionError(f"killed at step {last}: {exc}") from exc
    raise AssertionError


def main(arguments: Sequence[str]) -> None:
    name, every, first, *mutant = arguments
    with applied(mutant[0]) if mutant else nullcontext():
        try:
            print("steps", run(name, int(every), int(first)))
        except AssertionError as exc:
            print(exc)
            sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
