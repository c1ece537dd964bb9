"""extents: remembers what the child said of its extents, so that nothing is asked twice.

Knowledge lies in an `ExtentMap`. What a range begins with is answered from there when it is known (a reply may be a prefix);
else the child is asked for the whole unknown rest in one *question*, which belongs to the layer: whoever wants something of
its range meanwhile waits for it, and it goes on when they are cancelled.

    a change of a range                 what is known of it          a question under way over it
    begins, waits, is under way         stays                        goes on
    has ended, well or not, cancelled   forgotten                    its answer is not kept for that range

That is enough: what was asked before a change ended is either forgotten with it or never kept, and what is asked afterwards
is about what the change left. To forget before the change would let an answer that came during it stay. So writes never wait
for a question, and a question never for a write. Ranges are widened to the child's `preferred_io` (4 KiB at least): a write
of a sector makes data of its block.

Whoever asks after a change has ended never gets an answer from before it: it does not join a question that the change has
marked there, it asks anew; when that goes on for ASK_TRIES rounds, the child answers it directly and nothing is kept.

Reads that lie wholly in runs of zeros are answered here, on the loop.

What survives: for an image that nobody writes, in a stack with a cache, what is known lies beside the image in the cache's
pool (`cachefs.pool.holes`), written SAVE_AFTER_S after it changed and at close. Anything else begins empty.
Concurrency: no locks. Source: the idea is nbdkit's cacheextents filter, which keeps the last reply only.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated

import pydantic
import trio

from cachefs.errors import BackendError, CachefsError
from cachefs.extent import STATE_OF, Extent, MapRun, MapState
from cachefs.layers.base import Caps, Done, Environment, Geometry, Later, Layer, Options, Statistics
from cachefs.pool.holes import HolesFile
from cachefs.store.extentmap import ExtentMap
from cachefs.units import Size, align_down, align_up

log = logging.getLogger(__name__)

AT_ONCE = 8192  # extents asked for with one question: what a look through the answer takes is time of the loop
ASK_TRIES = 3
MOST_MARKS = 64  # ranges that a question notes as changed before it lumps them together
RUN_BYTES = 256  # of memory for each run that is known
SAVE_AFTER_S = 5.0
_ZEROS = memoryview(bytes(1 << 20))


class ExtentsConfig(Options):
    memory: Annotated[Size, pydantic.Field(ge=64 << 10)] = 32 << 20
    """Most memory for what is known, 256 bytes for each run of data or zeros; beyond it the oldest knowledge goes first."""

    @property
    def passes_writes(self) -> bool:
        return True


class _Question:
    """Under way for *start* to *end*. changed: ranges of which the answer is not to be kept. error: why there is none."""

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.changed: list[tuple[int, int]] = []
        self.error: CachefsError | None = None
        self.done = trio.Event()

    def change(self, start: int, end: int) -> None:
        if start >= self.end or end <= self.start:
            return
        if self.changed and self.changed[-1][0] <= start <= self.changed[-1][1]:  # a stream of writes is one range
            start, end = self.changed[-1][0], max(end, self.changed.pop()[1])
        self.changed.append((start, end))
        if len(self.changed) > MOST_MARKS:
            self.changed = [(min(one[0] for one in self.changed), max(one[1] for one in self.changed))]

    def answers(self, offset: int) -> bool:
        """Whether what it brings for *offset*, as far as it reaches, may be used by one who asks now."""
        return self.start <= offset < self.end and not any(start <= offset < end for start, end in self.changed)

    def begins_behind(self, offset: int) -> int:
        """Where behind *offset*, which it does not answer, it may be asked for again."""
        if offset < self.start:
            return self.start
        return max((end for start, end in self.changed if start <= offset < end), default=self.end)


class Extents:
    """An open extent cache; `Extents.open` makes it. Passes everything, and takes what the child takes."""

    Config = ExtentsConfig

    def __init__(self, name: str, config: ExtentsConfig, child: Layer, nursery: trio.Nursery) -> None:
        self.name = name
        self.child = child
        self.identity = child.identity
        below = child.geometry
        self.geometry = Geometry(below.size, below.alignment, below.preferred_io, below.max_io)
        self.caps = child.caps | Caps.EXTENTS
        self.known = ExtentMap(config.memory // RUN_BYTES)
        self._nursery = nursery
        self._size = below.size
        self._unit = max(4096, below.preferred_io)
        self._questions: list[_Question] = []
        self.asked = self.answered = self.zero_reads = self.not_kept = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, config: ExtentsConfig, child: Layer, env: Environment) -> AsyncIterator[Extents]:
        """Raises: StoreError when the pool has no room for one more image."""
        async with AsyncExitStack() as stack:
            file = None
            if env.pool is not None and Caps.WRITE not in child.caps and child.identity.lasts:
                attached = env.pool.attach(child.identity, child.geometry.size, env.owner)
                file = HolesFile(await stack.enter_async_context(attached))
            async with trio.open_nursery() as nursery:
                layer = cls(f"{env.owner}/extents", config, child, nursery)
                if file is not None:
                    layer.known.learn(await file.load())
                loaded = layer.known.changes
                if file is not None:
                    nursery.start_soon(layer._save_often, file, loaded)
                try:
                    yield layer
                finally:
                    nursery.cancel_scope.cancel()
                    if file is not None and layer.known.changes != loaded:
                        await file.save_last(layer.known.snapshot())

    async def _save_often(self, file: HolesFile, saved: int) -> None:
        """*saved*: the `changes` at which the file says what is known."""
        while True:
            await trio.sleep(SAVE_AFTER_S)
            now = self.known.changes
            if now != saved and await file.save(self.known.snapshot()):
                saved = now

    # ---- fast path

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        if self.known and self._read_zeros(offset, buffer):
            return True
        return self.child.try_read_into(offset, buffer)

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        return self.child.try_read_later(offset, buffer, done)

    def _read_zeros(self, offset: int, buffer: memoryview) -> bool:
        length = len(buffer)
        if not self.known.is_zero(offset, offset + length):
            return False
        for at in range(0, length, len(_ZEROS)):
            buffer[at : at + len(_ZEROS)] = _ZEROS[: min(len(_ZEROS), length - at)]
        self.zero_reads += 1
        return True

    def try_write(self, offset: int, data: memoryview) -> bool:
        try:
            return self.child.try_write(offset, data)
        finally:
            if self.known or self._questions:
                self._changed(offset, len(data))

    def try_flush(self, done: Done) -> bool:
        return self.child.try_flush(done)

    def try_extent(self, offset: int, length: int) -> Extent | None:
        found = self.known.at(offset, offset + length)
        if found is not None:
            self.answered += 1
        return found

    # ---- slow path

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        if not self.known or not self._read_zeros(offset, buffer):
            await self.child.read_into(offset, buffer)

    async def write(self, offset: int, data: memoryview) -> None:
        try:
            await self.child.write(offset, data)
        finally:
            self._changed(offset, len(data))

    async def trim(self, offset: int, length: int) -> None:
        try:
            await self.child.trim(offset, length)
        finally:
            self._changed(offset, length)

    async def zero(self, offset: int, length: int) -> None:
        try:
            await self.child.zero(offset, length)
        finally:
            self._changed(offset, length)

    async def flush(self) -> None:
        await self.child.flush()

    def _changed(self, offset: int, length: int) -> None:
        """A change of the range has ended, in whichever way."""
        start, end = align_down(offset, self._unit), align_up(offset + length, self._unit)
        self.known.forget(start, end)
        for question in self._questions:
            question.change(start, end)

    # ---- questions

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        end = offset + length
        joins = True
        for _ in range(ASK_TRIES):
            if found := self.known.known(offset, end, limit):
                self.answered += 1
                return found
            question = self._find(offset) if joins else None
            joins = False  # the answer of another's question may end before *offset*; that of one's own cannot
            question = question or self._ask(offset)
            await question.done.wait()
            # Anything may have been learnt, forgotten or changed meanwhile: looked up anew.
            if question.error is not None:
                raise question.error
        self.not_kept += 1
        return await self.child.extents(offset, length, limit)

    def _find(self, offset: int) -> _Question | None:
        return next((one for one in self._questions if one.answers(offset)), None)

    def _ask(self, offset: int) -> _Question:
        """Ask for what is unknown from *offset* on, up to what is known or asked for already."""
        end = self.known.gap_end(offset, self._size)
        for question in self._questions:
            if offset < (begin := question.begins_behind(offset)):
                end = min(end, begin)
        question = _Question(offset, end)
        self._questions.append(question)
        self._nursery.start_soon(self._answer, question)
        return question

    async def _answer(self, question: _Question) -> None:
        self.asked += 1
        try:
            found = await self.child.extents(question.start, question.end - question.start, AT_ONCE)
            self.known.learn(found, question.changed)
        except CachefsError as exc:
            question.error = exc
        except Exception:
            log.exception("%s: asking for the extents of %d to %d failed", self.name, question.start, question.end)
            question.error = BackendError(self.name, "a bug below; its log line says more")
        except BaseException:
            question.error = BackendError(self.name, "was closed")
            raise
        finally:
            self._questions.remove(question)
            question.done.set()

    # ---- the rest

    def map_runs(self, offset: int, limit: int) -> list[MapRun]:
        """What is known, from *offset* on: a non-empty prefix of the rest."""
        runs: list[MapRun] = []
        while offset < self._size and len(runs) < limit:
            found = self.known.at(offset, self._size)
            end = self.known.gap_end(offset, self._size) if found is None else found.end
            state = MapState.UNKNOWN if found is None else STATE_OF[found.kind]
            runs.append(MapRun(offset, end - offset, state))
            offset = end
        return runs

    async def prefetch(self, offset: int, length: int) -> None:
        await self.child.prefetch(offset, length)

    def allocated_bytes(self) -> int:
        return self.child.allocated_bytes()

    def pending_error(self) -> Exception | None:
        return self.child.pending_error()

    def statistics(self) -> Statistics:
        values: dict[str, int | float | str] = {
            "known_runs": len(self.known),
            "questions": self.asked,
            "answered_from_memory": self.answered,
            "zero_reads": self.zero_reads,
            "not_kept": self.not_kept,
        }
        return Statistics(self.name, values, self.child.statistics())


__all__ = ["Extents", "ExtentsConfig"]
