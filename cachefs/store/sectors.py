"""The durable form of a map: 512-byte sectors that each vouch for themselves, and which of them have changed.

A sector has a magic, a crc32, the generation of the round that wrote it and its own index, so any mixture of old and new
sectors is a valid map. A flush *round* takes copies of the dirty sectors (`begin_round`), and after they are durable says
so (`end_round`), or not (`abandon_round`): dirty -> in round -> clean, and back to dirty when the round failed.

Byte table: docs/formats/overlay.md. All methods are synchronous, for one event loop; nothing here does I/O.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from bitarray import bitarray

from cachefs.errors import FormatError

SECTOR_SIZE = 512
SECTOR_HEAD = struct.Struct("<4sIQQ8x")  # magic, crc32 of all behind it, generation, index
BODY_SIZE = SECTOR_SIZE - SECTOR_HEAD.size  # 480
_CRC_OFFSET = 8


class SectorCopy(NamedTuple):
    number: int  # of the sector in the map
    content: bytes  # SECTOR_SIZE bytes, as they go to the file


def encode_sector(magic: bytes, generation: int, index: int, body: bytes) -> bytes:
    rest = SECTOR_HEAD.pack(magic, 0, generation, index)[_CRC_OFFSET:] + body
    return magic + zlib.crc32(rest).to_bytes(4, "little") + rest


def decode_sector(magic: bytes, index: int, content: bytes, where: str, advice: str) -> tuple[int, bytes] | None:
    """Generation and body of sector *index* as read from the file; None for all zeros, which was never written.

    Raises: FormatError when it is not this sector, or is damaged; *advice* says what that means and what to do.
    """
    if not any(content):
        return None
    found, crc, generation, own_index = SECTOR_HEAD.unpack_from(content)
    if len(content) != SECTOR_SIZE or found != magic or crc != zlib.crc32(content[_CRC_OFFSET:]):
        raise FormatError(where, f"sector {index} of the block map is damaged (its checksum does not match). {advice}")
    if own_index != index:
        raise FormatError(where, f"sector {index} of the block map says it is sector {own_index}. {advice}")
    return generation, content[SECTOR_HEAD.size :]


class SectorCopies:
    """Sectors of a map as they were at one moment; copied raw, and given head and checksum only when they are iterated.

    runs: first sector, and the bytes of each plane of the map for a run of neighbouring sectors.
    """

    def __init__(self, magic: bytes, generation: int, runs: list[tuple[int, tuple[bytes, ...]]]) -> None:
        self._magic = magic
        self._generation = generation
        self._runs = runs

    def __bool__(self) -> bool:
        return bool(self._runs)

    def __iter__(self) -> Iterator[SectorCopy]:
        for first, planes in self._runs:
            width = BODY_SIZE // len(planes)
            for index in range(len(planes[0]) // width):
                body = b"".join(plane[index * width : (index + 1) * width] for plane in planes)
                yield SectorCopy(first + index, encode_sector(self._magic, self._generation, first + index, body))


def bitmap_size(bits: int) -> int:
    """Bytes of a bitmap, in whole words."""
    return -(-bits // 64) * 8


class SyncState(enum.IntEnum):
    """Of the files of a store; what a successor finds tells it what its predecessor may have been told and not said."""

    IDLE = 0
    UNDER_WAY = 1
    ASKING = 2  # the witnesses are being asked what became of one that was cut off: cachefs.store.mapfile


class DirtySectors:
    """Which of *count* sectors are dirty or in round, and how far the last round is.

    *memory*: `DirtySectors.size(count)` bytes, zero at first: two bitmaps, the generation of the last round, a SyncState.
    """

    def __init__(self, memory: memoryview, count: int) -> None:
        half = bitmap_size(count)
        self._dirty = bitarray(buffer=memory[:half], endian="little")
        self._in_round = bitarray(buffer=memory[half : 2 * half], endian="little")
        self._words = memory[2 * half : self.size(count)].cast("Q")

    @staticmethod
    def size(count: int) -> int:
        return 2 * bitmap_size(count) + 16

    @property
    def generation(self) -> int:
        """Of the last round."""
        return self._words[0]

    @generation.setter
    def generation(self, generation: int) -> None:
        self._words[0] = generation

    @property
    def sync(self) -> SyncState:
        return SyncState(self._words[1])

    @sync.setter
    def sync(self, state: SyncState) -> None:
        self._words[1] = state

    def numbers(self) -> Iterator[int]:
        """Of the dirty sectors, in order."""
        start = self._dirty.find(1)
        while start >= 0:
            yield start
            start = self._dirty.find(1, start + 1)

    def mark(self, start: int, end: int) -> None:
        """Sectors *start* to *end* (half-open) have changed, or are about to."""
        self._dirty[start:end] = True

    @property
    def count(self) -> int:
        return self._dirty.count(1)

    def begin_round(self, magic: bytes, copy: Callable[[int, int], tuple[bytes, ...]]) -> SectorCopies:
        """Copies of all dirty sectors, in order; from here on they are *in round* and may become dirty again.

        copy: the planes' bytes for sectors *start* to *end*.
        """
        runs = []
        if self._dirty.any():
            self.generation += 1
            # in_round first: a kill in between leaves a sector in both, never in neither
            self._in_round |= self._dirty
            start = self._dirty.find(1)
            while start >= 0:
                end = self._dirty.find(0, start)
                end = len(self._dirty) if end < 0 else end
                runs.append((start, copy(start, end)))
                start = self._dirty.find(1, end)
            self._dirty.setall(0)
        return SectorCopies(magic, self.generation, runs)

    def end_round(self) -> None:
        """The copies of the round are durable."""
        self._in_round.setall(0)

    def abandon_round(self) -> None:
        """The round failed: its sectors are dirty again."""
        self._dirty |= self._in_round
        self._in_round.setall(0)
