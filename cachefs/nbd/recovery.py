"""Writes, trims and zeros on a server that may die: what was sent is sent again until it is known to be done.

Every change is kept (`cachefs.nbd.unflushed`) from its first byte on the way until a flush of the server has made it durable.
When a connection is lost meanwhile, or a flush fails, the server may have lost any of them. Then, and until all of them
were sent again:

- What overlaps one of them waits, reads too: the server would answer with what it had before. Everything else goes on.
- They are sent again in their order, but only behind a *fence* when one of them was not answered: the first copy may be on its
  way still, and land after a later write of the same bytes. The fence of a server that we started is its end; that of a
  remote one is time, counted from the loss.
- One whose client is gone is not sent again; its range is free behind the fence.
- A flush that was not answered needs the fence too: it may fail yet, and a server that cannot write drops what it holds then,
  and says so to nobody. So behind the fence everything unflushed is sent again, what was answered meanwhile included.

    sound --(lost)--> fenced --(fence)--> resending --(all answered)--> sound
                        ^-----(lost)----------'

All connections are given up together at such a loss, so that there is one moment from which the fence counts.

State: the changes in the memory; `_due`, those of them to send again, and `_barred`, their ranges; `_in_flight`, those of
which a copy is on its way. A flush vouches for what was answered before it was sent, if no connection was lost until its
answer.

Concurrency: one event loop; `run` is a task of the backend. Cancelling a change before its first byte is sent drops it; then it
is waited for, shielded, until it is answered or its connection lost; while it waits to be sent again it may be cancelled.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence

import trio

from cachefs.errors import CachefsError, PermanentError, TransientError
from cachefs.nbd.client import Client
from cachefs.nbd.connection import ConnectionLost
from cachefs.nbd.protocol import FUA, NO_HOLE, TRANSIENT_ERRORS, Command, Request
from cachefs.nbd.unflushed import Change, Kind, Ranges, Unflushed, next_wave, without_superseded

log = logging.getLogger(__name__)

_WAVE = 64  # changes that are sent again side by side
_RETRY_S = 1.0  # between two tries to send again what the server refuses

_COMMANDS = {
    Kind.WRITE: (Command.WRITE, 0),
    Kind.TRIM: (Command.WRITE_ZEROES, 0),
    Kind.ZERO: (Command.WRITE_ZEROES, NO_HOLE),
}

Fence = Callable[[float], Awaitable[None]]
"""Returns when nothing that was sent before the given time (of trio's clock) can reach the disk any more."""


class _Barred(Exception):
    """Something that is to be sent again overlaps, since a moment ago."""


class _NoRoom(Exception):
    """Too much is unflushed."""


class _Unwanted(Exception):
    """Whoever wanted it has gone while it waited to be sent again."""


class _Writer:
    """Whoever waits for a change. latest: until then. change: once its first byte was sent. settled: it was sent again, or
    refused.
    """

    def __init__(self, kind: Kind, data: memoryview | None, latest: float) -> None:
        self.kind = kind
        self.data = data
        self.latest = latest
        self.change: Change | None = None
        self.settled = trio.Event()
        self.refusal: Request | None = None


class Recovery:
    """flushes: whether the server has a flush; without one nothing is kept, and *fua* makes each change durable.

    opened_at: on trio's clock; whatever a daemon before us has sent, it has sent by then.
    """

    def __init__(
        self,
        name: str,
        unflushed: Unflushed,
        client: Client,
        fence: Fence,
        *,
        flushes: bool,
        fua: bool,
        opened_at: float = 0.0,
    ) -> None:
        self.problem: CachefsError | None = None
        """Why the last flush failed, or what was acknowledged cannot be sent again; None since a flush succeeded."""
        self.resent = 0
        self._name = name
        self._unflushed = unflushed
        self._client = client
        self._fence = fence
        self._flushes = flushes
        self._flags = FUA if fua and not flushes else 0
        self._writers: dict[Change, _Writer] = {}
        self._in_flight: set[Change] = set()
        self._abandoned: set[Change] = set()
        self._due: list[Change] = []
        self._barred = Ranges(())
        self._is_flush_under_way = False
        self._flush_latest = math.inf
        self._is_flush_lost = False
        self._needs_fence = False
        self._fenced_from = 0.0
        self._losses = 0
        self._flushed = 0  # so many of the answered ones
        self._flushing = trio.Lock()
        self._progress = trio.lowlevel.ParkingLot()  # something was answered, refused or flushed
        self._work = trio.Event()
        self._sound = trio.Event()
        self._sound.set()
        if len(unflushed):  # of a daemon that died: its clients ask again for what was not answered
            self._abandoned.update(change for change in unflushed if not change.is_answered)
            self._in_flight.update(change for change in unflushed if change.was_under_way)
            self._is_flush_under_way = unflushed.may_flush
            self.lost("taken over from the daemon before")
            self._fenced_from = opened_at

    @property
    def is_sound(self) -> bool:
        return self._sound.is_set()

    @property
    def is_risky(self) -> bool:
        """Whether the loss of a connection now would have to be fenced."""
        return bool(self._in_flight) or self._is_flush_under_way

    def is_overdue(self, now: float) -> bool:
        """Whether somebody waits for what is under way, and should not any more: it is not taken back from a connection."""
        return any(writer.latest <= now for writer in self._writers.values()) or (
            self._is_flush_under_way and self._flush_latest <= now
        )

    @property
    def is_flushed(self) -> bool:
        return self._flushed == self._unflushed.answered and self.problem is None

    @property
    def unflushed_bytes(self) -> int:
        return self._unflushed.used_bytes

    # ---- losses

    def lost(self, reason: str) -> None:
        """A connection was lost: what was answered may be lost, what was not may still arrive."""
        self._losses += 1
        if not len(self._unflushed):
            return
        if self.is_risky:
            self._needs_fence = True
            self._fenced_from = trio.current_time()
            self._in_flight.clear()
            self._is_flush_lost |= self._is_flush_under_way
            self._is_flush_under_way = False
        self._client.drop_all(reason)
        self._begin(reason)

    def _begin(self, reason: str) -> None:
        if self.is_sound:
            log.warning("%s: %d unflushed changes are to be sent again: %s", self._name, len(self._unflushed), reason)
            self._sound = trio.Event()
        self._due = list(self._unflushed)
        self._barred = Ranges(self._due)
        self._work.set()
        self._progress.unpark_all()

    async def run(self) -> None:
        """Send again what must be, for ever."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            try:
                await self._wait_behind_fence()
                await self._resend()
            except CachefsError as exc:
                self._work.set()
                if isinstance(exc, PermanentError):
                    self.note(exc)
                if not isinstance(exc, ConnectionLost):
                    await trio.sleep(_RETRY_S)

    async def _wait_behind_fence(self) -> None:
        while True:
            if self._needs_fence:
                since = self._fenced_from
                await self._fence(since)
                self._needs_fence = self._fenced_from != since
            elif self._is_flush_lost:
                self._is_flush_lost = self._unflushed.may_flush = False
                self._begin("a flush was not answered")
            elif not self._in_flight.isdisjoint(self._due):  # a flush failed, and their connections live
                await self._progress.park()
            else:
                return

    async def _resend(self) -> None:
        """Raises: ConnectionLost; PermanentError when the server refuses what it had acknowledged."""
        losses = self._losses
        plan = without_superseded(self._due)
        while plan:
            self._drop_abandoned(plan[:_WAVE])
            wave = next_wave([change for change in plan[:_WAVE] if not change.is_dropped])
            errors: list[CachefsError] = []
            async with trio.open_nursery() as nursery:
                for change in wave:
                    nursery.start_soon(self._send_again, change, errors)
            if errors:
                raise errors[0]
            if losses != self._losses:
                raise ConnectionLost(self._name, "a connection was lost again")
            self.resent += len(wave)
            plan = plan[plan.index(wave[-1]) + 1 :] if wave else plan[_WAVE:]
        self._due = []
        self._barred = Ranges(())
        self._sound.set()
        log.info("%s: everything unflushed was sent again", self._name)

    def _drop_abandoned(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change in self._abandoned:
                self._abandoned.remove(change)
                self._drop(change)

    async def _send_again(self, change: Change, errors: list[CachefsError]) -> None:
        request = self._request(change.kind, change.offset, change.length, change)
        try:
            await self._client.ask(request, change.data, give_up=False)
        except _Unwanted:
            self._drop_abandoned([change])
            return
        except CachefsError as exc:
            errors.append(exc)
            return
        self._in_flight.discard(change)
        writer = self._writers.get(change)
        if not request.error:
            self._abandoned.discard(change)  # too late: it is done
            self._answer(change)
        elif change.is_answered:
            detail = (
                f"the server refuses {change.kind.name.lower()} {change.offset}+{change.length}, which it had "
                f"acknowledged before: {request.reason}; it is kept, and sent again"
            )
            kind = TransientError if request.error in TRANSIENT_ERRORS else PermanentError
            errors.append(kind(self._name, detail))
        else:
            self._drop(change)
            if writer is not None:
                writer.refusal = request
        if writer is not None:
            writer.settled.set()

    # ---- what may be sent

    def check(self, request: Request) -> None:
        """In the step that sends the first byte of *request*. Raises: what makes its sender wait."""
        token = request.token
        if request.command is Command.FLUSH:
            if not self.is_sound:
                raise _Barred
            self._is_flush_under_way = self._unflushed.may_flush = True
            return
        if isinstance(token, Change):
            if token in self._abandoned:
                raise _Unwanted
            self._unflushed.send_again(token)
            self._in_flight.add(token)
            return
        if self.bars(request.offset, request.length):
            raise _Barred
        if isinstance(token, _Writer):
            change = self._unflushed.put(token.kind, request.offset, request.length, token.data)
            if change is None:
                raise _NoRoom
            token.change = change
            self._writers[change] = token
            self._in_flight.add(change)

    async def ask(self, request: Request) -> None:
        """A request that changes nothing, when nothing that is to be sent again overlaps. Raises: ConnectionLost."""
        while True:
            try:
                return await self._client.ask(request)
            except _Barred:
                await self._wait_until_clear(request.offset, request.length)

    async def _wait_until_clear(self, offset: int, length: int) -> None:
        while self.bars(offset, length):
            await self._sound.wait()

    def bars(self, offset: int, length: int) -> bool:
        """Whether something overlaps that is to be sent again first."""
        return bool(self._due) and self._barred.overlap(offset, length)

    async def change(
        self, kind: Kind, offset: int, length: int, data: memoryview | None, latest: float = math.inf
    ) -> Request:
        """Make a change and return its request, answered. latest: see `is_overdue`.

        Raises: ConnectionLost when nothing of it was sent.
        """
        while True:
            writer = _Writer(kind, data, latest)
            request = self._request(kind, offset, length, writer)
            try:
                await self._client.ask(request, data, give_up=False)
                return self._finish(writer, request)
            except _Barred:
                await self._wait_until_clear(offset, length)
            except _NoRoom:
                await self._make_room(latest)
            except ConnectionLost:
                if writer.change is None:
                    raise
                await self._wait_until_resent(writer, writer.change)
                return writer.refusal or request

    def _request(self, kind: Kind, offset: int, length: int, token: object) -> Request:
        command, flags = _COMMANDS[kind]
        return Request(command, offset, length, flags | self._flags, token=token)

    def _finish(self, writer: _Writer, request: Request) -> Request:
        change = writer.change
        assert change is not None
        del self._writers[change]
        self._in_flight.discard(change)
        if request.error:
            self._drop(change)
        else:
            self._answer(change)
        return request

    def _answer(self, change: Change) -> None:
        self._unflushed.answer(change)
        if not self._flushes:  # then what it acknowledges is durable, or nobody can know
            self._unflushed.drop(change)
        self._progress.unpark_all()

    def _drop(self, change: Change) -> None:
        self._unflushed.drop(change)
        self._progress.unpark_all()

    async def _wait_until_resent(self, writer: _Writer, change: Change) -> None:
        try:
            await writer.settled.wait()
        finally:
            del self._writers[change]
            if not writer.settled.is_set():  # cancelled
                self._abandoned.add(change)

    async def _make_room(self, latest: float) -> None:
        """Returns when something that was kept may be gone."""
        if self._unflushed.answered > self._flushed:
            await self.flush(latest)
        else:
            await self._progress.park()

    # ---- flush

    async def flush(self, latest: float = math.inf) -> None:
        """Returns when everything that was answered before is durable; after an error the next one tries again.

        latest: see `is_overdue`.
        Raises: ConnectionLost; PermanentError when the server cannot.
        """
        wanted = self._unflushed.answered
        async with self._flushing:
            while self._flushed < wanted:
                self._flush_latest = latest
                await self._flush_now()

    async def _flush_now(self) -> None:
        await self._sound.wait()
        answered, losses = self._unflushed.answered, self._losses
        request = Request(Command.FLUSH)
        if self._flushes:
            try:
                await self._client.ask(request, give_up=False)  # for its error has to be heard
            except _Barred:
                return
        if losses != self._losses:
            return  # it may not vouch for what was answered over a connection that is lost; all of that is sent again
        self._is_flush_under_way = self._unflushed.may_flush = False
        if request.error:
            self._begin("a flush failed")  # a server that could not write may have dropped it, as a kernel does
            raise PermanentError(self._name, f"flush: the server says: {request.reason}")
        self._flushed = answered
        self._unflushed.drop_flushed(answered)
        self._progress.unpark_all()
        self.problem = None

    def note(self, error: CachefsError) -> None:
        """Remember why a flush failed."""
        if self.problem is None:
            log.error("%s: %s", self._name, error.detail)
        self.problem = error
