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

Freeing needs no sync: a block that is ZERO reads as zeros whatever lies under it. So it is punched later: one bit per
PUNCH_PIECE of the disk says that there may be something to free (a million trims that wait cost no more memory than one).
In a piece whose turn has come SEEK_DATA finds what is allocated; what of it is not DATA is punched under its range lock,
looked up again under it. What a dead daemon left unpunched is found in the same way at the next open.

Concurrency: one event loop. `locks` are this store's; whoever changes blocks on the slow path holds them.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from bitarray.util import zeros

from cachefs.errors import BackendError, CachefsError, NoSpaceError
from cachefs.extent import ExtentKind
from cachefs.rangelock import RangeLocks
from cachefs.store.blockmap import BlockMap, State, working_size
from cachefs.store.failedflag import FailedFlag
from cachefs.store.files import Header
from cachefs.store.mapfile import StoreFiles, load_sectors, open_files, write_sectors
from cachefs.store.rounds import Done, FlushRounds
from cachefs.store.sectors import SectorCopies, SyncState
from cachefs.survivor import Survivors

log = logging.getLogger(__name__)

PUNCH_PIECE = 4 << 20  # bytes per bit, and at most per punch and lock
LOOK_PIECES = 1024  # that one look for allocated space may cover,
LOOK_EXTENTS = 8192  # and what it may find: at least one piece of the smallest extents
LAST_FLUSH_TRIES = 30  # seconds that a close waits for space for the map
MEMORY_KIND, LAYOUT = "map", 1  # of the survivor memory: the working form of BlockMap


