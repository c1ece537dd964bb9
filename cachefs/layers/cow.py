"""cow: a persistent copy-on-write overlay. Writes stay here; the child is never written and must not change.

Each block is ABSENT (the child's), DATA (in the overlay's file) or ZERO (trimmed). Blocks are 4 KiB by default, so that an
aligned 4 KiB guest write never reads the base first.

A read is split into runs of one state; absent runs go down as one request. A write changes exactly its own blocks: those
that it covers in part and that are not DATA are completed with what surrounds it (from the child, or zeros), and the
whole lands as one write of the data file, then one change of the map, then the reply.

Locks: the fast path takes none and stands back from locked blocks. On the slow path a write, trim or zero locks exactly
its blocks from look-up to publication; a read pins the blocks that it takes from the overlay's file. Base reads happen
under no lock that another block could want. Lock order: one range of this store; the child is called with it held.

Cancellation: while a write waits for its lock, the base or a thread, it is dropped whole; once a thread has it, it runs to
its publication.

Survives power loss: what was flushed. Survives the daemon: see `cachefs.store.blockstore`.
Source: the idea is nbdkit's cow filter (filters/cow/blk.c), whose read-miss install outside the lock loses writes, and
qcow2 overlays; the order of a flush is in `cachefs.store.blockstore`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import pydantic
import trio

from cachefs.errors import BaseChangedError, NoSpaceError, StoreError, from_os_error
from cachefs.extent import Extent, ExtentKind, MapRun, MapState, merge_extents
from cachefs.layers.base import ALL_CAPS, Done, Environment, Geometry, Later, Layer, Options, Statistics
from cachefs.store import files
from cachefs.store.blockmap import Run, State
from cachefs.store.blockstore import MEMORY_KIND, BlockStore, open_store
from cachefs.store.failedflag import FailedFlag
from cachefs.store.files import Header, StoreLock
from cachefs.store.mapfile import kept_names, read_header
from cachefs.survivor import Survivors, read_epoch
from cachefs.units import LocalPath, Size, format_size, is_power_of_two, split_aligned

LOOK_SPAN = 1 << 30  # bytes that one look for the end of a run may cover: it runs on the loop
MAP_SPAN = 64 << 30  # the same of `map_runs`
_ZEROS = bytes(1 << 20)
_MAP_STATES = {State.ABSENT: MapState.ABSENT, State.DATA: MapState.DATA, State.ZERO: MapState.ZERO}
_KINDS = {State.DATA: ExtentKind.DATA, State.ZERO: ExtentKind.ZERO}


def _check_block_size(value: int) -> int:
    if not 4096 <= value <= 2 << 20 or not is_power_of_two(value):
        raise ValueError("must be a power of two from 4KiB to 2MiB")
    return value


class CowConfig(Options):
    path: LocalPath | None = None
    """Directory of the overlay; default: state_dir/overlays/NAME-OF-THE-DISK. Made when it does not exist."""
    block_size: Annotated[Size, pydantic.AfterValidator(_check_block_size)] = 4096
    """Bytes per block, 4KiB to 2MiB, a power of two; fixed when the overlay is made."""
    limit: Annotated[Size, pydantic.Field(gt=0)] | None = None
    """Most bytes of data that the overlay may hold; beyond it the guest gets ENOSPC. Default: no limit."""
    ephemeral: bool = False
    """Deleted when the disk is detached; a flush then need not make anything durable."""
    direct: bool = False
    """The overlay's data bypasses the page cache (O_DIRECT): memory belongs to the guests. Its map does not matter."""
    detect_zeroes: bool = False
    """Whole blocks that are written full of zeros are stored as zero blocks, which take no space."""


