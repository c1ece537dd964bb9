#!/usr/bin/env python3
"""Plays the trace of a guest boot (bench/traces) through eviction and read-ahead policies, and counts.

    bench/replay.py [--markdown] [TRACE]

No I/O and no time: reads come in the order of the trace. Two guests are the same trace twice, the second some reads behind.
What cachefs runs is `cachefs.pool`; LRU, FIFO and SIEVE as published are here, for comparison.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from cachefs.pool.evict import RING_SHARE, Fifo, Sieve
from cachefs.pool.readahead import Plan, ReadAhead

BLOCK = 64 << 10
MIB = 1 << 20
TRACE = Path(__file__).with_name("traces") / "debian-boot.csv.gz"


class Read(NamedTuple):
    offset: int
    length: int

    @property
    def blocks(self) -> range:
        return range(self.offset // BLOCK, -(-(self.offset + self.length) // BLOCK))


@dataclass(frozen=True)
class Trace:
    size: int
    reads: list[Read]

    @classmethod
    def load(cls, path: Path) -> Trace:
        with gzip.open(path, "rt") as lines:
            size = int(next(lines).split("size=")[1].split()[0])
            fields = (line.split(",") for line in lines)
            return cls(size, [Read(int(offset), int(length)) for _, offset, length, _ in fields])

    def distinct(self) -> int:
        return len({block for read in self.reads for block in read.blocks})


# ------------------------------------------------------------------------------------------------------ the policies


class Cached(Protocol):
    """What evicts: a set of keys of at most *capacity*."""

    def has(self, key: int) -> bool: ...
    def add(self, key: int, plan: Plan, prefetched: bool) -> None: ...
    def touch(self, key: int, run: int) -> None: ...


class Lru:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.keys: OrderedDict[int, bool] = OrderedDict()

    def has(self, key: int) -> bool:
        return key in self.keys

    def add(self, key: int, plan: Plan, prefetched: bool) -> None:
        while len(self.keys) >= self.capacity:
            self.evict()
        self.keys[key] = False

    def evict(self) -> None:
        self.keys.popitem(last=False)

    def touch(self, key: int, run: int) -> None:
        self.keys.move_to_end(key)


class FirstIn(Lru):
    def touch(self, key: int, run: int) -> None:
        pass


class PublishedSieve(Lru):
    """As in the paper: every touch counts; the value of a key is its visited bit."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.ahead, self.behind = Fifo(), Fifo()

    def add(self, key: int, plan: Plan, prefetched: bool) -> None:
        super().add(key, plan, prefetched)
        self.ahead.push(key)

    def evict(self) -> None:
        while True:
            if not self.ahead:
                self.ahead, self.behind = self.behind, self.ahead
            key = self.ahead.pop()
            if not self.keys[key]:
                del self.keys[key]
                return
            self.keys[key] = False
            self.behind.push(key)

    def touch(self, key: int, run: int) -> None:
        self.keys[key] = True


