"""The changes that a server may lose: every write, trim and zero that no flush has vouched for yet, with its data.

They lie in survivor memory, so that they can be sent again after the server's death, and after our own. Valid at every
instant: data first, then the fields of its slot, then the slot's state, one byte (docs/formats/survivor.md).

    FREE -> SENT -> ANSWERED -> FREE when a flush has made it durable
             |       '--> SENT_AGAIN -> ANSWERED
             '--> FREE when the server refused it, or when nobody wants it any more

Beside them stands whether a flush is under way: one that nobody hears of may fail, and drop what a successor has sent again.

Data is laid out in a ring, in the order of sending. Pure bookkeeping: no I/O, no clock, one event loop.
"""

from __future__ import annotations

import bisect
import enum
import struct
from collections import deque
from collections.abc import Iterable, Iterator

from cachefs.errors import FormatError

_SLOT = struct.Struct(
    "<BBB5xQQQQ"
)  # state, kind, flush (of the first one), sequence, offset, length, position of the data
_FLUSH = 2  # where that stands
_FREE, _SENT, _ANSWERED, _SENT_AGAIN = 0, 1, 2, 3
_BYTES_PER_SLOT = 4096  # of data: guests write little less at once


class Kind(enum.IntEnum):
    WRITE = 1
    TRIM = 2
    ZERO = 3


class Change:
    """One that may be lost. data: of a write, in the memory. order: place among the answered ones, -1 before.

    was_under_way: a copy of it was, when the memory was taken over.
    """

    __slots__ = ("data", "is_dropped", "kind", "length", "offset", "order", "position", "slot", "was_under_way")

    def __init__(self, kind: Kind, offset: int, length: int, data: memoryview | None, position: int, slot: int) -> None:
        self.kind = kind
        self.offset = offset
        self.length = length
        self.data = data
        self.position = position
        self.slot = slot
        self.order = -1
        self.is_dropped = False
        self.was_under_way = False

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def is_answered(self) -> bool:
        return self.order >= 0


def body_size(data_bytes: int) -> int:
    """Bytes of memory for *data_bytes* of unflushed data, a multiple of 4096."""
    return _slots(data_bytes) * _SLOT.size + data_bytes


def data_size(body_bytes: int) -> int:
    """How many bytes of data a memory of *body_bytes* was made for, if it was at least 4 MiB."""
    return body_bytes * _BYTES_PER_SLOT // (_BYTES_PER_SLOT + _SLOT.size)


