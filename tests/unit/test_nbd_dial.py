"""The socket of a connection, as its server sees it."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

FILL = """
import contextlib, sys, time, trio
from cachefs.nbd.address import Address
from cachefs.nbd.dial import connected_socket
connected = trio.run(connected_socket, Address("", host="127.0.0.1", port=int(sys.argv[1])))
connected.setblocking(False)
sent = 0
with contextlib.suppress(BlockingIOError):
    while True:
        sent += connected.send(bytes(1 << 16))
print(sent, flush=True)
time.sleep(1000)
"""


def test_what_a_killed_daemon_has_not_sent_is_not_sent_after_its_death() -> None:
    """The kernel goes on for minutes where the network is away: it would arrive behind the fence of a successor."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        command = [sys.executable, "-c", FILL, str(listening.getsockname()[1])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as daemon:
            try:
                accepted, _ = listening.accept()
                assert daemon.stdout is not None
                sent = int(daemon.stdout.readline())
            finally:
                daemon.kill()
    with accepted:
        arrived = 0

        def receive() -> None:
            nonlocal arrived
            while got := len(accepted.recv(1 << 16)):
                arrived += got

        with pytest.raises(ConnectionResetError):
            receive()
    assert arrived < sent
