"""cache: copies what is read from below into a pool on a local disk, shared by every disk over the same image.

    state in the pool    a read                                    on the loop
    DATA, ready          from the data file                        yes
    ZERO                 zeros                                      yes
    DATA, not verified   whole blocks, compared with their sums     no
    anything else        from a flight, or a new one                no

A miss fetches whole blocks, neighbours in one request of up to MAX_FETCH bytes; whoever wants a block that is in flight
waits for that flight. A flight belongs to the cache: it goes on when its reader is cancelled. The reader gets its bytes as
soon as they are there; installing them is the pool's work, and not on anybody's way. Where the flight fails, each reader
asks below for its own bytes: what was only read ahead fails nobody. Runs of zeros that the child knows of are not fetched.

*No fault of the pool reaches a guest*: while reading or writing its files does not work, reads are served from below.

Writes (mode: write-through) go below, and what the pool holds of their blocks is dropped before and stays out until they
are done; what a flight brings of them by then is not installed, and not joined by later reads.

Concurrency: no locks. Between a look-up and what follows from it nobody else runs; blocks that a thread reads are pinned.
Source: cache images: Razavi and Kielmann, "Scalable Virtual Machine Deployment Using VM Image Caches", SC 2013.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Literal, NamedTuple

import trio
from bitarray import bitarray

from cachefs.errors import BackendError, CachefsError
from cachefs.extent import Extent, ExtentKind, MapRun, MapState
from cachefs.layers.base import ALL_CAPS, MAX_IO, Caps, Done, Environment, Geometry, Later, Layer, Options, Statistics
from cachefs.pool.evict import VISITED
from cachefs.pool.image import Flight, PoolImage
from cachefs.pool.readahead import Plan
from cachefs.pool.summap import State, SumMap

log = logging.getLogger(__name__)

MAX_FETCH = MAX_IO
JOINED_AHEAD = 512 << 10  # what is read ahead goes along with its request up to this length
EXTENTS_AT_ONCE = 128
LOOK_BLOCKS = 1 << 20  # that one look for the end of a run of zeros may cover: it runs on the loop
MAP_BLOCKS = 1 << 15  # that one call of `map_runs` looks at, one by one
_MAP_STATES = {State.DATA: MapState.CACHED, State.ZERO: MapState.ZERO}
_NO_PLAN = Plan(0, False, 0)
_ZEROS = memoryview(bytes(MAX_IO))


class CacheConfig(Options):
    pool: str
    """Name of the pool, below `pools`."""
    mode: Literal["read-only", "write-through"] = "read-only"
    """What becomes of writes from above: refused, or written to what lies below."""

    @property
    def passes_writes(self) -> bool:
        return self.mode == "write-through"


class Share(NamedTuple):
    """The blocks *start* to *end* of a flight, as far as a request wants them from it."""

    flight: Flight
    start: int
    end: int


class Cache:
    """An open cache; `Cache.open` makes it. Takes any byte range."""

    Config = CacheConfig

    def __init__(self, name: str, config: CacheConfig, child: Layer, image: PoolImage, nursery: trio.Nursery) -> None:
        self.name = name
        self.child = child
        self.identity = child.identity
        self.image = image
        size = child.geometry.size
        self.geometry = Geometry(size, preferred_io=image.header.block_size)
        writable = config.mode == "write-through" and Caps.WRITE in child.caps
        self.caps = ALL_CAPS if writable else Caps.FLUSH | Caps.EXTENTS
        self._nursery = nursery
        self._shift = image.shift
        self._ready = image.map.ready
        self._zero = image.map.zero
        self._try_read = image.data.try_read
        self._blocks = image.blocks
        self._words = image.blocks.words
        self._ahead = image.ahead
        self._most_blocks = max(1, MAX_FETCH >> image.shift)
        self._joined_blocks = max(1, JOINED_AHEAD >> image.shift)
        self._explored = bitarray(image.count)  # the child was asked what it knows of these
        self._holes = bitarray(image.count)  # and they are zeros
        self._changes = 0  # begun from above
        self.hits = self.misses = self.bypassed = 0  # requests
        self.fetches = self.fetched_bytes = self.failed_fetches = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, config: CacheConfig, child: Layer, env: Environment) -> AsyncIterator[Cache]:
        """Raises: StoreError."""
        pool = env.pools[config.pool]
        is_written = config.passes_writes and Caps.WRITE in child.caps
        attached = pool.attach(child.identity, child.geometry.size, env.owner, is_written=is_written)
        async with attached as image, trio.open_nursery() as nursery:
            yield cls(f"{env.owner}/cache", config, child, image, nursery)
            nursery.cancel_scope.cancel()

    # ---- fast path

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        shift = self._shift
        start, end = offset >> shift, ((offset + len(buffer) - 1) >> shift) + 1
        if self._ready.find(0, start, end) >= 0:
            return self._try_read_mixed(offset, buffer, start, end)
        if not self._try_read(offset, buffer):
            return False
        self.hits += 1
        self._note_hit(offset, len(buffer), start, end)
        return True

    def _try_read_mixed(self, offset: int, buffer: memoryview, start: int, end: int) -> bool:
        """Ready parts and zeros, or nothing."""
        ready, zero = self._ready, self._zero
        if (ready[start:end] | zero[start:end]).find(0) >= 0:
            return False
        for part in self.image.map.parts(start, end):
            view, at = self._cut(offset, buffer, part.start, part.end)
            if part.state is State.ZERO:
                view[:] = _ZEROS[: len(view)]
            elif not self._try_read(at, view):
                return False
        self.hits += 1
        self._note_hit(offset, len(buffer), start, end)
        return True

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        return False  # a miss is a flight's

    def try_write(self, offset: int, data: memoryview) -> bool:
        return False

    def try_flush(self, done: Done) -> bool:
        return self.child.try_flush(done)

    def _cut(self, offset: int, buffer: memoryview, start: int, end: int) -> tuple[memoryview, int]:
        """What of *buffer*, which begins at *offset*, lies in these blocks, and the offset where that begins."""
        first = max(offset, start << self._shift)
        last = min(offset + len(buffer), end << self._shift)
        return buffer[first - offset : last - offset], first

    # ---- slow path

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        image = self.image
        if not image.reading.works:
            self.bypassed += 1
            await self._read_below(offset, buffer)
            return
        start, end = offset >> self._shift, ((offset + len(buffer) - 1) >> self._shift) + 1
        missed = any(self._is_missing(block) and block not in image.flights for block in range(start, end))
        keeps = not missed or image.takes_more
        plan = self._ahead.read(offset, len(buffer), missed=missed) if keeps else _NO_PLAN
        flights = self._fetch_blocks(start, end, plan, begin=keeps)
        if plan.ahead:
            self._fetch_ahead(offset + len(buffer), plan)
        if not keeps:
            self.bypassed += 1
        elif flights:
            self.misses += 1
        else:
            self.hits += 1
        at = start
        while at < end:
            # Looked up anew after every wait: blocks come and go meanwhile.
            part = next(image.map.parts(at, end))
            if part.state is State.ZERO or part.state is State.DATA:
                view, first = self._cut(offset, buffer, at, part.end)
                if part.state is State.ZERO:
                    view[:] = _ZEROS[: len(view)]
                else:
                    self._blocks.touch(at, part.end, plan.run)
                    await self._read_stored(first, view, at, part.end)
                at = part.end
                continue
            found = next((one for one in flights if one.start <= at < one.end), None)
            if found is None:  # not to be kept, or it vanished
                until = min((one.start for one in flights if one.start > at), default=end)
                until = min(part.end, until)
            else:
                until = min(part.end, found.end)
            view, first = self._cut(offset, buffer, at, until)
            if found is None or not await self._take(found.flight, first, view):
                await self._read_below(first, view)
            at = until

    async def _read_stored(self, offset: int, view: memoryview, start: int, end: int) -> None:
        """Bytes of blocks that are DATA; from below when the pool does not give them."""
        image = self.image
        with image.pinned(start, end):
            if image.map.ready.find(0, start, end) < 0 and self._try_read(offset, view):
                return
            found = await image.read(start, end)
        if found is None:
            self._fetch_blocks(start, end, _NO_PLAN)  # what was spoiled is mended; what was not is not fetched
            await self._read_below(offset, view)
        else:
            first = offset - image.offset_of(start)
            view[:] = found[first : first + len(view)]

    async def _take(self, flight: Flight, offset: int, view: memoryview) -> bool:
        """Wait for *flight* and take these bytes from it. False: it failed."""
        await flight.done.wait()
        if flight.error is not None:
            return False
        first = offset - self.image.offset_of(flight.start)
        view[:] = memoryview(flight.buffer)[first : first + len(view)]
        return True

    async def _read_below(self, offset: int, view: memoryview) -> None:
        if not self.child.try_read_into(offset, view):
            await self.child.read_into(offset, view)

    # ---- fetching

    def _fetch_blocks(self, start: int, end: int, plan: Plan, *, begin: bool = True) -> list[Share]:
        """Who brings each block of the range that is not in the pool: flights that are under way, or (*begin*) new ones.

        What is returned is right for a request that is issued now, whatever is changed above later.
        """
        image = self.image
        found: list[Share] = []
        fetched = 0
        for block in range(start, end):
            flight = image.flights.get(block)
            if flight is None and begin and self._is_missing(block):
                flight = self._join_or_begin(block, plan, self._most_blocks)
                fetched += 1
            if flight is None:
                continue
            if flight.unread:
                image.ask_for(flight, block)
            if found and found[-1].flight is flight and found[-1].end == block:
                found[-1] = found[-1]._replace(end=block + 1)
            else:
                found.append(Share(flight, block, block + 1))
        if fetched:
            self._ahead.fetched(plan.run, fetched << self._shift, 0)
        return found

    def _fetch_ahead(self, offset: int, plan: Plan) -> None:
        """Flights for what *plan* wants behind *offset*. A short piece goes with the request that it follows."""
        image = self.image
        if not image.may_read_ahead():
            return
        start, end = -(-offset >> self._shift), min(image.count, -(-(offset + plan.ahead) >> self._shift))
        most = self._most_blocks if end - start > self._joined_blocks else self._joined_blocks
        fetched = 0
        for block in range(start, end):
            if block not in image.flights and self._is_missing(block):
                self._join_or_begin(block, plan, most).unread.add(block)
                fetched += 1
        if fetched:
            self._ahead.fetched(plan.run, 0, fetched << self._shift)

    def _is_missing(self, block: int) -> bool:
        return self.image.map.state(block) not in (State.ZERO, State.DATA) and block not in self.image.barred

    def _join_or_begin(self, block: int, plan: Plan, most: int) -> Flight:
        """A flight of fewer than *most* blocks beside this one that has not begun takes the block along, or a new one does.

        Beside, not only before: requests of one moment come in any order.
        """
        image = self.image
        flight = image.joinable.get(block) or image.joinable_before.get(block + 1)
        if flight is None or flight.end - flight.start >= most:
            flight = Flight(block, block, plan.run, plan.sequential)
            self._nursery.start_soon(self._fly, flight)
        self._close_joining(flight)
        flight.start, flight.end = min(flight.start, block), max(flight.end, block + 1)
        image.joinable[flight.end] = image.joinable_before[flight.start] = flight
        image.flights[block] = flight
        return flight

    def _close_joining(self, flight: Flight) -> None:
        image = self.image
        if image.joinable.get(flight.end) is flight:
            del image.joinable[flight.end]
        if image.joinable_before.get(flight.start) is flight:
            del image.joinable_before[flight.start]

    async def _fly(self, flight: Flight) -> None:
        image = self.image
        self._close_joining(flight)
        try:
            buffer = bytearray(image.length_of(flight.start, flight.end))
            await self._fill(flight, memoryview(buffer))
            flight.buffer = buffer
        except Exception as exc:
            self.failed_fetches += 1
            flight.error = exc
            image.land(flight)  # whoever waits asks below for its own bytes, and meets the error there
            if not isinstance(exc, CachefsError):
                log.exception("%s: a fetch of blocks %d to %d failed", self.name, flight.start, flight.end)
        except BaseException:  # this disk is closed; others over the same image ask below themselves
            flight.error = BackendError(self.name, "was closed")
            image.land(flight)
            raise
        else:
            image.install(flight)
        finally:
            flight.done.set()

    async def _fill(self, flight: Flight, view: memoryview) -> None:
        """The bytes of *flight* from below, without what is known to be zeros."""
        block = self._explored.find(0, flight.start, flight.end)
        if block >= 0:
            await self._explore(block)
        start = flight.start
        first = self.image.offset_of(start)
        while start < flight.end:
            is_hole = bool(self._holes[start])
            end = self._holes.find(not is_hole, start, flight.end)
            end = flight.end if end < 0 else end
            if not is_hole:
                offset = self.image.offset_of(start)
                length = self.image.length_of(start, end)
                await self._read_below(offset, view[offset - first : offset - first + length])
                self.fetches += 1
                self.fetched_bytes += length
            start = end

    async def _explore(self, block: int) -> None:
        """Ask the child which blocks from *block* on are zeros. It need not know."""
        size, shift = self.geometry.size, self._shift
        offset = block << shift
        before, is_changing = self._changes, bool(self.image.barred)
        try:
            extents = await self.child.extents(offset, size - offset, EXTENTS_AT_ONCE)
        except CachefsError:
            extents = []
        if not extents or is_changing or before != self._changes:  # the answer may be about what is no more
            self._explored[block : block + self._most_blocks] = True  # the fetch will say what is wrong
            return
        for extent in extents:
            if extent.kind is not ExtentKind.DATA:
                last = self.image.count if extent.end == size else extent.end >> shift
                first = -(-extent.offset >> shift)
                if first < last:
                    self._holes[first:last] = True
        end = self.image.count if extents[-1].end == size else extents[-1].end >> shift
        self._explored[block : max(block + 1, end)] = True

    def _note_hit(self, offset: int, length: int, start: int, end: int) -> None:
        """Tell policy and read-ahead, unless a second run has touched these blocks already: then neither wants to know."""
        if self._words[start] & VISITED and (end - start == 1 or self._blocks.is_settled(start, end)):
            return
        plan = self._ahead.read(offset, length, missed=False)
        self._blocks.touch(start, end, plan.run)
        if plan.ahead:
            self._fetch_ahead(offset + length, plan)

    # ---- writes

    @contextmanager
    def _changing(self, offset: int, length: int) -> Iterator[None]:
        """Keep these blocks out of the pool until the change is done."""
        image = self.image
        self._changes += 1
        start, end = offset >> self._shift, ((offset + length - 1) >> self._shift) + 1
        for block in range(start, end):
            image.barred[block] += 1
            image.flights.pop(block, None)
            image.joinable.pop(block, None)
            image.joinable.pop(block + 1, None)
            image.joinable_before.pop(block, None)
            image.joinable_before.pop(block + 1, None)
            if image.map.state(block) is State.DATA:
                image.map.set_spoiled(block)
            elif image.map.state(block) is State.ZERO:
                image.map.set_absent(block)
        self._holes[start:end] = False
        self._explored[start:end] = True
        try:
            yield
        finally:
            for block in range(start, end):
                image.barred[block] -= 1
                if not image.barred[block]:
                    del image.barred[block]

    async def write(self, offset: int, data: memoryview) -> None:
        with self._changing(offset, len(data)):
            await self.child.write(offset, data)

    async def trim(self, offset: int, length: int) -> None:
        with self._changing(offset, length):
            await self.child.trim(offset, length)

    async def zero(self, offset: int, length: int) -> None:
        with self._changing(offset, length):
            await self.child.zero(offset, length)

    async def flush(self) -> None:
        await self.child.flush()

    # ---- the rest

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        if (own := self._zeros_at(offset, length)) is not None:
            return [own]
        end = self._next_zeros(offset, length)
        try:
            return await self.child.extents(offset, end - offset, limit)
        except CachefsError:
            # What the pool holds is served while nothing answers below; so is what it knows of it.
            held = self._held_at(offset, end)
            if held is None:
                raise
            return [held]

    def try_extent(self, offset: int, length: int) -> Extent | None:
        if (own := self._zeros_at(offset, length)) is not None:
            return own
        found = self.child.try_extent(offset, length)
        if found is None:
            return None
        end = self._next_zeros(offset, found.length)
        return found if end == found.end else Extent(offset, end - offset, found.kind)

    def map_runs(self, offset: int, limit: int) -> list[MapRun]:
        """What the pool has, from *offset* on: a non-empty prefix of the rest."""
        return map_runs(self.image.map, self._shift, self.geometry.size, offset, limit)

    def _zeros_at(self, offset: int, length: int) -> Extent | None:
        """The blocks from *offset* on that the pool knows to be zeros, though the child may hold them as data."""
        block = offset >> self._shift
        if not self._zero[block]:
            return None
        last = ((offset + length - 1) >> self._shift) + 1
        until = self._zero.find(0, block, min(last, block + LOOK_BLOCKS))
        end = min(offset + length, (min(last, block + LOOK_BLOCKS) if until < 0 else until) << self._shift)
        return Extent(offset, end - offset, ExtentKind.ZERO)

    def _next_zeros(self, offset: int, length: int) -> int:
        """Where the next such blocks begin, or the end of the range."""
        block, end = offset >> self._shift, offset + length
        until = self._zero.find(1, block, ((end - 1) >> self._shift) + 1)
        return end if until < 0 else until << self._shift

    def _held_at(self, offset: int, end: int) -> Extent | None:
        """The blocks from *offset* on whose data the pool holds."""
        part = next(self.image.map.parts(offset >> self._shift, ((end - 1) >> self._shift) + 1))
        if part.state is not State.DATA:
            return None
        return Extent(offset, min(end, part.end << self._shift) - offset, ExtentKind.DATA)

    async def prefetch(self, offset: int, length: int) -> None:
        length = min(length, self.image.pool.room_for_hints())
        if length and self.image.reading.works and self.image.takes_more:
            start, end = offset >> self._shift, ((offset + length - 1) >> self._shift) + 1
            self._fetch_blocks(start, end, _NO_PLAN)

    def allocated_bytes(self) -> int:
        return self.child.allocated_bytes()

    def pending_error(self) -> Exception | None:
        return self.child.pending_error()

    def statistics(self) -> Statistics:
        image = self.image
        values: dict[str, int | float | str] = {
            "pool": image.pool.name,
            "hits": self.hits,
            "misses": self.misses,
            "bypassed": self.bypassed,
            "fetches": self.fetches,
            "fetched_bytes": self.fetched_bytes,
            "failed_fetches": self.failed_fetches,
            **image.statistics(),
        }
        return Statistics(self.name, values, self.child.statistics())


def map_runs(states: SumMap, shift: int, size: int, offset: int, limit: int) -> list[MapRun]:
    """The blocks of an image of *size* bytes, from *offset* on, neighbours of one kind merged; a non-empty prefix."""
    block = offset >> shift
    runs: list[MapRun] = []
    for part in states.parts(block, min(states.blocks, block + MAP_BLOCKS)):
        state = _MAP_STATES.get(part.state, MapState.ABSENT)
        start, end = max(offset, part.start << shift), min(size, part.end << shift)
        if runs and runs[-1].state is state:
            runs[-1] = MapRun(runs[-1].offset, end - runs[-1].offset, state)
        elif len(runs) == limit:
            break
        else:
            runs.append(MapRun(start, end - start, state))
    return runs


__all__ = ["Cache", "CacheConfig", "map_runs"]