def _slots(data_bytes: int) -> int:
    return max(1024, data_bytes // _BYTES_PER_SLOT)


class Unflushed:
    """Over the *body* of a survivor memory of `body_size(data_bytes)` bytes; what is in it already is taken over.

    Raises: FormatError when it holds what cannot be.
    """

    def __init__(self, body: memoryview, data_bytes: int) -> None:
        slots = _slots(data_bytes)
        self._slots = body[: slots * _SLOT.size]
        self._data = body[slots * _SLOT.size :]
        self._capacity = data_bytes
        self._changes: deque[Change] = deque()  # as sent; dropped ones until they are the oldest
        self._free: list[int] = []
        self._sequence = 0
        self._head = 0  # where the next data goes
        self.answered = 0
        """How many were answered so far."""
        self.used_bytes = 0
        self._load(slots)

    def _load(self, slots: int) -> None:
        found: list[tuple[int, int, Change]] = []
        for slot in range(slots):
            state, kind, _, sequence, offset, length, position = _SLOT.unpack_from(self._slots, slot * _SLOT.size)
            if state == _FREE:
                self._free.append(slot)
                continue
            size = length if kind == Kind.WRITE else 0
            if state > _SENT_AGAIN or kind not in tuple(Kind) or position + size > self._capacity:
                raise FormatError("nbd", f"slot {slot} of the memory of unflushed changes holds what cannot be")
            data = self._data[position : position + size] if size else None
            change = Change(Kind(kind), offset, length, data, position, slot)
            change.was_under_way = state in (_SENT, _SENT_AGAIN)
            found.append((sequence, state, change))
        for sequence, state, change in sorted(found, key=lambda one: one[0]):
            self._changes.append(change)
            self._sequence = sequence
            self._head = change.position + len(change.data or b"")
            self.used_bytes += len(change.data or b"")
            if state != _SENT:
                self._count_answer(change)

    @property
    def may_flush(self) -> bool:
        """Whether a flush was sent that may fail yet, for all that is known."""
        return bool(self._slots[_FLUSH])

    @may_flush.setter
    def may_flush(self, may: bool) -> None:
        self._slots[_FLUSH] = may

    def __iter__(self) -> Iterator[Change]:
        """The oldest first."""
        return (change for change in self._changes if not change.is_dropped)

    def __len__(self) -> int:
        return len(self._slots) // _SLOT.size - len(self._free)

    def put(self, kind: Kind, offset: int, length: int, data: memoryview | None) -> Change | None:
        """One is about to be sent. None: there is no room."""
        size = len(data) if data is not None else 0
        position = self._place(size)
        if position < 0 or not self._free:
            return None
        kept = self._data[position : position + size] if data is not None else None
        if kept is not None and data is not None:
            kept[:] = data
        slot = self._free.pop()
        change = Change(kind, offset, length, kept, position, slot)
        self._sequence += 1
        at = slot * _SLOT.size
        _SLOT.pack_into(
            self._slots, at, _FREE, kind, self._slots[at + _FLUSH], self._sequence, offset, length, position
        )
        self._slots[at] = _SENT
        self._changes.append(change)
        self._head = position + size
        self.used_bytes += size
        return change

    def answer(self, change: Change) -> None:
        """The server has done it, and may lose it."""
        self._slots[change.slot * _SLOT.size] = _ANSWERED
        if not change.is_answered:
            self._count_answer(change)

    def send_again(self, change: Change) -> None:
        """A further copy of it is about to be sent."""
        if change.is_answered:
            self._slots[change.slot * _SLOT.size] = _SENT_AGAIN

    def _count_answer(self, change: Change) -> None:
        self.answered += 1
        change.order = self.answered

    def drop(self, change: Change) -> None:
        """It is durable, or was never done as far as anybody has heard."""
        if change.is_dropped:
            return
        change.is_dropped = True
        self._slots[change.slot * _SLOT.size] = _FREE
        self._free.append(change.slot)
        self.used_bytes -= len(change.data or b"")
        change.data = None
        while self._changes and self._changes[0].is_dropped:
            self._changes.popleft()
        if not self._changes:
            self._head = 0  # so that memory that a burst touched is not touched in turns for ever

    def drop_flushed(self, answered: int) -> None:
        """A flush succeeded that began when *answered* had been answered."""
        for change in [change for change in self if 0 <= change.order <= answered]:
            self.drop(change)

    def _place(self, size: int) -> int:
        """Where *size* bytes fit; -1: nowhere."""
        if not self._changes:
            return 0 if size <= self._capacity else -1
        tail = self._changes[0].position
        if self._head < tail:
            return self._head if self._head + size < tail else -1
        if self._head + size <= self._capacity:
            return self._head
        return 0 if size < tail else -1


class Ranges:
    """Byte ranges, merged: do any of them overlap another one?"""

    def __init__(self, changes: Iterable[Change]) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted((change.offset, change.end) for change in changes):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._starts.append(start)
                self._ends.append(end)

    def overlap(self, offset: int, length: int) -> bool:
        index = bisect.bisect_right(self._ends, offset)  # the first that ends beyond offset
        return index < len(self._starts) and self._starts[index] < offset + length


def next_wave(changes: list[Change]) -> list[Change]:
    """The longest beginning of *changes* of which no two overlap: they may be sent in any order."""
    wave: list[Change] = []
    for change in changes:
        if any(change.offset < other.end and other.offset < change.end for other in wave):
            break
        wave.append(change)
    return wave


def without_superseded(changes: list[Change]) -> list[Change]:
    """Without those whose bytes a later answered one of the same range has replaced. In the order of *changes*."""
    kept: list[Change] = []
    later: set[tuple[int, int]] = set()
    for change in reversed(changes):
        where = (change.offset, change.length)
        if not (change.is_answered and where in later):
            kept.append(change)
        if change.is_answered:
            later.add(where)
    return kept[::-1]
