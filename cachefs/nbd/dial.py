"""How a connection to an NBD export is made: socket, handshake, TLS."""

from __future__ import annotations

import socket
import ssl

import trio

from cachefs.nbd.address import Address
from cachefs.nbd.client import Dial
from cachefs.nbd.handshake import Export, Receive, RefusedError, Send, negotiate
from cachefs.nbd.protocol import ProtocolError
from cachefs.nbd.transport import Plain, Tls, Transport, forget_unsent, no_delay


def dialer(address: Address, context: ssl.SSLContext | None) -> Dial:
    """*context*: for TLS, with the certificates in it."""

    async def dial() -> tuple[Transport, Export]:
        plain = Plain(await connected_socket(address))
        try:
            return await greet(plain, address, context)
        except BaseException:
            plain.close()
            raise

    return dial


async def connected_socket(address: Address) -> socket.socket:
    """Whatever ends it, the end of this process too, resets it: a fence of a successor counts from there. Raises: OSError."""
    if address.socket:
        stream = await trio.open_unix_socket(address.socket)
    else:
        stream = await trio.open_tcp_stream(address.host, address.port)
    connected = socket.socket(fileno=stream.socket.detach())
    no_delay(connected)
    forget_unsent(connected)
    return connected


async def greet(plain: Plain, address: Address, context: ssl.SSLContext | None) -> tuple[Transport, Export]:
    """The handshake over *plain*. Raises: RefusedError, ProtocolError, and what transports raise."""
    transport: Transport = plain
    plan = negotiate(address.export, tls=context is not None)
    step = next(plan)
    while True:
        try:
            if isinstance(step, Send):
                await transport.send([memoryview(step.data)])
                step = next(plan)
            elif isinstance(step, Receive):
                step = plan.send(await _receive_exactly(transport, step.length))
            else:
                assert context is not None
                transport = await _start_tls(plain, context, address.host)
                step = next(plan)
        except StopIteration as done:
            return transport, done.value


async def _start_tls(plain: Plain, context: ssl.SSLContext, host: str) -> Tls:
    tls = Tls(plain, context, host)
    try:
        await tls.handshake()
    except trio.BrokenResourceError as exc:
        if isinstance(exc.__cause__, ssl.SSLCertVerificationError):
            raise RefusedError(f"the server's certificate: {exc.__cause__.verify_message}") from exc
        raise
    return tls


async def _receive_exactly(transport: Transport, count: int) -> bytes:
    left = memoryview(bytearray(count))
    whole = left
    while left:
        target = left
        got = await transport.receive(lambda target=target: (target,))  # type: ignore[misc]
        if not got:
            raise ProtocolError("it closed the connection during the handshake")
        left = left[got:]
    return bytes(whole)


def tls_context(ca: str | None, cert: str | None, key: str | None) -> ssl.SSLContext:
    """Verifies the server's certificate and its name. Raises: OSError, ssl.SSLError."""
    context = ssl.create_default_context(cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert is not None:
        context.load_cert_chain(cert, key)
    return context
