"""The state of every block of a store: a pure state machine over shared memory, and its durable form.

    state    written  zero
    ABSENT   0        0      the block is the child's
    DATA     1        0      the block is in the data file
    ZERO     any      1      the block reads as zeros, whatever lies under it

*Working form* (layout 1, in survivor memory): four bit planes, LSB first: `written`, `zero` (one bit per block), `dirty`,
`in_round` (one bit per sector). A kill may fall between any two stores, so no change passes through ABSENT: to ZERO sets
zero, then clears written; to DATA sets written, then clears zero; and the sector's dirty bit is set before either.

*Durable form*: an array of 512-byte sectors, each with magic, crc32, generation and index of its own, and the states of
BLOCKS_PER_SECTOR blocks. Any mixture of old and new sectors is a valid map. Byte table: docs/formats/overlay.md.

A flush *round* takes copies of the dirty sectors (`begin_round`), and after they are durable says so (`end_round`), or
not (`abandon_round`). All methods are synchronous, for one event loop; nothing here does I/O.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from bitarray import bitarray

from cachefs.errors import FormatError

SECTOR_SIZE = 512
SECTOR_HEAD = struct.Struct("<4sIQQ8x")  # magic, crc32 of all behind it, generation, index
STATES_SIZE = SECTOR_SIZE - SECTOR_HEAD.size  # 480: two planes of 240 bytes
PLANE_SIZE = STATES_SIZE // 2
BLOCKS_PER_SECTOR = PLANE_SIZE * 8
SECTOR_MAGIC = b"cfsM"
LAYOUT = 1
_CRC_OFFSET = 8


class State(enum.Enum):
    ABSENT = 0
    DATA = 1
    ZERO = 2


class Run(NamedTuple):
    """Bytes of one state, within the range that was asked for."""

    state: State
    offset: int
    length: int


class SectorCopy(NamedTuple):
    number: int  # of the sector in the map
    content: bytes  # SECTOR_SIZE bytes, as they go to the file


def sector_count(blocks: int) -> int:
    return -(-blocks // BLOCKS_PER_SECTOR)


def working_size(blocks: int) -> int:
    """Bytes of the working form."""
    sectors = sector_count(blocks)
    return 2 * sectors * PLANE_SIZE + 2 * _bitmap_size(sectors)


def _bitmap_size(bits: int) -> int:
    return -(-bits // 64) * 8


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
        plane, bitmap = self.sectors * PLANE_SIZE, _bitmap_size(self.sectors)
        self._zero_at = plane
        self.written = bitarray(buffer=memory[:plane], endian="little")
        self.zero = bitarray(buffer=memory[plane : 2 * plane], endian="little")
        self._dirty = bitarray(buffer=memory[2 * plane : 2 * plane + bitmap], endian="little")
        self._in_round = bitarray(buffer=memory[2 * plane + bitmap :], endian="little")
        self.data_blocks = 0  # counted here, never in the planes: to read a page nobody touched would allocate it
        self.generation = 0

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
        self.written[start:end] = True
        self.zero[start:end] = False
        self.data_blocks += end - start - before

    def set_zero(self, start: int, end: int) -> None:
        """To ZERO."""
        if self.zero.find(0, start, end) < 0:
            return
        before = self.written.count(1, start, end)
        self._mark_dirty(start, end)
        self.zero[start:end] = True
        self.written[start:end] = False
        self.data_blocks -= before

    def _mark_dirty(self, start: int, end: int) -> None:
        self._dirty[start // BLOCKS_PER_SECTOR : (end - 1) // BLOCKS_PER_SECTOR + 1] = True

    # ---- the durable form

    @property
    def dirty_sectors(self) -> int:
        return self._dirty.count(1)

    def begin_round(self) -> list[SectorCopy]:
        """Copies of all dirty sectors, in order; from here on they are *in round* and may become dirty again."""
        if not self._dirty.any():
            return []
        self.generation += 1
        indices = list(self._dirty.search(1))
        # in_round first: a kill in between leaves a sector in both, never in neither
        for index in indices:
            self._in_round[index] = True
        copies = [SectorCopy(index, self._encode(index)) for index in indices]
        self._dirty.setall(0)
        return copies

    def end_round(self) -> None:
        """The copies of the round are durable."""
        self._in_round.setall(0)

    def abandon_round(self) -> None:
        """The round failed: its sectors are dirty again."""
        self._dirty |= self._in_round
        self._in_round.setall(0)

    def _encode(self, index: int) -> bytes:
        at = index * PLANE_SIZE
        written = self._memory[at : at + PLANE_SIZE]
        zero = self._memory[self._zero_at + at : self._zero_at + at + PLANE_SIZE]
        body = SECTOR_HEAD.pack(SECTOR_MAGIC, 0, self.generation, index)[_CRC_OFFSET:] + bytes(written) + bytes(zero)
        return SECTOR_MAGIC + zlib.crc32(body).to_bytes(4, "little") + body

    def load(self, index: int, content: bytes, where: str) -> None:
        """Take over sector *index* as read from the file. All zeros: never written, all ABSENT.

        Raises: FormatError when it is not this sector, or is damaged.
        """
        if not any(content):
            return
        magic, crc, generation, own_index = SECTOR_HEAD.unpack_from(content)
        if len(content) != SECTOR_SIZE or magic != SECTOR_MAGIC or crc != zlib.crc32(content[_CRC_OFFSET:]):
            raise FormatError(
                where,
                f"sector {index} of the block map is damaged (its checksum does not match). The blocks it describes "
                "cannot be told apart from the base; restore the overlay from a backup",
            )
        if own_index != index:
            raise FormatError(where, f"sector {index} of the block map says it is sector {own_index}; restore a backup")
        body = content[SECTOR_HEAD.size :]
        zero = int.from_bytes(body[PLANE_SIZE:], "little")
        written = int.from_bytes(body[:PLANE_SIZE], "little") & ~zero  # zero wins
        inside = (1 << min(BLOCKS_PER_SECTOR, self.blocks - index * BLOCKS_PER_SECTOR)) - 1  # nothing past the end
        zero, written = zero & inside, written & inside
        at = index * PLANE_SIZE
        self._memory[at : at + PLANE_SIZE] = written.to_bytes(PLANE_SIZE, "little")
        self._memory[self._zero_at + at : self._zero_at + at + PLANE_SIZE] = zero.to_bytes(PLANE_SIZE, "little")
        self.data_blocks += written.bit_count()
        self.generation = max(self.generation, generation)


__all__ = ["BlockMap", "Run", "SectorCopy", "State", "working_size"]
