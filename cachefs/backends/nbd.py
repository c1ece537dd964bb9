"""nbd: an export of an NBD server (nbdkit, qemu-nbd, nbd-server), over TCP, TLS or a unix socket.

What fails, and what then:
- A connection that is lost, or silent for `timeout`, is made anew, for as long as the disk is open. Reads and questions for
  extents that were on it are asked again until `deadline`; then they fail (BackendTimeout) and nothing else does.
- A write, trim or zero that was on it fails with EIO. It is not sent again: the first copy may still be on its way, and
  land after a later write of the same bytes that was acknowledged.
- A server may lose what it acknowledged and was not asked to flush. So when a connection is lost, or a flush fails, while it
  may hold such a change, the disk has *failed*: writes are refused, every flush fails, `pending_error` says why; reads go
  on. That lasts until it is mounted anew.
- So while such changes are about, a silent server is given not `timeout` but `deadline`: a connection that comes back to
  life costs nothing.

State: `_failed`, set once. Concurrency: none of its own; a server orders overlapping requests as it likes.
Trims are WRITE_ZEROES that may make holes, zeros WRITE_ZEROES with NO_HOLE; NBD_CMD_TRIM guarantees nothing and is never used.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated

import pydantic
import trio

from cachefs.errors import (
    BackendError,
    BackendTimeout,
    CachefsError,
    NoSpaceError,
    PermanentError,
    ReadOnlyError,
    StoreError,
    TransientError,
)
from cachefs.extent import Extent, ExtentKind
from cachefs.layers.base import MAX_IO, Caps, Done, Environment, Geometry, Options, Statistics
from cachefs.nbd.address import parse_uri
from cachefs.nbd.client import Client, Dial, Limits, backoff
from cachefs.nbd.connection import ConnectionLost
from cachefs.nbd.dial import dialer, tls_context
from cachefs.nbd.handshake import Export, Flag, RefusedError
from cachefs.nbd.protocol import CHANGES, MAX_STATUS_LENGTH, NO_HOLE, Command, Request
from cachefs.store.identity import SAMPLE_SIZE, SAMPLES, Identity
from cachefs.units import Duration, LocalPath, align_down, align_up

log = logging.getLogger(__name__)

_MAX_ZERO = 32 << 20  # bytes of one WRITE_ZEROES: a server without a fast way writes them
_NO_MEMORY, _SHUTTING_DOWN = 12, 108
_TRANSIENT = {_NO_MEMORY: "it is out of memory", _SHUTTING_DOWN: "it is shutting down"}
_SENTENCES = {
    1: "it does not permit that",
    5: "input/output error",
    22: "it calls the request invalid",
    28: "no space left",
    75: "the request is too long for it",
    95: "it does not support that",
}


def _check_uri(uri: str) -> str:
    parse_uri(uri)
    return uri


class TlsConfig(Options):
    ca: LocalPath | None = None
    """Certificates of those who may sign the server's, PEM. Default: those that the system trusts."""
    cert: LocalPath | None = None
    """The client's own certificate, PEM, where the server asks for one."""
    key: LocalPath | None = None
    """Its key, PEM. Default: it stands in the file `cert`."""


class NbdConfig(Options):
    uri: Annotated[str, pydantic.AfterValidator(_check_uri)]
    """nbd://host/export, nbds://host/export (TLS) or nbd+unix:///export?socket=/path. Default port: 10809."""
    connections: Annotated[int, pydantic.Field(ge=1, le=16)] = 4
    """How many connections are made to a server that allows several; one to any other."""
    connect_timeout: Annotated[Duration, pydantic.Field(ge=0.05, le=600)] = 5.0
    """How long one try to connect may take."""
    timeout: Annotated[Duration, pydantic.Field(ge=0.05, le=600)] = 5.0
    """How long the server may be silent while reads wait; then the connection is made anew."""
    deadline: Annotated[Duration, pydantic.Field(ge=0.05, le=3600)] = 60.0
    """How long a request may take, tries and reconnections included, before it fails."""
    tls: TlsConfig | None = None
    """Certificates for nbds://."""

    @pydantic.model_validator(mode="after")
    def _check_tls(self) -> NbdConfig:
        if self.tls is None:
            return self
        if not parse_uri(self.uri).tls:
            raise ValueError("tls is given, and the URI is not nbds://: nothing would be encrypted")
        if self.tls.key is not None and self.tls.cert is None:
            raise ValueError("tls.key needs tls.cert")
        return self


