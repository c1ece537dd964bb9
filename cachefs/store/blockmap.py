"""The state of every block of a store: a pure state machine over shared memory, and its durable form.

    state    written  zero
    ABSENT   0        0      the block is the child's
    DATA     1        0      the block is in the data file
    ZERO     any      1      the block reads as zeros, whatever lies under it

*Working form* (layout 1, in survivor memory): four bit planes, LSB first: `written`, `zero` (one bit per block), `dirty`,
`in_round` (one bit per sector); and how far the last round is. A kill may fall between any two stores, so no change
passes through ABSENT: to ZERO sets zero, then clears written; to DATA sets written, then clears zero; and the sector's
dirty bit is set before either.

*Durable form*: sectors (`cachefs.store.sectors`) with the states of BLOCKS_PER_SECTOR blocks each. Byte table:
docs/formats/overlay.md.

All methods are synchronous, for one event loop; nothing here does I/O.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from bitarray import bitarray
from bitarray.util import zeros

from cachefs.store.sectors import (
    BODY_SIZE,
    SECTOR_SIZE,
    DirtySectors,
    SectorCopies,
    SectorCopy,
    SyncState,
    decode_sector,
)

PLANE_SIZE = BODY_SIZE // 2  # two planes
BLOCKS_PER_SECTOR = PLANE_SIZE * 8
SECTOR_MAGIC = b"cfsM"
LAYOUT = 1
_PAGE_SHIFT = 15  # blocks whose bits fill a page of memory
_DAMAGED = "The blocks it describes cannot be told apart from the base; restore the overlay from a backup"


class State(enum.Enum):
    ABSENT = 0
    DATA = 1
    ZERO = 2


class Run(NamedTuple):
    """Bytes of one state, within the range that was asked for."""

    state: State
    offset: int
    length: int


def sector_count(blocks: int) -> int:
    return -(-blocks // BLOCKS_PER_SECTOR)


def working_size(blocks: int) -> int:
    """Bytes of the working form."""
    sectors = sector_count(blocks)
    return 2 * sectors * PLANE_SIZE + DirtySectors.size(sectors)


def _common(ours: list[tuple[int, int]], theirs: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What two lists of ranges, each in order, have in common."""
    number = 0
    for start, end in ours:
        while number < len(theirs) and theirs[number][1] <= start:
            number += 1
        for first, last in theirs[number:]:
            if first >= end:
                break
            yield max(start, first), min(end, last)


