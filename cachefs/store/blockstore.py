"""Blocks at their own offsets in a sparse file, a map that says which of them count, and the order in which they last.

Writing: data first, then the map in survivor memory, then the reply. Durable, in one *round* per flush:

    1  copies of the map's dirty sectors are taken                    (loop, at once)
    2  fdatasync of the data file                                     (one hop to one thread for 2 to 4)
    3  those copies are written to the map file, never live memory
    4  fdatasync of the map file; the sectors are clean

A map entry must never be durable before the data that it vouches for: copies taken after 2 could name blocks that 2 did
not sync, and after a power cut these would read as zeros. Nothing changed: the round ends after 2.

A failed fdatasync is final: the kernel may have dropped the pages, and asking again would report a success that is none.
The store is *failed* from then on: nothing more goes into the map file, writes are refused, every flush raises. ENOSPC
while the map is written is no such thing: it is reported, the sectors are dirty again, the next flush tries again.

Freeing needs no sync: a block that is ZERO reads as zeros whatever lies under it. So it is punched later, in pieces, under
its range lock, and what is no longer ZERO or ABSENT by then is skipped. What a dead daemon left unpunched is found with
SEEK_DATA at the next open, in the background.

Concurrency: one event loop. `locks` are this store's; whoever changes blocks on the slow path holds them.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from cachefs.errors import BackendError, CachefsError, FormatError, NoSpaceError, StoreError
from cachefs.extent import ExtentKind
from cachefs.rangelock import RangeLocks
from cachefs.store import files
from cachefs.store.blockmap import SECTOR_SIZE, BlockMap, SectorCopy, State, working_size
from cachefs.store.failedflag import FailedFlag
from cachefs.store.files import HEADER_SIZE, Header
from cachefs.store.localfile import LocalFile
from cachefs.store.rounds import Done, FlushRounds
from cachefs.survivor import SurvivorMemory

log = logging.getLogger(__name__)

PUNCH_PIECE = 4 << 20  # bytes per punch and lock
_CHUNK_SECTORS = 2048  # of the map file, read or written at once
LAST_FLUSH_TRIES = 30  # seconds that a close waits for space for the map
LAYOUT = 1  # of the survivor memory: the planes of BlockMap


class BlockStore:
    """An open store. Made by `open_store`."""

    def __init__(
        self, path: Path, name: str, header: Header, data: LocalFile, map_file: LocalFile, epoch: int, flag: FailedFlag
    ) -> None:
        self.path = path
        self.name = name
        self.header = header
        self.data = data
        self.map_file = map_file
        self.locks = RangeLocks()
        blocks = -(-header.size // header.block_size)
        self.memory = SurvivorMemory("map", LAYOUT, header.uuid, epoch, working_size(blocks))
        self.map = BlockMap(self.memory.body, blocks, header.block_size)
        self.flag = flag
        self.durable = True
        self.rounds = FlushRounds(name, self._begin_round, lambda copies: self._make_durable(copies), self._end_round)
        self.punched_bytes = 0
        self._can_punch = True
        self._punches: trio.MemorySendChannel[tuple[int, int]]
        self._unpunched = 0  # ranges handed over and not finished
        self._all_punched = trio.Event()
        self._all_punched.set()

    # ---- durability

    def ask_flush(self, done: Done) -> None:
        """What was published before the call is durable when *done* is called, or it gets the reason why not.

        Errors: the failure of the store's fdatasync, now and ever after; NoSpaceError when the map had no room.
        """
        if self.failed is not None or not self.durable:
            done(self.failed)
        else:
            self.rounds.ask(done)

    async def flush(self) -> None:
        """`ask_flush`, and wait; errors are raised."""
        if self.failed is not None:
            raise self.failed
        if self.durable:
            await self.rounds.flush()

    def _begin_round(self) -> list[SectorCopy]:
        """Step 1."""
        self.data.file_system.slow += 1
        return self.map.begin_round()

    def _end_round(self, _: list[SectorCopy], error: Exception | None) -> None:
        self.data.file_system.slow -= 1
        if error is None:
            self.map.end_round()
        else:
            self.map.abandon_round()

    def _make_durable(self, copies: list[SectorCopy]) -> None:
        """Steps 2 to 4, in the thread of the rounds."""
        if self.failed is not None:  # by the round before this one
            raise self.failed
        try:
            os.fdatasync(self.data.descriptor)
        except OSError as exc:
            raise self.flag.fail(exc, self.path / "data") from exc
        if not copies:
            return
        try:
            self._write_sectors(copies)
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpaceError(self.name, "no space left for the block map; the flush will be tried again") from exc
            raise self.flag.fail(exc, self.path / "map") from exc
        try:
            os.fdatasync(self.map_file.descriptor)
        except OSError as exc:
            raise self.flag.fail(exc, self.path / "map") from exc

    def _write_sectors(self, copies: list[SectorCopy]) -> None:
        """Neighbouring sectors are one write."""
        begin = 0
        while begin < len(copies):
            end = begin + 1
            while (
                end < len(copies) and end - begin < _CHUNK_SECTORS and copies[end].number == copies[end - 1].number + 1
            ):
                end += 1
            content = b"".join(copy.content for copy in copies[begin:end])
            self.map_file.write_now(HEADER_SIZE + copies[begin].number * SECTOR_SIZE, (content,))
            begin = end

    @property
    def failed(self) -> BackendError | None:
        """Why the store cannot be written any more."""
        return self.flag.error

    def check_writable(self) -> None:
        """Raises: ReadOnlyError once the store has failed."""
        self.flag.check_writable()

    # ---- freeing

    def punch_later(self, start: int, end: int) -> None:
        """Free the space of these blocks (indices) in the background; whatever holds data by then is left alone."""
        if self._can_punch and start < end:
            self._unpunched += 1
            self._all_punched = trio.Event() if self._unpunched == 1 else self._all_punched
            self._punches.send_nowait((start, end))

    async def wait_punched(self) -> None:
        """Until all that was handed to `punch_later` so far has been tried."""
        await self._all_punched.wait()

    async def _puncher(self, ranges: trio.MemoryReceiveChannel[tuple[int, int]]) -> None:
        piece = max(1, PUNCH_PIECE >> self.map.shift)
        async for first, last in ranges:
            for start in range(first, last, piece):
                if self._can_punch:
                    await self._punch_piece(start, min(last, start + piece))
            self._unpunched -= 1
            if not self._unpunched:
                self._all_punched.set()

    async def _punch_piece(self, start: int, end: int) -> None:
        hold = await self.locks.acquire(start, end, wait_for_pins=True)
        try:
            # Under the lock nobody else changes these blocks, fast path included: what is not DATA now stays so.
            for run in list(self.map.runs(start << self.map.shift, (end - start) << self.map.shift)):
                if run.state is not State.DATA:
                    await self.data.punch(run.offset, run.length)
                    self.punched_bytes += run.length
        except OSError as exc:
            if exc.errno == errno.EOPNOTSUPP:
                self._can_punch = False  # space stays held; contents are right all the same
            else:
                log.warning("%s: cannot free space: %s; it stays held until the next mount", self.name, exc)
        finally:
            self.locks.release(hold)

    async def _punch_leftovers(self) -> None:
        """Hand everything that lies in the data file and is not DATA to the puncher."""
        offset, size = 0, self.header.size
        while offset < size:
            try:
                extents = await self.data.extents(offset, size - offset, 256)
            except OSError as exc:
                log.warning("%s: cannot look for space to free: %s; it stays held until the next mount", self.name, exc)
                return
            for extent in extents:
                if extent.kind is ExtentKind.DATA:
                    for run in list(self.map.runs(extent.offset, extent.length)):
                        if run.state is not State.DATA:
                            self.punch_later(
                                run.offset >> self.map.shift, -(-(run.offset + run.length) >> self.map.shift)
                            )
            offset = extents[-1].end
            await trio.lowlevel.checkpoint()

    # ---- opening

    def load_map(self) -> None:
        """Fill the working map from the map file; blocks. What was never written is a hole there, and is not read.

        Raises: FormatError.
        """
        offset, end = HEADER_SIZE, files.map_size(self.header)
        while offset < end:
            for extent in self.map_file.extents_now(offset, end - offset, 256):
                if extent.kind is ExtentKind.DATA:
                    first = (extent.offset - HEADER_SIZE) // SECTOR_SIZE
                    self._load_sectors(first, -(-(extent.end - HEADER_SIZE) // SECTOR_SIZE))
                offset = extent.end

    def _load_sectors(self, first: int, last: int) -> None:
        for start in range(first, last, _CHUNK_SECTORS):
            count = min(_CHUNK_SECTORS, last - start)
            content = os.pread(self.map_file.descriptor, count * SECTOR_SIZE, HEADER_SIZE + start * SECTOR_SIZE)
            for number in range(count):
                sector = content[number * SECTOR_SIZE : (number + 1) * SECTOR_SIZE]
                self.map.load(start + number, sector, str(self.path / "map"))

    def close_files(self) -> None:
        self.rounds.close()
        self.memory.close()
        self.data.close()
        self.map_file.close()

    def statistics(self) -> dict[str, int | str]:
        blocks = self.map.data_blocks
        return {
            "data_bytes": blocks * self.map.block_size,
            "allocated_bytes": self.data.allocated_bytes(),
            "flush_rounds": self.rounds.completed,
            "dirty_map_sectors": self.map.dirty_sectors,
            "punched_bytes": self.punched_bytes,
            "state": "failed" if self.failed else "ok",
            **self.locks.statistics(),
        }


def read_header(path: Path) -> Header:
    """Raises: FormatError, StoreError."""
    try:
        with (path / "map").open("rb") as file:
            content = file.read(HEADER_SIZE)
    except OSError as exc:
        raise StoreError(
            str(path), f"cannot read the store's map: {exc.strerror}; check the path and its rights"
        ) from exc
    return files.decode_header(content, str(path / "map"))


def _open_files(path: Path, header: Header) -> tuple[LocalFile, LocalFile, int]:
    """Data, map, and the epoch that this opening began."""
    descriptors: list[int] = []
    try:
        for part, wanted in (("data", header.size), ("map", files.map_size(header))):
            descriptors.append(os.open(path / part, os.O_RDWR))
            size = os.fstat(descriptors[-1]).st_size
            if size != wanted:
                raise FormatError(
                    str(path / part), f"has {size} bytes and should have {wanted}; restore it from a backup"
                )
        data, map_file = LocalFile(descriptors[0], header.size), LocalFile(descriptors[1], files.map_size(header))
        return data, map_file, files.bump_epoch(path)
    except BaseException as exc:
        for descriptor in descriptors:
            os.close(descriptor)
        if isinstance(exc, OSError):
            detail = f"cannot open the store: {exc.strerror}; check its rights and its device"
            raise StoreError(str(path), detail) from exc
        raise


@asynccontextmanager
async def open_store(
    path: Path, name: str, header: Header, flag: FailedFlag, *, durable: bool = True
) -> AsyncIterator[BlockStore]:
    """The store at *path*, which exists and whose lock the caller holds. On exit: flushed, then closed.

    Raises: StoreError, FormatError.
    """
    data, map_file, epoch = await trio.to_thread.run_sync(_open_files, path, header)
    store = BlockStore(path, name, header, data, map_file, epoch, flag)
    store.durable = durable
    problem: CachefsError | None = None
    try:
        await trio.to_thread.run_sync(store.load_map)
        async with trio.open_nursery() as nursery:
            store._punches, ranges = trio.open_memory_channel[tuple[int, int]](float("inf"))
            nursery.start_soon(store._puncher, ranges)
            nursery.start_soon(store._punch_leftovers)
            try:
                yield store
                with trio.CancelScope(shield=True):
                    await store.wait_punched()
            finally:
                # Also when we are cancelled: what was acknowledged goes to disk if it can.
                with trio.CancelScope(shield=True):
                    problem = await _flush_last(store)
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):  # its thread uses the descriptors
            await store.rounds.wait_idle()
        store.close_files()
    if problem is not None:
        raise problem


async def _flush_last(store: BlockStore) -> CachefsError | None:
    """What keeps acknowledged writes from being durable. A lack of space is waited out for a while, and said."""
    if store.failed is not None:
        return None  # and was said when it happened
    for _ in range(LAST_FLUSH_TRIES):
        try:
            await store.flush()
            return None
        except NoSpaceError as exc:
            problem: CachefsError = exc
            log.error("%s: cannot close yet: %s: make room at %s", store.name, exc.detail, store.path)
        except CachefsError as exc:
            log.error("%s: the last flush failed: %s", store.name, exc.detail)
            return exc
        await trio.sleep(1)
    return problem
