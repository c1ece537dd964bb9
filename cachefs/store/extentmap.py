"""What is known of a disk's extents: an interval map that forgets. Pure: no I/O, no waiting.

A *run* is a range of one kind that came with one answer; nothing is known of what lies between runs. Neighbours of one kind
that came with different answers stay apart here and are merged on their way out.

State: `_starts`, sorted, and for each start its run. A sorted list and a dict, not a tree: whole answers come and go by one
slice, and a look-up is a bisection in C (docs/decisions.md has the figures). Invariants: runs do not overlap; every run names
an answer that is in `_answers`, which remembers where that answer lay, the oldest first. Beyond `limit` runs (or answers)
the oldest answer goes, with what is left of its runs.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from cachefs.extent import Extent, ExtentKind, merge_extents


class _Run(NamedTuple):
    end: int
    kind: ExtentKind
    answer: int


class ExtentMap:
    """limit: most runs that are kept. All offsets are bytes, ranges half-open."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._starts: list[int] = []
        self._runs: dict[int, _Run] = {}
        self._answers: dict[int, tuple[int, int]] = {}
        self._numbers = itertools.count()
        self.changes = 0
        """Goes up with everything that is learnt or forgotten."""

    def __len__(self) -> int:
        return len(self._starts)

    def _index(self, offset: int) -> int:
        """Of the run that *offset* lies in, else of the first one behind it."""
        index = bisect_right(self._starts, offset)
        return index - 1 if index and self._runs[self._starts[index - 1]].end > offset else index

    # ---- questions

    def known(self, offset: int, end: int, limit: int) -> list[Extent]:
        """What is known from *offset* on without a gap, clipped to *end*, at most *limit* entries; empty: nothing is."""
        return merge_extents(itertools.islice(self._from(offset, end), limit))

    def at(self, offset: int, end: int) -> Extent | None:
        """What is known to begin at *offset*, clipped to *end*."""
        starts = self._starts
        index = bisect_right(starts, offset) - 1
        if index < 0:
            return None
        run = self._runs[starts[index]]
        if run.end <= offset:
            return None
        return Extent(offset, min(run.end, end) - offset, run.kind)

    def _from(self, offset: int, end: int) -> Iterator[Extent]:
        for start, run in self._each(self._index(offset)):
            if start > offset or offset >= end:
                return
            yield Extent(offset, min(run.end, end) - offset, run.kind)
            offset = run.end

    def _each(self, index: int) -> Iterator[tuple[int, _Run]]:
        starts, runs = self._starts, self._runs
        while index < len(starts):
            yield starts[index], runs[starts[index]]
            index += 1

    def is_zero(self, offset: int, end: int) -> bool:
        """Whether all of the range is known to read as zeros."""
        starts, runs = self._starts, self._runs
        index = bisect_right(starts, offset) - 1
        if index < 0:
            return False
        run = runs[starts[index]]
        while run.kind is not ExtentKind.DATA and run.end > offset:
            if run.end >= end:
                return True
            offset = run.end
            index += 1
            if index == len(starts) or starts[index] != offset:
                return False
            run = runs[offset]
        return False

    def gap_end(self, offset: int, end: int) -> int:
        """Where the unknown range that begins at *offset* ends, *end* at the latest."""
        index = self._index(offset)
        return min(end, max(offset, self._starts[index])) if index < len(self._starts) else end

    def snapshot(self) -> Iterator[Extent]:
        """Everything as it is now, in order, with gaps, not merged; made as it is iterated, in any thread."""
        starts, runs = self._starts[:], list(map(self._runs.__getitem__, self._starts))
        return (Extent(start, run.end - start, run.kind) for start, run in zip(starts, runs, strict=True))

    # ---- changes

    def learn(self, answer: Iterable[Extent], without: Sequence[tuple[int, int]] = ()) -> None:
        """Take *answer*, in order, in place of what was known there, but nothing that lies in one of the ranges *without*."""
        extents = merge_extents(answer)[: self._limit]
        if not extents:
            return
        start, end = extents[0].offset, extents[-1].end
        for hole in without:
            extents = list(_cut(extents, *hole))
        self.forget(start, end)
        number = next(self._numbers)
        index = bisect_left(self._starts, start)
        self._starts[index:index] = [extent.offset for extent in extents]
        self._runs.update((one.offset, _Run(one.end, one.kind, number)) for one in extents)
        self._answers[number] = (start, end)
        self._keep_limit()

    def forget(self, start: int, end: int) -> None:
        """Nothing is known of the range any more."""
        first, last = self._index(start), bisect_left(self._starts, end)
        if first >= last:
            return
        self.changes += 1
        if last - first == len(self._starts) and start <= self._starts[0] and self._runs[self._starts[-1]].end <= end:
            self._starts.clear()  # a whole disk is trimmed
            self._runs.clear()
            self._answers.clear()
            return
        gone = self._starts[first:last]
        runs = [(at, self._runs.pop(at)) for at in gone]
        kept = []
        if gone[0] < start:
            kept.append((gone[0], runs[0][1]._replace(end=start)))
        if runs[-1][1].end > end:
            kept.append((end, runs[-1][1]))
        self._starts[first:last] = [at for at, _ in kept]
        self._runs.update(kept)
        self._keep_limit()

    def _keep_limit(self) -> None:
        self.changes += 1
        while len(self._starts) > self._limit or len(self._answers) > self._limit:
            number = next(iter(self._answers))
            start, end = self._answers.pop(number)
            first, last = bisect_left(self._starts, start), bisect_left(self._starts, end)
            kept = [at for at in self._starts[first:last] if self._runs[at].answer != number]
            for at in set(self._starts[first:last]).difference(kept):
                del self._runs[at]
            self._starts[first:last] = kept


def _cut(extents: Iterable[Extent], start: int, end: int) -> Iterator[Extent]:
    """*extents* without what lies in the range."""
    for extent in extents:
        if extent.offset < min(start, extent.end):
            yield Extent(extent.offset, min(start, extent.end) - extent.offset, extent.kind)
        if extent.end > max(end, extent.offset):
            first = max(end, extent.offset)
            yield Extent(first, extent.end - first, extent.kind)


__all__ = ["ExtentMap"]
