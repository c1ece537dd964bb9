"""nbd: an export of an NBD server (nbdkit, qemu-nbd, nbd-server), over TCP, TLS or a unix socket; or of one that we start.

What fails, and what then:
- A connection that is lost, or silent for `timeout`, is made anew, for as long as the disk is open. Reads and questions for
  extents that were on it are asked again until `deadline`, then `on_failure` decides (`cachefs.insistence`).
- Changes that were on it, and those that were acknowledged and not flushed, are kept and sent again, behind a fence where
  that is needed (`cachefs.nbd.recovery`). So nothing that was acknowledged is lost with a server, and no error stays.
- While a change is under way, giving up a connection costs a fence: then a silent server is given half of it.

Concurrency: none of its own; a server orders overlapping requests as it likes.
Trims are WRITE_ZEROES that may make holes, zeros WRITE_ZEROES with NO_HOLE; NBD_CMD_TRIM guarantees nothing and is never used.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shlex
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial

import trio

from cachefs.backends.nbdoptions import NbdConfig, TlsConfig
from cachefs.errors import BackendError, CachefsError, NoSpaceError, PermanentError, StoreError, TransientError
from cachefs.extent import Extent
from cachefs.layers.base import MAX_IO, Caps, Done, Environment, Geometry, Later, Statistics
from cachefs.nbd.address import Address, parse_uri
from cachefs.nbd.child import Child
from cachefs.nbd.client import Client, Dial, Limits
from cachefs.nbd.connection import Connection, ConnectionLost, ServerSilent
from cachefs.nbd.dial import dialer, tls_context
from cachefs.nbd.handshake import Export, Flag, RefusedError
from cachefs.nbd.protocol import TRANSIENT_ERRORS, Command, Request
from cachefs.nbd.recovery import Recovery
from cachefs.nbd.status import StatusQuestions
from cachefs.nbd.unflushed import Kind, Unflushed, body_size, data_size
from cachefs.store.identity import SAMPLE_SIZE, SAMPLES, Identity
from cachefs.units import align_down, align_up

log = logging.getLogger(__name__)

_MAX_ZERO = 32 << 20  # bytes of one WRITE_ZEROES: a server without a fast way writes them
_END_GRACE_S = 1.0  # for a server of ours that has to be started anew
_FORCED_S = 0.5  # for what is under way when a stop is forced
_MEMORY_LAYOUT = 1


class Nbd:
    """An open export; `Nbd.open` makes it."""

    Config = NbdConfig

    def __init__(
        self, name: str, config: NbdConfig, address: Address, dial: Dial, child: Child | None, *, writable: bool
    ) -> None:
        self.name = name
        self._address = address
        self._config = config
        self._child = child
        self._timeout_s = config.timeout
        self._fence_s = config.fence
        self._risky_timeout_s = config.timeout if child is not None else max(config.timeout, config.fence / 2)
        self._hung = trio.Event()
        self._ending = trio.Lock()
        self._last_flush = trio.CancelScope(shield=True)
        self._insistence = config.insistence(name, self._trouble)
        self._client = Client(
            name,
            dial,
            Limits(config.connections, config.connect_timeout, config.deadline, writable),
            patience=self._patience,
            breaker=self._insistence.breaker,
            on_lost=self._lost,
            check=lambda request: self._recovery.check(request),
        )
        self._recovery: Recovery

    @classmethod
    @asynccontextmanager
    async def open(
        cls, config: NbdConfig, env: Environment, dial: Dial | None = None, *, kind: str = "nbd"
    ) -> AsyncIterator[Nbd]:
        """*dial* stands for the network, in tests; *kind* is what the configuration calls the backend.

        Raises: StoreError when the server cannot be started or reached within the deadline, or will not serve the export.
        """
        name = f"{env.owner}/{kind}"
        async with AsyncExitStack() as stack:
            opened_at = trio.current_time()
            child = None
            if config.command is not None:
                opening = Child.open(name, config.command, env.state_dir, env.forced_stop)
                child = await stack.enter_async_context(opening)
            try:
                backend = await stack.enter_async_context(cls._open_over(name, config, env, dial, child, opened_at))
            finally:
                if child is not None:
                    await child.check_lasted()  # its end explains more than what it led to
            yield backend

    @classmethod
    @asynccontextmanager
    async def _open_over(
        cls, name: str, config: NbdConfig, env: Environment, dial: Dial | None, child: Child | None, opened_at: float
    ) -> AsyncIterator[Nbd]:
        address = parse_uri(config.uri or "") if child is None else child.address
        dial = dial or _dialer(name, config, address)
        backend = cls(name, config, address, dial, child, writable=env.writable)
        problem: CachefsError | None = None
        async with _memory(name, config, env) as unflushed:
            first = await backend._connect_first(env)
            recovery = backend._recover(unflushed, first.export, opened_at)
            beside = (recovery.run, backend._restart_what_hangs, partial(backend._stop_when_forced, env.forced_stop))
            async with backend._client.keep_connected(first, beside):
                try:
                    await backend._begin(first.export, writable=env.writable)
                except StoreError as exc:
                    problem = exc
                else:
                    try:
                        yield backend
                    finally:
                        problem = await backend._flush_at_last()
            if isinstance(problem, StoreError):
                raise problem  # what is unflushed stays for the next try
        if problem is not None:
            raise problem

    async def _connect_first(self, env: Environment) -> Connection:
        """Raises: StoreError."""
        # guests wait already where the mount has outlived a daemon
        patience_s = self._insistence.patience_s if env.is_successor else self._config.deadline
        connect = partial(self._client.connect, patience_s)
        try:
            return await (connect() if self._child is None else self._child.until_served(connect))
        except (TransientError, RefusedError) as exc:
            raise StoreError(self.name, f"cannot open {self._address}: {exc.detail}") from exc

    async def _restart_what_hangs(self) -> None:
        """A server of our own that is silent is started anew: there is nobody else who would."""
        while True:
            await self._hung.wait()
            self._hung = trio.Event()
            await self._end_server(trio.current_time())

    def _recover(self, unflushed: Unflushed, export: Export, opened_at: float) -> Recovery:
        self._recovery = Recovery(
            self.name,
            unflushed,
            self._client,
            self._fence,
            flushes=Flag.SEND_FLUSH in export.flags,
            fua=Flag.SEND_FUA in export.flags,
            opened_at=opened_at,
        )
        return self._recovery

    async def _stop_when_forced(self, forced_stop: trio.Event) -> None:
        """All disks flush at once then: they are closed one after the other, and a dead store must not cost each its time."""
        await forced_stop.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._flush_when_forced, trio.current_time() + _FORCED_S)
            await trio.sleep(_FORCED_S)
            self._drop_all("the stop was forced")  # a flush that was sent waits for its answer or for this
        await trio.sleep(_FORCED_S)
        self._drop_all("the stop was forced")

    async def _flush_when_forced(self, ends_at: float) -> None:
        with trio.move_on_at(ends_at) as scope, suppress(BackendError):  # who closes the disk sees it too
            if not self._recovery.is_flushed:
                await self.flush()
        self._last_flush.deadline = ends_at if scope.cancelled_caught else ends_at + _FORCED_S

    async def _flush_at_last(self) -> BackendError | None:
        """What the last flush failed with."""
        error: BackendError | None = None
        if self._recovery.is_flushed:
            return None
        with self._last_flush:
            try:
                await self.flush()
            except BackendError as exc:
                error = exc
        if self._last_flush.cancelled_caught:
            error = TransientError(self.name, f"the last flush was given up: {self._client.trouble}")
        if error is not None:
            log.error("%s: the last flush failed: %s", self.name, error.detail)
        return error

    async def _begin(self, export: Export, *, writable: bool) -> None:
        """Raises: StoreError."""
        if not export.size:
            raise StoreError(self.name, f"{self._address} is empty, and a disk cannot be")
        if writable and Flag.READ_ONLY in export.flags:
            raise StoreError(
                self.name, f"{self._address} is read-only: put a cow layer above it, or say read_only: true"
            )
        self._export = export
        self._alignment = export.minimum
        max_io = max(self._alignment, align_down(min(MAX_IO, export.maximum), self._alignment))
        self.geometry = Geometry(export.size, export.minimum, export.preferred, max_io)
        self._questions = StatusQuestions(export.size, export.minimum, self._block_status)
        self.caps = Caps.FLUSH
        if export.context is not None:
            self.caps |= Caps.EXTENTS
        if writable:
            self.caps |= Caps.WRITE
            if Flag.SEND_WRITE_ZEROES in export.flags:
                self.caps |= Caps.TRIM | Caps.ZERO
            if not export.flags & (Flag.SEND_FLUSH | Flag.SEND_FUA):
                log.warning(
                    "%s: the server offers no flush: what it acknowledges has to be durable as it is", self.name
                )
        self.identity = Identity("nbd", {"export": self._address.export, "size": str(export.size)})
        if writable:
            return  # nothing is made over contents that change
        try:
            self.identity = await self._sample()
        except CachefsError as exc:
            raise StoreError(self.name, f"cannot read {self._address}: {exc.detail}") from exc

    async def _sample(self) -> Identity:
        """What the export is known by: its name, its size, and 16 samples of 4 KiB, the first and the last included."""
        size, name = self.geometry.size, self._address.export
        last = max(0, size - SAMPLE_SIZE)
        digest = hashlib.sha256()
        for index in range(SAMPLES):
            at = last * index // (SAMPLES - 1)
            end = min(size, at + SAMPLE_SIZE)
            start = align_down(at, self._alignment)
            buffer = bytearray(min(size, align_up(end, self._alignment)) - start)
            await self.read_into(start, memoryview(buffer))
            digest.update(buffer[at - start : end - start])
        return Identity("nbd", {"export": name, "size": str(size), "content sample": digest.hexdigest()})

    # ---- failure

    def _patience(self) -> float:
        """Seconds that the server may be silent while requests wait; none once a change or flush is beyond its deadline."""
        if self._recovery.is_overdue(trio.current_time()):
            return 0.0
        return self._risky_timeout_s if self._recovery.is_risky else self._timeout_s

    def _lost(self, why: ConnectionLost) -> None:
        if self._child is not None and isinstance(why, ServerSilent):
            self._hung.set()
        self._recovery.lost(why.detail)

    async def _fence(self, lost_at: float) -> None:
        """What was under way has arrived by then, or never will."""
        if self._child is None:
            await trio.sleep_until(lost_at + self._fence_s)
        else:
            await self._end_server(lost_at)

    async def _end_server(self, started_before: float) -> None:
        """The server that we started is gone, and another one is started; unless that has happened since."""
        assert self._child is not None
        async with self._ending:
            if self._child.pid and self._child.started_at <= started_before:
                self._drop_all("its server is started anew")  # nbdkit waits until its clients are gone
                await self._child.end(_END_GRACE_S)
                self._child.ensure_running()

    def _drop_all(self, reason: str) -> None:
        """Give every connection up; what is unflushed, and what was under way, is sent again over others."""
        self._recovery.lost(reason)
        self._client.drop_all(reason)

    def _trouble(self) -> str:
        return self._client.trouble

    def _refusal(self, request: Request, what: str) -> CachefsError:
        detail = f"{what}: the server says: {request.reason}"
        if request.error in TRANSIENT_ERRORS:
            return TransientError(self.name, detail)
        if request.error == errno.ENOSPC:
            return NoSpaceError(self.name, detail)
        return PermanentError(self.name, detail)

    async def _change(self, kind: Kind, offset: int, length: int, data: memoryview | None = None) -> None:
        what = f"{kind.name.lower()} {offset}+{length}"
        latest = trio.current_time() + self._insistence.patience_s

        async def attempt() -> None:
            request = await self._recovery.change(kind, offset, length, data, latest)
            if request.error:
                raise self._refusal(request, what)

        await self._insistence.insist(attempt, what)

    # ---- the operations

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return False

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        def then(request: Request) -> None:
            done(None if request.is_answered and not request.error else request.sent_at + self._insistence.patience_s)

        if self._recovery.bars(offset, len(buffer)):
            return False
        return self._client.try_ask_later(Request(Command.READ, offset, len(buffer), buffer=buffer, then=then))

    def try_write(self, offset: int, data: memoryview) -> bool:
        return False

    def try_flush(self, done: Done) -> bool:
        if not self._recovery.is_flushed:
            return False
        done(None)
        return True

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        what = f"read {offset}+{len(buffer)}"

        async def attempt() -> None:
            request = Request(Command.READ, offset, len(buffer), buffer=buffer)
            await self._recovery.ask(request)
            if request.error:
                raise self._refusal(request, what)

        await self._insistence.insist(attempt, what)

    async def write(self, offset: int, data: memoryview) -> None:
        await self._change(Kind.WRITE, offset, len(data), data)

    async def flush(self) -> None:
        latest = trio.current_time() + self._insistence.patience_s
        try:
            await self._insistence.insist(lambda: self._recovery.flush(latest), "flush")
        except BackendError as exc:
            self._recovery.note(exc)
            raise

    async def trim(self, offset: int, length: int) -> None:
        await self._write_zeroes(Kind.TRIM, offset, length)

    async def zero(self, offset: int, length: int) -> None:
        await self._write_zeroes(Kind.ZERO, offset, length)

    async def _write_zeroes(self, kind: Kind, offset: int, length: int) -> None:
        step = max(self._alignment, align_down(min(_MAX_ZERO, self._export.maximum), self._alignment))
        for at in range(offset, offset + length, step):
            await self._change(kind, at, min(step, offset + length - at))

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        return await self._questions.extents(offset, length, limit)

    async def _block_status(self, offset: int, length: int) -> Request:
        what = f"block status {offset}+{length}"

        async def attempt() -> Request:
            request = Request(Command.BLOCK_STATUS, offset, length)
            await self._recovery.ask(request)
            if request.error in TRANSIENT_ERRORS:
                raise self._refusal(request, what)
            return request

        return await self._insistence.insist(attempt, what)

    def try_extent(self, offset: int, length: int) -> Extent | None:
        return None

    async def prefetch(self, offset: int, length: int) -> None:
        """The server is not asked to: what it reads ahead is its own affair."""

    def allocated_bytes(self) -> int:
        """As of a block device: nobody here knows better."""
        return self.geometry.size

    def pending_error(self) -> Exception | None:
        return self._recovery.problem

    def statistics(self) -> Statistics:
        values: dict[str, int | float | str] = {
            **self._server(),
            "state": self._state(),
            "connections": self._client.connected,
            "lost_connections": self._client.losses,
            "retries": self._insistence.retries,
            "in_flight": self._client.in_flight,
            "unflushed_bytes": self._recovery.unflushed_bytes,
            "resent": self._recovery.resent,
        }
        if not self._client.connected:
            values["trouble"] = self._client.trouble
        return Statistics(self.name, values)

    def _state(self) -> str:
        state = self._insistence.breaker.state(trio.current_time())
        return state if state != "ok" or self._recovery.is_sound else "resending"

    def _server(self) -> dict[str, int | str]:
        if self._child is None:
            return {"uri": self._config.uri or ""}
        return {
            "command": shlex.join(self._config.command or ()),
            "server_pid": self._child.pid,
            "server_starts": self._child.starts,
        }


@asynccontextmanager
async def _memory(name: str, config: NbdConfig, env: Environment) -> AsyncIterator[Unflushed]:
    """Of the changes that the server may lose. Raises: StoreError."""
    if not env.writable:
        yield Unflushed(memoryview(bytearray(body_size(0))), 0)
        return
    store = config.uri or shlex.join(config.command or ())
    length = body_size(align_down(config.unflushed, 4096))
    async with env.memory(name, "nbd", _MEMORY_LAYOUT, store, length) as memory:
        yield Unflushed(memory.body, data_size(len(memory.body)))


def _dialer(name: str, config: NbdConfig, address: Address) -> Dial:
    """Raises: StoreError when the certificates cannot be used."""
    if not address.tls:
        return dialer(address, None)
    tls = config.tls or TlsConfig()
    try:
        paths = [None if path is None else os.fspath(path) for path in (tls.ca, tls.cert, tls.key)]
        return dialer(address, tls_context(*paths))
    except OSError as exc:  # ssl.SSLError is one
        why = exc.reason if isinstance(exc, ssl.SSLError) else exc.strerror
        raise StoreError(name, f"cannot use the certificates below tls: {why}; check ca, cert and key") from exc