class Cow:
    """An open overlay; `Cow.open` makes it. Takes any byte range (alignment 1)."""

    Config = CowConfig

    def __init__(self, name: str, config: CowConfig, child: Layer, store: BlockStore) -> None:
        self.name = name
        self.child = child
        self.identity = child.identity
        size = child.geometry.size
        self.geometry = Geometry(size, alignment=1, preferred_io=store.header.block_size)
        self.caps = ALL_CAPS
        self.store = store
        self._map = store.map
        self._written, self._zero = store.map.written, store.map.zero
        self._data = store.data
        self._flag = store.flag
        self._locks = store.locks
        self._limit = config.limit
        self._detect_zeroes = config.detect_zeroes
        self._shift = store.map.shift
        self._mask = store.header.block_size - 1
        self._size = size
        self._reserved_blocks = 0  # of slow writes that have been let in under the limit and are not published
        self._child_read_bytes = 0
        self._no_space = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, config: CowConfig, child: Layer, env: Environment) -> AsyncIterator[Cow]:
        """Raises: StoreError and its kinds, with what to do."""
        name = f"{env.owner}/cow"
        path = overlay_path(env.state_dir, env.owner, config.path)
        header = Header(child.geometry.size, config.block_size, child.identity, config.ephemeral)
        lock = await trio.to_thread.run_sync(_prepare, path, header, env)
        try:
            header = await trio.to_thread.run_sync(read_header, path)
            _check_header(path, header, config, child)
            async with open_store(
                path,
                name,
                header,
                FailedFlag(env.state_dir, env.owner, name),
                env.survivors,
                durable=not config.ephemeral,
                direct=config.direct,
            ) as store:
                yield cls(name, config, child, store)
            if config.ephemeral:
                await trio.to_thread.run_sync(_remove, path, header, env.survivors)
        finally:
            lock.close()

    # ---- fast path

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        start = offset >> self._shift
        end = ((offset + len(buffer) - 1) >> self._shift) + 1
        written = self._written
        if written.find(0, start, end) < 0:
            return self._data.try_read(offset, buffer)
        if written.find(1, start, end) < 0 and self._zero.find(1, start, end) < 0:
            return self.child.try_read_into(offset, buffer)
        for run in self._map.runs(offset, len(buffer)):
            part = buffer[run.offset - offset : run.offset - offset + run.length]
            if run.state is State.ZERO:
                part[:] = _ZEROS[: run.length]
            elif run.state is State.DATA:
                if not self._data.try_read(run.offset, part):
                    return False
            elif not self.child.try_read_into(run.offset, part):
                return False
        return True

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        """Only what is the child's as a whole: as in `read_into`, it is as right when it has become DATA or ZERO since."""
        start, end = offset >> self._shift, ((offset + len(buffer) - 1) >> self._shift) + 1
        if self._written.find(1, start, end) >= 0 or self._zero.find(1, start, end) >= 0:
            return False
        if not self.child.try_read_later(offset, buffer, done):
            return False
        self._child_read_bytes += len(buffer)
        return True

    def try_write(self, offset: int, data: memoryview) -> bool:
        end_offset = offset + len(data)
        shift = self._shift
        start, end = offset >> shift, ((end_offset - 1) >> shift) + 1
        if self._locks.held and self._locks.is_locked(start, end):
            return False
        written = self._written
        changes = written.find(0, start, end) >= 0  # some block is not DATA yet
        if changes:
            if offset & self._mask and not written[start]:
                return False
            if end_offset & self._mask and end_offset != self._size and not written[end - 1]:
                return False
            if self._limit is not None:
                return False
        if self._flag.error is not None or (self._detect_zeroes and _is_zero(data)):
            return False
        if not self._data.try_write(offset, data):
            return False
        if changes:
            self._map.set_data(start, end)
        return True

    # ---- slow path

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        # A pin, not a lock: a writer beside us may or may not be seen, but nothing that we look up is freed meanwhile.
        with self._locks.pin(offset >> self._shift, ((offset + len(buffer) - 1) >> self._shift) + 1):
            absent = []
            for run in list(self._map.runs(offset, len(buffer))):
                part = buffer[run.offset - offset : run.offset - offset + run.length]
                if run.state is State.ZERO:
                    part[:] = bytes(run.length)
                elif run.state is State.ABSENT:
                    absent.append((run.offset, part))
                else:
                    await self._read_data(run.offset, part)
        # The base is read under no pin: a punch that waits for one would hold up writers of blocks that nobody reads.
        # What was absent may have become DATA or ZERO since: then that request overlaps this one, and the base is as right.
        for start, part in absent:
            self._child_read_bytes += len(part)
            await self.child.read_into(start, part)

    async def _read_data(self, offset: int, buffer: memoryview) -> None:
        if self._data.try_read(offset, buffer):
            return
        try:
            await self._data.read(offset, buffer)
        except OSError as exc:
            raise from_os_error(exc, self.name, f"pread {offset}+{len(buffer)}") from exc

    async def write(self, offset: int, data: memoryview) -> None:
        start, end = offset >> self._shift, ((offset + len(data) - 1) >> self._shift) + 1
        hold = await self._locks.acquire(start, end)
        try:
            self.store.check_writable()
            if self._detect_zeroes and _is_zero(data):
                await self._zero_locked(offset, len(data))
            else:
                await self._write_locked(offset, data)
        finally:
            self._locks.release(hold)

    async def _write_locked(self, offset: int, data: memoryview | bytes) -> None:
        """*data* is published; the caller holds the lock of its blocks."""
        start, end = offset >> self._shift, ((offset + len(data) - 1) >> self._shift) + 1
        before = await self._surroundings(start << self._shift, offset)
        after = await self._surroundings(offset + len(data), min(end << self._shift, self._size))
        # Both awaits were under the lock: the states of these blocks are as they were.
        new_blocks = self._reserve(start, end)
        try:
            # Cancelled before a thread took it: nothing was written. After that it runs to its end and returns.
            await self._data.write(offset - len(before), (before, data, after))
        except OSError as exc:
            error = from_os_error(exc, self.name, f"pwrite {offset}+{len(data)}")
            if isinstance(error, NoSpaceError):
                self._no_space += 1
                error.detail = (
                    f"the file system of {self.store.path} is full; make room there, the guest can go on then"
                )
            raise error from exc
        finally:
            self._reserved_blocks -= new_blocks
        self._map.set_data(start, end)

    async def _surroundings(self, start: int, end: int) -> bytes:
        """What a block that is written in part holds at bytes *start* to *end* (within it); empty when it is DATA."""
        if start >= end:
            return b""
        state = self._map.state(start >> self._shift)
        if state is State.DATA:
            return b""
        if state is State.ZERO:  # perhaps not punched yet: what lies in the file is not to be seen again
            return bytes(end - start)
        buffer = bytearray(end - start)
        self._child_read_bytes += len(buffer)
        if not self.child.try_read_into(start, memoryview(buffer)):
            await self.child.read_into(start, memoryview(buffer))
        return bytes(buffer)

    def _reserve(self, start: int, end: int) -> int:
        """Blocks that become DATA by this write, counted under the limit. Raises: NoSpaceError."""
        new = end - start - self._map.count_data(start, end)
        if self._limit is not None and new:
            held = self._map.data_blocks + self._reserved_blocks + new
            if held << self._shift > self._limit:
                self._no_space += 1
                raise NoSpaceError(
                    self.name,
                    f"the overlay's limit of {self._limit} bytes is reached; raise cow.limit or trim in the guest",
                )
        self._reserved_blocks += new
        return new

    async def trim(self, offset: int, length: int) -> None:
        await self.zero(offset, length)

    async def zero(self, offset: int, length: int) -> None:
        start, end = offset >> self._shift, ((offset + length - 1) >> self._shift) + 1
        hold = await self._locks.acquire(start, end)
        try:
            self.store.check_writable()
            await self._zero_locked(offset, length)
        finally:
            self._locks.release(hold)

    async def _zero_locked(self, offset: int, length: int) -> None:
        """Whole blocks become ZERO and are punched later; edges are written as zeros. The caller holds the lock."""
        head, body, tail = split_aligned(offset, length, self._mask + 1)
        if tail.length and tail.offset + tail.length == self._size:  # the last block is whole, though it is shorter
            body = body._replace(length=body.length + tail.length) if body.length else tail
            tail = tail._replace(length=0)
        elif head.length and head.offset & self._mask == 0 and head.offset + head.length == self._size:
            body, head = head, head._replace(length=0)
        if body.length:
            start, end = body.offset >> self._shift, ((body.offset + body.length - 1) >> self._shift) + 1
            self._map.set_zero(start, end)
            self.store.punch_later(start, end)
        for edge in (head, tail):
            if edge.length and self._map.state(edge.offset >> self._shift) is not State.ZERO:
                await self._write_locked(edge.offset, bytes(edge.length))

    def try_flush(self, done: Done) -> bool:
        self.store.ask_flush(done)
        return True

    async def flush(self) -> None:
        await self.store.flush()

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        # No pin: nothing is taken from the overlay's file, and the child may take its time.
        runs = self._first_runs(offset, length, limit)
        absent = next((run.offset for run in runs if run.state is State.ABSENT), None)
        if absent is None:
            return _merge(runs, [])[:limit]
        # Asked once for all absent runs: between them may lie thousands of others, and each question may go to a server.
        below = await self.child.extents(absent, offset + length - absent, limit)
        # Looked up anew: blocks may have been written meanwhile. None has become absent, so the answer begins early enough.
        return _merge(self._first_runs(offset, length, limit), below)[:limit]

    def try_extent(self, offset: int, length: int) -> Extent | None:
        block = offset >> self._shift
        if self._written[block] or self._zero[block]:
            run = self._map.run_at(offset, offset + min(length, LOOK_SPAN))
            return Extent(offset, run.length, _KINDS[run.state])
        found = self.child.try_extent(offset, min(length, LOOK_SPAN))  # first: it says how far to look here
        if found is None:
            return None
        last = ((found.end - 1) >> self._shift) + 1
        if self._written.find(1, block, last) < 0 and self._zero.find(1, block, last) < 0:
            return found
        return Extent(offset, self._map.run_at(offset, found.end).length, found.kind)

    def _first_runs(self, offset: int, length: int, limit: int) -> list[Run]:
        runs = []
        for run in self._map.runs(offset, length):
            runs.append(run)
            if len(runs) >= limit:
                break
        return runs

    def map_runs(self, offset: int, limit: int) -> list[MapRun]:
        """What the overlay itself has, from *offset* on: a non-empty prefix of the rest."""
        runs = self._first_runs(offset, min(self._size - offset, MAP_SPAN), limit)
        return [MapRun(run.offset, run.length, _MAP_STATES[run.state]) for run in runs]

    async def prefetch(self, offset: int, length: int) -> None:
        for run in self._first_runs(offset, length, 64):
            if run.state is State.ABSENT:
                await self.child.prefetch(run.offset, run.length)

    def allocated_bytes(self) -> int:
        return self._data.allocated_bytes() + self.child.allocated_bytes()

    def pending_error(self) -> Exception | None:
        return self.store.failed

    def statistics(self) -> Statistics:
        values: dict[str, int | float | str] = {
            "path": str(self.store.path),
            "child_read_bytes": self._child_read_bytes,
            "no_space_errors": self._no_space,
            **self.store.statistics(),
        }
        if self._limit is not None:
            values["limit_bytes"] = self._limit
        return Statistics(self.name, values, self.child.statistics())


