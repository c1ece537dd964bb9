"""Which blocks of a pool go when it is full. Pure: no I/O, no lock, plans only; one object for all images of a pool.

SIEVE is a FIFO queue and a hand that moves from its tail (oldest) to its head: a block that was touched since the hand
passed keeps its place and loses its mark, the first one that was not is evicted. The queue is kept as two FIFOs of keys,
`behind` and `ahead` of the hand: the hand takes from the front of `ahead`; survivors go to the end of `behind`, new blocks
to the end of `ahead`; when `ahead` is empty the hand wraps, and the two change places.

Under a block device plain SIEVE is not scan resistant. Three additions:

- *Touches by the run that brought a block in do not count.* A guest reads each 64 KiB block in several requests. A run is
  a stream of reads (`cachefs.pool.readahead`); each block keeps the RUN_BITS-bit number of the one that brought it in.
  Numbers wrap: one touch in RUN_IDS by a stranger is taken for the own run's and lost. 0 is nobody's.
- *The ring*, a FIFO that loses its blocks before the main queue does while it holds more than RING_SHARE of the
  capacity. Blocks of a sequential run beyond its first SCAN_BYTES (`sequential`) live there. A touch by another
  run moves a block to the main queue: when its turn to go comes, so that a touch stays one store.
- *Probation.* Once the pool is full all new blocks begin in the ring, unless they left it not long ago (`recent`, a bit per
  block in two generations of capacity / 2 blocks). Otherwise random reads, or the first 16 MiB of every scan, would push out
  a boot set that has been used only once. One newcomer in LUCKY is let in at once, so that a main queue that nobody reads
  any more gives way even to a set of blocks too large for `recent`; a random scan of ten times the capacity takes 4 % of it.

    state      in which FIFO   meaning
    ABSENT     none
    MAIN       behind, ahead   cached
    RING       ring            cached
    EVICTING   none            a victim: until `forget`, or `restore` when it stays after all
    LEFT_MAIN  behind, ahead   gone without being a victim; the entry waits for the hand, or for the block to come back
    LEFT_RING  ring            the same

Per block of an image: one 16-bit word in lazily allocated memory, bits 0-2 state, 3 visited, 4 prefetched (and not read
yet), 5-15 run; and two bits of `recent`. Per cached block: 8 bytes in a FIFO. Nothing here survives a restart; the blocks of a
reopened pool come back with `adopt`.

**The hit path** looks at one bit: `if not image.words[block] & VISITED` for a block, 50 ns, or `is_settled`, 0.2 us. A warm
block has it, and nothing else is to be done. Otherwise it asks `ReadAhead.read` for the run, 1 us, and calls `touch`,
0.4 us. To insert costs 1 us, to evict 1.5 us.

**Source:** SIEVE: Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024. Probation and `recent`: the small and the
ghost queue of S3-FIFO, Yang et al., SOSP 2023.
"""

from __future__ import annotations

import enum
import mmap
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import NoReturn

from bitarray import bitarray

RUN_BITS = 11
RUN_IDS = 1 << RUN_BITS  # 0 is nobody's
RING_SHARE = 20  # one part in this many
ROOM_SHARE = 8  # the pool is full when fewer than one part in this many is free
LUCKY = 256  # one newcomer in this many is spared probation
STEPS_PER_VICTIM = 16
STEPS_PER_CALL = 256

KEY_SHIFT = 40  # a key is image number << KEY_SHIFT | block
BLOCK_MASK = (1 << KEY_SHIFT) - 1
STATE_MASK = 0b111
VISITED = 1 << 3
PREFETCHED = 1 << 4
RUN_SHIFT = 5
CHUNK = 4096  # keys


class Where(enum.IntEnum):
    ABSENT = 0
    MAIN = 1
    RING = 2
    EVICTING = 3
    LEFT_MAIN = 4
    LEFT_RING = 5


# plain ints: an enum member costs a look-up wherever it is named
ABSENT, MAIN, RING, EVICTING, LEFT_MAIN, LEFT_RING = map(int, Where)


