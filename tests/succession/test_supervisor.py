"""The supervisor against a daemon of a few lines: what it keeps, whom it believes, when it starts another."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from served import ROOT, wait_for

PREFACE = """
import os, socket, sys, time
from pathlib import Path

here = Path(sys.argv[-1])
life = len(list(here.glob("life*")))
(here / f"life{life}").write_text(str(os.getpid()))

def tell(*descriptors, **state):
    message = "\\n".join(f"{name}={value}" for name, value in state.items()).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.connect("\\0" + os.environ["NOTIFY_SOCKET"][1:])
        socket.send_fds(client, [message], list(descriptors))

def barrier():
    ours, theirs = os.pipe()
    tell(theirs, BARRIER="1")
    os.close(theirs)
    os.read(ours, 1)

def memory(content):
    made = os.memfd_create("m")
    os.write(made, content)
    return made

"""

Supervise = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def supervise(tmp_path: Path) -> Supervise:
    """Run a daemon, given as lines of Python, below a supervisor."""
    package = tmp_path / "package" / "cachefs"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(ROOT / "cachefs" / "supervisor.py", package)

    def run(daemon: str) -> subprocess.Popen[bytes]:
        (package / "__main__.py").write_text(PREFACE + daemon)
        return subprocess.Popen(
            [sys.executable, "-m", "cachefs.supervisor", "mount", str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(package.parent)},
            cwd="/",
            stdin=subprocess.DEVNULL,
        )

    return run


def lives(folder: Path) -> int:
    return len(list(folder.glob("life*")))


@pytest.mark.parametrize(
    ("daemon", "code"),
    [
        ("sys.exit(3)", 3),
        ("os.kill(os.getpid(), 9)", 137),
        ("tell(READY=1); barrier(); sys.exit(0)", 0),
        ("tell(READY=1); tell(STOPPING=1); os._exit(1)", 1),
    ],
    ids=["before it was ready", "killed before it was ready", "in order", "forced"],
)
def test_a_daemon_that_ends_for_good_ends_the_supervisor(
    supervise: Supervise, tmp_path: Path, daemon: str, code: int
) -> None:
    assert supervise(daemon).wait(20) == code
    assert lives(tmp_path) == 1


def test_what_is_stored_is_handed_on_in_order_and_what_is_removed_is_not(supervise: Supervise, tmp_path: Path) -> None:
    daemon = """
tell(READY=1)
if life == 0:
    for name in ("c", "a", "b", "a"):
        tell(memory(name.encode()), FDSTORE=1, FDNAME=name, FDPOLL=0)
    tell(FDSTOREREMOVE=1, FDNAME="a")
    tell(memory(b"late"), FDSTORE=1, FDNAME="a")
    os.kill(os.getpid(), 9)  # what was sent counts all the same
assert os.environ["LISTEN_PID"] == str(os.getpid())
names = os.environ["LISTEN_FDNAMES"].split(":")
found = [(name, os.pread(3 + n, 9, 0)) for n, name in enumerate(names)]
assert int(os.environ["LISTEN_FDS"]) == len(names)
(here / "found").write_text(repr(found))
"""
    assert supervise(daemon).wait(20) == 0
    assert (tmp_path / "found").read_text() == repr([("c", b"c"), ("b", b"b"), ("a", b"late")])
    assert lives(tmp_path) == 2


def test_only_the_daemon_itself_is_believed(supervise: Supervise, tmp_path: Path) -> None:
    daemon = """
tell(READY=1)
if life == 0:
    if os.fork() == 0:
        tell(memory(b"x"), FDSTORE=1, FDNAME="x")
        tell(STOPPING=1)
        os._exit(0)
    os.wait()
    barrier()
    os._exit(9)
(here / "found").write_text(os.environ.get("LISTEN_FDNAMES", "nothing"))
"""
    assert supervise(daemon).wait(20) == 0
    assert (tmp_path / "found").read_text() == "nothing"


def test_another_main_process_takes_the_place_of_the_first(supervise: Supervise, tmp_path: Path) -> None:
    daemon = """
tell(READY=1)
if life == 0:
    ours, theirs = os.pipe()
    child = os.fork()
    if child:
        tell(MAINPID=child)
        barrier()
        os._exit(0)
    os.close(theirs)
    os.read(ours, 1)  # the first one has ended
    tell(memory(b"second"), FDSTORE=1, FDNAME="second")
    os._exit(9)
(here / "found").write_text(os.environ["LISTEN_FDNAMES"])
"""
    assert supervise(daemon).wait(20) == 0
    assert (tmp_path / "found").read_text() == "second"


def test_signals_reach_the_daemon_and_not_its_supervisor(supervise: Supervise, tmp_path: Path) -> None:
    daemon = """
import signal
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7) if life else (here / "heard").touch())
tell(READY=1)
tell(STOPPING=1) if life else None
(here / f"ready{life}").touch()
while not (here / "heard").exists() or life:
    signal.pause()
os._exit(9)
"""
    supervisor = supervise(daemon)
    for number in range(2):
        wait_for((tmp_path / f"ready{number}").exists, "a daemon")
        supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(20) == 7
