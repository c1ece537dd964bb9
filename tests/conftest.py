"""Real mounts for tests, and two rules for all of them: what is logged must be declared, and nobody sleeps.

`mount` starts the real daemon as a subprocess; at the end of the test it is killed and its mount taken away, whatever
happened. `module_mount` does the same for a whole module. `wait_until` is the one place where tests wait for time to pass.

A WARNING, an ERROR or a traceback in the log of a daemon fails the test that it happened in, and so does a record of the
`cachefs` loggers in the test's own process, unless the test declares it: `@pytest.mark.logs("regex", ...)`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from nbdservers import Servers

from cachefs import mounts, stop

ROOT = Path(__file__).parents[1]
DEADLINE_S = 15.0
ALARMING = re.compile(r"\b(ERROR|WARNING|CRITICAL)\b|Traceback|internal error|never awaited")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "logs(regex, ...): lines that the test may log at WARNING or above")


def _wait_until(condition: Callable[[], Any], what: str = "", *, timeout: float = DEADLINE_S) -> Any:
    """The first true value of *condition*, asked every few milliseconds; fails after *timeout* seconds."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout:.0f} s: {what or condition}")
        time.sleep(0.005)
    return found


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    return _wait_until


# ---- the command line


def _run(*arguments: object, program: Sequence[str] = ("-m", "cachefs"), **options: Any) -> Any:
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(
        command, env=_environment(), capture_output=True, text=True, check=False, timeout=60, **options
    )


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


@pytest.fixture(scope="session")
def cachefs() -> Callable[..., Any]:
    """`cachefs("check", path)`: a command of cachefs that ran to its end."""
    return _run


# ---- mounts


