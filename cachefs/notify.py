"""Telling systemd how the daemon is: sd_notify(3), a datagram to $NOTIFY_SOCKET; nothing where there is none."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(**state: str) -> None:
    """`notify(READY="1", STATUS="serving 3 disks")`."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    message = "\n".join(f"{name}={value}" for name, value in state.items()).encode()
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as client:
        client.sendto(message, "\0" + address[1:] if address.startswith("@") else address)
