"""Power cuts without a plug: everything that goes to a store's files in one ordered log, and what a cut leaves of it.

    log = WriteLog(folder)                    # the stores below this folder
    with log.recording():
        ...                                   # open the disk, write, flush; `log.note(Began(...))`, `log.note(Ended(...))`
    replay, promises = Replay(log), Promises(base, log.entries)
    for at in range(len(log.entries)):
        replay.advance(at)                    # the power fails right after this entry
        materialise(replay.files(at_random(dice)), fresh_folder)
        promises.check(<what the disk reads as when it is opened from there>, at)

The log is taken at the system calls (pwrite, pwritev, fallocate, fdatasync, fsync), for whichever code makes them; what direct
files would do together is done one by one. A write is one entry, at the moment it is in the page cache. A sync is two,
because writes go on beside it: what was logged before it *began* is durable when it has *ended*.
Of the rest each 512-byte sector keeps any version that it ever had since, by
itself: the kernel writes back when and in which order it likes. A sync that failed makes nothing durable, and what it was
to cover no later sync covers either: the kernel has dropped those pages or calls them clean.

Directories and what is created in them count as durable at once: a store is made whole, then renamed into place. The files
of a store are known from the first entry that concerns one of them, which is the bump of its epoch.

Syncs, and writes that are made in threads, can be held and made to fail: `log.hold("sync data")`,
`log.faults.append((Rule("write map"), OSError(errno.ENOSPC, "...")))`; the second word is the name of the file.

Source: QEMU's blklogwrites and dm-log-writes, which replay whole prefixes; the subset of sectors is ours.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from cachefs.store import localfile, transfers
from cachefs.testing.gate import _Holds, _in_thread
from cachefs.testing.model import Changing, Flush, Op, left_by
from cachefs.testing.rules import Rule

SECTOR = 512
NEVER = 1 << 62  # later than any entry


# ---- the log


@dataclass(frozen=True)
class Change:
    """*file* (relative to the log's folder) got *data*; a punch is a change to zeros."""

    file: str
    offset: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class SyncBegan:
    file: str


@dataclass(frozen=True)
class SyncEnded:
    """began: the entry of its `SyncBegan`."""

    file: str
    began: int
    failed: bool = False


@dataclass(frozen=True)
class Began:
    """The guest asks for *op*. synced: durable when it is done (O_DSYNC)."""

    op: Op
    synced: bool = False


@dataclass(frozen=True)
class Ended:
    """It was told that the request of entry *began* is done. One that failed never ends: it may be done, or in part."""

    began: int


Entry = Change | SyncBegan | SyncEnded | Began | Ended


class WriteLog(_Holds):
    """initial: the files as they were before the first entry. times: `time.monotonic_ns` of each entry."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.entries: list[Entry] = []
        self.times: list[int] = []
        self.initial: dict[str, bytes] = {}
        self.faults: list[tuple[Rule, OSError]] = []
        self._prefix = f"{folder.resolve()}/"
        self._lock = threading.Lock()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While it lasts, the calls of this process are taken down."""
        patched: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
            (os, "pwrite", self._pwrite),
            (os, "pwritev", self._pwritev),
            (os, "fdatasync", self._sync),
            (os, "fsync", self._sync),
            (localfile._libc, "fallocate", self._fallocate),
            (transfers, "carry_out", lambda real, ring, some: transfers.one_by_one(some)),
        )
        with ExitStack() as stack:
            for owner, name, instead in patched:
                stack.enter_context(mock.patch.object(owner, name, partial(instead, getattr(owner, name))))
            yield

    def note(self, entry: Entry) -> int:
        """Its index."""
        with self._lock:
            return self._append(entry)

    def _append(self, entry: Entry) -> int:
        self.entries.append(entry)
        self.times.append(time.monotonic_ns())
        return len(self.entries) - 1

    def _file(self, descriptor: int) -> str | None:
        """Its name if it is a file of a store, whose files are then known."""
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not path.startswith(self._prefix):
            return None
        name = path[len(self._prefix) :]
        if "/." in f"/{name}" or name.endswith("/lock") or not os.path.isfile(path):  # not renamed into place yet
            return None
        with self._lock:
            if name not in self.initial:
                for other in Path(path).parent.iterdir():
                    if other.is_file() and other.name != "lock":
                        self.initial.setdefault(str(other)[len(self._prefix) :], other.read_bytes())
        return name

    def _meet(self, op: str, offset: int, length: int) -> OSError | None:
        return next((error for rule, error in self.faults if rule.matches(op, offset, length)), None)

    def _change(self, call: Callable[[], int], descriptor: int, offset: int, pieces: Sequence[Any]) -> int:
        """*call*, which writes some of *pieces* and says how much; entry and write are one."""
        name = self._file(descriptor)
        if name is None:
            return call()
        content = b"".join(pieces)
        op = f"write {Path(name).name}"
        fault = self._meet(op, offset, len(content))

        def logged() -> int:
            with self._lock:
                count = call()
                self._append(Change(name, offset, content[:count]))
            return count

        return _in_thread(self._find(op, offset, len(content)), fault, logged, ())

    def _pwrite(self, real: Callable[..., int], descriptor: int, data: Any, offset: int) -> int:
        return self._change(partial(real, descriptor, data, offset), descriptor, offset, (data,))

    def _pwritev(self, real: Callable[..., int], descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        return self._change(partial(real, descriptor, buffers, offset, flags), descriptor, offset, buffers)

    def _fallocate(self, real: Callable[..., int], descriptor: int, mode: int, offset: int, length: int) -> int:
        name = self._file(descriptor)
        assert mode & (localfile.PUNCH_HOLE | localfile.ZERO_RANGE)
        if name is None:
            return real(descriptor, mode, offset, length)
        with self._lock:
            result = real(descriptor, mode, offset, length)
            if result == 0:
                self._append(Change(name, offset, bytes(length)))
        return result

    def _sync(self, real: Callable[[int], None], descriptor: int) -> None:
        name = self._file(descriptor)
        if name is None:
            return real(descriptor)
        op = f"sync {Path(name).name}"
        held, fault = self._find(op, 0, NEVER), self._meet(op, 0, NEVER)
        began = self.note(SyncBegan(name))
        failed = True
        try:
            _in_thread(held, fault, real, (descriptor,))
            failed = False
        finally:
            self.note(SyncEnded(name, began, failed))
        return None


# ---- the cut

Keep = Callable[[str, int], int]
"""Of a sector of a file that had so many versions since it was last durable: which stays; 0 is the durable one."""


def nothing(file: str, versions: int) -> int:
    return 0


def everything(file: str, versions: int) -> int:
    return versions


def only(name: str) -> Keep:
    """Everything of the files of this name, nothing of the others."""
    return lambda file, versions: versions if Path(file).name == name else 0


def at_random(dice: random.Random) -> Keep:
    return lambda file, versions: dice.randint(0, versions)


class _File:
    """durable: what it holds at least. versions: per sector, what it became since, as (entry, content)."""

    def __init__(self, content: bytes) -> None:
        self.durable = bytearray(content)
        self._latest = bytearray(content)
        self.versions: dict[int, list[tuple[int, bytes]]] = {}
        self._lost_before = -1

    def change(self, index: int, offset: int, data: bytes) -> None:
        end = min(offset + len(data), len(self._latest))  # of a punch; the files of a store never grow
        data = data[: end - offset]
        self._latest[offset:end] = data
        for number in range(offset // SECTOR, -(-end // SECTOR)):
            content = bytes(self._latest[number * SECTOR : (number + 1) * SECTOR])
            self.versions.setdefault(number, []).append((index, content))

    def sync(self, began: int, failed: bool) -> None:
        if failed:
            self._lost_before = began
            return
        for number, versions in list(self.versions.items()):
            covered = [version for version in versions if version[0] < began]
            if covered and covered[-1][0] > self._lost_before:
                self.durable[number * SECTOR : (number + 1) * SECTOR] = covered[-1][1]
                self.versions[number] = versions[len(covered) :]
                if not self.versions[number]:
                    del self.versions[number]

    def cut(self, keep: Callable[[int], int]) -> bytes:
        content = bytearray(self.durable)
        for number, versions in self.versions.items():
            which = keep(len(versions))
            if which:
                content[number * SECTOR : (number + 1) * SECTOR] = versions[which - 1][1]
        return bytes(content)


class Replay:
    """The files of a log as it goes on; before the first `advance` nothing has happened."""

    def __init__(self, log: WriteLog) -> None:
        self._entries = log.entries
        self._files = {name: _File(content) for name, content in log.initial.items()}
        self._next = 0

    def advance(self, at: int) -> None:
        """On to behind entry *at*."""
        for index in range(self._next, at + 1):
            match self._entries[index]:
                case Change(file, offset, data):
                    self._files[file].change(index, offset, data)
                case SyncEnded(file, began, failed):
                    self._files[file].sync(began, failed)
        self._next = max(self._next, at + 1)

    def files(self, keep: Keep) -> dict[str, bytes]:
        """What is left when the power fails now."""
        return {name: file.cut(partial(keep, name)) for name, file in self._files.items()}


def power_cut(log: WriteLog, at: int, keep: Keep) -> dict[str, bytes]:
    """What is left of the files when the power fails right after entry *at*."""
    replay = Replay(log)
    replay.advance(at)
    return replay.files(keep)


def materialise(files: dict[str, bytes], folder: Path) -> None:
    """Lay *files* below *folder*, zeros as holes."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for at in range(0, len(content), 4096):
                part = content[at : at + 4096]
                if part.count(0) != len(part):
                    file.seek(at)
                    file.write(part)
            file.truncate(len(content))


# ---- what was promised


@dataclass(frozen=True)
class _Request:
    op: Changing
    began: int
    ended: int
    synced: bool


class Promises:
    """What each sector of a disk may hold: *content* is the disk before the first entry.

    Of the changes that touch a sector, any that had begun may have happened, in an order in which they could have;
    one that was done before another began comes before it. Those that had ended before a flush began which was then
    acknowledged must have happened, and so must acknowledged synchronous ones. A sector is old or new, never a mixture.
    """

    def __init__(self, content: bytes, entries: Sequence[Entry]) -> None:
        self._content = content
        self._requests: dict[int, list[_Request]] = {}  # by sector, in the order in which they began
        self._flushes: list[tuple[int, int]] = []  # ended, began
        self._known: dict[tuple[int, int, int], set[bytes]] = {}
        ends = {entry.began: index for index, entry in enumerate(entries) if isinstance(entry, Ended)}
        for index, entry in enumerate(entries):
            if isinstance(entry, Began):
                self._take(entry, index, ends.get(index, NEVER))
        edges = [-1, *sorted(self._requests), -(-len(content) // SECTOR)]
        self._untouched = [slice((a + 1) * SECTOR, b * SECTOR) for a, b in itertools.pairwise(edges) if a + 1 < b]

    def _take(self, entry: Began, began: int, ended: int) -> None:
        op = entry.op
        if isinstance(op, Changing):
            for number in range(op.offset // SECTOR, -(-(op.offset + op.length) // SECTOR)):
                request = _Request(op, began, ended, entry.synced)
                self._requests.setdefault(number, []).append(request)
        elif isinstance(op, Flush):
            self._flushes.append((ended, began))

    def check(self, got: bytes, at: int) -> None:
        """Raises AssertionError when *got* is not what may be found after a cut right after entry *at*."""
        flushed = max((began for ended, began in self._flushes if ended <= at), default=-1)
        for number in self._requests:
            sector = got[number * SECTOR : (number + 1) * SECTOR]
            allowed = self._allowed(number, at, flushed)
            if sector not in allowed:
                touched = [request.op for request in self._requests[number] if request.began <= at]
                raise AssertionError(
                    f"cut after entry {at}: sector {number} holds {_short(sector)}, may hold "
                    f"{' or '.join(map(_short, allowed))}; touched by {touched}"
                )
        for part in self._untouched:
            assert got[part] == self._content[part], f"cut after entry {at}: nobody touched bytes {part}"

    def _allowed(self, number: int, at: int, flushed: int) -> set[bytes]:
        requests = [request for request in self._requests[number] if request.began <= at]
        must = 0
        for index, one in enumerate(requests):
            if one.ended < flushed or (one.synced and one.ended <= at):
                must |= 1 << index
        key = number, len(requests), must
        if key not in self._known:
            before = self._content[number * SECTOR : (number + 1) * SECTOR]
            self._known[key] = _possible(before, number * SECTOR, requests, must)
        return self._known[key]


def _possible(before: bytes, start: int, requests: Sequence[_Request], must: int) -> set[bytes]:
    """What the sector at *start* may hold when *requests*, of which the bits of *must* are sure, happened or not."""
    earlier = [sum(1 << i for i, one in enumerate(requests) if one.ended < other.began) for other in requests]
    found: set[bytes] = set()
    reached: dict[int, set[bytes]] = {0: {before}}  # by the set of those that have happened
    while reached:
        further: dict[int, set[bytes]] = {}
        for happened, contents in reached.items():
            if happened & must == must:
                found |= contents
            for index, request in enumerate(requests):
                if not happened >> index & 1 and earlier[index] & happened == earlier[index]:
                    after = {_after(content, start, request.op) for content in contents}
                    further.setdefault(happened | 1 << index, set()).update(after)
        reached = further
    return found


def _after(content: bytes, start: int, op: Changing) -> bytes:
    first, last = max(start, op.offset), min(start + len(content), op.offset + op.length)
    return content[: first - start] + left_by(op)[first - op.offset : last - op.offset] + content[last - start :]


def _short(sector: bytes) -> str:
    """Like 5a5a5a5a x512, or its pieces."""
    groups = [(byte, len(list(same))) for byte, same in itertools.groupby(sector)]
    if len(groups) > 4:
        return f"{sector[:8].hex()}..{sector[-4:].hex()}"
    return " ".join(f"{byte:02x}x{count}" for byte, count in groups)