class Fifo:
    """A queue of keys, 8 bytes each."""

    def __init__(self) -> None:
        self._chunks: deque[array[int]] = deque()
        self._taken = 0  # of the first chunk
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        taken = self._taken
        for chunk in self._chunks:
            yield from chunk[taken:]
            taken = 0

    def push(self, key: int) -> None:
        if not self._chunks or len(self._chunks[-1]) >= CHUNK:
            self._chunks.append(array("Q"))
        self._chunks[-1].append(key)
        self._length += 1

    def extend(self, start: int, end: int) -> None:
        """Push the keys from *start* to before *end*."""
        self._length += end - start
        while start < end:
            if not self._chunks or len(self._chunks[-1]) >= CHUNK:
                self._chunks.append(array("Q"))
            until = min(end, start + CHUNK - len(self._chunks[-1]))
            self._chunks[-1].extend(range(start, until))
            start = until

    def pop(self) -> int:
        chunk = self._chunks[0]
        key = chunk[self._taken]
        self._taken += 1
        self._length -= 1
        if self._taken == len(chunk):
            self._chunks.popleft()
            self._taken = 0
        return key


class ImageBlocks:
    """The blocks of one image: what the hit path needs of the policy. Made by `add_image`.

    base: the key of block 0; the key of any block is `base | block`.
    used_blocks: prefetched ones that were read then; wasted_blocks: prefetched ones that went unread.
    on_used: called with block and run of each prefetched block when it is read first.
    """

    on_used: Callable[[int, int], None] | None = None

    def __init__(self, number: int, blocks: int) -> None:
        self.number = number
        self.base = number << KEY_SHIFT
        self.blocks = blocks
        self.words = memoryview(mmap.mmap(-1, max(1, 2 * blocks))).cast("H")  # zero, and no memory until it is touched
        self.recent = bitarray(blocks)
        self.recent_before = bitarray(blocks)
        self.cached = 0  # blocks in MAIN or RING
        self.used_blocks = 0
        self.wasted_blocks = 0

    def touch(self, start: int, end: int, run: int = 0) -> None:
        """A read of run *run* took the cached blocks from *start* to before *end*."""
        words = self.words
        for block in range(start, end):
            word = words[block]
            if word & VISITED:  # then it is not PREFETCHED either
                continue
            if word >> RUN_SHIFT != run or not run:
                word |= VISITED
            if word & PREFETCHED:
                word &= ~PREFETCHED
                self.used_blocks += 1
                if self.on_used is not None:
                    self.on_used(block, word >> RUN_SHIFT)
            words[block] = word

    def is_settled(self, start: int, end: int) -> bool:
        """Whether a touch of these blocks changes nothing: a second run has touched them all. The hit path asks this first."""
        words = self.words
        for block in range(start, end):  # noqa: SIM110 (all() of a generator takes twice as long)
            if not words[block] & VISITED:
                return False
        return True

    def expect(self, start: int, end: int) -> None:
        """Spare these blocks probation: somebody has said that they will be wanted."""
        self.recent[start:end] = True

    def next_generation(self) -> None:
        self.recent, self.recent_before = self.recent_before, self.recent
        self.recent.setall(0)


