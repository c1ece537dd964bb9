"""Talking to whoever keeps this daemon alive: systemd, or `cachefs.supervisor`, which speaks the same protocol.

Datagrams to $NOTIFY_SOCKET: how the daemon is, and descriptors that are to outlive it. Where there is no keeper every call
does nothing and says so. Any thread may call. The socket takes few datagrams that were not read: a keeper that hangs must not
hang the daemon with it, so `say` never waits, and `notify` and `barrier` no longer than PATIENCE_S.

Source: sd_notify(3), sd_pid_notify_with_fds(3), sd_notify_barrier(3), sd_listen_fds(3).
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Mapping, Sequence

FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
PATIENCE_S = 5.0


def has_keeper() -> bool:
    """Whether this process was started by one; it may have died since."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def notify(*descriptors: int, **state: str) -> bool:
    """`notify(READY="1", STATUS="serving 3 disks")`; *descriptors* go along. False: nobody listens, or reads."""
    return _send(PATIENCE_S, descriptors, state)


def say(**state: str) -> bool:
    """`say(WATCHDOG="1")`: what may be lost on the way. False: nobody listens."""
    return _send(0, (), state)


def _send(patience_s: float, descriptors: Sequence[int], state: Mapping[str, str]) -> bool:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    message = "\n".join(f"{name}={value}" for name, value in state.items()).encode()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as client:
            client.connect("\0" + address[1:] if address.startswith("@") else address)
            client.settimeout(patience_s)
            socket.send_fds(client, [message], list(descriptors))
    except BlockingIOError:
        return True  # somebody listens, and does not read
    except OSError:
        return False
    return True


def barrier() -> bool:
    """Wait until the keeper has taken in all that was sent before. False: it does not answer."""
    ours, theirs = os.pipe()
    try:
        sent = notify(theirs, BARRIER="1")
    finally:
        os.close(theirs)
    try:
        end = select.poll()  # not select(), which takes no number above 1023
        end.register(ours, 0)
        return sent and bool(end.poll(PATIENCE_S * 1000))  # it closes its end
    finally:
        os.close(ours)


def take_descriptors() -> list[tuple[str, int]]:
    """What the keeper hands to this process, by name, in its order; the next call finds nothing."""
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if not count.isdecimal() or pid != str(os.getpid()):
        return []
    numbers = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count))
    for number in numbers:
        os.set_inheritable(number, False)
    return list(zip(names, numbers, strict=False))


def describe(descriptors: Sequence[tuple[str, int]]) -> dict[str, str]:
    """The environment in which a process finds *descriptors*, numbered from FIRST_DESCRIPTOR on; LISTEN_PID is its own."""
    return {"LISTEN_FDS": str(len(descriptors)), "LISTEN_FDNAMES": ":".join(name for name, _ in descriptors)}
