"""`cachefs warm`: fill the cache of an image before anybody needs it.

The image's stack is opened as a mount would open it, without anything above its cache. What the pool holds is skipped, so a
run that was interrupted is simply run again. Blocks that are fetched here are spared the probation of
`cachefs.pool.evict`: somebody has asked for them. When they begin to push out each other the pool is too small, and it ends.
"""

from __future__ import annotations

import re
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import trio
from bitarray import bitarray

from cachefs.bytebar import ByteBar
from cachefs.config import Config, DiskSpec, load
from cachefs.disks import open_disks
from cachefs.errors import CachefsError, unwrap
from cachefs.layers.base import Layer
from cachefs.layers.cache import Cache, CacheConfig
from cachefs.pool.image import Flight
from cachefs.pool.pool import BACKLOG_BYTES
from cachefs.pool.summap import State
from cachefs.store.files import StoreLock
from cachefs.units import format_size, parse_size, short_size

WINDOW = 16 << 20  # bytes that are fetched at once, and so at most a quarter of what may wait to be installed
LEAST_WINDOWS = 4  # a second, when there is a limit on the rate
MOST_SAID = 20  # errors
END_PATIENCE_S = 10.0

_RANGE = re.compile(r"([0-9]\w*)?([-+])([0-9]\w*)?", re.ASCII)
_RATE = re.compile(r"([0-9]\w*)/s", re.ASCII)


class Range(NamedTuple):
    """Bytes, half-open. end: None is the end of the image."""

    start: int
    end: int | None

    def within(self, size: int) -> tuple[int, int]:
        """Raises: ValueError when it is not inside an image of *size* bytes."""
        end = size if self.end is None else self.end
        if self.start >= end:
            raise ValueError(f"the range from {self.start} to {end} is empty")
        if end > size:
            raise ValueError(f"the range ends at {end}, and the image at {size}")
        return self.start, end


def parse_range(text: str) -> Range:
    """`1GiB-2GiB`, `1GiB-` (to the end), `-1GiB` (from the beginning), `1GiB+512MiB`. Raises: ValueError."""
    match = _RANGE.fullmatch(text)
    if match is None or (match[2] == "+" and match[3] is None):
        raise ValueError(f"{text!r} is not a range: write START-END or START+LENGTH, such as 1GiB-2GiB or 1GiB+512MiB")
    start = parse_size(match[1] or "0")
    if match[3] is None:
        return Range(start, None)
    second = parse_size(match[3])
    return Range(start, start + second if match[2] == "+" else second)


def parse_rate(text: str) -> int:
    """Bytes per second: `50MiB/s`. Raises: ValueError."""
    match = _RATE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a rate: write a size per second, such as 50MiB/s")
    rate = parse_size(match[1])
    if rate == 0:
        raise ValueError("a rate of 0 would never end: leave it out for no limit")
    return rate


@dataclass
class Outcome:
    """Bytes of the range, whole blocks. skipped: were there. fetched: from below. zeros: not fetched, known to be zeros.

    problem: why it ended before the end, for people.
    """

    total: int = 0
    skipped: int = 0
    fetched: int = 0
    zeros: int = 0
    failed: int = 0
    interrupted: bool = False
    problem: str = ""

    @property
    def done(self) -> int:
        return min(self.total, self.skipped + self.fetched + self.zeros + self.failed)

    def sentence(self) -> str:
        parts = [f"{format_size(self.fetched)} fetched", f"{format_size(self.skipped)} skipped (were there)"]
        parts += [f"{format_size(self.zeros)} zeros"] if self.zeros else []
        parts += [f"{format_size(self.failed)} FAILED"] if self.failed else []
        return f"{format_size(self.done)} of {format_size(self.total)}: {', '.join(parts)}"


