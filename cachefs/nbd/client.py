"""The connections to an NBD export: made, kept up, and given requests.

`Client` keeps up to `connections` of them, makes lost ones anew for as long as it is open, with growing pauses, and gives each
request to one of them (`_choose`). A request that waits for a connection was not started: cancelling drops it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from cachefs.errors import CachefsError, TransientError
from cachefs.insistence import Breaker, backoff
from cachefs.nbd.connection import Connection, ConnectionLost, ServerSilent
from cachefs.nbd.handshake import Export, Flag, RefusedError
from cachefs.nbd.protocol import Request
from cachefs.nbd.transport import LOST, Transport, reason_of

log = logging.getLogger(__name__)

DEPTH = 64  # requests in flight on a connection
CROWD, CROWD_BYTES = 8, 1 << 20  # requests, and bytes to be read, beyond which the next connection is used

Dial = Callable[[], Awaitable[tuple[Transport, Export]]]
"""Makes a transport and does the handshake. Raises: RefusedError, ProtocolError, and what transports raise."""


@dataclass(frozen=True)
class Limits:
    """Seconds, and a number. connect_s: for each try to connect. longest_s: for the oldest request in flight.

    writable: whether there will be changes; only then it counts which ones a server takes that comes back.
    """

    connections: int = 1
    connect_s: float = 5.0
    longest_s: float = 60.0
    writable: bool = True


class Client:
    """Up to `connections` connections. *dial* makes one: transport and export after the handshake."""

    def __init__(
        self,
        name: str,
        dial: Dial,
        limits: Limits,
        *,
        patience: Callable[[], float],
        breaker: Breaker,
        on_lost: Callable[[ConnectionLost], None] = lambda why: None,
        check: Callable[[Request], None] = lambda request: None,
    ) -> None:
        self.trouble = "not connected yet"
        """Why the last connection was lost or not made."""
        self.losses = 0
        self._name = name
        self._dial = dial
        self._limits = limits
        self._patience = patience
        self._breaker = breaker
        self._on_lost = on_lost
        self._check = check
        self._connections: list[Connection] = []
        self._changed = trio.lowlevel.ParkingLot()
        self._is_closing = False
        self._silent_since: float | None = None  # of the connection that was lost last

    @property
    def connected(self) -> int:
        return len(self._connections)

    @property
    def in_flight(self) -> int:
        return sum(connection.load for connection in self._connections)

    @asynccontextmanager
    async def keep_connected(
        self, first: Connection, beside: Sequence[Callable[[], Awaitable[None]]] = ()
    ) -> AsyncIterator[None]:
        """With *first* and as many more as there may be, each made anew whenever it is lost.

        *beside* runs as long as the connections are kept.
        """
        slots = self._limits.connections if Flag.CAN_MULTI_CONN in first.export.flags else 1
        lasting = trio.CancelScope(shield=True)  # a cancelled owner still flushes when it closes
        self._add(first)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run, lasting, first, slots, beside)
            try:
                yield
            finally:
                self._is_closing = True
                for connection in [*self._connections]:
                    await connection.disconnect()
                lasting.cancel()

    async def _run(
        self, scope: trio.CancelScope, first: Connection, slots: int, beside: Sequence[Callable[[], Awaitable[None]]]
    ) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                for index in range(slots):
                    nursery.start_soon(self._keep_connected, first.export, None if index else first)
                for task in beside:
                    nursery.start_soon(task)

    async def connect(self, deadline_s: float) -> Connection:
        """The first connection. Raises: RefusedError; TransientError when there was none within *deadline_s*."""
        with trio.move_on_after(deadline_s):
            for pause in backoff():
                try:
                    return await self._connect()
                except TransientError:
                    await trio.sleep(pause)
        raise TransientError(self._name, f"no connection within {deadline_s:.0f} s: {self.trouble}")

    async def _connect(self) -> Connection:
        """Raises: TransientError; RefusedError."""
        try:
            with trio.fail_after(self._limits.connect_s):
                transport, export = await self._dial()
        except CachefsError as exc:
            self.trouble = exc.detail
            raise
        except (*LOST, trio.TooSlowError) as exc:
            self.trouble = (
                f"no connection within {self._limits.connect_s:.1f} s"
                if isinstance(exc, trio.TooSlowError)
                else f"cannot connect: {reason_of(exc)}"
            )
            raise ConnectionLost(self._name, self.trouble) from exc
        return Connection(
            self._name,
            transport,
            export,
            patience=self._patience,
            longest_s=self._limits.longest_s,
            on_lost=self._lose,
            on_room=self._make_room,
            check=self._check,
        )

    async def _keep_connected(self, expected: Export, connection: Connection | None) -> None:
        """One of the connections, for ever."""
        pauses = backoff()
        while True:
            if connection is None and (connection := await self._reconnect(expected)) is not None:
                self._add(connection)
                if self.losses:
                    log.info("%s: connected again", self._name)
            if connection is not None:
                await connection.run()
                if connection.was_useful:
                    pauses = backoff()
                connection = None
            await trio.sleep(next(pauses))

    async def _reconnect(self, expected: Export) -> Connection | None:
        try:
            connection = await self._connect()
        except (TransientError, RefusedError) as exc:  # an export may be away while its server starts
            log.debug("%s: %s", self._name, exc.detail)
            return None
        difference = _difference(connection.export, expected, writable=self._limits.writable)
        if difference:
            self.trouble = f"the export is another one now ({difference}): mount it anew"
            connection.drop(self.trouble)
            return None
        return connection

    def _add(self, connection: Connection) -> None:
        self._connections.append(connection)
        self._breaker.reached()
        self._changed.unpark_all()

    def drop_all(self, reason: str) -> None:
        """Give every connection up, so that nothing that was sent and not answered is answered any more."""
        connections, self._connections = self._connections, []
        for connection in connections:
            self.losses += 1
            connection.drop(reason)
        self._note_absence()

    def _note_absence(self) -> None:
        """From the moment on in which a silent server was last heard, if it is that."""
        if not self._connections:
            self._breaker.lost(trio.current_time() if self._silent_since is None else self._silent_since)

    def _make_room(self) -> None:
        if self._changed:
            self._changed.unpark()

    def _lose(self, connection: Connection) -> None:
        if connection not in self._connections:
            return
        self._connections.remove(connection)
        self._silent_since = connection.lost.since if isinstance(connection.lost, ServerSilent) else None
        self._note_absence()
        if self._is_closing or connection.lost is None:
            return
        self.losses += 1
        self.trouble = connection.lost.detail
        log.warning("%s: connection lost, making a new one: %s", self._name, self.trouble)
        self._on_lost(connection.lost)

    async def ask(self, request: Request, data: memoryview | None = None, *, give_up: bool = True) -> None:
        """As `Connection.ask`, on the connection with the fewest requests; waits for one as long as there is none."""
        while True:
            connection = self._choose()
            if connection is not None:
                break
            await self._changed.park()
        await connection.ask(request, data, give_up=give_up)

    def try_ask_later(self, request: Request) -> bool:
        """As `Connection.ask_later`; False, done nothing, while there is no connection with room for it."""
        connection = self._choose()
        if connection is None:
            return False
        connection.ask_later(request)
        return True

    def _choose(self) -> Connection | None:
        """The first that is not crowded, else the one with the fewest requests; None when all have DEPTH.

        Requests that go over one connection share system calls and wake-ups, here and in the server; but nobody is to wait
        for long data of others, and nbdkit serves no more than 16 requests of a connection at once.
        """
        best, least = None, DEPTH
        for connection in self._connections:
            load = connection.load
            if load < CROWD and connection.expected_bytes < CROWD_BYTES:
                return connection
            if load < least:
                best, least = connection, load
        return best


def _difference(export: Export, expected: Export, *, writable: bool) -> str:
    """What was promised upwards at open, or is relied on, and does not hold for *export*; empty where all of it does."""
    if export.size != expected.size:
        return f"{export.size} bytes, it had {expected.size}"
    if export.minimum > expected.minimum or export.maximum < expected.maximum:
        limits = f"{expected.minimum} to {expected.maximum}"
        return f"requests of {export.minimum} to {export.maximum} bytes, it took {limits}"
    if not writable:
        return ""
    needed = Flag.SEND_WRITE_ZEROES | Flag.CAN_MULTI_CONN  # a flush has to vouch for all connections
    if Flag.SEND_FLUSH not in expected.flags:
        needed |= Flag.SEND_FUA
    changed = export.flags ^ expected.flags
    wrong = changed & (Flag.READ_ONLY | Flag.SEND_FLUSH | (needed & expected.flags))
    return f"it differs in {', '.join(str(flag.name) for flag in Flag if flag & wrong)}" if wrong else ""
