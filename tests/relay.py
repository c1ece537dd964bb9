"""A TCP relay in front of a unix socket: `relay.py ADDRESS PORT SOCKET`. It says "ready", then what it does to connections.

SIGUSR1: the next reply is forwarded by half, and its connection reset. When the server goes, its connections are reset too,
as the kernel of a server that was killed does.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import sys

import trio
import trio.testing

LOST = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)

to_reset = [False]


def say(text: str) -> None:
    print(text, flush=True)


async def forward(
    source: trio.SocketStream, target: trio.SocketStream, ended: trio.CancelScope, is_reply: bool
) -> None:
    with contextlib.suppress(*LOST):
        while data := await source.receive_some(64 << 10):
            if is_reply and to_reset[0]:
                to_reset[0] = False
                half = len(data) // 2 | 1  # headers and data have even lengths: this is within a reply
                await target.send_all(data[:half])
                say(f"reset after {half} of {len(data)} bytes")
                break
            await target.send_all(data)
    ended.cancel()


async def serve(client: trio.SocketStream) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing it resets it
    async with client:
        with contextlib.suppress(OSError):
            async with await trio.open_unix_socket(sys.argv[3]) as server, trio.open_nursery() as nursery:
                nursery.start_soon(forward, client, server, nursery.cancel_scope, False)
                nursery.start_soon(forward, server, client, nursery.cancel_scope, True)


async def watch_signals() -> None:
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        async for _ in signals:
            to_reset[0] = True


async def main() -> None:
    listeners = await trio.open_tcp_listeners(int(sys.argv[2]), host=sys.argv[1])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_signals)
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        await trio.testing.wait_all_tasks_blocked()
        say("ready")


if __name__ == "__main__":
    trio.run(main)
