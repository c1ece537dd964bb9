"""What a range of a disk holds, as far as it is known without reading it."""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class ExtentKind(enum.Enum):
    DATA = "data"
    ZERO = "zero"  # reads as zeros, though space may be held for it
    HOLE = "hole"  # reads as zeros and holds no space


class Extent(NamedTuple):
    offset: int  # bytes
    length: int  # bytes, never 0
    kind: ExtentKind

    @property
    def end(self) -> int:
        return self.offset + self.length


class MapState(enum.IntEnum):
    """What one layer has of a range, for `cachefs map`; the numbers go from the daemon to the command."""

    ABSENT = 0  # what lies below counts
    DATA = 1
    ZERO = 2
    HOLE = 3
    CACHED = 4  # a copy of what lies below
    UNKNOWN = 5  # not asked yet


STATE_OF = {ExtentKind.DATA: MapState.DATA, ExtentKind.ZERO: MapState.ZERO, ExtentKind.HOLE: MapState.HOLE}


class MapRun(NamedTuple):
    offset: int  # bytes
    length: int  # bytes, never 0
    state: MapState

    @property
    def end(self) -> int:
        return self.offset + self.length


_PACKED = struct.Struct("<QQ")  # offset; length shifted left by 3, with the state


def pack_runs(runs: Iterable[MapRun]) -> bytes:
    return b"".join(_PACKED.pack(run.offset, run.length << 3 | run.state) for run in runs)


def unpack_runs(content: bytes) -> list[MapRun]:
    """Raises: ValueError, struct.error when *content* was not packed here."""
    return [MapRun(offset, packed >> 3, MapState(packed & 7)) for offset, packed in _PACKED.iter_unpack(content)]


def merge_extents(extents: Iterable[Extent]) -> list[Extent]:
    """Adjacent extents of one kind become one."""
    merged: list[Extent] = []
    for extent in extents:
        if merged and merged[-1].kind is extent.kind and merged[-1].end == extent.offset:
            merged[-1] = Extent(merged[-1].offset, merged[-1].length + extent.length, extent.kind)
        else:
            merged.append(extent)
    return merged


def clip_extents(extents: Iterable[Extent], start: int, end: int) -> list[Extent]:
    """The parts of *extents* from *start* to before *end*."""
    return [
        Extent(max(one.offset, start), min(one.end, end) - max(one.offset, start), one.kind)
        for one in extents
        if one.end > start and one.offset < end
    ]


def with_data(extents: Iterable[Extent], held: Sequence[tuple[int, int]]) -> list[Extent]:
    """*extents* with the ranges *held* (half-open, in order, they may overlap) as data; it ends where *extents* does."""
    found: list[Extent] = []
    waiting = list(reversed(held))
    for extent in extents:
        at = extent.offset
        while waiting and waiting[-1][0] < extent.end:
            first, last = max(at, waiting[-1][0]), min(extent.end, waiting[-1][1])
            if first > at:
                found.append(Extent(at, first - at, extent.kind))
            if last > first:
                found.append(Extent(first, last - first, ExtentKind.DATA))
            at = max(at, last)
            if waiting[-1][1] > extent.end:
                break
            waiting.pop()
        if at < extent.end:
            found.append(Extent(at, extent.end - at, extent.kind))
    return found
