"""One image in a pool: its files, its map of checksums, and the blocks that are on their way into it.

    fetched -> installing: room is taken, the map says SPOILED, a thread writes -> DATA, ready
    DATA -> EVICTING: a thread punches -> ABSENT, the room is given back

Whatever fails on the way leaves the block SPOILED: its room is counted, nothing in it is believed. A block that is DATA and
was not verified since the pool was opened is read as a whole and compared with its checksum first.

Two kinds of calls go to the pool's file system, both in threads. A *read* for a guest goes into memory of its own and is
given up after the pool's patience. *Work* (write, punch, sync) runs to its end and nobody waits for it; that it takes
longer than that is noticed by the pool. Both kinds of failure end in a `Health` that says "not now".

A `Flight` is a fetch from below, shared by everybody who waits for its blocks; it belongs to the image, its bytes stay in
memory until they are installed or given up, and readers are served from there meanwhile.

Concurrency: one event loop. `pins` keep blocks from being evicted while a thread reads or writes them.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import trio

from cachefs.errors import FormatError
from cachefs.extent import ExtentKind
from cachefs.pool.calls import Calls
from cachefs.pool.evict import PREFETCHED
from cachefs.pool.health import Health
from cachefs.pool.readahead import MAX_WINDOW, ReadAhead
from cachefs.pool.summap import State, SumMap, checksum
from cachefs.store.files import HEADER_SIZE, Header
from cachefs.store.mapfile import StoreFiles, load_sectors, write_sectors
from cachefs.store.sectors import SectorCopies, SyncState

if TYPE_CHECKING:
    from cachefs.pool.pool import Pool

log = logging.getLogger(__name__)

T = TypeVar("T")

WINDOW_SHARE = 64  # the longest read-ahead is one part in this many of the quota
SYNC_PATIENCE_S = 30.0  # nobody waits for one, and on a busy disk one of 64 MiB takes its time
INSTALLERS = 4  # calls of an image that write at once: one would wait for its turn on the loop most of the time
SCAN_STEP = 256  # extents asked for at once
SCAN_BLOCKS = 1 << 16  # looked at before others run


def is_all_zero(content: memoryview) -> bool:
    """Whether *content*, which is not empty, is all zeros; the first byte answers for most."""
    return content[0] == 0 and bytes(content).count(0) == len(content)


class Flight:
    """A fetch of blocks *start* to *end*, which may grow at both ends until it begins. buffer: their bytes, once it is `done`.

    unread: blocks that were fetched ahead and nobody has asked for yet. error: why there are no bytes.
    """

    __slots__ = ("buffer", "done", "end", "error", "run", "sequential", "start", "unread")

    def __init__(self, start: int, end: int, run: int, sequential: bool) -> None:
        self.start = start
        self.end = end
        self.run = run
        self.sequential = sequential
        self.unread: set[int] = set()
        self.buffer = bytearray()
        self.done = trio.Event()
        self.error: Exception | None = None


class PoolImage:
    """Made by `Pool`. *label*: whose it is, for people. users: how many open layers use it."""

    def __init__(self, pool: Pool, path: Path, label: str, header: Header, opened: StoreFiles) -> None:
        self.pool = pool
        self.path = path
        self.label = label
        self.header = header
        self.files = opened
        self.data = opened.data
        self.map_file = opened.map_file
        self.size = header.size
        self.shift = header.block_size.bit_length() - 1
        self.count = -(-header.size // header.block_size)  # of blocks
        self.map = SumMap(opened.memory.body, self.count)
        self.blocks = pool.policy.add_image(self.count)
        # What is read ahead waits in the ring, a small part of the quota, and must not push itself out of it.
        self.ahead = ReadAhead(
            self.size, header.block_size, max_window=min(MAX_WINDOW, pool.account.limit // WINDOW_SHARE)
        )
        self.blocks.on_used = self.ahead.used
        self.users = 0
        self.is_damaged = False  # a part of the map could not be read
        self.holes_lock = trio.Lock()  # two disks may have stacks of their own over one image
        self.holes_bytes = 0  # that the file of what is known of its extents takes, see `cachefs.pool.holes`
        self.unowned = 0  # bytes in the data file that no block of the map accounts for
        self.reading = Health("reading")
        self.writing = Health("writing")
        self.flights: dict[int, Flight] = {}
        self.joinable: dict[int, Flight] = {}  # those that have not begun, by the block behind the last
        self.joinable_before: dict[int, Flight] = {}  # the same by the first block
        self.pins: Counter[int] = Counter()
        self.barred: Counter[int] = Counter()  # being changed from above: not to be installed
        self.unsynced: set[int] = set()  # installed since the last good sync
        self._may_lack_any = opened.inherited  # which ones a predecessor had installed since then it has not said
        self._sync_was_cut_off = opened.inherited and self.map.sync is not SyncState.IDLE
        self.is_leaving = False  # about to be deleted: nothing more goes in
        self.is_closed = False  # the policy may not know it any more
        self._installing = 0  # installers at work
        self._queue: deque[Flight] = deque()
        self._queued = trio.Event()
        self._landed = trio.Event()
        self.calls = Calls(opened.data, pool.patience_s, self._landed_something)
        self.installed_blocks = self.evicted_blocks = self.dropped_blocks = self.corrupt_blocks = self.zero_blocks = 0
        self.forgotten_blocks = 0

    # ---- blocks

    @property
    def settled(self) -> bool:
        """Whether map and data file agree on what has room. Only then blocks are installed."""
        return self.map.settled

    def offset_of(self, block: int) -> int:
        return block << self.shift

    def length_of(self, start: int, end: int) -> int:
        """Bytes of these blocks; the last one of the image may be shorter."""
        return min(self.size, end << self.shift) - (start << self.shift)

    @contextmanager
    def pinned(self, start: int, end: int) -> Iterator[None]:
        """Keep these blocks from being evicted."""
        pins = self.pins
        for block in range(start, end):
            pins[block] += 1
        try:
            yield
        finally:
            for block in range(start, end):
                pins[block] -= 1
                if not pins[block]:
                    del pins[block]

    # ---- reads for guests

    async def read(self, start: int, end: int) -> memoryview | None:
        """The blocks, which are DATA and pinned, verified where they are not ready; None: ask below.

        A block that disagrees with its checksum is SPOILED then, and None is returned.
        """
        began = trio.current_time()
        buffer = bytearray(self.length_of(start, end))
        suspects = [(block, self.map.entry(block)) for block in range(start, end) if not self.map.ready[block]]
        with trio.move_on_after(self.pool.patience_s) as patience:
            try:
                spoiled = await trio.to_thread.run_sync(
                    self._read_now,
                    start,
                    buffer,
                    suspects,
                    abandon_on_cancel=True,
                    limiter=self.data.file_system.limiter,
                )
            except OSError as exc:
                self.fail(self.reading, f"{os.strerror(exc.errno or 0)} at {self.offset_of(start)}+{len(buffer)}")
                return None
            except Exception as exc:  # a bug; the guest need not hear of it
                log.exception("%s: reading failed", self.path)
                self.fail(self.reading, repr(exc))
                return None
        if patience.cancelled_caught:
            self.fail(self.reading, f"no answer in {self.pool.patience_s:g} s")
            return None
        if self.is_leaving:
            return None
        self._recovered(self.reading, began)
        for block, entry in suspects:
            if self.map.state(block) is not State.DATA or self.map.entry(block) != entry:
                continue  # evicted, or installed anew meanwhile
            if block not in spoiled:
                self.map.verified(block)
                continue
            self.map.set_spoiled(block)
            if spoiled[block]:
                self.forgotten_blocks += 1  # punched, or never written, before a crash: nobody's fault
                continue
            self.corrupt_blocks += 1
            log.warning(
                "%s: the block at %d disagrees with its checksum; it is fetched anew", self.path, self.offset_of(block)
            )
        return None if spoiled else memoryview(buffer)

    def _read_now(self, start: int, buffer: bytearray, suspects: list[tuple[int, int]]) -> dict[int, bool]:
        """Fill *buffer*; the blocks that disagree with their checksums, and whether they are nothing but zeros."""
        view = memoryview(buffer)
        self.data.read_now(self.offset_of(start), view)
        first = self.offset_of(start)
        found = {}
        for block, entry in suspects:
            content = view[(block << self.shift) - first : ((block + 1) << self.shift) - first]
            if checksum(block, content) != entry:
                found[block] = is_all_zero(content)
        return found

    # ---- installing

    @property
    def takes_more(self) -> bool:
        """Whether what is fetched now may be kept. Otherwise it is no use to fetch more than was asked for."""
        return (
            not self.is_leaving and self.settled and self.writing.may_try(trio.current_time()) and self.pool.takes_more
        )

    def install(self, flight: Flight) -> None:
        """Keep what *flight* has brought, if there is a way; its blocks leave `flights` when that is decided."""
        size = len(flight.buffer)
        if (
            self.is_leaving
            or not self.writing.may_try(trio.current_time())
            or not self.settled
            or not self.pool.take_backlog(size)
        ):
            self.dropped_blocks += flight.end - flight.start
            self.land(flight)
            return
        self._queue.append(flight)
        self._queued.set()

    def land(self, flight: Flight) -> None:
        """Nobody is served from *flight* any more."""
        for block in range(flight.start, flight.end):
            if self.flights.get(block) is flight:
                del self.flights[block]
        lost = sum(not self.blocks.words[block] & PREFETCHED for block in flight.unread)
        self.ahead.lost(lost << self.shift)
        self._landed.set()

    def ask_for(self, flight: Flight, block: int) -> None:
        """Somebody wants *block* of *flight*: it was worth fetching ahead."""
        if block in flight.unread:
            flight.unread.remove(block)
            if self.blocks.words[block] & PREFETCHED:  # it is being installed
                self.blocks.touch(block, block + 1, flight.run)
            else:
                self.ahead.used(block, flight.run)

    def may_read_ahead(self) -> bool:
        """Whether what is fetched ahead would be kept."""
        return self.writing.works and self.settled and self.pool.has_place_ahead()

    async def run_installer(self) -> None:
        """Install what is queued, one flight after the other, until the image is dropped. There are INSTALLERS at most."""
        while not self.is_leaving:
            if not self._queue:
                if self._queued.is_set():
                    self._queued = trio.Event()
                await self._queued.wait()
                continue
            flight = self._queue.popleft()
            self._installing += 1
            try:
                if self.writing.may_try(trio.current_time()):
                    await self._install(flight)
                else:
                    self.dropped_blocks += flight.end - flight.start
            except Exception:
                log.exception("%s: a block could not be installed; it was served from below", self.path)
            finally:
                self._installing -= 1
                self.pool.give_back_backlog(len(flight.buffer))
                self.land(flight)

    def drop_queue(self) -> None:
        """Give up on what waits to be installed and was not begun."""
        while self._queue:
            flight = self._queue.popleft()
            self.dropped_blocks += flight.end - flight.start
            self.pool.give_back_backlog(len(flight.buffer))
            self.land(flight)

    def leave(self) -> None:
        """About to be deleted: nothing more goes in, and the installer ends."""
        self.is_leaving = True
        self.drop_queue()
        self._queued.set()

    def _landed_something(self) -> None:
        self._landed.set()

    async def _wait_landed(self) -> None:
        if self._landed.is_set():  # never a new event while somebody waits for the old one
            self._landed = trio.Event()
        await self._landed.wait()

    async def wait_idle(self) -> None:
        """Until no work is under way."""
        while self.calls or self._installing:
            await self._wait_landed()

    async def wait_installed(self) -> None:
        """Until nothing waits to be installed, or writing does not work."""
        while self.flights and self.writing.works:
            await self._wait_landed()

    async def wait_settled(self) -> None:
        """Until what a crash left is known, or writing does not work."""
        while not self.settled and self.writing.works:
            await self._wait_landed()

    def may_install(self, block: int) -> bool:
        return (
            not self.is_leaving
            and self.map.state(block) in (State.ABSENT, State.SPOILED)
            and block not in self.pins
            and block not in self.barred
        )

    async def _install(self, flight: Flight) -> None:
        # A block that was changed since it was fetched is not in `flights` any more.
        mine = [block for block in range(flight.start, flight.end) if self.flights.get(block) is flight]
        while mine:  # mostly once: the room for all of it is there
            wanted = await self.pool.take_room(self, mine)
            if not wanted or not await self._store(flight, wanted):
                self.dropped_blocks += len(mine)
                return
            mine = [block for block in mine if block > wanted[-1]]

    async def _store(self, flight: Flight, wanted: list[int]) -> bool:
        """Put these blocks of *flight*, which have room, into the file and the map. False: writing failed."""
        fresh = {block for block in wanted if not self.map.holds(block)}
        for block in wanted:
            if block in fresh:
                self.map.set_spoiled(block)
            self.pins[block] += 1
        began = trio.current_time()
        entries: list[int] = []
        try:
            entries = await self.calls.run(self._store_now, flight, wanted, fresh)
        except OSError as exc:
            self.fail(self.writing, os.strerror(exc.errno or 0))
            return False
        finally:
            zeros = {block for block, entry in zip(wanted, entries, strict=False) if entry == State.ZERO}
            for block in wanted:
                del self.pins[block]  # it was nobody else's, and nobody pins what is SPOILED
                if block in fresh and not self.is_closed and not (block in zeros and self.flights.get(block) is flight):
                    self.pool.insert(self, block, flight)
        self._recovered(self.writing, began)
        for block, entry in zip(wanted, entries, strict=True):
            if self.flights.get(block) is not flight:
                continue  # changed from above meanwhile: it stays SPOILED
            if entry >= State.DATA:
                self.map.set_data(block, entry)
                self.unsynced.add(block)
                self.installed_blocks += 1
            else:
                self.zero_blocks += 1
                self.map.set_zero(block)
                self.pool.account.give_back(1 << self.shift)
        self.pool.note_installed(len(wanted) << self.shift)
        return True

    def _store_now(self, flight: Flight, wanted: list[int], fresh: set[int]) -> list[int]:
        """Write what is not all zeros; the entry of each block. What is not *fresh* may lie over rubbish: it is written."""
        view, first = memoryview(flight.buffer), self.offset_of(flight.start)
        entries = []
        run: list[int] = []
        for block in wanted:
            content = view[(block << self.shift) - first : ((block + 1) << self.shift) - first]
            is_zero = block in fresh and is_all_zero(content)
            entries.append(int(State.ZERO) if is_zero else checksum(block, content))
            if run and (is_zero or block != run[-1] + 1):
                self._write_now(view, first, run)
                run = []
            if not is_zero:
                run.append(block)
        if run:
            self._write_now(view, first, run)
        return entries

    def _write_now(self, view: memoryview, first: int, run: list[int]) -> None:
        offset = self.offset_of(run[0])
        self.data.write_now(offset, (view[offset - first : offset - first + self.length_of(run[0], run[-1] + 1)],))

    # ---- evicting

    async def punch_out(self, blocks: list[int]) -> list[int]:
        """Free these blocks, whose state is EVICTING; what could not be freed is returned and SPOILED."""
        try:
            await self.calls.run(self._punch_now, sorted(blocks))
        except Exception as exc:
            if isinstance(exc, OSError):
                self.fail(self.writing, f"cannot free space: {os.strerror(exc.errno or 0)}")
            else:
                log.exception("%s: freeing space failed", self.path)
                self.fail(self.writing, f"cannot free space: {exc!r}")
            for block in blocks:
                self.map.set_spoiled(block)
            return blocks
        for block in blocks:
            self.map.set_absent(block)
            self.unsynced.discard(block)
        self.evicted_blocks += len(blocks)
        return []

    def _punch_now(self, blocks: list[int]) -> None:
        """Neighbours go in one call."""
        begin = 0
        for index in range(1, len(blocks) + 1):
            if index == len(blocks) or blocks[index] != blocks[index - 1] + 1:
                start, end = blocks[begin], blocks[index - 1] + 1
                self.data.punch_now(self.offset_of(start), (end - start) << self.shift)
                begin = index

    # ---- durability

    async def sync(self) -> None:
        """Make what was installed so far durable, and the map that names it. Its failure costs those blocks only."""
        if self.is_leaving or (not self.map.dirty_sectors and not self.unsynced):
            return
        if not self.writing.may_try(trio.current_time()):
            return
        copies, unsynced, self.unsynced = self.map.begin_round(), self.unsynced, set()
        try:
            await self.calls.run(self._sync_now, copies, patience_s=SYNC_PATIENCE_S)
        except OSError as exc:
            # The kernel may have dropped the pages: what is read now may not be what is read later.
            if self._may_lack_any:
                unsynced = {block for run in self.map.held_runs() for block in range(*run)}
            for block in unsynced:
                if self.map.state(block) is State.DATA:
                    self.map.set_spoiled(block)
            self._may_lack_any = False
            self.map.sync = SyncState.IDLE
            self.map.abandon_round()
            self.fail(self.writing, f"sync: {os.strerror(exc.errno or 0)}; {len(unsynced)} blocks are fetched anew")
        except BaseException as exc:
            self.map.abandon_round()
            self.unsynced |= unsynced
            if not isinstance(exc, Exception):
                raise
            log.exception("%s: the sync failed", self.path)
            self.fail(self.writing, f"sync: {exc!r}")
        else:
            self._may_lack_any = False
            self.map.end_round()

    def _sync_now(self, copies: SectorCopies) -> None:
        if self._sync_was_cut_off:
            self._sync_was_cut_off = False
            self._ask_what_became_of_the_sync()
        self.map.sync = SyncState.UNDER_WAY
        self.data.sync_now()
        if copies:
            write_sectors(self.map_file, copies)
            self.map_file.sync_now()
        self.map.sync = SyncState.IDLE

    def _ask_what_became_of_the_sync(self) -> None:
        """A predecessor was killed in a sync, and may have been told of a failure. Raises: OSError when it was."""
        was_asking, self.map.sync = self.map.sync is SyncState.ASKING, SyncState.ASKING
        self.files.ask_witnesses()
        if was_asking:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    # ---- what works

    def fail(self, health: Health, reason: str) -> None:
        """What *health* stands for failed: serve from below for a while."""
        if health.fail(reason, trio.current_time()):
            log.warning("%s: %s the cache failed: %s; served from below for now", self.path, health.what, reason)

    def _recovered(self, health: Health, began: float) -> None:
        if health.succeed(began):
            log.info("%s: %s the cache works again", self.path, health.what)

    async def try_reading(self) -> None:
        """See whether reading works again, with a read that nobody waits for."""
        held = (block for run in self.map.held_runs() for block in range(*run))
        block = next((block for block in held if self.map.state(block) is State.DATA), None)
        if block is None:
            self._recovered(self.reading, trio.current_time())
            return
        with self.pinned(block, block + 1):
            await self.read(block, block + 1)

    # ---- opening

    def load(self) -> None:
        """Go on with the map of a predecessor, or fill it from its file. Blocks. A sector that is damaged is forgotten."""
        if self.files.inherited:
            self._take_over()
        else:
            self._load()
        self.unowned = 0 if self.settled else self._count_unowned()
        self.files.keep()

    def _take_over(self) -> None:
        """What was being punched out is punched before anything is installed: it may be there, and it may not."""
        for extent in self.map_file.extents_now(0, self.map_file.size, self.map_file.size):
            if extent.kind is ExtentKind.DATA:
                self.map.note_room(max(0, extent.offset - HEADER_SIZE), extent.end - HEADER_SIZE)
        evicting = self.map.take_over(self.files.memory.touched)
        punched = True
        try:
            self._punch_now(evicting)
        except OSError as exc:
            log.warning("%s: cannot free space: %s", self.path, exc.strerror)
            punched = False
        for block in evicting:
            (self.map.set_absent if punched else self.map.set_spoiled)(block)

    def _load(self) -> None:
        where = str(self.path / "map")

        def take(number: int, content: bytes) -> None:
            try:
                self.map.load(number, content, where)
            except FormatError as exc:
                log.warning("%s", exc)
                self.map.forget_sector(number)
                self.is_damaged = True

        load_sectors(self.map_file, self.header, take)

    def _count_unowned(self) -> int:
        return max(0, self.data.allocated_bytes() - (self.map.held << self.shift))

    def recount(self) -> None:
        """Until it is settled: count what lies in the data file, for the map does not know all of it."""
        unowned = self._count_unowned()
        self.pool.account.add(unowned - self.unowned)
        self.unowned = unowned

    async def settle(self) -> None:
        """After a crash: make map and data file agree on what has room. From then on blocks are installed.

        What lies in the file and belongs to no block is punched; blocks of which nothing is there are forgotten.
        """
        try:
            await self._settle()
        except OSError as exc:
            self.fail(self.writing, f"cannot free what a crash left: {os.strerror(exc.errno or 0)}")
            return  # nothing is installed until the next start
        except Exception as exc:
            log.exception("%s: freeing what a crash left failed", self.path)
            self.fail(self.writing, f"cannot free what a crash left: {exc!r}")
            return
        if self.is_leaving:
            return
        self.pool.account.give_back(self.unowned)
        self.unowned = 0
        self.map.settle()
        self._landed.set()

    async def _settle(self) -> None:
        offset = 0
        while offset < self.size and not self.is_leaving:  # it may be dropped before this has begun
            extents = await self.calls.run(self.data.extents_now, offset, self.size - offset, SCAN_STEP)
            for extent in extents:
                is_data = extent.kind is ExtentKind.DATA
                first, last = extent.offset >> self.shift, -(-extent.end >> self.shift)
                if not is_data:  # the blocks that lie in it as a whole
                    first = -(-extent.offset >> self.shift)
                    last = self.count if extent.end == self.size else extent.end >> self.shift
                for start in range(first, last, SCAN_BLOCKS):
                    if is_data:
                        await self._punch_strays(start, min(last, start + SCAN_BLOCKS))
                    else:
                        self._forget_holes(start, min(last, start + SCAN_BLOCKS))
                    self.recount()
                    await trio.lowlevel.checkpoint()
                    if self.is_leaving:
                        return
            offset = extents[-1].end

    async def _punch_strays(self, start: int, end: int) -> None:
        stray: list[int] = []
        for first, last in [*self.map.held_runs(start, end), (end, end)]:
            stray += range(start, first)
            start = last
        if stray:
            await self.calls.run(self._punch_now, stray)

    def _forget_holes(self, start: int, end: int) -> None:
        for first, last in list(self.map.held_runs(start, end)):
            for block in range(first, last):
                is_sure = self.map.ready[block] or block in self.pins or self.map.state(block) is State.EVICTING
                if not is_sure:
                    self.pool.give_back(self, block)
                    self.forgotten_blocks += 1

    def close_files(self) -> None:
        """Not while a thread may still use them: then they stay open until the process ends."""
        self.is_closed = True
        if not self.calls:
            self.files.close(is_durable=True)

    def statistics(self) -> dict[str, int | float | str]:
        broken = [health for health in (self.reading, self.writing) if not health.works]
        return {
            "held_blocks": self.map.held,
            "installed_blocks": self.installed_blocks,
            "zero_blocks": self.zero_blocks,
            "evicted_blocks": self.evicted_blocks,
            "not_installed_blocks": self.dropped_blocks,
            "corrupt_blocks": self.corrupt_blocks,
            "forgotten_blocks": self.forgotten_blocks,
            "read_ahead_used_blocks": self.blocks.used_blocks,
            "read_ahead_wasted_blocks": self.blocks.wasted_blocks,
            "failures": self.reading.failures + self.writing.failures,
            "bypass": "; ".join(f"{health.what}: {health.reason}" for health in broken) or "no",
        }


__all__ = ["Flight", "PoolImage"]