class BlockStore:
    """An open store. Made by `open_store`."""

    def __init__(self, path: Path, name: str, header: Header, opened: StoreFiles, flag: FailedFlag) -> None:
        self.path = path
        self.name = name
        self.header = header
        self.files = opened
        self.data = opened.data
        self.map_file = opened.map_file
        self.memory = opened.memory
        self.locks = RangeLocks()
        blocks = block_count(header)
        self.map = BlockMap(self.memory.body, blocks, header.block_size)
        self.flag = flag
        self._sync_was_cut_off = opened.inherited and self.map.sync is not SyncState.IDLE
        self.durable = True
        self.rounds = FlushRounds(name, self._begin_round, self._work, self._end_round)
        self.punched_bytes = 0
        self._can_punch = True
        self._piece = max(1, PUNCH_PIECE >> self.map.shift)  # blocks
        self._unpunched = zeros(-(-blocks // self._piece))  # by piece
        self._punch_due = trio.Event()
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

    def _begin_round(self) -> SectorCopies:
        """Step 1."""
        self.data.file_system.syncs.add(self)
        return self.map.begin_round()

    def _work(self, copies: SectorCopies) -> None:
        """Steps 2 to 4, in the thread of the rounds."""
        try:
            self._make_durable(copies)
        finally:
            self.data.file_system.syncs.discard(self)

    def _end_round(self, _: SectorCopies, error: Exception | None) -> None:
        if error is None:
            self.map.end_round()
        else:
            self.map.abandon_round()

    def _make_durable(self, copies: SectorCopies) -> None:
        if self._sync_was_cut_off:
            self._sync_was_cut_off = False
            self._ask_what_became_of_the_sync()
        if self.failed is not None:  # by the round before this one
            raise self.failed
        self.map.sync = SyncState.UNDER_WAY
        try:
            self.data.sync_now()
        except OSError as exc:
            raise self.flag.fail(exc, self.path / "data") from exc
        if copies:
            self._make_map_durable(copies)
        self.map.sync = SyncState.IDLE

    def _make_map_durable(self, copies: SectorCopies) -> None:
        """Steps 3 and 4."""
        try:
            self._write_sectors(copies)
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                self.map.sync = SyncState.IDLE
                raise NoSpaceError(self.name, "no space left for the block map; the flush will be tried again") from exc
            raise self.flag.fail(exc, self.path / "map") from exc
        try:
            os.fdatasync(self.map_file.descriptor)
        except OSError as exc:
            raise self.flag.fail(exc, self.path / "map") from exc

    def _ask_what_became_of_the_sync(self) -> None:
        """A predecessor was killed in a sync, and may have been told of a failure. Blocks."""
        was_asking = self.map.sync is SyncState.ASKING
        self.map.sync = SyncState.ASKING
        try:
            self.files.ask_witnesses()
        except OSError as exc:
            self.flag.fail(exc, self.path)
            return
        if was_asking:
            cut = OSError(errno.EIO, "its outcome was lost when the daemon was killed, twice")
            self.flag.fail(cut, self.path)
            return
        self.map.sync = SyncState.IDLE

    def _write_sectors(self, copies: SectorCopies) -> None:
        """Step 3."""
        write_sectors(self.map_file, copies)

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
            self._unpunched[start // self._piece : (end - 1) // self._piece + 1] = True
            if self._all_punched.is_set():
                self._all_punched = trio.Event()
                self._punch_due.set()

    async def wait_punched(self) -> None:
        """Until all that was handed to `punch_later` so far has been tried."""
        await self._all_punched.wait()

    async def _puncher(self) -> None:
        """Round and round, so that a piece which is trimmed all the time does not keep the others waiting."""
        while True:
            await self._punch_due.wait()
            number = 0
            while (number := self._next_unpunched(number)) >= 0:
                number = await self._punch_some(number)
            self._punch_due = trio.Event()
            self._all_punched.set()

    def _next_unpunched(self, number: int) -> int:
        """The next piece from *number* on, else from the first; -1: there is none."""
        found = self._unpunched.find(1, number)
        return found if found >= 0 else self._unpunched.find(1)

    async def _punch_some(self, number: int) -> int:
        """Free what can be freed in the pieces from *number* on, as far as one look into the file reaches; the next one."""
        shift, piece = self.map.shift, self._piece
        offset, stop = number * piece << shift, min(number + LOOK_PIECES, len(self._unpunched))
        marked = self._unpunched[number:stop]
        self._unpunched[number:stop] = False  # whatever is trimmed from here on marks its piece anew
        try:
            length = min(stop * piece << shift, self.header.size) - offset
            extents = await self.data.extents(offset, length, LOOK_EXTENTS) if self._can_punch else []
        except OSError as exc:
            self._cannot_free(exc)
            return stop
        if extents and extents[-1].end < offset + length:
            seen = (extents[-1].end >> shift) // piece
            self._unpunched[seen:stop] |= marked[seen - number :]
            stop = seen
        for extent in extents:
            if extent.kind is ExtentKind.DATA:
                start, end = extent.offset >> shift, -(-extent.end >> shift)
                for first, last in self._in_pieces(start, end):
                    if marked[first // piece - number]:
                        await self._punch_allocated(first, last)
        return stop

    def _in_pieces(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        while start < end:
            last = min(end, (start // self._piece + 1) * self._piece)
            yield start, last
            start = last

    async def _punch_allocated(self, start: int, end: int) -> None:
        """Of these blocks of one piece, which take space, those that are not DATA."""
        shift = self.map.shift
        for run in list(self.map.runs(start << shift, (end - start) << shift)):
            if run.state is not State.DATA and self._can_punch:
                await self._punch_piece(run.offset >> shift, (run.offset + run.length) >> shift)

    def _cannot_free(self, exc: OSError) -> None:
        log.warning("%s: cannot free space: %s; it stays held until the next mount", self.name, exc)

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
                self._cannot_free(exc)
        finally:
            self.locks.release(hold)

    async def _punch_leftovers(self) -> None:
        """Hand everything that lies in the data file and is not DATA to the puncher."""
        offset, size = 0, self.header.size
        while offset < size:
            try:
                extents = await self.data.extents(offset, size - offset, 256)
            except OSError as exc:
                self._cannot_free(exc)
                return
            for extent in extents:
                if extent.kind is ExtentKind.DATA:
                    for first, last in self._in_pieces(
                        extent.offset >> self.map.shift, -(-extent.end >> self.map.shift)
                    ):
                        if not self.map.is_data(first, last):
                            self.punch_later(first, last)
            offset = extents[-1].end
            await trio.lowlevel.checkpoint()

    # ---- opening

    def load_map(self) -> None:
        """Go on with the working map of a predecessor, or fill it from the map file; blocks. Raises: FormatError."""
        where = str(self.path / "map")
        if self.files.inherited:
            self.map.take_over(self.memory.touched)
        else:
            load_sectors(self.map_file, self.header, lambda number, content: self.map.load(number, content, where))
        self.files.keep()

    def close_files(self, *, is_durable: bool) -> None:
        self.rounds.close()
        self.files.close(is_durable=is_durable)

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


def block_count(header: Header) -> int:
    return -(-header.size // header.block_size)


@asynccontextmanager
async def open_store(
    path: Path,
    name: str,
    header: Header,
    flag: FailedFlag,
    survivors: Survivors,
    *,
    durable: bool = True,
    direct: bool = False,
) -> AsyncIterator[BlockStore]:
    """The store at *path*, which exists and whose lock the caller holds. On exit: flushed, then closed.

    direct: its data bypasses the page cache; the caller locks the blocks of every write then, also of one in part of them.

    Raises: StoreError, FormatError.
    """
    size = working_size(block_count(header))
    opened = await trio.to_thread.run_sync(
        lambda: open_files(path, header, survivors, MEMORY_KIND, LAYOUT, size, direct=direct)
    )
    store = BlockStore(path, name, header, opened, flag)
    store.durable = durable
    problem: CachefsError | None = None
    is_durable = False
    try:
        await trio.to_thread.run_sync(store.load_map)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store._puncher)
            nursery.start_soon(store._punch_leftovers)
            try:
                yield store
                with trio.CancelScope(shield=True):
                    await store.wait_punched()
            finally:
                # Also when we are cancelled: what was acknowledged goes to disk if it can.
                with trio.CancelScope(shield=True):
                    problem = await _flush_last(store)
                is_durable = problem is None and store.durable
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):  # its thread uses the descriptors
            await store.rounds.wait_idle()
        store.close_files(is_durable=is_durable)
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