class BlockMap:
    """*memory* is a writable view of `working_size(blocks)` bytes, all zero: every block ABSENT.

    block_size: bytes, a power of two. Block indices are half-open ranges; offsets and lengths are bytes.
    """

    def __init__(self, memory: memoryview, blocks: int, block_size: int) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.shift = block_size.bit_length() - 1
        self.sectors = sector_count(blocks)
        self._memory = memory
        plane = self.sectors * PLANE_SIZE
        self._zero_at = plane
        self.written = bitarray(buffer=memory[:plane], endian="little")
        self.zero = bitarray(buffer=memory[plane : 2 * plane], endian="little")
        self._dirty = DirtySectors(memory[2 * plane :], self.sectors)
        # Pages of `written` that hold something: a look at another one would allocate it, and zeroes need none.
        self._written_pages = zeros((self.sectors * BLOCKS_PER_SECTOR >> _PAGE_SHIFT) + 1)
        self.data_blocks = 0  # counted here, never in the planes: to read a page nobody touched would allocate it

    # ---- look-up

    def state(self, block: int) -> State:
        if self.zero[block]:
            return State.ZERO
        return State.DATA if self.written[block] else State.ABSENT

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """The range as runs of equal state, in order. The map must not change while it is iterated."""
        shift = self.shift
        end = offset + length
        block, last = offset >> shift, ((end - 1) >> shift) + 1
        while block < last:
            state = self.state(block)
            until = self._end_of_run(state, block, last)
            start = max(offset, block << shift)
            yield Run(state, start, min(end, until << shift) - start)
            block = until

    def run_at(self, offset: int, end: int) -> Run:
        """The run that *offset* lies in, from there on and clipped to *end*."""
        block, last = offset >> self.shift, ((end - 1) >> self.shift) + 1
        state = self.state(block)
        return Run(state, offset, min(end, self._end_of_run(state, block, last) << self.shift) - offset)

    def _end_of_run(self, state: State, block: int, last: int) -> int:
        """The first block behind *block* and before *last* that is in another state, or *last*."""
        if state is State.DATA:
            until = self.written.find(0, block, last)
        elif state is State.ZERO:
            until = self.zero.find(0, block, last)
        else:
            until = self.written.find(1, block, last)
            end = last if until < 0 else until
            zero = self.zero.find(1, block, end)
            return end if zero < 0 else zero
        return last if until < 0 else until

    def is_data(self, start: int, end: int) -> bool:
        """Whether every block of the range is DATA."""
        return self.written.find(0, start, end) < 0

    def count_data(self, start: int, end: int) -> int:
        return self.written.count(1, start, end)

    # ---- changes

    def set_data(self, start: int, end: int) -> None:
        """To DATA; the bytes must be in the data file already."""
        before = self.written.count(1, start, end)
        if before == end - start:
            return
        self._mark_dirty(start, end)
        self._written_pages[start >> _PAGE_SHIFT : ((end - 1) >> _PAGE_SHIFT) + 1] = True
        self.written[start:end] = True
        self.zero[start:end] = False
        self.data_blocks += end - start - before

    def set_zero(self, start: int, end: int) -> None:
        """To ZERO."""
        if self.zero.find(0, start, end) < 0:
            return
        pages = start >> _PAGE_SHIFT, ((end - 1) >> _PAGE_SHIFT) + 1
        before = self.written.count(1, start, end) if self._written_pages.find(1, *pages) >= 0 else 0
        self._mark_dirty(start, end)
        self.zero[start:end] = True
        if before:
            self.written[start:end] = False
            self.data_blocks -= before

    def _mark_dirty(self, start: int, end: int) -> None:
        self._dirty.mark(start // BLOCKS_PER_SECTOR, (end - 1) // BLOCKS_PER_SECTOR + 1)

    # ---- succession

    def take_over(self, touched: Callable[[int, int], Iterable[tuple[int, int]]]) -> None:
        """Go on from what a predecessor left in the memory, whatever it was doing when it was killed.

        touched(start, end): the parts of the memory in that range, in bytes, outside of which all is zero; the rest is
        not looked at, because a look allocates.
        """
        plane = self._zero_at
        written = list(touched(0, plane))
        for start, end in _common(written, [(a - plane, b - plane) for a, b in touched(plane, 2 * plane)]):
            self.written[start * 8 : end * 8] &= ~self.zero[
                start * 8 : end * 8
            ]  # zero wins; the fast path looks at one
        self.data_blocks = 0
        for start, end in written:
            self.data_blocks += self.written.count(1, start * 8, end * 8)
            self._written_pages[start * 8 >> _PAGE_SHIFT : ((end * 8 - 1) >> _PAGE_SHIFT) + 1] = True
        self._dirty.abandon_round()

    # ---- the durable form

    @property
    def generation(self) -> int:
        """Of the last round."""
        return self._dirty.generation

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
        """The copies of the round are durable."""
        self._dirty.end_round()

    def abandon_round(self) -> None:
        """The round failed: its sectors are dirty again."""
        self._dirty.abandon_round()

    def _copy(self, start: int, end: int) -> tuple[bytes, bytes]:
        """The two planes of these sectors."""
        first, last = start * PLANE_SIZE, end * PLANE_SIZE
        return bytes(self._memory[first:last]), bytes(self._memory[self._zero_at + first : self._zero_at + last])

    def load(self, index: int, content: bytes, where: str) -> None:
        """Take over sector *index* as read from the file. All zeros: never written, all ABSENT.

        Raises: FormatError when it is not this sector, or is damaged.
        """
        decoded = decode_sector(SECTOR_MAGIC, index, content, where, _DAMAGED)
        if decoded is None:
            return
        generation, body = decoded
        zero = int.from_bytes(body[PLANE_SIZE:], "little")
        written = int.from_bytes(body[:PLANE_SIZE], "little") & ~zero  # zero wins
        inside = (1 << min(BLOCKS_PER_SECTOR, self.blocks - index * BLOCKS_PER_SECTOR)) - 1  # nothing past the end
        zero, written = zero & inside, written & inside
        at = index * PLANE_SIZE
        self._memory[at : at + PLANE_SIZE] = written.to_bytes(PLANE_SIZE, "little")
        self._memory[self._zero_at + at : self._zero_at + at + PLANE_SIZE] = zero.to_bytes(PLANE_SIZE, "little")
        self.data_blocks += written.bit_count()
        if written:
            first = index * BLOCKS_PER_SECTOR
            self._written_pages[first >> _PAGE_SHIFT : ((first + BLOCKS_PER_SECTOR - 1) >> _PAGE_SHIFT) + 1] = True
        self._dirty.generation = max(self._dirty.generation, generation)


__all__ = ["SECTOR_SIZE", "BlockMap", "Run", "SectorCopy", "State", "working_size"]