def run(path: Path, name: str, wanted: Range, rate: int | None) -> Outcome:
    """Warm the image or disk *name* of the configuration *path*. rate: bytes per second at most.

    Raises: ConfigError, StoreError, LockedError; CachefsError when there is nothing to warm.
    """
    config = _only(load(path), name)
    for pool in _pools(config):
        if pool.exists():
            advice = (
                "a mount uses it, so warm the image through that: read a disk over it that has no cow layer, such as "
                f"`golden: {{image: {name}}}`, with `dd if=MOUNTPOINT/golden of=/dev/null bs=1M`"
            )
            StoreLock(pool, "cachefs warm", advice).close()
    try:
        return trio.run(_run, config, name, wanted, rate)
    except BaseExceptionGroup as group:
        raise unwrap(group) from group


def _only(config: Config, name: str) -> Config:
    """*config* with one disk: what of *name* lies below its topmost cache, and the cache. Raises: CachefsError."""
    disk = config.disks.get(name)
    if name not in config.images and disk is None:
        there = ", ".join(config.images) or "none"
        raise CachefsError(str(config.file), f"has no image {name!r}; there is {there}")
    if name in config.images or disk is None:
        disk = DiskSpec(name, (), image=name, backend=None)
    own = next((number for number, layer in enumerate(disk.layers) if isinstance(layer.options, CacheConfig)), None)
    layers = () if own is None else disk.layers[own:]
    below = config.images[disk.image].layers if disk.image is not None else ()
    if not any(isinstance(layer.options, CacheConfig) for layer in (*layers, *below)):
        raise CachefsError(
            name, "has no cache to warm: add one to its layers, such as `layers: [{cache: {pool: NAME}}]`"
        )
    if disk.writable and not disk.has_cow:
        raise CachefsError(name, "is written through its cache, which therefore begins empty at every mount")
    return replace(config, disks={name: replace(disk, layers=layers, read_only=True)})


def _pools(config: Config) -> list[Path]:
    layers = [layer for disk in config.disks.values() for layer in disk.layers]
    layers += [layer for disk in config.disks.values() if disk.image for layer in config.images[disk.image].layers]
    names = {layer.options.pool for layer in layers if isinstance(layer.options, CacheConfig)}
    return [config.pools[name].options.path for name in sorted(names)]


async def _run(config: Config, name: str, wanted: Range, rate: int | None) -> Outcome:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with open_disks(config, None) as (disks, _):
            (disk,) = disks
            warming = Warming(name, disk.top, wanted, rate)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_watch_signals, signals, nursery.cancel_scope, warming.outcome)
                with warming.bar:
                    await warming.run()
                nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True), trio.move_on_after(END_PATIENCE_S):
                await warming.end()
    return warming.outcome


async def _watch_signals(signals: AsyncIterator[int], scope: trio.CancelScope, outcome: Outcome) -> None:
    async for _ in signals:
        outcome.interrupted = True
        scope.cancel()