class TwoAdditions(PublishedSieve):
    """SIEVE, own touches not counted, sequential blocks in a ring; no probation."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.runs: dict[int, int] = {}
        self.ring = Fifo()

    def add(self, key: int, plan: Plan, prefetched: bool) -> None:
        Lru.add(self, key, plan, prefetched)
        (self.ring if plan.sequential else self.ahead).push(key)
        self.runs[key] = plan.run

    def evict(self) -> None:
        while len(self.ring) * RING_SHARE > self.capacity or not (self.ahead or self.behind):
            key = self.ring.pop()
            if not self.keys[key]:
                del self.keys[key]
                return
            self.keys[key] = False
            self.ahead.push(key)
        super().evict()

    def touch(self, key: int, run: int) -> None:
        if self.runs[key] != run:
            self.keys[key] = True


class Ours:
    """`cachefs.pool.evict.Sieve`."""

    def __init__(self, capacity: int) -> None:
        self.policy = Sieve(capacity)
        self.image = self.policy.add_image(1 << 25)

    def has(self, key: int) -> bool:
        return self.policy.is_cached(key)

    def add(self, key: int, plan: Plan, prefetched: bool) -> None:
        while len(self.policy) >= self.policy.capacity:
            for victim in self.policy.victims(1, lambda key: False):
                self.policy.forget(victim)
        self.policy.insert(key, plan.run, sequential=plan.sequential, prefetched=prefetched)

    def touch(self, key: int, run: int) -> None:
        self.image.touch(key, key + 1, run)


POLICIES: dict[str, Callable[[int], Cached]] = {
    "FIFO": FirstIn,
    "LRU": Lru,
    "SIEVE as published": PublishedSieve,
    "SIEVE, own touches not counted, ring": TwoAdditions,
    "cachefs: the same with probation": Ours,
}


# ---------------------------------------------------------------------------------------------------------- eviction


class Cache:
    """One cache, some images side by side in one key space; reads block by block, no read-ahead."""

    def __init__(self, cached: Cached, size: int) -> None:
        self.cached = cached
        self.streams = ReadAhead(size)

    def play(self, reads: Iterator[Read] | list[Read]) -> tuple[float, int]:
        """Hit ratio of the blocks of all reads, and how many were fetched."""
        hits = misses = 0
        for read in reads:
            missing = [block for block in read.blocks if not self.cached.has(block)]
            plan = self.streams.read(read.offset, read.length, missed=bool(missing))
            hits += len(read.blocks) - len(missing)
            misses += len(missing)
            for block in missing:
                self.cached.add(block, plan, False)
            for block in read.blocks:
                if self.cached.has(block):  # the first blocks of a long read may be gone already
                    self.cached.touch(block, plan.run)
        return hits / (hits + misses), misses


def scan(start: int, length: int, request: int) -> Iterator[Read]:
    for offset in range(start, start + length, request):
        yield Read(offset, request)


def interleaved(reads: list[Read], lag: int) -> Iterator[Read]:
    """Two guests, the second *lag* reads behind the first."""
    for first, second in itertools.zip_longest(reads, [*[None] * lag, *reads]):
        if first is not None:
            yield first
        if second is not None:
            yield second


def eviction_rows(trace: Trace, progress: Callable[[str], None]) -> Iterator[list[str]]:
    distinct = trace.distinct()
    far = -(-trace.size // MIB) * MIB
    for percent in (25, 50, 110):
        capacity = distinct * percent // 100
        for name, make in POLICIES.items():
            progress(f"quota {percent} %, {name}")

            def boots(between: Iterator[Read], make: Callable[[int], Cached] = make, capacity: int = capacity) -> float:
                cache = Cache(make(capacity), 2 * far + 20 * capacity * BLOCK)
                cache.play(trace.reads)
                for read in between:
                    cache.play([read])
                return cache.play(trace.reads)[0]

            cold = Cache(make(capacity), far).play(trace.reads)[0]
            warm = boots(iter(()))
            ten = 10 * capacity * BLOCK
            after = [boots(scan(far, ten, request)) for request in (4096, 128 << 10)]
            pair = Cache(make(capacity), far)
            pair_ratio, _ = pair.play(interleaved(trace.reads, 50))
            yield [f"{percent} %", name, *(f"{100 * ratio:.1f}" for ratio in (cold, warm, *after, pair_ratio))]


# -------------------------------------------------------------------------------------------------------- read-ahead


class Ahead(Protocol):
    def read(self, offset: int, length: int, *, missed: bool) -> Plan: ...
    def fetched(self, run: int, asked: int, ahead: int) -> None: ...
    def used(self, block: int, run: int) -> None: ...


class NoneAhead:
    def __init__(self, size: int) -> None:
        self.size = size

    def read(self, offset: int, length: int, *, missed: bool) -> Plan:
        return Plan(1, False, 0)

    def fetched(self, run: int, asked: int, ahead: int) -> None:
        pass

    def used(self, block: int, run: int) -> None:
        pass


class Doubling(NoneAhead):
    """Doubles per stream up to *most* bytes, halves at a jump, whatever it brings."""

    def __init__(self, size: int, most: int, first: int = 0) -> None:
        super().__init__(size)
        self.most, self.first = most, first
        self.windows: OrderedDict[int, tuple[int, int]] = OrderedDict()  # region: position, window

    def read(self, offset: int, length: int, *, missed: bool) -> Plan:
        end, region = offset + length, offset >> 20
        near = next((key for key in (region, region - 1, region + 1) if key in self.windows), None)
        window = self.first
        if near is not None:
            position, window = self.windows.pop(near)
            if missed:
                follows = 0 <= offset - position <= BLOCK
                window = min(self.most, max(BLOCK, 2 * window)) if follows else window // 2
        self.windows[end >> 20] = (end, window)
        until = min(self.size, (-(-end // BLOCK) + window // BLOCK) * BLOCK)
        return Plan(1, False, max(0, until - end) if missed and window else 0)


class Fetches(NamedTuple):
    requests: int
    blocks: int
    unread: int


def play_cold(ahead: Ahead, reads: Iterator[Read] | list[Read]) -> Fetches:
    """An empty cache without limit: what is asked of the store."""
    cached: dict[int, int] = {}  # block: run that fetched it ahead, 0 when it was read
    requests = 0
    for read in reads:
        missing = [block for block in read.blocks if block not in cached]
        plan = ahead.read(read.offset, read.length, missed=bool(missing))
        end = read.offset + read.length
        until = -(-(end + plan.ahead) // BLOCK)
        more = [block for block in range(read.blocks.stop, until) if block not in cached]
        for block in read.blocks:
            if cached.get(block):
                ahead.used(block, cached[block])
            cached[block] = 0
        cached.update(dict.fromkeys(more, plan.run))
        fetched = missing + more
        requests += sum(1 for one, other in itertools.pairwise([-2, *fetched]) if other != one + 1)
        ahead.fetched(plan.run, len(missing) * BLOCK, len(more) * BLOCK)
    return Fetches(requests, len(cached), sum(1 for run in cached.values() if run))


AHEAD: dict[str, Callable[[int], Ahead]] = {
    "none": NoneAhead,
    "doubling to 512 KiB": lambda size: Doubling(size, 512 << 10),
    "doubling to 4 MiB": lambda size: Doubling(size, 4 << 20),
    "doubling from 64 KiB to 512 KiB": lambda size: Doubling(size, 512 << 10, BLOCK),
    "doubling from 64 KiB to 4 MiB": lambda size: Doubling(size, 4 << 20, BLOCK),
    "cachefs": ReadAhead,
}


def ahead_rows(trace: Trace) -> Iterator[list[str]]:
    distinct = trace.distinct()
    whole = [Read(offset, 128 << 10) for offset in range(0, 256 * MIB, 128 << 10)]
    for name, make in AHEAD.items():
        one = play_cold(make(trace.size), trace.reads)
        two = play_cold(make(trace.size), interleaved(trace.reads, 50))
        sequential = play_cold(make(trace.size), whole)
        yield [
            name, str(one.requests), f"{one.blocks / 16:.1f}", f"{one.unread / 16:.1f}", f"{one.blocks / distinct:.3f}",
            str(two.requests), f"{two.blocks / distinct:.3f}", str(sequential.requests),
        ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- tables

EVICTION_HEAD = ["quota", "policy", "first boot", "second", "after a scan in 4 KiB", "in 128 KiB", "two guests at once"]
AHEAD_HEAD = ["read-ahead", "requests", "MiB", "MiB unread", "of distinct", "two guests: requests", "of distinct",
              "256 MiB in order: requests"]  # fmt: skip


def show(head: list[str], rows: list[list[str]], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        for row in rows:
            print("| " + " | ".join(row) + " |")
    else:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for row in [head, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("trace", nargs="?", type=Path, default=TRACE)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()

    def progress(what: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)

    trace = Trace.load(options.trace)
    print(
        f"{options.trace.name}: {len(trace.reads)} reads, {sum(read.length for read in trace.reads) / MIB:.1f} MiB, "
        f"{trace.distinct()} distinct blocks of 64 KiB ({trace.distinct() / 16:.1f} MiB)\n"
    )
    show(AHEAD_HEAD, list(ahead_rows(trace)), options.markdown)
    rows = list(eviction_rows(trace, progress))
    progress("")
    print("Hit ratio in per cent of blocks looked up; a scan reads ten times the quota, once, in order, elsewhere.\n")
    show(EVICTION_HEAD, rows, options.markdown)


if __name__ == "__main__":
    main()
