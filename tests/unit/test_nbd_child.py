"""Servers as children: what they are given, what is left of them, and who starts them again. Processes here are real."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.errors import LockedError, StoreError
from cachefs.nbd.child import Child

pytestmark = pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")

# A server in miniature: takes one connection after another and answers each with what it sees of itself.
LISTENER = """
import contextlib, json, os, signal, socket, sys
words = sys.argv[1:]
if "deaf" in words: signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "worker" in words and os.fork() == 0:
    if "deaf-worker" in words: signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True: signal.pause()
print("listening", file=sys.stderr, flush=True)
listening = socket.socket(fileno=3)
while True:
    connection, _ = listening.accept()
    seen = {
        "pid": os.getpid(), "listen": [os.environ.get("LISTEN_PID"), os.environ.get("LISTEN_FDS")],
        "notify": os.environ.get("NOTIFY_SOCKET"), "cwd": os.getcwd(), "session": os.getsid(0),
        "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd")),
    }
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(json.dumps(seen).encode())
    connection.close()
    if "once" in words: sys.exit(7)
"""


@pytest.fixture
def server(tmp_path: Path) -> Callable[..., list[str]]:
    script = tmp_path / "server.py"
    script.write_text(LISTENER)
    return lambda *words: [sys.executable, str(script), *words]


def talk(child: Child) -> Any:
    """What the server says of itself; waits for as long as it takes to start."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(child.address.socket)
        return json.loads(connection.makefile().read())


async def asked(child: Child) -> Any:
    return await trio.to_thread.run_sync(talk, child)


async def served(child: Child) -> Any:
    """As `asked`, as the first of all."""

    async def connect() -> Any:
        return await asked(child)

    return await child.until_served(connect)


