"""One connection to an NBD export, shared by all requests in flight on it.

Requests are sent one after the other and answered in any order; tasks in `run` receive the answers, send what `ask_later` has
collected, and look at the time. A connection is *lost*
once, for any reason (closed, reset, silent for too long, a lie), and every request in flight ends with ConnectionLost
then. Nothing is sent again here: what may be is decided by `cachefs.backends.nbd`.

Cancellation. A request that waits for its turn to be sent was not started, and is dropped. One whose first byte may have
been sent is sent to its end. Then: what changes the disk is waited for, shielded, until it is answered or the connection
is lost; anything else is given up, which takes its buffer away from the parser. Its cookie stays reserved, and a late
answer goes into a scratch buffer.

What `ask_later` is given is sent at once while nothing else is under way, else together with what comes in the same turn of
the loop: a system call for each request, and a wake-up of the server, cost more than all else. It cannot be cancelled.

Silence. A connection is lost when nothing came over it for `patience()` seconds while requests wait, or when the oldest
request has waited for `longest_s`. That is looked at every LOOK_S, and at the very moment where it can be foreseen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from contextlib import suppress

import trio

from cachefs.errors import TransientError
from cachefs.nbd.handshake import Export
from cachefs.nbd.protocol import SHUTTING_DOWN, Command, ProtocolError, ReplyParser, Request
from cachefs.nbd.transport import LOST, Transport, reason_of

STAGING = 64 << 10  # bytes that may be received in front of a header
DIRECT = 16 << 10  # what is left of a read's data is received into its buffer from this length on
HEAD = 512  # bytes that may be received in front of the header of a reply that is likely to be a long one
MAX_PARTS = 512  # of one system call; the kernel takes 1024
LOOK_S = 1.0  # at most between two looks at the time
LISTEN_S = 0.05  # before a server is called silent


class ConnectionLost(TransientError):
    """What was in flight on a connection was not answered; it may or may not have been done."""


class ServerSilent(ConnectionLost):
    """It was lost because nothing came over it. since: trio's clock."""

    since = 0.0