class Mounted:
    """A daemon that serves at `path`. process: the daemon in the foreground, None in the background."""

    def __init__(self, path: Path, log_file: Path, process: subprocess.Popen[bytes] | None) -> None:
        self.path = path
        self.process = process
        self._log_file = log_file
        self._seen = 0  # characters of the log that a check has seen
        self.pid = process.pid if process else int(self.status()["daemon"]["pid"])

    def status(self, name: str = "") -> Any:
        """{"daemon": ..., "disk": ...} of disk *name*; of the mount when there is none."""
        return json.loads(os.getxattr(self.path / name if name else self.path, "user.cachefs.status"))

    def layer(self, disk: str, index: int = 0) -> Any:
        """The statistics of one layer, counted from the top."""
        return self.status(disk)["disk"]["layers"][index]

    def log(self) -> str:
        return self._log_file.read_text() if self._log_file.exists() else ""

    def umount(self) -> None:
        """Like `cachefs umount`; the daemon must have ended well."""
        stop.unmount(self.path, force=False, say=lambda text: None)
        if self.process is not None:
            assert self.process.wait(DEADLINE_S) == 0, self.log()

    def kill(self) -> None:
        """kill -9 of the daemon and of whoever would start another. The mount stays on the tree, dead."""
        for supervisor in self._supervisors():
            os.kill(supervisor, signal.SIGKILL)
        self._signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait(DEADLINE_S)
        else:
            _wait_until(lambda: not Path(f"/proc/{self.pid}").exists(), "the daemon's end")

    def _supervisors(self) -> list[int]:
        """Those that stand behind our mount in the background."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline") if self.process is None else ():
            with contextlib.suppress(OSError):
                words = path.read_bytes().split(b"\0")
                if b"cachefs.supervisor" in words and os.fsencode(self.path) in words:
                    found.append(int(path.parent.name))
        return found

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.process is not None:
                self.process.send_signal(number)
            else:
                os.kill(self.pid, number)

    def clean_up(self) -> None:
        self._signal(signal.SIGCONT)
        for supervisor in self._supervisors():  # before the daemon, which it would start anew
            os.kill(supervisor, signal.SIGKILL)
        found = mounts.find_mount(self.path)
        if found is not None:
            mounts.try_unmount(self.path, lazy=True)
        if self.process is not None and found is not None:
            # With the mount off the tree it ends by itself, unless somebody still has a file open.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5)
        self._signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait(DEADLINE_S)

    def new_alarms(self, allowed: Sequence[str]) -> list[str]:
        """Lines of the log, since the last call, that say that something is wrong and that nobody declared."""
        new = self.log()[self._seen :]
        self._seen += len(new)
        lines = [line for line in new.splitlines() if ALARMING.search(line)]
        return [line for line in lines if not any(re.search(pattern, line) for pattern in allowed)]


class Mounts:
    """`mounts(config)` mounts below *folder*."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[Mounted] = []
        self.ended = False
        self._started: list[subprocess.Popen[bytes]] = []

    def write(self, config: dict[str, Any] | str) -> Path:
        """*config* as a file; its state_dir is folder/state unless it says another."""
        path = self.folder / f"config{len(list(self.folder.glob('config*.yaml')))}.yaml"
        if isinstance(config, dict):
            config = yaml.safe_dump({"state_dir": str(self.folder / "state"), **config})
        path.write_text(config)
        return path

    def __call__(
        self,
        config: dict[str, Any] | str | Path,
        *,
        foreground: bool = True,
        at: Path | None = None,
        program: Sequence[str] = ("-m", "cachefs"),
    ) -> Mounted:
        """Mount at *at* (default: a new directory) and return when it answers. *program* stands for cachefs."""
        file = config if isinstance(config, Path) else self.write(config)
        if at is None:
            at = self.folder / f"mnt{len(self.all)}"
            at.mkdir()
        if foreground:
            mounted = self._start(file, at, program)
        else:
            done = _run("mount", file, at, program=program)
            assert done.returncode == 0, done.stderr
            mounted = Mounted(at, Path(re.sub(r"^.*; log: ", "", done.stdout.strip(), flags=re.DOTALL)), None)
        self.all.append(mounted)
        return mounted

    def _start(self, file: Path, at: Path, program: Sequence[str]) -> Mounted:
        log_file = self.folder / f"log{len(self._started)}"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *program, "mount", "--foreground", str(file), str(at)],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._started.append(process)
        _wait_until(lambda: process.poll() is not None or "serving at" in log_file.read_text(), "the mount answers")
        assert process.poll() is None, log_file.read_text()
        return Mounted(at, log_file, process)

    def new_alarms(self, allowed: Sequence[str]) -> list[str]:
        return [line for mounted in self.all for line in mounted.new_alarms(allowed)]

    def clean_up(self) -> None:
        for mounted in self.all:
            mounted.clean_up()
        for process in self._started:  # one that never answered
            process.kill()
            process.wait(DEADLINE_S)


def _need_fuse() -> None:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as exc:
        pytest.skip(f"cannot open /dev/fuse: {exc.strerror}")
    if shutil.which("fusermount3") is None:
        pytest.skip("fusermount3 is not installed")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounts]:
    """`mount(config)` -> Mounted."""
    _need_fuse()
    made = Mounts(tmp_path)
    _current.append(made)
    yield made
    made.clean_up()
    made.ended = True


@pytest.fixture(scope="module")
def module_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounts]:
    """As `mount`, for all tests of a module."""
    _need_fuse()
    made = Mounts(tmp_path_factory.mktemp("mounts"))
    _current.append(made)
    yield made
    made.clean_up()
    _current.remove(made)
    assert not made.new_alarms([])


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    """NBD and web servers, killed at the end of the test."""
    made = Servers(tmp_path, _wait_until)
    yield made
    for server in made.all:
        server.kill()


_current: list[Mounts] = []  # whose logs are to be looked at


@pytest.fixture(autouse=True)
def nothing_alarming_is_logged(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    allowed = [pattern for mark in request.node.iter_markers("logs") for pattern in mark.args]
    yield
    alarms = [line for made in _current for line in made.new_alarms(allowed)]
    _current[:] = [made for made in _current if not made.ended]
    for record in caplog.get_records("call"):
        line = f"{record.levelname}: {record.getMessage()}"
        if record.name.startswith("cachefs") and record.levelno >= logging.WARNING:
            alarms += [] if any(re.search(pattern, line) for pattern in allowed) else [line]
    assert not alarms, "undeclared in the log:\n" + "\n".join(alarms)
