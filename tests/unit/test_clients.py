"""Which clients are dead. Real processes; whatever is not surely dead is alive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from cachefs.fuse import clients


def test_a_running_process_is_alive_by_any_of_its_threads() -> None:
    found: list[clients.Client | None] = []
    thread = threading.Thread(target=lambda: found.append(clients.resolve(threading.get_native_id())))
    thread.start()
    thread.join()
    assert found == [clients.resolve(os.getpid())]
    assert found[0] is not None
    assert found[0].process == os.getpid()
    assert not clients.is_dead(found[0])


@pytest.mark.parametrize("thread", [0, 2, 2**22 - 1], ids=["pid 0", "kernel thread", "no such thread"])
def test_what_cannot_be_a_client_is_never_dead(thread: int) -> None:
    assert clients.resolve(thread) is None


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    client = clients.resolve(child.pid)
    assert client is not None
    assert not clients.is_dead(client)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert clients.is_dead(client)
    assert child.stdin is not None
    child.stdin.close()
    child.wait()
    assert not clients.is_dead(client)  # gone altogether, and its number may be somebody else's


def test_another_process_under_the_same_number_is_not_the_client() -> None:
    client = clients.resolve(os.getpid())
    assert client is not None
    assert not clients.is_dead(client._replace(started="1"))


@pytest.mark.parametrize(
    ("pending", "dead"), [(signal.SIGKILL, True), (signal.SIGTERM, False), (signal.SIGALRM, False)]
)
@pytest.mark.parametrize("where", ["SigPnd", "ShdPnd"])
def test_only_sigkill_counts(monkeypatch: Any, tmp_path: Any, where: str, pending: int, dead: bool) -> None:
    client = clients.resolve(os.getpid())
    assert client is not None
    folder = tmp_path / str(os.getpid())
    folder.mkdir()
    (folder / "stat").write_text(Path("/proc/self/stat").read_text())
    status = [line for line in Path("/proc/self/status").read_text().splitlines() if not line.startswith(where)]
    (folder / "status").write_text("\n".join([*status, f"{where}:\t{1 << (pending - 1):016x}"]))
    monkeypatch.setattr(clients, "PROC", tmp_path)
    assert clients.is_dead(client) is dead
