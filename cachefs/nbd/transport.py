"""The byte streams below NBD: a plain socket, used without copies, and TLS over one.

`receive(where)` waits until there are bytes and only then asks *where* they belong, in the step that copies them; so a buffer
may be taken back at any time while somebody waits. `send` is called by one task at a time, and so is `receive`.
`close` is a plain function, after which both raise OSError or one of trio's resource errors.
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import trio

LOST = (OSError, ssl.SSLError, trio.BrokenResourceError, trio.ClosedResourceError)
"""What the operations of a transport raise when it is lost."""


Where = Callable[[], Sequence[memoryview]]
"""The places where the next bytes belong, one behind the other; none is empty."""


class Transport(Protocol):
    async def receive(self, where: Where) -> int:
        """Bytes that came, as many as there are; 0 at the end of the stream."""

    async def wait(self) -> None:
        """Until something may have come, which `receive` then finds, or not."""

    def send_now(self, parts: list[memoryview]) -> list[memoryview]:
        """Send what can be sent without waiting, in order; what is left."""

    async def send(self, parts: list[memoryview]) -> None:
        """Send all of it, in order."""

    def close(self) -> None: ...

    def abort(self) -> None:
        """Close it, and see to it that the kernel sends nothing more of what it was given."""


class Plain:
    """Over a connected stream socket, which it owns."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected

    async def receive(self, where: Where) -> int:
        while True:
            places = where()
            with suppress(BlockingIOError):
                if len(places) == 1:
                    return self._socket.recv_into(places[0])
                return self._socket.recvmsg_into(places)[0]
            await trio.lowlevel.wait_readable(self._socket)

    async def wait(self) -> None:
        await trio.lowlevel.wait_readable(self._socket)

    def send_now(self, parts: list[memoryview]) -> list[memoryview]:
        try:
            sent = self._socket.sendmsg(parts)
        except BlockingIOError:
            return parts
        while parts and sent >= len(parts[0]):
            sent -= len(parts[0])
            parts = parts[1:]
        return [parts[0][sent:], *parts[1:]] if sent else parts

    async def send(self, parts: list[memoryview]) -> None:
        while parts := self.send_now(parts):
            await trio.lowlevel.wait_writable(self._socket)

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    def abort(self) -> None:
        forget_unsent(self._socket)
        self.close()


class Tls:
    """TLS inside *plain*, with *host* as the name in the server's certificate."""

    def __init__(self, plain: Plain, context: ssl.SSLContext, host: str) -> None:
        self._plain = plain
        raw = trio.socket.from_stdlib_socket(plain._socket)
        self._raw = raw
        self._stream = trio.SSLStream(trio.SocketStream(raw), context, server_hostname=host)
        self._left = memoryview(b"")

    async def handshake(self) -> None:
        await self._stream.do_handshake()

    async def receive(self, where: Where) -> int:
        if not self._left:
            self._left = memoryview(await self._stream.receive_some(256 << 10))
        target = where()[0]
        count = min(len(target), len(self._left))
        target[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    async def wait(self) -> None:
        """TLS may hold something already, and only `receive` finds it."""

    def send_now(self, parts: list[memoryview]) -> list[memoryview]:
        return parts

    async def send(self, parts: list[memoryview]) -> None:
        for part in parts:
            await self._stream.send_all(part)

    def close(self) -> None:
        self._raw.close()

    def abort(self) -> None:
        forget_unsent(self._raw)
        self.close()


def no_delay(connected: socket.socket) -> None:
    """Requests are small and are waited for."""
    if connected.family in (socket.AF_INET, socket.AF_INET6):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def forget_unsent(connected: socket.socket | trio.socket.SocketType) -> None:
    """Closing it will reset it. Else the kernel goes on sending what it holds, minutes later if the network was away."""
    with suppress(OSError):
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def reason_of(exc: BaseException) -> str:
    """What a lost transport raised, for a sentence."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the server's certificate: {exc.verify_message}"
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    if isinstance(exc, BaseExceptionGroup):  # of a host with several addresses
        return reason_of(exc.exceptions[0])
    if exc.__cause__ is not None:
        return reason_of(exc.__cause__)
    return str(exc) or type(exc).__name__
