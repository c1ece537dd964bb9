"""What an export holds, by BLOCK_STATUS: how much to ask for at once, and how many questions side by side.

The length of a question follows from how dense the last answer was, so that an answer has about as many runs as are wanted.
Where a server tells all of what it was asked for, the pieces behind that are asked for at the same time.

Concurrency: any number of calls at once; they share nothing but the density.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from cachefs.errors import CachefsError
from cachefs.extent import Extent, ExtentKind, merge_extents
from cachefs.nbd.protocol import MAX_STATUS_LENGTH, Request
from cachefs.units import align_down, align_up

_LEAST = 64 << 20  # bytes of one question
_SIDE_BY_SIDE = 8
_FIRST_DENSITY = 128 << 10  # bytes of a run

Ask = Callable[[int, int], Awaitable[Request]]
"""Has a BLOCK_STATUS of offset and length answered. Raises: CachefsError."""


class StatusQuestions:
    """size, alignment: of the export."""

    def __init__(self, size: int, alignment: int, ask: Ask) -> None:
        self._size = size
        self._alignment = alignment
        self._ask = ask
        self._bytes_per_run = _FIRST_DENSITY

    async def extents(self, offset: int, length: int, limit: int) -> list[Extent]:
        """As `Layer.extents`."""
        start = align_down(offset, self._alignment)
        end = min(self._size, align_up(offset + length, self._alignment))
        at = min(end, start + self._step(limit))
        found = await self._question(start, at)
        while found[-1].end == at < end and len(found) < limit:
            bounds = self._bounds(at, end, limit - len(found))
            for piece_end, answer in zip(bounds[1:], await self._questions(bounds), strict=True):
                if found[-1].end == at:
                    found += answer
                    at = piece_end
        clipped = [_clip(extent, offset, offset + length) for extent in merge_extents(found)]
        return [extent for extent in clipped if extent.length > 0][:limit]

    def _step(self, limit: int) -> int:
        """Bytes to ask for at once, so that the answer has about *limit* runs."""
        return align_down(max(_LEAST, min(MAX_STATUS_LENGTH, limit * self._bytes_per_run)), self._alignment)

    def _bounds(self, start: int, end: int, limit: int) -> list[int]:
        """Of at most _SIDE_BY_SIDE pieces."""
        step = self._step(limit)
        last = min(end, start + _SIDE_BY_SIDE * step)
        return [*range(start, last, step), last]

    async def _questions(self, bounds: list[int]) -> list[list[Extent]]:
        """The answers for all pieces; empty for one that failed: whoever comes to it asks anew."""
        answers: list[list[Extent]] = [[] for _ in bounds[1:]]

        async def ask(index: int) -> None:
            with suppress(CachefsError):
                answers[index] = await self._question(bounds[index], bounds[index + 1])

        async with trio.open_nursery() as nursery:
            for index in range(len(answers)):
                nursery.start_soon(ask, index)
        return answers

    async def _question(self, start: int, end: int) -> list[Extent]:
        """What one question brings: a prefix of the range that is not empty."""
        answered = await self._ask(start, end - start)
        if answered.error or answered.extents is None:
            # Always true, and good enough; not for more than that, because it may be remembered above.
            return [Extent(start, min(end - start, _LEAST), ExtentKind.DATA)]
        self._bytes_per_run = (answered.extents[-1].end - start) // len(answered.extents)
        return answered.extents


def _clip(extent: Extent, start: int, end: int) -> Extent:
    first = max(extent.offset, start)
    return Extent(first, min(extent.end, end) - first, extent.kind)