class Nbd:
    """An open export; `Nbd.open` makes it."""

    Config = NbdConfig

    def __init__(self, name: str, config: NbdConfig, dial: Dial) -> None:
        self.name = name
        self._address = parse_uri(config.uri)
        self._uri = config.uri
        self._deadline_s = config.deadline
        self._timeout_s = config.timeout
        self._failed: PermanentError | None = None
        self._retries = 0
        limits = Limits(config.connections, config.connect_timeout, config.deadline)
        self._client = Client(name, dial, limits, patience=self._patience, on_lost=self._on_lost, check=self._check)
        self._ledger = self._client.ledger

    @classmethod
    @asynccontextmanager
    async def open(cls, config: NbdConfig, env: Environment, dial: Dial | None = None) -> AsyncIterator[Nbd]:
        """*dial* stands for the network, in tests.

        Raises: StoreError when the server cannot be reached within the deadline, or will not serve the export.
        """
        name = f"{env.owner}/nbd"
        backend = cls(name, config, dial or _dialer(name, config))
        problem: CachefsError | None = None
        try:
            first = await backend._client.connect(config.deadline)
        except (TransientError, RefusedError) as exc:
            raise StoreError(name, f"cannot open {backend._address}: {exc.detail}") from exc
        async with backend._client.keep_connected(first):
            try:
                await backend._begin(first.export, writable=env.writable)
            except StoreError as exc:
                problem = exc
            else:
                try:
                    yield backend
                finally:
                    problem = await backend._flush_at_last()
        if problem is not None:
            raise problem

    async def _flush_at_last(self) -> BackendError | None:
        """What the last flush failed with, unless that was known before."""
        if self._failed is None:
            with trio.CancelScope(shield=True):
                try:
                    await self.flush()
                except BackendError as exc:
                    log.error("%s: the last flush failed: %s", self.name, exc.detail)
                    return exc
        return None

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
        self.caps = Caps.FLUSH
        if export.context is not None:
            self.caps |= Caps.EXTENTS
        if writable:
            self.caps |= Caps.WRITE
            if Flag.SEND_WRITE_ZEROES in export.flags:
                self.caps |= Caps.TRIM | Caps.ZERO
            if Flag.SEND_FLUSH not in export.flags:
                log.warning(
                    "%s: the server offers no flush: what it acknowledges has to be durable as it is", self.name
                )
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
        return self._deadline_s if self._ledger.is_unflushed else self._timeout_s

    def _on_lost(self, reason: str) -> None:
        if self._ledger.is_unflushed:
            self._fail(f"the connection was lost ({reason})")

    def _fail(self, why: str) -> PermanentError:
        if self._failed is None:
            self._failed = PermanentError(
                self.name,
                f"{why} while the server held writes that were not flushed: they may be lost; the disk is read-only until "
                "it is mounted anew",
            )
            log.error("%s: %s", self.name, self._failed.detail)
        return self._failed

    def _check(self, request: Request) -> None:
        """A change that has waited for a connection is not sent any more when the disk has failed meanwhile."""
        if request.command in CHANGES:
            self._check_writable()

    def _check_writable(self) -> None:
        if self._failed is not None:
            raise ReadOnlyError(self.name, f"read-only since an earlier error: {self._failed.detail}")

    async def _ask_until_deadline(self, make: Callable[[], Request], what: str) -> Request:
        """The answered request; asked again, made anew each time, after anything that may go away by itself."""
        last = ""
        with trio.move_on_after(self._deadline_s):
            for pause in backoff():
                request = make()
                try:
                    await self._client.ask(request)
                    if request.error not in _TRANSIENT:
                        return request
                    last = _TRANSIENT[request.error]
                except ConnectionLost as exc:
                    last = exc.detail
                self._retries += 1
                await trio.sleep(pause)
        raise BackendTimeout(
            self.name, f"{what}: not answered within {self._deadline_s:.0f} s: {last or self._client.trouble}"
        )

    async def _change(self, request: Request, what: str, data: memoryview | None = None) -> None:
        """Sent once. Until its first byte is sent it may be cancelled; then it runs to its end."""
        self._check_writable()
        with trio.move_on_after(self._deadline_s) as scope:
            try:
                await self._client.ask(request, data, give_up=False)
            except ConnectionLost as exc:
                raise PermanentError(
                    self.name, f"{what}: {exc.detail}; it may or may not have been done, and is not sent again"
                ) from exc
        if scope.cancelled_caught:
            raise BackendTimeout(
                self.name, f"{what}: no connection within {self._deadline_s:.0f} s: {self._client.trouble}"
            )
        self._raise_error(request, what)

    def _raise_error(self, request: Request, what: str) -> None:
        if not request.error:
            return
        why = _SENTENCES.get(request.error) or _TRANSIENT.get(request.error) or f"error {request.error}"
        detail = f"{what}: the server says: {why}" + (f" ({request.message})" if request.message else "")
        if request.error == errno.ENOSPC and request.command in CHANGES:
            raise NoSpaceError(self.name, detail)
        raise PermanentError(self.name, detail)

    # ---- the operations

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return False

    def try_write(self, offset: int, data: memoryview) -> bool:
        return False

    def try_flush(self, done: Done) -> bool:
        if self._failed is None and self._ledger.is_unflushed:
            return False
        done(self._failed)
        return True

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        length = len(buffer)
        what = f"read {offset}+{length}"
        answered = await self._ask_until_deadline(partial(Request, Command.READ, offset, length, buffer=buffer), what)
        self._raise_error(answered, what)

    async def write(self, offset: int, data: memoryview) -> None:
        length = len(data)
        await self._change(Request(Command.WRITE, offset, length), f"write {offset}+{length}", data)

    async def flush(self) -> None:
        if self._failed is not None:
            raise self._failed
        if not self._ledger.is_unflushed:
            return
        answered = self._ledger.answered
        if Flag.SEND_FLUSH in self._export.flags:
            request = Request(Command.FLUSH)
            try:
                with trio.move_on_after(self._deadline_s) as scope:
                    await self._client.ask(request, give_up=False)
                self._raise_error(request, "flush")
            except (ConnectionLost, PermanentError) as exc:
                # a server that could not write may have dropped what it had, as a kernel does
                raise self._fail(exc.detail) from exc
            if scope.cancelled_caught:
                raise self._fail(f"no flush was sent within {self._deadline_s:.0f} s")
        if self._failed is not None:  # another connection was lost meanwhile
            raise self._failed
        self._ledger.flush(answered)

    async def trim(self, offset: int, length: int) -> None:
        await self._write_zeroes(offset, length, 0)

    async def zero(self, offset: int, length: int) -> None:
        await self._write_zeroes(offset, length, NO_HOLE)

    async def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        step = max(self._alignment, align_down(min(_MAX_ZERO, self._export.maximum), self._alignment))
        for at in range(offset, offset + length, step):
            count = min(step, offset + length - at)
            await self._change(Request(Command.WRITE_ZEROES, at, count, flags), f"zero {at}+{count}")

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        start = align_down(offset, self._alignment)
        end = min(self.geometry.size, align_up(offset + length, self._alignment), start + MAX_STATUS_LENGTH)
        answered = await self._ask_until_deadline(
            partial(Request, Command.BLOCK_STATUS, start, end - start), f"block status {start}+{end - start}"
        )
        if answered.error or answered.extents is None:
            return [Extent(offset, min(length, end - offset), ExtentKind.DATA)]  # always true, and good enough
        clipped = [_clip(extent, offset, offset + length) for extent in answered.extents]
        return [extent for extent in clipped if extent.length > 0][:limit]

    async def prefetch(self, offset: int, length: int) -> None:
        """The server is not asked to: what it reads ahead is its own affair."""

    def allocated_bytes(self) -> int:
        """As of a block device: nobody here knows better."""
        return self.geometry.size

    def pending_error(self) -> Exception | None:
        return self._failed

    def statistics(self) -> Statistics:
        values: dict[str, int | float | str] = {
            "uri": self._uri,
            "state": "failed" if self._failed else "ok" if self._client.connected else "disconnected",
            "connections": self._client.connected,
            "lost_connections": self._client.losses,
            "retries": self._retries,
            "in_flight": self._client.in_flight,
        }
        if not self._client.connected:
            values["trouble"] = self._client.trouble
        return Statistics(self.name, values)


def _clip(extent: Extent, start: int, end: int) -> Extent:
    first = max(extent.offset, start)
    return Extent(first, min(extent.end, end) - first, extent.kind)


def _dialer(name: str, config: NbdConfig) -> Dial:
    """Raises: StoreError when the certificates cannot be used."""
    address = parse_uri(config.uri)
    if not address.tls:
        return dialer(address, None)
    tls = config.tls or TlsConfig()
    try:
        paths = [None if path is None else os.fspath(path) for path in (tls.ca, tls.cert, tls.key)]
        return dialer(address, tls_context(*paths))
    except OSError as exc:  # ssl.SSLError is one
        why = exc.reason if isinstance(exc, ssl.SSLError) else exc.strerror
        raise StoreError(name, f"cannot use the certificates below tls: {why}; check ca, cert and key") from exc