class Policy:
    """What the policies share; by itself `never`: nothing is evicted, the cache stops when it is full.

    Every cached block is told with `insert` and `forget`; `len` is their number. Misuse raises ValueError.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._images: dict[int, ImageBlocks] = {}
        self._next_number = 0
        self._cached = 0  # of all images

    def __len__(self) -> int:
        return self._cached

    def add_image(self, blocks: int) -> ImageBlocks:
        image = ImageBlocks(self._next_number, blocks)
        self._next_number += 1  # never used again: what queues still hold of a dropped image is nobody's
        self._images[image.number] = image
        return image

    def drop_image(self, image: ImageBlocks) -> None:
        """Forget all blocks of *image*, victims that are not gone yet as well."""
        del self._images[image.number]
        self._cached -= image.cached

    def insert(self, key: int, run: int = 0, *, sequential: bool = False, prefetched: bool = False) -> None:
        """The block is cached now, brought in by *run*. sequential: beyond the first SCAN_BYTES of a sequential run.

        prefetched: not asked for yet.
        """
        image, block = self._find(key)
        state = image.words[block] & STATE_MASK
        if state in (MAIN, RING, EVICTING):
            _misuse("insert", key, state)
        where = self._enter(image, key, state, sequential)
        image.words[block] = where | (PREFETCHED if prefetched else 0) | run << RUN_SHIFT
        self._count(image, 1)

    def adopt(self, image: ImageBlocks, start: int, end: int) -> None:
        """The blocks from *start* to before *end*, all ABSENT, are cached: what a reopened pool holds."""
        self._enter_all(image.base | start, image.base | end)
        image.words[start:end] = memoryview(array("H", [MAIN]) * (end - start))
        self._count(image, end - start)

    def forget(self, key: int) -> None:
        """The block is not cached any more: a victim that is gone, or one dropped for another reason."""
        image, block = self._find(key)
        word = image.words[block]
        state = word & STATE_MASK
        if state not in (MAIN, RING, EVICTING):
            _misuse("forget", key, state)
        if word & PREFETCHED:
            image.wasted_blocks += 1
        if state != EVICTING:
            self._count(image, -1)
        image.words[block] = self._leave(state)

    def restore(self, key: int) -> None:
        """The victim stays after all."""
        image, block = self._find(key)
        word = image.words[block]
        if word & STATE_MASK != EVICTING:
            _misuse("restore", key, word & STATE_MASK)
        image.words[block] = (word & ~STATE_MASK) | self._enter_again(key)
        self._count(image, 1)

    def victims(self, count: int, is_pinned: Callable[[int], bool]) -> list[int]:
        """Keys of at most *count* blocks that shall go. They do not count as cached any more, and are not named again.

        Fewer, perhaps none, when all are pinned or the work for one call is done. Each must be answered with `forget` or
        `restore`.
        """
        return []

    def is_cached(self, key: int) -> bool:
        image, block = self._find(key)
        return image.words[block] & STATE_MASK in (MAIN, RING)

    def check(self) -> None:
        """Assert the invariants; costs a look at every block."""
        for image in self._images.values():
            states = [word & STATE_MASK for word in image.words]
            assert image.cached == states.count(MAIN) + states.count(RING)
        assert self._cached == sum(image.cached for image in self._images.values())

    def _count(self, image: ImageBlocks, blocks: int) -> None:
        image.cached += blocks
        self._cached += blocks

    def _find(self, key: int) -> tuple[ImageBlocks, int]:
        return self._images[key >> KEY_SHIFT], key & BLOCK_MASK

    # what a policy with queues does differently

    def _enter(self, image: ImageBlocks, key: int, state: int, sequential: bool) -> int:
        return MAIN

    def _enter_all(self, start: int, end: int) -> None:
        pass

    def _enter_again(self, key: int) -> int:
        return MAIN

    def _leave(self, state: int) -> int:
        return ABSENT


class Never(Policy):
    """`evict: never`."""

    def give_up(self, key: int) -> None:
        """The block shall go all the same, for the quota is smaller now; to be answered as a victim is."""
        image, block = self._find(key)
        if image.words[block] & STATE_MASK != MAIN:
            _misuse("give_up", key, image.words[block] & STATE_MASK)
        image.words[block] = (image.words[block] & ~STATE_MASK) | EVICTING
        self._count(image, -1)


class Sieve(Policy):
    """`evict: sieve`; *capacity* in blocks. It is a measure for ring and probation, not a limit: the pool keeps the quota."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._behind = Fifo()
        self._ahead = Fifo()
        self._ring = Fifo()
        self._noted = 0  # in this generation
        self._newcomers = 0

    @property
    def ring_blocks(self) -> int:
        return len(self._ring)

    def victims(self, count: int, is_pinned: Callable[[int], bool]) -> list[int]:
        found: list[int] = []
        kept = 0  # steps in a row that left their queue as long as it was
        for _ in range(STEPS_PER_CALL + STEPS_PER_VICTIM * count):
            if len(found) == count:
                break
            main, ring = len(self._ahead) + len(self._behind), len(self._ring)
            from_ring = ring * RING_SHARE > self.capacity
            if kept > 2 * (ring if from_ring else main):  # all pinned there, or it is empty
                from_ring = not from_ring
            if not (ring if from_ring else main):
                from_ring = not from_ring
            if not (ring if from_ring else main):
                break
            key = self._step_ring(is_pinned) if from_ring else self._step_main(is_pinned)
            if key >= 0:
                found.append(key)
            is_shorter = len(self._ring) < ring if from_ring else len(self._ahead) + len(self._behind) < main
            kept = 0 if is_shorter else kept + 1
        return found

    def _step_main(self, is_pinned: Callable[[int], bool]) -> int:
        """The hand looks at one block: its key when it is a victim, else -1."""
        if not self._ahead:
            self._ahead, self._behind = self._behind, self._ahead
        key = self._ahead.pop()
        image = self._images.get(key >> KEY_SHIFT)
        if image is None:
            return -1
        words, block = image.words, key & BLOCK_MASK
        word = words[block]
        if word & STATE_MASK == LEFT_MAIN:
            words[block] = ABSENT
            return -1
        if is_pinned(key):
            self._behind.push(key)
            return -1
        if word & VISITED:
            words[block] = word & ~VISITED
            self._behind.push(key)
            return -1
        words[block] = (word & ~STATE_MASK) | EVICTING
        self._count(image, -1)
        return key

    def _step_ring(self, is_pinned: Callable[[int], bool]) -> int:
        """The oldest block of the ring leaves it: its key when it is a victim, else -1."""
        key = self._ring.pop()
        image = self._images.get(key >> KEY_SHIFT)
        if image is None:
            return -1
        words, block = image.words, key & BLOCK_MASK
        word = words[block]
        if word & STATE_MASK == LEFT_RING:
            words[block] = ABSENT
            return -1
        if word & VISITED:
            words[block] = (word & ~(STATE_MASK | VISITED)) | MAIN
            self._ahead.push(key)
            return -1
        if is_pinned(key):
            self._ring.push(key)
            return -1
        self._note(image, block)
        words[block] = (word & ~STATE_MASK) | EVICTING
        self._count(image, -1)
        return key

    def _note(self, image: ImageBlocks, block: int) -> None:
        """The block leaves from the ring. Those of the main queue are not noted: taken back, each would push out the next."""
        if self._noted * 2 >= self.capacity:
            self._noted = 0
            for other in self._images.values():
                other.next_generation()
        self._noted += 1
        image.recent[block] = True

    def _enter(self, image: ImageBlocks, key: int, state: int, sequential: bool) -> int:
        # One that had left comes back to its own place: it was damaged, or dropped after a failed sync, not unwanted.
        if state == LEFT_MAIN:
            return MAIN
        if state == LEFT_RING:
            return RING
        block = key & BLOCK_MASK
        if sequential or self._is_on_probation(image, block):
            self._ring.push(key)
            return RING
        self._ahead.push(key)
        return MAIN

    def _is_on_probation(self, image: ImageBlocks, block: int) -> bool:
        if (
            (self.capacity - self._cached) * ROOM_SHARE > self.capacity
            or image.recent[block]
            or image.recent_before[block]
        ):
            return False
        self._newcomers += 1
        return self._newcomers % LUCKY != 0

    def _enter_all(self, start: int, end: int) -> None:
        self._ahead.extend(start, end)

    def _enter_again(self, key: int) -> int:
        self._behind.push(key)
        return MAIN

    def _leave(self, state: int) -> int:
        if state == MAIN:
            return LEFT_MAIN
        if state == RING:
            return LEFT_RING
        return ABSENT

    def check(self) -> None:
        super().check()
        queued: set[int] = set()
        for fifo, states in (
            (self._behind, (MAIN, LEFT_MAIN)),
            (self._ahead, (MAIN, LEFT_MAIN)),
            (self._ring, (RING, LEFT_RING)),
        ):
            keys = list(fifo)
            assert len(keys) == len(fifo)
            for key in keys:
                if key >> KEY_SHIFT in self._images:
                    image, block = self._find(key)
                    assert key not in queued
                    assert image.words[block] & STATE_MASK in states
                    queued.add(key)
        for image in self._images.values():
            for block, word in enumerate(image.words):
                where = word & STATE_MASK
                assert (image.base | block in queued) == (where not in (ABSENT, EVICTING))


def _misuse(what: str, key: int, state: int) -> NoReturn:
    raise ValueError(f"{what} of block {key & BLOCK_MASK} of image {key >> KEY_SHIFT}, which is {Where(state).name}")


__all__ = ["RUN_IDS", "ImageBlocks", "Never", "Policy", "Sieve"]
