"""What a range of a disk holds, as far as it is known without reading it."""

from __future__ import annotations

import enum
from collections.abc import Iterable
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


def merge_extents(extents: Iterable[Extent]) -> list[Extent]:
    """Adjacent extents of one kind become one."""
    merged: list[Extent] = []
    for extent in extents:
        if merged and merged[-1].kind is extent.kind and merged[-1].end == extent.offset:
            merged[-1] = Extent(merged[-1].offset, merged[-1].length + extent.length, extent.kind)
        else:
            merged.append(extent)
    return merged
