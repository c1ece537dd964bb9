"""One connection to an NBD export, shared by all requests in flight on it.

Requests are sent one after the other and answered in any order; the task in `run` receives the answers. A connection is *lost*
once, for any reason (closed, reset, silent for too long, a lie), and every request in flight ends with ConnectionLost
then. Nothing is sent again here: what may be is decided by `cachefs.backends.nbd`.

Cancellation. A request that waits for its turn to be sent was not started, and is dropped. One whose first byte may have
been sent is sent to its end. Then: what changes the disk is waited for, shielded, until it is answered or the connection
is lost; anything else is given up, which takes its buffer away from the parser. Its cookie stays reserved, and a late
answer goes into a scratch buffer.

Silence. A connection is lost when nothing came over it for `patience()` seconds while requests wait, or when the oldest
request has waited for `longest_s`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress

import trio

from cachefs.errors import TransientError
from cachefs.nbd.handshake import Export
from cachefs.nbd.protocol import Command, ProtocolError, ReplyParser, Request
from cachefs.nbd.transport import LOST, Transport, reason_of

STAGING = 64 << 10  # bytes that may be received in front of a header
DIRECT = 16 << 10  # what is left of a read's data is received into its buffer from this length on


class ConnectionLost(TransientError):
    """What was in flight on a connection was not answered; it may or may not have been done."""


class ServerSilent(ConnectionLost):
    """It was lost because nothing came over it."""


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
        self._answered: dict[Request, trio.Event] = {}
        self._begun: dict[Request, float] = {}  # in the order in which they were sent
        self._sending = trio.Lock()
        self._scope = trio.CancelScope()
        self._heard = trio.current_time()
        self._staging = memoryview(bytearray(STAGING))
        self._is_direct = False

    @property
    def load(self) -> int:
        """Requests that wait to be sent or answered, given up ones included."""
        return self._queued + len(self._begun)

    async def ask(self, request: Request, data: memoryview | None = None, *, give_up: bool = True) -> None:
        """Send *request* (and *data* of a write) and wait until it is answered: its error, extents and buffer are set.

        give_up: a cancellation ends the wait; without it, only the answer or the loss of the connection does.
        Raises: ConnectionLost.
        """
        await self._wait_for_turn()
        try:
            self._raise_if_lost()
            self._check(request)
            answered = self._begin(request)
            parts = [memoryview(request.encode())] if data is None else [memoryview(request.encode()), data]
            try:
                if rest := self._transport.send_now(parts):
                    with trio.CancelScope(shield=True):
                        await self._transport.send(rest)
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
            self._answered.pop(request, None)
            self._parser.abandon(request)
        if request.cookie in self._parser.pending:  # the event was set by the loss
            self._raise_if_lost()

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

    def _begin(self, request: Request) -> trio.Event:
        if not self._begun:
            self._heard = trio.current_time()
        request.cookie = next(self._cookies)
        self._parser.expect(request)
        self._begun[request] = trio.current_time()
        answered = self._answered[request] = trio.Event()
        self._watch()
        return answered

    def _raise_if_lost(self) -> None:
        if self.lost is not None:
            raise type(self.lost)(self.lost.where, self.lost.detail)

    async def run(self) -> None:
        """Receive answers until the connection is lost."""
        self._watch()
        try:
            with self._scope:
                for turn in itertools.count():
                    if turn % 32 == 31:
                        await trio.lowlevel.checkpoint()  # a server that never pauses is not alone on the loop
                    count = await self._transport.receive(self._where)
                    if not count or self.lost is not None:
                        break
                    self._take(count)
        except ProtocolError as exc:
            self.drop(exc.detail)
        except LOST as exc:
            self.drop(f"receiving failed: {reason_of(exc)}")
        finally:
            if self._scope.cancelled_caught:
                silent_s = trio.current_time() - self._heard
                self._lose(ServerSilent(self._name, f"the server was silent for {silent_s:.1f} s"))
            else:
                self.drop("the server closed it")

    def _where(self) -> memoryview:
        self._is_direct = self._parser.data_left >= DIRECT
        return self._parser.where() if self._is_direct else self._staging

    def _take(self, count: int) -> None:
        self._heard = trio.current_time()
        self.was_useful = True
        parser = self._parser
        answers = parser.received(count) if self._is_direct else parser.feed(self._staging[:count])
        for request in answers:
            del self._begun[request]
            answered = self._answered.pop(request, None)
            if answered is not None:
                answered.set()
            self._on_room()
        self._watch()

    def _watch(self) -> None:
        """Set the time at which the connection counts as lost."""
        if not self._begun:
            self._scope.deadline = float("inf")
        else:
            oldest = next(iter(self._begun.values()))
            self._scope.deadline = min(self._heard + self._patience(), oldest + self._longest_s)

    def drop(self, reason: str) -> None:
        """The connection is lost, if it was not before: everybody who waits for an answer hears of it."""
        self._lose(ConnectionLost(self._name, reason))

    def _lose(self, why: ConnectionLost) -> None:
        if self.lost is not None:
            return
        self.lost = why
        self._transport.abort()
        self._on_lost(self)
        for request in self._begun:
            self._parser.abandon(request)
        self._begun.clear()
        for answered in self._answered.values():
            answered.set()
        self._answered.clear()
        self._scope.cancel()

    async def disconnect(self) -> None:
        """Say goodbye, if the server listens."""
        with trio.move_on_after(1, shield=True), suppress(*LOST):
            async with self._sending:
                if self.lost is None:
                    await self._transport.send([memoryview(Request(Command.DISCONNECT, cookie=0).encode())])
                    self._transport.close()
        self.drop("closed")
