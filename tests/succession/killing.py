"""Stores killed at every step and taken over: what the successor finds, and what is left when the power is cut then.

For n = FIRST, FIRST + EVERY, ...: a child opens the stores, does the requests of a scenario and kills itself (SIGKILL) at the
n-th *step*; a second child takes over what its keeper holds, and is content with it or not (`kill_scenarios`, the program).

A step is whenever what outlives the process is another than before: behind each system call that changes files or what the
keeper holds, behind each line that has changed survivor memory, and behind each answer. A kill in between leaves what one
at the step before it leaves. Both children write one log (`cachefs.testing.writelog`), which outlives them.
"""

from __future__ import annotations

import itertools
import mmap
import os
import pickle
import select
import signal
import sys
import tempfile
import threading
import traceback
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import succession_mutants
import trio

from cachefs import notify, survivor
from cachefs.layers import coalesce
from cachefs.layers import cow as cow_module
from cachefs.nbd import recovery, unflushed
from cachefs.pool import image as image_module
from cachefs.pool import pool as pool_module
from cachefs.pool import summap
from cachefs.store import blockmap, blockstore, clusters, localfile, sectors
from cachefs.survivor import SurvivorMemory, Survivors
from cachefs.testing.keeper import Keeper
from cachefs.testing.writelog import Ended, Entry, WriteLog

TRACED = {
    module.__file__
    for module in (
        *(survivor, cow_module, blockmap, blockstore, sectors, summap, image_module, pool_module),
        *(unflushed, recovery, clusters, coalesce, succession_mutants),
    )
}
DEADLINE_S = 20.0

Work = Callable[[Path, Survivors, "SharedLog", bool], Awaitable[None]]
"""Open the stores in a folder and do the requests; or, as a successor, look at what is there. Raises AssertionError."""


class SharedLog(WriteLog):
    """A log that outlives the process: each entry is appended to *file* at once. step: called after each `Ended`."""

    def __init__(self, folder: Path, file: Path, step: Callable[[], None] = lambda: None) -> None:
        super().__init__(folder)
        self.folder = folder
        self.step = step
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
        if isinstance(entry, Ended):
            self.step()
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
        self._memories: list[SurvivorMemory] = []
        self._seen: list[int] = []

    def step(self) -> None:
        with self._lock:
            self._counter[0] += 1
            if self._counter[0] == self._last:
                os.kill(os.getpid(), signal.SIGKILL)

    def _look(self) -> None:
        """A step, if a memory is another one than at the last look."""
        found = [_digest(memory) for memory in self._memories]
        if found != self._seen:
            self._seen = found
            self.step()

    def _behind(self, call: Callable[..., Any], *arguments: Any, **keys: Any) -> Any:
        self._look()
        try:
            return call(*arguments, **keys)
        finally:
            self.step()

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in TRACED:
            return None
        self._look()
        return self._trace

    def _watch(self, made: Callable[..., None], memory: SurvivorMemory, *arguments: Any, **keys: Any) -> None:
        made(memory, *arguments, **keys)
        self._memories.append(memory)

    @contextmanager
    def counting(self) -> Iterator[None]:
        calls: list[tuple[Any, str]] = [(os, name) for name in ("pwrite", "pwritev", "fdatasync", "fsync", "rename")]
        calls += [(localfile._libc, "fallocate"), (notify, "notify")]
        init = SurvivorMemory.__init__
        with ExitStack() as stack:
            for owner, name in calls:
                stack.enter_context(mock.patch.object(owner, name, partial(self._behind, getattr(owner, name))))
            watch = lambda memory, *arguments, **keys: self._watch(init, memory, *arguments, **keys)  # noqa: E731
            stack.enter_context(mock.patch.object(SurvivorMemory, "__init__", watch))
            threading.settrace(self._trace)
            sys.settrace(self._trace)
            try:
                yield
            finally:
                sys.settrace(None)
                threading.settrace(None)  # type: ignore[arg-type]


def _digest(memory: SurvivorMemory) -> int:
    found = 0
    for start, end in memory.touched(0, len(memory.body)):
        found = zlib.crc32(memory.body[start:end], found)
    return found


def run_child(work: Callable[[], None], keeper: Keeper) -> int:
    """Fork, do *work*, and serve as its keeper meanwhile; its exit code, minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    keeper.main_pid = pid
    descriptor = os.pidfd_open(pid)
    ended = keeper.wait(lambda: select.select([descriptor], [], [], 0)[0], DEADLINE_S)
    os.close(descriptor)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    keeper.turn()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not ended:
        raise AssertionError("it hangs")
    return code


def kill_at(scenario: Work, last: int, folder: Path, counter: Any) -> int:
    """The exit code of the one that was to be killed. Raises AssertionError when its successor is not content."""
    keeper = Keeper(folder / "notify")
    stores = folder / "stores"
    log_file = folder / "log"
    os.environ["NOTIFY_SOCKET"] = str(keeper.path)

    def victim() -> None:
        steps = Steps(last, counter)
        log = SharedLog(stores / "state" / "overlays", log_file, steps.step)
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


def run(scenario: Work, every: int, first: int = 1) -> int:
    """The number of steps. Raises AssertionError with the step at which the kill did harm."""
    counter = memoryview(mmap.mmap(-1, 4096)).cast("q")
    for last in itertools.count(first, every):
        with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as folder:
            try:
                if kill_at(scenario, last, Path(folder), counter) == 0:
                    return int(counter[0])
            except AssertionError as exc:
                raise AssertionError(f"killed at step {last}: {exc}") from exc
    raise AssertionError