class Warming:
    """One run over the blocks of a range. outcome: what it came to so far."""

    def __init__(self, name: str, top: Layer, wanted: Range, rate: int | None) -> None:
        self.name = name
        self._caches = _caches(top)
        self._cache = self._caches[0]
        image = self._image = self._cache.image
        if not self._cache.identity.lasts:
            raise CachefsError(name, "lies over memory, so its cache begins empty at every mount: nothing to warm")
        try:
            start, end = wanted.within(image.size)
        except ValueError as exc:
            raise CachefsError(name, str(exc)) from exc
        self._start, self._end = start >> image.shift, -(-end >> image.shift)
        self._rate = rate
        share = image.pool.account.quota // 8  # so that a pool that is too small is noticed before much was fetched
        bytes_at_once = min(WINDOW, share) if rate is None else min(WINDOW, share, rate // LEAST_WINDOWS)
        self._backlog = min(BACKLOG_BYTES // 2, share)
        self._at_once = max(1, bytes_at_once >> image.shift)
        self._expected = bitarray(image.count)  # blocks that are there, or are on their way
        self._evicted, self._dropped = image.evicted_blocks, image.dropped_blocks
        self._began = 0.0
        self._said = 0
        self.outcome = Outcome(image.length_of(self._start, self._end))
        self.bar = ByteBar(self.outcome.total)

    async def run(self) -> None:
        image, outcome = self._image, self.outcome
        await image.wait_settled()
        self._began = trio.current_time()
        at = self._start
        while at < self._end and not outcome.problem:
            until = min(self._end, at + self._at_once)
            await self._warm(at, until)
            at = until
            self._show()
            outcome.problem = self._find_problem()
            if self._rate is not None:
                await trio.sleep_until(self._began + outcome.fetched / self._rate)
            for cache in self._caches:
                if cache.image.pool.backlog_bytes > self._backlog:
                    await cache.image.wait_installed()

    async def _warm(self, start: int, end: int) -> None:
        image, outcome = self._image, self.outcome
        missing = [block for block in range(start, end) if image.map.state(block) not in (State.DATA, State.ZERO)]
        length = sum(image.length_of(block, block + 1) for block in missing)
        outcome.skipped += image.length_of(start, end) - length
        self._expected[start:end] = True
        if not missing:
            await trio.lowlevel.checkpoint()
            return
        image.blocks.expect(start, end)
        before = outcome.fetched
        await self._cache.prefetch(image.offset_of(start), image.length_of(start, end))
        flights: dict[Flight, None] = {image.flights[block]: None for block in missing if block in image.flights}
        for flight in flights:
            await flight.done.wait()
            if flight.error is not None:
                self._expected[flight.start : flight.end] = False
                lost = image.length_of(flight.start, flight.end)
                outcome.failed += lost
                length -= lost
                self._say(f"{self.name}: {image.offset_of(flight.start)}+{lost}: {flight.error}")
        outcome.zeros += max(0, length - (self._count_fetched() - before))

    def _count_fetched(self) -> int:
        self.outcome.fetched = self._cache.fetched_bytes  # the cache was opened for this run
        return self.outcome.fetched

    def _say(self, text: str) -> None:
        self._said += 1
        if self._said <= MOST_SAID:
            self.bar.say(text)
        elif self._said == MOST_SAID + 1:
            self.bar.say("more errors like these are counted only")

    def _show(self) -> None:
        outcome = self.outcome
        rate = outcome.fetched / max(1e-3, trio.current_time() - self._began)
        text = (
            f"{short_size(outcome.fetched)} fetched at {short_size(int(rate))}/s, {short_size(outcome.skipped)} skipped"
        )
        self.bar.update(outcome.done, what=self.name, text=text)

    def _find_problem(self) -> str:
        """Why it makes no sense to go on; empty when it does."""
        image = self._image
        for health in (image.reading, image.writing):
            if not health.works:
                return f"{health.what} the pool {image.pool.name} failed: {health.reason}"
        too_small = (
            f"the pool {image.pool.name} is too small for it (quota {format_size(image.pool.account.quota)}): raise the "
            "quota, `cachefs pool drop` what nobody needs, or warm a range"
        )
        if image.dropped_blocks > self._dropped:
            return too_small
        if image.evicted_blocks > self._evicted:
            self._evicted = image.evicted_blocks
            for block in self._expected.search(1):
                if image.map.state(block) not in (State.DATA, State.ZERO) and block not in image.flights:
                    return too_small
        return ""

    async def end(self) -> None:
        """Until what was fetched lies in the pool."""
        for cache in self._caches:
            await cache.image.wait_installed()
        self._count_fetched()
        if not self.outcome.interrupted:
            self.outcome.problem = self.outcome.problem or self._find_problem()


def _caches(top: Layer) -> list[Cache]:
    """The caches of a stack, top to bottom."""
    found: list[Cache] = []
    node: Layer | None = top
    while node is not None:
        if isinstance(node, Cache):
            found.append(node)
        node = getattr(node, "child", None)
    return found