def is_there(pid: int) -> bool:
    """Not ended yet, with all of its threads; reaped or not."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    ended = poll.poll(0)
    os.close(pidfd)
    return not ended


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_server_is_given_its_socket_and_nothing_else_of_ours(
    tmp_path: Path, server: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    inherited = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    try:
        async with Child.open("vm/nbd", server(), tmp_path) as child:
            seen = await served(child)
            assert seen["pid"] == child.pid
            assert seen["listen"] == [str(child.pid), "1"]
            assert seen["session"] == child.pid
            assert (seen["notify"], seen["cwd"]) == (None, "/")
            # 3 is the listening socket; one is the connection, one the directory that is being listed
            assert seen["descriptors"] == [0, 1, 2, 3, 4, 5]
            socket_file = tmp_path / "servers/vm/nbd/socket"
            assert socket_file.is_socket()
            assert socket_file.parent.stat().st_mode & 0o777 == 0o700
    finally:
        os.close(inherited)
    assert not is_there(seen["pid"])
    assert not socket_file.exists()


async def test_long_state_dir_is_no_obstacle(tmp_path: Path, server: Callable[..., list[str]]) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    async with Child.open("vm/nbd", server(), deep) as child:
        assert (await served(child))["pid"] == child.pid


async def test_what_it_says_stands_in_the_log_line_by_line(
    tmp_path: Path, server: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with Child.open("vm/nbd", server(), tmp_path) as child:
        await served(child)
    assert "vm/nbd: server: listening" in caplog.messages


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo broken >&2; exit 3", "ended with exit status 3: broken; run that command by hand to see more"),
        ("exit 0", "ended with exit status 0; it must stay in the foreground: leave out --fork and the like"),
        ("kill -9 $$", "was ended by SIGKILL; run that command by hand"),
        ("echo cannot use socket activation with -U >&2; exit 1", "it is given its socket: leave out"),
        ("sleep 60 & echo away >&2", "ended with exit status 0: away; it must stay in the foreground"),
    ],
)
async def test_server_that_ends_at_once_is_an_error_that_says_what_to_do(
    tmp_path: Path, script: str, sentence: str
) -> None:
    async def connect() -> None:
        await trio.sleep_forever()

    with pytest.raises(StoreError) as caught:
        async with Child.open("vm/nbd", ["sh", "-c", script], tmp_path) as child:
            await child.until_served(connect)
    assert sentence in caught.value.detail
    assert f"the server (sh -c '{script}')" in caught.value.detail


async def test_program_that_is_not_there_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "qemu-nbd" else real(name))
    for program, todo in (("qemu-nbd", "apt-get install qemu-utils"), ("/no/such", "write its whole path")):
        with pytest.raises(StoreError, match=todo):
            async with Child.open("vm/nbd", [program, "-t"], tmp_path):
                pass


@pytest.mark.logs("starting it again")
async def test_server_that_ends_by_itself_is_started_again_at_the_same_address(
    tmp_path: Path, server: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    async with Child.open("vm/nbd", server("once"), tmp_path) as child:
        first = await served(child)
        second = await asked(child)
        assert second["pid"] != first["pid"]
        assert child.starts == 2
    line = next(line for line in caplog.messages if "starting it again" in line)
    assert "ended with exit status 7: listening; starting it again in 0." in line


# ---- the end, which is the fence


@pytest.mark.logs("did not end within 0.1 s: killed")
@pytest.mark.parametrize(
    "kind", ["well-behaved", "deaf", "stopped", "worker", "deaf worker", "worker of its own session"]
)
async def test_after_the_end_nothing_is_left_and_nothing_starts_until_asked_for(
    tmp_path: Path, server: Callable[..., list[str]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachefs.nbd.child.GRACE_S", 0.1)
    if kind == "worker of its own session":
        command = ["sh", "-c", 'setsid sleep 600 & exec "$@"', "sh", *server()]
    else:
        command = server(*{"deaf worker": ("worker", "deaf-worker")}.get(kind, (kind,)))
    async with Child.open("vm/nbd", command, tmp_path) as child:
        first = await served(child)
        workers = children_of(child.pid)
        assert len(workers) == ("worker" in kind)
        if kind == "stopped":
            os.kill(child.pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:  # whoever asks for it, and however often
            nursery.start_soon(child.end, 0.1)
            nursery.start_soon(child.end, 0.1)
        assert not any(is_there(pid) for pid in (first["pid"], *workers))
        assert (child.pid, child.pidfd, child.starts) == (0, -1, 1)
        await child.end(0.1)
        waiting = socket.socket(socket.AF_UNIX)
        waiting.connect(child.address.socket)  # the address stays, whoever listens
        waiting.close()
        child.ensure_running()
        again = await asked(child)
        assert again["pid"] == child.pid != first["pid"]


async def test_end_waits_for_a_server_that_takes_its_time(tmp_path: Path) -> None:
    ready, gate, done = tmp_path / "ready", tmp_path / "gate", tmp_path / "done"
    os.mkfifo(ready)
    os.mkfifo(gate)
    script = f"trap 'read line <{gate}; echo late >{done}; exit 0' TERM; echo >{ready}; while :; do sleep 0.01; done"
    async with Child.open("vm/nbd", ["sh", "-c", script], tmp_path) as child:
        ended = trio.Event()

        async def end() -> None:
            await child.end(60)
            assert done.exists()
            ended.set()

        async with trio.open_nursery() as nursery:
            await trio.to_thread.run_sync(ready.read_text)  # the trap is set
            nursery.start_soon(end)
            writer = await trio.to_thread.run_sync(lambda: open(gate, "w"))  # noqa: SIM115 - returns once it is waited for
            assert not ended.is_set()
            writer.close()
        assert ended.is_set()


@pytest.mark.logs("the stop was forced")
@pytest.mark.parametrize("when", ["before the end", "while it is waited for"])
async def test_forced_stop_does_not_wait_for_a_server_that_hangs(
    tmp_path: Path, server: Callable[..., list[str]], when: str
) -> None:
    forced = trio.Event()
    async with trio.open_nursery() as nursery:

        async def force() -> None:
            await wait_all_tasks_blocked(0.05)
            forced.set()

        async with Child.open("vm/nbd", server("deaf"), tmp_path, forced) as child:
            await served(child)
            if when == "before the end":
                forced.set()
            else:
                nursery.start_soon(force)
    assert child.pid == 0


@pytest.mark.logs("did not end within")
async def test_cancelled_owner_leaves_no_server_behind(tmp_path: Path, server: Callable[..., list[str]]) -> None:
    pid = 0
    with trio.CancelScope() as scope:
        async with Child.open("vm/nbd", server("deaf"), tmp_path) as child:
            await served(child)
            pid = child.pid
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert pid
    assert not is_there(pid)


# ---- daemons that die, and those that come after them

DAEMON = """
import sys, trio
from pathlib import Path
from cachefs.nbd.child import Child
async def main():
    async with Child.open("vm/nbd", sys.argv[3:], Path(sys.argv[1])) as child:
        if sys.argv[2] == "serving":
            await (await trio.open_unix_socket(child.address.socket)).receive_some()
        print(child.pid, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


Daemons = Callable[..., tuple["subprocess.Popen[str]", int]]


@pytest.fixture
def start_daemon() -> Iterator[Daemons]:
    """`start_daemon(state_dir, command)`: a process that has opened a child, which is *serving* or about to, and its pid."""
    started = []

    def start(state_dir: Path, command: list[str], stage: str = "serving") -> tuple[subprocess.Popen[str], int]:
        words = [sys.executable, "-c", DAEMON, str(state_dir), stage, *command]
        daemon = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        started.append(daemon)
        assert daemon.stdout is not None
        return daemon, int(daemon.stdout.readline())

    yield start
    for daemon in started:
        with daemon:
            daemon.kill()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["starting", "serving"])
def test_server_ends_when_its_daemon_is_killed(
    tmp_path: Path, server: Callable[..., list[str]], start_daemon: Daemons, stage: str, wait_until: Callable[..., Any]
) -> None:
    daemon, pid = start_daemon(tmp_path, server(), stage)
    assert is_there(pid)
    daemon.kill()
    wait_until(lambda: not is_there(pid), "the end of the server")


@pytest.mark.slow
async def test_what_a_killed_daemon_left_is_gone_before_the_next_one_serves(
    tmp_path: Path, server: Callable[..., list[str]], start_daemon: Daemons, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachefs.nbd.child.GRACE_S", 0.1)
    daemon, pid = start_daemon(tmp_path, server())
    os.kill(pid, signal.SIGSTOP)  # SIGTERM does not reach it
    with pytest.raises(LockedError, match="each mount needs a state_dir of its own"):
        async with Child.open("vm/nbd", server(), tmp_path):
            pass
    daemon.kill()
    await trio.to_thread.run_sync(daemon.wait)
    assert is_there(pid)
    async with Child.open("vm/nbd", server(), tmp_path) as child:
        assert not is_there(pid)
        assert (await served(child))["pid"] == child.pid
