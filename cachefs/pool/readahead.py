"""How far to fetch beyond what was asked for: streams of reads of one image, and what paid so far. Pure.

A *stream* is reads each of which is in the MiB of the one before or in a neighbouring one: a guest that boots jumps about in
small steps, and the requests of a sequential reader overtake each other. Each has a number, the *run* of its reads
(`cachefs.pool.evict`). STREAMS of them are kept, the one that was idle longest goes first.

*Window.* One block for a new stream; doubled, up to MAX_WINDOW, by each miss that goes on where the stream is, and when the
reader has come to the second half of what was fetched for it, which is then fetched on; halved by a miss after a jump.

*What pays* is learnt per size of request: a guest's kernel that reads 16 or 128 KiB is reading ahead itself and goes on in
four of five cases, one that reads 4 or 32 KiB in one of three. For each power of two the share of windows whose first block
has been read is kept, over the last LATELY windows. Below PAYS (some are read only later) there is no read-ahead but for one
try in PROBE_EVERY. TRIALS first blocks are waited for.

*The bound.* `unproven` is what was fetched ahead and has not been read, evicted or not. It is never more than SLACK and
one part in SHARE of all that was fetched, whatever the guests do, and beside that one part in STREAM_SHARE of the length of
each stream that reads without gaps, so that old failures do not hold up a reader that proves itself: 13 % in all.

**Who calls what.** `read`, for every miss, and for a hit on blocks that are not settled (`ImageBlocks.is_settled`): not
touched yet by a second run. `fetched` with what was then fetched; `used` is the `on_used` of the image's `ImageBlocks`.
A warm hit calls nothing here. `read` costs 1 us, and 2.4 us where it begins a stream.

**Source:** the marked page of Linux' mm/readahead.c (a hit on a block not read before moves the window on), the probes of
`cachefs.fuse.polling`; figures: docs/layers/cache.md.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from cachefs.pool.evict import RUN_IDS

KIB, MIB = 1 << 10, 1 << 20
MAX_WINDOW = 4 * MIB
STREAMS = 64
SCAN_BYTES = 16 * MIB
REGION_SHIFT = 20
SHARE = 10
STREAM_SHARE = 32
SLACK = 1 * MIB
PAYS = 0.4
PROBE_EVERY = 16
LATELY = 64  # windows
TRIALS = 512  # first blocks that are waited for
SIZES = 18  # classes of requests: up to 1 byte, 2, 4, ... 128 KiB and more


class Plan(NamedTuple):
    """run: of this read. sequential: its stream is longer than `scan_bytes`. ahead: bytes to fetch behind the request."""

    run: int
    sequential: bool
    ahead: int


class Stream:
    """position: behind its last read. frontier: behind what was fetched for it. ground: bytes that it read, less the gaps,
    since its last jump."""

    __slots__ = ("frontier", "ground", "position", "run", "window")

    def __init__(self, run: int) -> None:
        self.run = run
        self.position = -1
        self.frontier = 0
        self.ground = 0
        self.window = 0


class ReadAhead:
    """For one image of *size* bytes, cached in blocks of *block_size*."""

    def __init__(
        self, size: int, block_size: int = 64 * KIB, scan_bytes: int = SCAN_BYTES, max_window: int = MAX_WINDOW
    ) -> None:
        self.size = size
        self.block_size = block_size
        self.scan_bytes = scan_bytes
        self.max_window = max(block_size, max_window)
        self.fetched_bytes = 0
        self.ahead_bytes = 0  # of them ahead
        self.used_bytes = 0  # of those read then
        self._streams: dict[int, Stream] = {}  # by the region in which they are; the one idle longest is the first
        self._last_run = 0
        self._judged: dict[int, int] = {}  # the first block of each window that is still on trial: size of its request
        # per size of request
        self._tried = array("d", [3.0]) * SIZES
        self._paid = array("d", [2.5]) * SIZES
        self._refused = array("I", [0]) * SIZES

    @property
    def unproven(self) -> int:
        return self.ahead_bytes - self.used_bytes

    @property
    def streams(self) -> int:
        return len(self._streams)

    def read(self, offset: int, length: int, *, missed: bool) -> Plan:
        """A read of the range, which is inside the image; *missed*: not all of it is cached or on its way."""
        end = offset + length
        region = offset >> REGION_SHIFT
        streams = self._streams
        stream = streams.pop(region, None) or streams.pop(region - 1, None) or streams.pop(region + 1, None)
        if stream is None:
            stream = self._new_stream()
        follows = stream.position <= offset <= max(stream.position, stream.frontier) + self.block_size
        if stream.position < 0:
            follows = False
            stream.ground = length
        elif follows:
            gap = max(0, offset - stream.position)
            stream.ground = max(length, stream.ground + length - gap)
        elif end > stream.position:
            stream.ground = length
        ahead = 0
        if missed or (follows and 2 * (stream.frontier - end) <= stream.window > 4 * self.block_size):
            if follows:
                stream.window = min(self.max_window, max(self.block_size, 2 * stream.window))
            else:
                stream.window = max(self.block_size, stream.window // 2)
            ahead = self._ahead(stream, end, length, missed)
        stream.position = end
        if not follows or missed:
            stream.frontier = end + ahead
        else:
            stream.frontier = max(stream.frontier, end + ahead)
        streams[end >> REGION_SHIFT] = stream
        return Plan(stream.run, stream.ground > self.scan_bytes, ahead)

    def fetched(self, run: int, asked: int, ahead: int) -> None:
        """Bytes that were fetched for a read of *run*: what it asked for, and ahead of it."""
        self.fetched_bytes += asked + ahead
        self.ahead_bytes += ahead

    def lost(self, count: int) -> None:
        """*count* bytes that were fetched ahead were not kept, through no fault of the plan."""
        self.ahead_bytes -= count

    def used(self, block: int, run: int) -> None:
        """*block*, fetched ahead for *run*, is read for the first time."""
        self.used_bytes += self.block_size
        size = self._judged.pop(block, None)
        if size is not None:
            self._paid[size] += 1

    def _new_stream(self) -> Stream:
        if len(self._streams) >= STREAMS:
            del self._streams[next(iter(self._streams))]
        self._last_run = self._last_run % (RUN_IDS - 1) + 1  # never 0
        return Stream(self._last_run)

    def _ahead(self, stream: Stream, end: int, length: int, missed: bool) -> int:
        """Bytes to fetch behind *end*, up to a block's end or the image's."""
        size = min(SIZES - 1, (length - 1).bit_length())
        window = stream.window
        if self._paid[size] < PAYS * self._tried[size]:
            self._refused[size] += 1
            stream.window = self.block_size
            if self._refused[size] % PROBE_EVERY:
                return 0
            window = self.block_size
        room = max(SLACK + self.fetched_bytes // SHARE - self.unproven, stream.ground // STREAM_SHARE)
        if not missed:
            room += stream.frontier - end  # of the window, that much is there
        first = -(-end // self.block_size)
        blocks = min(window, room) // self.block_size
        stream.window = max(1, blocks) * self.block_size
        until = min(self.size, (first + blocks) * self.block_size)
        if until <= max(end, first * self.block_size) or (not missed and until <= stream.frontier):
            return 0
        if stream.frontier <= first * self.block_size or stream.frontier > until:  # a new window, not one that moves on
            self._tried[size] += 1
            self._judged[first] = size
            if len(self._judged) > TRIALS:
                del self._judged[next(iter(self._judged))]
            if self._tried[size] > LATELY:
                self._tried[size] /= 2
                self._paid[size] /= 2
        return until - end


__all__ = ["Plan", "ReadAhead"]