class Connection:
    """A transport after its handshake.

    on_lost is called at the moment of the loss, before anybody hears of it; on_room when another request may be sent. What
    *check* raises is raised instead of sending a request, in the step that would send its first byte.
    """

    def __init__(
        self,
        name: str,
        transport: Transport,
        export: Export,
        *,
        patience: Callable[[], float],
        longest_s: float,
        on_lost: Callable[[Connection], None] = lambda connection: None,
        on_room: Callable[[], None] = lambda: None,
        check: Callable[[Request], None] = lambda request: None,
    ) -> None:
        self.export = export
        self.lost: ConnectionLost | None = None
        self.was_useful = False
        self._name = name
        self._transport = transport
        self._parser = ReplyParser(structured=export.structured, context=export.context)
        self._patience = patience
        self._longest_s = longest_s
        self._on_lost = on_lost
        self._on_room = on_room
        self._check = check
        self._queued = 0  # requests that wait for their turn to be sent
        self._cookies = itertools.count(1)
        self._pending = self._parser.pending
        self._sending = trio.Lock()
        self._unsent: list[memoryview] = []  # begun; goes out in front of whatever is sent next
        self._sender = trio.lowlevel.ParkingLot()
        self._watchdog = trio.lowlevel.ParkingLot()
        self._scope = trio.CancelScope()
        self._heard = trio.current_time()
        self.expected_bytes = 0
        """Of reads in flight."""
        self._staging = memoryview(bytearray(STAGING))
        self._head = self._staging[:HEAD]
        self._direct = 0

    @property
    def load(self) -> int:
        """Requests that wait to be sent or answered, given up ones included."""
        return self._queued + len(self._pending)

    async def ask(self, request: Request, data: memoryview | None = None, *, give_up: bool = True) -> None:
        """Send *request* (and *data* of a write) and wait until it is answered: its error, extents and buffer are set.

        give_up: a cancellation ends the wait; without it, only the answer or the loss of the connection does.
        Raises: ConnectionLost.
        """
        await self._wait_for_turn()
        answered = trio.Event()
        request.then = lambda request: answered.set()
        try:
            self._raise_if_lost()
            self._check(request)
            self._begin(request)
            if data is not None:
                self._unsent.append(data)
            try:
                self._send_now()
                if self._unsent:
                    with trio.CancelScope(shield=True):
                        await self._send_unsent()
            except LOST as exc:
                self.drop(f"sending failed: {reason_of(exc)}")
        finally:
            self._sending.release()
        try:
            if give_up:
                await answered.wait()
            else:
                with trio.CancelScope(shield=True):
                    await answered.wait()
        finally:
            self._parser.abandon(request)
        if not request.is_answered:  # the event was set by the loss
            self._raise_if_lost()

    def ask_later(self, request: Request) -> None:
        """Send *request* soon; its `then` hears of the answer or the loss, and never before this has returned."""
        goes_now = not self._pending and not self._unsent and not self._sending.locked()
        self._begin(request)
        if goes_now:
            with suppress(*LOST):  # whoever sends what is left meets it again
                self._send_now()
        if self._unsent:
            self._sender.unpark()

    async def _wait_for_turn(self) -> None:
        if not self._sending.locked():
            self._sending.acquire_nowait()
            return
        self._queued += 1
        try:
            await self._sending.acquire()
        except BaseException:
            self._on_room()
            raise
        finally:
            self._queued -= 1

    def _begin(self, request: Request) -> None:
        now = trio.current_time()
        if not self._pending:
            self._heard = now
            if self._watchdog:
                self._watchdog.unpark()
        if request.command is Command.READ:
            self.expected_bytes += request.length
        request.cookie = next(self._cookies)
        request.sent_at = now
        self._parser.expect(request)
        self._unsent.append(memoryview(request.encode()))

    def _send_now(self) -> None:
        """What can be sent without waiting, while nobody else sends. Raises: what transports raise."""
        parts = self._unsent
        if len(parts) > MAX_PARTS:
            parts = [memoryview(b"".join(parts))]
        if parts:
            self._unsent = self._transport.send_now(parts)

    async def _send_unsent(self) -> None:
        """All of it; the caller holds the lock."""
        while self._unsent:
            parts, self._unsent = self._unsent, []
            await self._transport.send(parts)

    async def _send_later(self) -> None:
        """What `ask_later` collects, for ever."""
        while True:
            if not self._unsent:
                await self._sender.park()
            await self._wait_for_turn()
            try:
                self._send_now()
                await self._send_unsent()
            except LOST as exc:
                self.drop(f"sending failed: {reason_of(exc)}")
            finally:
                self._sending.release()

    def _raise_if_lost(self) -> None:
        if self.lost is not None:
            raise type(self.lost)(self.lost.where, self.lost.detail)

    async def run(self) -> None:
        """Serve until the connection is lost."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_later)
            nursery.start_soon(self._watch)
            await self._receive()
            nursery.cancel_scope.cancel()

    async def _receive(self) -> None:
        try:
            with self._scope:
                for turn in itertools.count():
                    if turn % 32 == 31:
                        await trio.lowlevel.checkpoint()  # a server that never pauses is not alone on the loop
                    if not self._pending and self.lost is None:
                        await self._transport.wait()  # nothing can have come: an attempt to receive it costs more
                    count = await self._transport.receive(self._where)
                    if not count or self.lost is not None:
                        break
                    self._take(count)
        except ProtocolError as exc:
            self.drop(exc.detail)
        except LOST as exc:
            self.drop(f"receiving failed: {reason_of(exc)}")
        finally:
            self.drop("the server closed it")

    def _where(self) -> tuple[memoryview, ...]:
        """The buffer of a long read, and behind it room for what follows; else room for as much as comes."""
        left = self._parser.data_left
        if left >= DIRECT:
            place = self._parser.where()
            self._direct = len(place)
            return place, self._head
        self._direct = 0
        oldest = next(iter(self._pending.values()), None)
        is_long = oldest is not None and oldest.length > DIRECT and oldest.command is Command.READ
        return (self._head if is_long and not left else self._staging,)

    def _take(self, count: int) -> None:
        self._heard = trio.current_time()
        self.was_useful = True
        if count < self._direct:
            self._parser.advance(count)
            return
        direct = self._direct
        if direct:
            self._finish(self._parser.received(direct))
        if count > direct:
            self._finish(self._parser.feed(self._staging[: count - direct]))

    def _finish(self, answers: Iterable[Request]) -> None:
        for request in answers:
            if request.command is Command.READ:
                self.expected_bytes -= request.length
            request.then(request)
            self._on_room()
            if request.error == SHUTTING_DOWN:
                self.drop("the server is shutting down")  # nbdkit waits with that until its clients are gone

    async def _watch(self) -> None:
        """Lose the connection when nothing is heard for too long.

        What came while this process stood still (stopped, or busy) is received before that counts as silence.
        """
        has_listened = False
        while True:
            if not self._pending:
                await self._watchdog.park()
            now = trio.current_time()
            patience, oldest = self._patience(), next(iter(self._pending.values()), None)
            limit = min(self._heard + patience, oldest.sent_at + self._longest_s) if oldest is not None else math.inf
            if now >= limit and not has_listened:
                has_listened = True
                await trio.sleep(LISTEN_S)
                continue
            if now >= limit:
                why = ServerSilent(self._name, f"the server was silent for {now - self._heard:.1f} s")
                why.since = self._heard
                self._lose(why)
                return
            has_listened = False
            await trio.sleep(min(limit - now, patience, LOOK_S))

    def drop(self, reason: str) -> None:
        """The connection is lost, if it was not before: everybody who waits for an answer hears of it."""
        self._lose(ConnectionLost(self._name, reason))

    def _lose(self, why: ConnectionLost) -> None:
        if self.lost is not None:
            return
        self.lost = why
        self._transport.abort()
        self._on_lost(self)
        self._scope.cancel()
        unanswered = list(self._pending.values())
        self._pending.clear()
        self._unsent.clear()
        for request in unanswered:
            self._parser.abandon(request)
        for request in unanswered:
            request.then(request)

    async def disconnect(self) -> None:
        """Say goodbye, if the server listens."""
        with trio.move_on_after(1, shield=True), suppress(*LOST):
            async with self._sending:
                if self.lost is None:
                    self._unsent.append(memoryview(Request(Command.DISCONNECT, cookie=0).encode()))
                    await self._send_unsent()
                    self._transport.close()
        self.drop("closed")
