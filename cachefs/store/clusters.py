"""Clusters of a disk that are gathered before they are written: the buffers of `coalesce` and which of their bytes count.

A *slot* holds bytes of one cluster, and a bit for each of them that was written. A cluster has at most two slots:

    OPEN      takes writes
    FROZEN    is being written out, or its range trimmed, and does not change but by whoever froze it; older than the open one

    put -> OPEN -> freeze -> FROZEN -> complete -> free     every byte of it is below now
                                '----> thaw -----> OPEN     it is not: with the bytes of a newer slot laid over it

All of it lies in survivor memory (docs/formats/survivor.md), because a buffered write has been acknowledged. Valid at every
instant: slot, then bytes, then bits; of a slot that is freed the bits are cleared first, and nobody needs them any more. Who
takes the memory over lays the slots of a cluster over each other in the order of their sequence.

Pure bookkeeping: no I/O, no clock, one event loop.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from bitarray import bitarray

from cachefs.errors import FormatError
from cachefs.units import align_down, align_up, is_power_of_two

_HEAD = struct.Struct("<QQ")  # bytes per cluster, slots
_SLOT = struct.Struct("<B7xQQ8x")  # state, sequence, cluster
_FREE, _USED = 0, 1
_PAGE = 4096

Range = tuple[int, int]
"""Half-open, in bytes."""


class Slot:
    """data, bits: of the whole cluster. length: bytes of the cluster that the disk has. filled: how many of them count, all of
    them from *low* to before *high*.
    """

    __slots__ = ("bits", "cluster", "data", "filled", "high", "length", "low", "number", "sequence")

    def __init__(self, number: int, cluster: int, sequence: int, data: memoryview, bits: bitarray, length: int) -> None:
        self.number = number
        self.cluster = cluster
        self.sequence = sequence
        self.data = data
        self.bits = bits
        self.length = length
        self.filled = 0
        self.low, self.high = length, 0

    @property
    def is_full(self) -> bool:
        return self.filled == self.length

    def put(self, start: int, data: memoryview | bytes) -> None:
        """*data* at byte *start* of the cluster: bytes, then bits."""
        end = start + len(data)
        self.low, self.high = min(self.low, start), max(self.high, end)
        self.data[start:end] = data
        self.filled += end - start - self.bits.count(1, start, end)
        self.bits[start:end] = True

    def zero(self, start: int, end: int) -> None:
        """Those bytes of the range that count become zeros."""
        for first, last in runs(self.bits, start, end):
            self.data[first:last] = bytes(last - first)

    def drop(self, start: int, end: int) -> None:
        """No byte of the range counts any more: what is below does."""
        self.filled -= self.bits.count(1, start, end)
        self.bits[start:end] = False

    def units(self, unit: int) -> list[Range]:
        """What is to be written: the bytes that count, completed to whole units (the disk's last one may be shorter)."""
        found: list[Range] = []
        for first, last in runs(self.bits, self.low, self.high):
            start, end = align_down(first, unit), min(align_up(last, unit), self.length)
            if found and start <= found[-1][1]:
                found[-1] = found[-1][0], end
            else:
                found.append((start, end))
        return found

    def gaps(self, start: int, end: int) -> list[Range]:
        """The bytes of the range that do not count."""
        return list(runs(self.bits, start, end, 0))


def runs(bits: bitarray, start: int, end: int, value: int = 1) -> Iterator[Range]:
    """The runs of *value* from *start* to before *end*, in order."""
    while (first := bits.find(value, start, end)) >= 0:
        start = bits.find(1 - value, first, end)
        if start < 0:
            start = end
        yield first, start


def body_size(cluster: int, slots: int) -> int:
    """Bytes of memory for so many slots of clusters of so many bytes."""
    return _data_at(cluster, slots) + slots * cluster


def _bits_at(slots: int) -> int:
    return _PAGE + align_up(slots * _SLOT.size, _PAGE)


def _data_at(cluster: int, slots: int) -> int:
    return _bits_at(slots) + slots * (cluster // 8)


def slots_within(buffer: int, cluster: int) -> int:
    """How many slots *buffer* bytes are, bits included."""
    return buffer // (cluster + cluster // 8)


class Clusters:
    """Over the *body* of a survivor memory: one of zeros, of `body_size(cluster, slots)` bytes, or one that is taken over,
    with the slots that it was made with. size: of the disk, in bytes.

    Raises: FormatError when it holds what cannot be.
    """

    def __init__(self, body: memoryview, size: int, cluster: int, slots: int) -> None:
        if not any(body[: _HEAD.size]):
            _HEAD.pack_into(body, 0, cluster, slots)
        self.cluster_size, self.slots = _HEAD.unpack_from(body)
        is_size = is_power_of_two(self.cluster_size) and self.cluster_size >= _PAGE
        if not is_size or body_size(self.cluster_size, self.slots) > len(body):
            raise FormatError("coalesce", f"memory for {self.slots} clusters of {self.cluster_size} bytes cannot be")
        self._body = body
        self._size = size
        self._shift = self.cluster_size.bit_length() - 1
        self._sequence = 0
        self.open: dict[int, Slot] = {}
        """By cluster, the one that was written longest ago first."""
        self.frozen: dict[int, Slot] = {}
        self._last: Slot | None = None  # of the open ones
        self._free: list[int] = []
        self._load()

    def _load(self) -> None:
        used = []
        for number in range(self.slots):
            state, sequence, cluster = _SLOT.unpack_from(self._body, _PAGE + number * _SLOT.size)
            if state == _FREE:
                self._free.append(number)
                continue
            if state != _USED or cluster << self._shift >= self._size:
                raise FormatError("coalesce", f"slot {number} of the memory of gathered writes holds what cannot be")
            used.append(self._slot(number, cluster, sequence))
        for slot in sorted(used, key=lambda one: one.sequence):
            self._sequence = slot.sequence
            slot.filled = slot.bits.count(1, 0, slot.length)
            slot.low, slot.high = 0, slot.length
            self.frozen[slot.cluster] = self.open.pop(slot.cluster, slot)
            if self.frozen[slot.cluster] is not slot:
                self.open[slot.cluster] = slot
            self.thaw(self.frozen[slot.cluster])
        self._free.reverse()  # the first is used first

    def _slot(self, number: int, cluster: int, sequence: int) -> Slot:
        size = self.cluster_size
        data_at = _data_at(size, self.slots) + number * size
        bits_at = _bits_at(self.slots) + number * (size // 8)
        bits = bitarray(buffer=self._body[bits_at : bits_at + size // 8], endian="little")
        length = min(size, self._size - (cluster << self._shift))
        return Slot(number, cluster, sequence, self._body[data_at : data_at + size], bits, length)

    # ---- looking

    @property
    def free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    @property
    def buffered_bytes(self) -> int:
        return sum(slot.filled for slots in (self.open, self.frozen) for slot in slots.values())

    def span(self, offset: int, length: int) -> range:
        """The clusters that the range touches."""
        return range(offset >> self._shift, (offset + length - 1 >> self._shift) + 1)

    def within(self, cluster: int, offset: int, end: int) -> Range:
        """The part of *offset* to *end* that lies in *cluster*, in bytes of the cluster."""
        base = cluster << self._shift
        return max(0, offset - base), min(self.cluster_size, end - base)

    def holds(self, offset: int, length: int) -> bool:
        """Whether the range touches a cluster of which there are bytes here."""
        if not self.open and not self.frozen:
            return False
        return any(cluster in self.open or cluster in self.frozen for cluster in self.span(offset, length))

    def lacks(self, offset: int, length: int) -> int:
        """How many slots a write of the range would take."""
        is_open = self.open
        first, last = offset >> self._shift, offset + length - 1 >> self._shift
        if first == last:
            return first not in is_open
        return sum(cluster not in is_open for cluster in range(first, last + 1))

    def overlay(self, offset: int, buffer: memoryview) -> list[Range]:
        """Lay what is here over *buffer*, which is the disk from *offset* on. The ranges of the disk that are not here."""
        gaps: list[Range] = []
        end = offset + len(buffer)
        for cluster in self.span(offset, len(buffer)):
            base = cluster << self._shift
            start, stop = self.within(cluster, offset, end)
            for first, last in self._lay(cluster, start, buffer[base + start - offset : base + stop - offset]):
                if gaps and gaps[-1][1] == base + first:
                    gaps[-1] = gaps[-1][0], base + last
                else:
                    gaps.append((base + first, base + last))
        return gaps

    def _lay(self, cluster: int, start: int, part: memoryview) -> Iterator[Range]:
        """`overlay` within a cluster, in bytes of it."""
        end = start + len(part)
        older, newer = self.frozen.get(cluster), self.open.get(cluster)
        for slot in (older, newer):
            if slot is not None:
                for first, last in runs(slot.bits, start, end):
                    part[first - start : last - start] = slot.data[first:last]
        if older is not None and newer is not None:
            both = older.bits[start:end] | newer.bits[start:end]
            return ((start + first, start + last) for first, last in runs(both, 0, end - start, 0))
        one = older or newer
        return iter([(start, end)]) if one is None else runs(one.bits, start, end, 0)

    # ---- changing

    def try_put(self, offset: int, data: memoryview) -> Slot | None:
        """Take *data* in if it lies in one cluster that is open: its slot. The shortest way, for streams."""
        cluster = offset >> self._shift
        slot = self.open.get(cluster)
        start = offset & self.cluster_size - 1
        if slot is None or start + len(data) > self.cluster_size:
            return None
        if slot is not self._last:
            self.open[cluster] = self._last = self.open.pop(cluster)
        slot.put(start, data)
        return slot

    def put(self, offset: int, data: memoryview | bytes) -> tuple[list[int], list[int]]:
        """Take *data* in; there must be room for it. The clusters that were begun by it, and those that are full now and
        were not before.
        """
        begun, finished = [], []
        end = offset + len(data)
        for cluster in self.span(offset, len(data)):
            base = cluster << self._shift
            start, stop = max(offset, base), min(end, base + self.cluster_size)
            slot = self.open.pop(cluster, None)
            if slot is None:
                slot = self._take(cluster)
                begun.append(cluster)
            self.open[cluster] = self._last = slot
            was_full = slot.filled == slot.length
            slot.put(start - base, data[start - offset : stop - offset])
            if not was_full and slot.filled == slot.length:
                finished.append(cluster)
        return begun, finished

    def _take(self, cluster: int) -> Slot:
        number = self._free.pop()
        self._sequence += 1
        slot = self._slot(number, cluster, self._sequence)
        at = _PAGE + number * _SLOT.size
        _SLOT.pack_into(self._body, at, _FREE, self._sequence, cluster)
        self._body[at] = _USED
        return slot

    def _give_back(self, slot: Slot) -> None:
        """Every byte of *slot* is somewhere else."""
        slot.bits[slot.low : slot.high] = False
        self._body[_PAGE + slot.number * _SLOT.size] = _FREE
        self._free.append(slot.number)

    def freeze(self, cluster: int) -> Slot | None:
        """The open slot of *cluster*, which has no frozen one: later writes go to another."""
        slot = self.open.pop(cluster, None)
        if slot is not None:
            self.frozen[cluster] = slot
        return slot

    def complete(self, slot: Slot) -> None:
        """What the frozen *slot* holds is below."""
        del self.frozen[slot.cluster]
        self._give_back(slot)

    def thaw(self, slot: Slot) -> None:
        """The frozen *slot* goes on, with what was written since laid over it; it is freed when it holds nothing."""
        del self.frozen[slot.cluster]
        newer = self.open.pop(slot.cluster, None)
        if not slot.filled:
            self._give_back(slot)
            if newer is not None:
                self.open[slot.cluster] = newer
            return
        if newer is not None:
            for first, last in runs(newer.bits, newer.low, newer.high):
                slot.put(first, newer.data[first:last])
            self._give_back(newer)
        self.open[slot.cluster] = self._last = slot
