"""What a pool holds of an image: for every block its state or its checksum; a pure state machine over shared memory.

    entry        state      space   the block
    0            ABSENT     none    has to be fetched
    1            ZERO       none    reads as zeros
    2            EVICTING   held    is being punched out; nothing may be installed until that is done
    3            SPOILED    held    has room in the file, and nothing of worth in it: being written, damaged, or unsynced
                                    when a sync failed; may be installed over, and evicted
    4 and more   DATA       held    lies in the data file, and has this checksum

A DATA block is *ready* when its checksum has been verified since the pool was opened (or it was installed since); only a
ready block is read without looking at its bytes. `ready` and `zero` are bit planes for the fast path and belong to the
process. Survivor memory (layout 1) are the entries (8 bytes each, little-endian), two bitmaps, `dirty` and `in round`, one
bit per sector, how far the last sync is, and whether the map is *settled*: it accounts for all that lies in the file. A
block is believed for its checksum alone, so no order of writes matters.

The checksum is xxh3-64 of the block, seeded with its index: one that lies in the wrong place disagrees. 0 to 3 are moved
up by 4. Byte table of the durable form: docs/formats/pool.md.

Concurrency: one event loop; nothing here does I/O.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import xxhash
from bitarray import bitarray

from cachefs.store.sectors import (
    BODY_SIZE,
    SECTOR_SIZE,
    DirtySectors,
    SectorCopies,
    SyncState,
    decode_sector,
)

ENTRY_SIZE = 8
BLOCKS_PER_SECTOR = BODY_SIZE // ENTRY_SIZE  # 60
SECTOR_MAGIC = b"cfsP"
LAYOUT = 1
PAGE_SIZE = 4096
SECTORS_PER_PAGE = 8
_DAMAGED = "What it describes is fetched anew"


class State(enum.IntEnum):
    ABSENT = 0
    ZERO = 1
    EVICTING = 2
    SPOILED = 3
    DATA = 4  # and everything above


class Part(NamedTuple):
    """Blocks of one kind: `start` to `end`, half-open."""

    state: State
    ready: bool
    start: int
    end: int


def checksum(block: int, content: bytes | bytearray | memoryview) -> int:
    """The entry of a block that holds *content*."""
    found: int = xxhash.xxh3_64_intdigest(content, seed=block)
    return found if found >= State.DATA else found + State.DATA


def sector_count(blocks: int) -> int:
    return -(-blocks // BLOCKS_PER_SECTOR)


def working_size(blocks: int) -> int:
    """Bytes of survivor memory."""
    sectors = sector_count(blocks)
    return sectors * BODY_SIZE + DirtySectors.size(sectors) + 8


class SumMap:
    """*memory*: a writable view of `working_size(blocks)` bytes, all zero."""

    def __init__(self, memory: memoryview, blocks: int) -> None:
        self.blocks = blocks
        self.sectors = sector_count(blocks)
        self._bytes = memory[: self.sectors * BODY_SIZE]
        self._entries = self._bytes.cast("Q")
        bits_at = self.sectors * BODY_SIZE
        self._dirty = DirtySectors(memory[bits_at:], self.sectors)
        settled_at = bits_at + DirtySectors.size(self.sectors)
        self._settled = memory[settled_at : settled_at + 8].cast("Q")
        self.ready = bitarray(blocks)
        self.zero = bitarray(blocks)
        self.held = 0  # blocks that have room in the data file
        self._pages = bitarray(-(-self.sectors // SECTORS_PER_PAGE))  # of the map file, that have or will have content
        self.pages = 0

    # ---- look-up

    def state(self, block: int) -> State:
        entry = self._entries[block]
        return State(entry) if entry < State.DATA else State.DATA

    def entry(self, block: int) -> int:
        """The checksum of a block that is DATA."""
        return self._entries[block]

    def holds(self, block: int) -> bool:
        """Whether the block has room in the data file."""
        return self._entries[block] >= State.EVICTING

    def parts(self, start: int, end: int) -> Iterator[Part]:
        """The range as parts of equal kind, in order. The map must not change while it is iterated."""
        entries, ready = self._entries, self.ready
        while start < end:
            state, is_ready = self.state(start), bool(ready[start])
            until = start + 1
            while until < end:
                entry = entries[until]
                same = entry >= State.DATA if state is State.DATA else entry == state
                if not same or bool(ready[until]) != is_ready:
                    break
                until += 1
            yield Part(state, is_ready, start, until)
            start = until

    def new_pages(self, start: int, end: int) -> int:
        """Pages of the map file that a change of these blocks would fill first."""
        first, last = self._page(start), self._page(end - 1) + 1
        return self._pages.count(0, first, last)

    def _page(self, block: int) -> int:
        return block // (BLOCKS_PER_SECTOR * SECTORS_PER_PAGE)

    # ---- changes

    def _change(self, block: int, entry: int) -> None:
        before = self._entries[block]
        if before == entry:
            return
        self._dirty.mark(block // BLOCKS_PER_SECTOR, block // BLOCKS_PER_SECTOR + 1)
        self._entries[block] = entry
        self.held += (entry >= State.EVICTING) - (before >= State.EVICTING)
        self.zero[block] = entry == State.ZERO
        self._note_room(block // BLOCKS_PER_SECTOR)

    def set_data(self, block: int, entry: int) -> None:
        """The block lies in the file, and *entry* is its checksum; it is ready."""
        self._change(block, entry)
        self.ready[block] = True

    def verified(self, block: int) -> None:
        """The bytes in the file agree with the checksum."""
        self.ready[block] = True

    def set_zero(self, block: int) -> None:
        """The block reads as zeros, and nothing of it is in the file."""
        self._change(block, State.ZERO)

    def set_evicting(self, block: int) -> None:
        self.ready[block] = False
        self._change(block, State.EVICTING)

    def set_spoiled(self, block: int) -> None:
        self.ready[block] = False
        self._change(block, State.SPOILED)

    def set_absent(self, block: int) -> None:
        self.ready[block] = False
        self._change(block, State.ABSENT)

    # ---- succession

    @property
    def settled(self) -> bool:
        """Whether what lies in the data file belongs to blocks of the map. Set once."""
        return bool(self._settled[0])

    def settle(self) -> None:
        self._settled[0] = 1

    def take_over(self, touched: Callable[[int, int], Iterable[tuple[int, int]]]) -> list[int]:
        """Go on from what a predecessor left in the memory; the blocks that it was about to punch out.

        touched(start, end): as in `cachefs.store.blockmap`.
        """
        self._dirty.abandon_round()
        evicting: list[int] = []
        done = 0  # sectors
        for start, end in touched(0, self.sectors * BODY_SIZE):
            first, done = max(done, start // BODY_SIZE), -(-end // BODY_SIZE)
            for index in range(first, done):
                evicting += self._take_over_sector(index)
        for index in self._dirty.numbers():
            self._note_room(index)
        return evicting

    def _take_over_sector(self, index: int) -> list[int]:
        first = index * BLOCKS_PER_SECTOR
        entries = self._entries[first : min(self.blocks, first + BLOCKS_PER_SECTOR)]
        if not any(entries):
            return []
        self._note_room(index)
        if min(entries) >= State.DATA:
            self.held += len(entries)
            return []
        for block, entry in enumerate(entries, first):
            self.held += entry >= State.EVICTING
            self.zero[block] = entry == State.ZERO
        return [block for block, entry in enumerate(entries, first) if entry == State.EVICTING]

    def note_room(self, start: int, end: int) -> None:
        """Bytes *start* to before *end* of the map file, counted from its first sector, have room."""
        for index in range(start // SECTOR_SIZE, min(self.sectors, -(-end // SECTOR_SIZE)), SECTORS_PER_PAGE):
            self._note_room(index)

    def _note_room(self, index: int) -> None:
        """Sector *index* has room in the map file, or will have."""
        page = index // SECTORS_PER_PAGE
        if not self._pages[page]:
            self._pages[page] = True
            self.pages += 1

    # ---- the durable form

    @property
    def sync(self) -> SyncState:
        return self._dirty.sync

    @sync.setter
    def sync(self, state: SyncState) -> None:
        self._dirty.sync = state

    @property
    def dirty_sectors(self) -> int:
        return self._dirty.count

    def begin_round(self) -> SectorCopies:
        """Copies of all dirty sectors, in order."""
        return self._dirty.begin_round(SECTOR_MAGIC, self._copy)

    def end_round(self) -> None:
        self._dirty.end_round()

    def abandon_round(self) -> None:
        self._dirty.abandon_round()

    def _copy(self, start: int, end: int) -> tuple[bytes]:
        return (bytes(self._bytes[start * BODY_SIZE : end * BODY_SIZE]),)

    def load(self, index: int, content: bytes, where: str) -> None:
        """Take over sector *index* as read from the file; what was EVICTING is SPOILED: its room may be held.

        Raises: FormatError when the sector is damaged; nothing was taken over then.
        """
        self._note_room(index)  # it is held, whatever is in it
        decoded = decode_sector(SECTOR_MAGIC, index, content, where, _DAMAGED)
        if decoded is None:
            return
        generation, body = decoded
        self._dirty.generation = max(self._dirty.generation, generation)
        first = index * BLOCKS_PER_SECTOR
        inside = min(BLOCKS_PER_SECTOR, self.blocks - first)
        entries = memoryview(body).cast("Q")[:inside]
        if inside == BLOCKS_PER_SECTOR and min(entries) >= State.DATA:  # one look for the full pool
            self._bytes[index * BODY_SIZE : (index + 1) * BODY_SIZE] = body
            self.held += inside
            return
        for block, entry in enumerate(entries, first):
            if entry:
                self._entries[block] = State.SPOILED if entry == State.EVICTING else entry
                self.held += entry >= State.EVICTING
                self.zero[block] = entry == State.ZERO

    def forget_sector(self, index: int) -> None:
        """Sector *index* of the file is damaged: the next round writes it anew, and what it described is ABSENT."""
        self._dirty.mark(index, index + 1)

    def held_runs(self, begin: int = 0, until: int | None = None) -> Iterator[tuple[int, int]]:
        """The blocks from *begin* to before *until* that have room in the data file, as runs `start` to `end`, in order."""
        until = self.blocks if until is None else until
        for start, end in self._held_runs(begin // BLOCKS_PER_SECTOR, -(-until // BLOCKS_PER_SECTOR)):
            if max(start, begin) < min(end, until):
                yield max(start, begin), min(end, until)

    def _held_runs(self, first_sector: int, last_sector: int) -> Iterator[tuple[int, int]]:
        start = end = 0  # of the run so far
        for sector in range(first_sector, last_sector):
            body = self._bytes[sector * BODY_SIZE : (sector + 1) * BODY_SIZE].cast("Q")
            first = sector * BLOCKS_PER_SECTOR
            if min(body) >= State.EVICTING:  # mostly all of them, or none
                found = [(first, first + BLOCKS_PER_SECTOR)]
            elif not any(body):
                continue
            else:
                found = [(block, block + 1) for block, entry in enumerate(body, first) if entry >= State.EVICTING]
            for one, last in found:
                if one != end:
                    if start < end:
                        yield start, end
                    start = one
                end = last
        if start < end:
            yield start, end


__all__ = ["Part", "State", "SumMap", "checksum", "working_size"]