def _merge(runs: list[Run], below: list[Extent]) -> list[Extent]:
    """What *runs* hold, the absent ones as *below* says, up to the first byte of which that says nothing."""
    found: list[Extent] = []
    answers = iter(below)
    answer = next(answers, None)
    for run in runs:
        end = run.offset + run.length
        if run.state is not State.ABSENT:
            found.append(Extent(run.offset, run.length, _KINDS[run.state]))
            continue
        at = run.offset
        while at < end:
            while answer is not None and answer.end <= at:
                answer = next(answers, None)
            if answer is None:
                return merge_extents(found)
            found.append(Extent(at, min(answer.end, end) - at, answer.kind))
            at = found[-1].end
    return merge_extents(found)


def _is_zero(data: memoryview) -> bool:
    """Whether *data* is all zeros; the first byte answers for most."""
    return data[0] == 0 and bytes(data) == _ZEROS[: len(data)]


def overlay_path(state_dir: Path, disk: str, path: Path | None) -> Path:
    """Where the overlay of *disk* lies."""
    return path if path is not None else state_dir / "overlays" / disk


def _remove(path: Path, header: Header, survivors: Survivors) -> None:
    survivors.drop(kept_names(MEMORY_KIND, header))
    files.remove(path)


def _prepare(path: Path, header: Header, env: Environment) -> StoreLock:
    """Make the store where there is none, and lock it. Blocks.

    Raises: StoreError; also when one of the two is ephemeral and the other not, before anything is deleted.
    """
    if not path.exists():
        files.create(path, header)
    lock = StoreLock(path, f"disk {env.owner} of cachefs")
    try:
        found = read_header(path)
        if found.ephemeral != header.ephemeral:
            kept, wanted = ("deleted at detach", "kept") if found.ephemeral else ("kept", "deleted at detach")
            raise StoreError(
                str(path),
                f"the overlay was made to be {kept} and the configuration wants it {wanted}: set ephemeral back to "
                f"{str(found.ephemeral).lower()}, or name another path",
            )
    except BaseException:
        lock.close()
        raise
    epoch_file = path / "epoch"
    is_left = found.ephemeral and read_epoch(epoch_file) > 0
    if is_left and not env.survivors.has_memory(MEMORY_KIND, found.uuid, epoch_file):
        # Left by a daemon that died with nobody to take over. Nothing in it was promised to be durable: start empty.
        lock.close()
        files.remove(path)
        files.create(path, header)
        lock = StoreLock(path, f"disk {env.owner} of cachefs")
    return lock


def _check_header(path: Path, header: Header, config: CowConfig, child: Layer) -> None:
    """Raises: StoreError when this overlay is not the one that the configuration means."""
    if "block_size" in config.model_fields_set and header.block_size != config.block_size:
        raise StoreError(
            str(path),
            f"the overlay was made with blocks of {format_size(header.block_size)}, the configuration says "
            f"{format_size(config.block_size)}; that cannot be changed: write block_size: {format_size(header.block_size)}",
        )
    changes = header.base.changes(child.identity)
    if header.size != child.geometry.size:
        changes.append(f"the disk had {header.size} bytes, has {child.geometry.size}")
    if changes:
        raise BaseChangedError(
            str(path),
            f"the base below this overlay is not the one it was made over: {'; '.join(changes)}. An overlay holds only "
            f"what differs from its base, so it is refused. Put the old base back, or name another path for a new overlay",
        )
