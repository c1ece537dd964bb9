"""A client lives as long as its process: a thread that submitted a request and ended takes nothing with it."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aio_client import NUMBERS
from test_bounds import daemon, serve

Client = subprocess.Popen[bytes]
PROGRAM = str(Path(__file__).with_name("aio_client.py"))
LENGTH = 8192
# the thread that submits, and when it ends: before the daemon has looked who that is, or afterwards
THREADS = [(who, when) for who in ("another", "first") for when in ("at-once", "later")]


@pytest.fixture
def start() -> Iterator[Callable[[str, str, Path, int], Client]]:
    """Named before `mount`, so that a mount that hangs is gone before its clients are waited for."""
    clients: list[Client] = []

    def start_one(who: str, when: str, path: Path, offset: int) -> Client:
        command = [sys.executable, PROGRAM, who, when, str(path), str(offset), str(LENGTH)]
        clients.append(Client(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return clients[-1]

    yield start_one
    for client in clients:
        client.kill()
        client.communicate(timeout=15)


def living_threads(client: Client) -> int:
    states = Path(f"/proc/{client.pid}/task").glob("*/stat")
    return sum(stat.read_text().rpartition(")")[2].split()[0] != "Z" for stat in states)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in NUMBERS, reason="aio_client.py does not know this machine's system calls")
def test_a_read_outlives_the_thread_that_submitted_it(
    start: Callable[[str, str, Path, int], Client], mount: Any, wait_until: Any
) -> None:
    mounted = serve(mount, "read * hang")
    disk = mounted.path / "vm1"
    data = [os.urandom(LENGTH) for _ in THREADS]
    with disk.open("r+b", buffering=0) as file:
        file.write(b"".join(data))
    clients = [start(who, when, disk, number * LENGTH) for number, (who, when) in enumerate(THREADS)]
    wait_until(lambda: daemon(mounted)["waiting_requests"] == len(clients), "their reads hang")
    looked = daemon(mounted)["uptime_s"] + 1
    wait_until(lambda: daemon(mounted)["uptime_s"] > looked, "a few looks at who waits")
    assert daemon(mounted)["given_up_requests"] == 0
    for client in clients:
        assert client.stdin is not None
        client.stdin.write(b"\n")
        client.stdin.flush()
    wait_until(lambda: [living_threads(client) for client in clients] == [1] * len(clients), "one thread is left")

    looked = daemon(mounted)["uptime_s"] + 20
    wait_until(lambda: daemon(mounted)["uptime_s"] > looked, "20 s of looks", timeout=30)
    assert daemon(mounted)["given_up_requests"] == 0
    assert [client.poll() for client in clients] == [None] * len(clients)

    mounted.process.send_signal(signal.SIGUSR1)
    for client, expected in zip(clients, data, strict=True):
        got, said = client.communicate(timeout=15)
        assert (client.returncode, said) == (0, b"")
        assert got == expected
    assert daemon(mounted)["given_up_requests"] == 0
