"""The protocol that every layer and backend speaks, and what they share of it.

A *stack* is layers, top to bottom, ending in a *backend*; each layer holds the next one as `child` and calls the same
verbs on it. Promises, for every layer:

- any number of requests may be in flight, in no order; bytes that only one of them touches are never lost;
- a read that is issued after a write was acknowledged sees that write;
- a cancelled write may have written some of its own range and nothing outside it; a write that was handed to the
  kernel runs to its end before the cancellation is delivered;
- `try_read_later` is for what is neither here nor worth a task: a layer that waits for a socket or a device begins the read and
  tells its end from the loop. It knows success and "ask `read_into`", nothing else: errors, retries and cancelling are there;
- `try_read_into` and `try_write` are plain functions: they finish the request on the event loop and return True, or
  return False having changed nothing that the async operation would not do again. They take no lock and need none,
  because between look-up and I/O nobody else runs. `try_extent` is the same for what is known of a range.

Offsets and lengths are bytes. Edges are checked once, by `cachefs.layers.checked`, which the graph puts on every edge:
a layer may rely on bounds, alignment and capabilities.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import pydantic
import trio

from cachefs.errors import StoreError
from cachefs.extent import Extent
from cachefs.store.rounds import Done
from cachefs.survivor import SurvivorMemory, Survivors

if TYPE_CHECKING:
    from cachefs.pool.pool import Pool
    from cachefs.store.identity import Identity

__all__ = [
    "ALL_CAPS",
    "MAX_IO",
    "Caps",
    "Done",
    "Environment",
    "Geometry",
    "Later",
    "Layer",
    "Options",
    "Slow",
    "Statistics",
]

Later = Callable[[float | None], None]
"""Told once how a read that was begun without a task has ended. None: its buffer is filled. A time (of trio's clock): it
is not; `read_into` may try until then.
"""

MAX_IO = 1 << 20  # what one FUSE request can carry, and the most a layer hands down at once by default


class Options(pydantic.BaseModel):
    """What a layer or backend accepts in YAML; subclass it as `Config` of the layer. Frozen; unknown keys are errors."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @property
    def remote_store(self) -> str | None:
        """What these options open, for a sentence, when it is no file of this machine: the same text, the same store."""
        return None

    @property
    def passes_writes(self) -> bool:
        """Whether a layer with these options hands writes to its child, instead of keeping or refusing them."""
        return False

    @property
    def aligns(self) -> bool:
        """Whether a layer with these options sends its child only aligned requests, whatever it gets itself."""
        return False


class Caps(enum.Flag):
    """What a layer does itself. What is missing is emulated by the edge above it (`checked`) or refused."""

    NONE = 0
    WRITE = enum.auto()
    FLUSH = enum.auto()
    TRIM = enum.auto()
    ZERO = enum.auto()
    EXTENTS = enum.auto()


ALL_CAPS = Caps.WRITE | Caps.FLUSH | Caps.TRIM | Caps.ZERO | Caps.EXTENTS


@dataclass(frozen=True)
class Geometry:
    """Bytes, fixed from open to close.

    size: of the disk, any number. alignment: power of two that offset and length of every request must be a multiple
    of (except that a request may end at the end of the disk). preferred_io: power of two at which requests are cheap.
    max_io: longest request the layer takes.
    """

    size: int
    alignment: int = 1
    preferred_io: int = 4096
    max_io: int = MAX_IO


@dataclass(frozen=True)
class Statistics:
    """A frozen snapshot of a layer's counters, and of those below it. Names end in their unit where it is not "times"."""

    layer: str
    values: Mapping[str, int | float | str] = field(default_factory=dict)
    child: Statistics | None = None

    def chain(self) -> Iterator[Statistics]:
        """This layer's statistics, then its child's, down to the backend."""
        node: Statistics | None = self
        while node is not None:
            yield node
            node = node.child


@dataclass(frozen=True)
class Environment:
    """What the graph tells a layer that opens. owner: "vm1" or the image's name; writable: may the store be changed.

    forced_stop: set when nothing is to be waited for any more.
    pool: that of the cache in the same stack, if there is one.
    survivors: what outlives the process. is_successor: the mount has outlived a daemon, and guests wait.
    """

    owner: str
    state_dir: Path
    writable: bool = True
    pools: Mapping[str, Pool] = field(default_factory=dict)
    forced_stop: trio.Event = field(default_factory=trio.Event)
    pool: Pool | None = None
    survivors: Survivors = field(default_factory=Survivors)
    is_successor: bool = False

    @asynccontextmanager
    async def memory(
        self, where: str, kind: str, layout: int, store: str, length: int
    ) -> AsyncIterator[SurvivorMemory]:
        """Survivor memory for what was acknowledged and is in no file yet, of what the text *store* names.

        One of a predecessor may have another length. At the end it is gone; after an error it stays, for the next try to open
        the disk or for the next daemon.

        Raises: StoreError.
        """
        key = uuid.uuid5(uuid.NAMESPACE_URL, f"{self.owner} {store}")
        epoch = self.state_dir / kind / f"{key}.epoch"
        try:
            memory = await trio.to_thread.run_sync(self.survivors.memory, kind, {layout}, key, length, epoch)
        except OSError as exc:
            raise StoreError(where, f"cannot write {epoch}: {exc.strerror}; check state_dir") from exc
        try:
            if not memory.is_inherited:
                await trio.to_thread.run_sync(self.survivors.keep, {memory.name: memory.descriptor})
            yield memory
        except BaseException:  # a bug among them: what was acknowledged is not known to be in the store
            self.survivors.give_back({memory.name: memory.descriptor})
            raise
        else:
            self.survivors.release(memory)


class Layer(Protocol):
    """See the module's docstring for the promises."""

    name: str
    geometry: Geometry
    caps: Caps
    identity: Identity
    """Of the contents as they are below the first writable layer; see `cachefs.store.identity`."""

    def try_read_into(self, offset: int, buffer: memoryview) -> bool: ...
    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        """Begin what `read_into` does and have *done* told its end, on the loop, or return False, done nothing.

        *done* is called once, never before this has returned, and within the time limits of the layer. None: *buffer* is
        filled. A time (of trio's clock): it is not, for whatever reason; `read_into` may try until then. *buffer* is the
        layer's until *done* was called. There is no cancelling.
        """

    def try_write(self, offset: int, data: memoryview) -> bool: ...
    def try_flush(self, done: Done) -> bool:
        """Begin what `flush` does and have *done* told its end, in any thread; or return False, done nothing."""

    def try_extent(self, offset: int, length: int) -> Extent | None:
        """The extent that the range begins with, clipped to it; or a part of it. None: that is not known at once."""

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill all of *buffer* or raise."""

    async def write(self, offset: int, data: memoryview) -> None:
        """Write all of *data* or raise; keep no reference to it."""

    async def flush(self) -> None:
        """Every write acknowledged before the call is durable on return."""

    async def trim(self, offset: int, length: int) -> None:
        """The range then reads as zeros and its space is freed (perhaps later)."""

    async def zero(self, offset: int, length: int) -> None:
        """The range then reads as zeros."""

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        """What the range holds, in order, from *offset* on: a non-empty prefix of it, at most *limit* entries."""

    async def prefetch(self, offset: int, length: int) -> None:
        """A hint: caches below may fill."""

    def allocated_bytes(self) -> int:
        """Space that the stack holds on local disks, in bytes; cheap."""

    def pending_error(self) -> Exception | None:
        """A write-out error that no flush has cleared yet: what close() reports."""

    def statistics(self) -> Statistics: ...


class OpenLayer(Protocol):
    """How a layer class is opened: `async with Cow.open(config, child, env) as layer`. Close flushes, then releases."""

    Config: ClassVar[type[Options]]

    def open(self, config: Any, child: Layer, env: Environment) -> AbstractAsyncContextManager[Layer]: ...


class OpenBackend(Protocol):
    Config: ClassVar[type[Options]]

    def open(self, config: Any, env: Environment) -> AbstractAsyncContextManager[Layer]: ...


class Slow:
    """The defaults of a layer that has no fast path."""

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return False

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        return False

    def try_write(self, offset: int, data: memoryview) -> bool:
        return False

    def try_flush(self, done: Done) -> bool:
        return False

    def try_extent(self, offset: int, length: int) -> Extent | None:
        return None
