"""Mounts that somebody keeps, to be killed and upgraded by tests."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cachefs.testing.keeper import is_gone

ROOT = Path(__file__).parents[2]
DEADLINE_S = 30.0
KEEPERS = ("supervisor", "pid1")


def wait_for(condition: Callable[[], Any], what: str, timeout: float = DEADLINE_S) -> Any:
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout:.0f} s: {what}"
        time.sleep(0.01)
    return found


class Served:
    """A mount at `path` and whoever keeps its daemon. `package`: the folder that cachefs is imported from."""

    def __init__(self, folder: Path, config: Path, options: Sequence[str], package: Path) -> None:
        self.path = folder / "mnt"
        self.path.mkdir()
        self.folder = folder
        self.config = config
        self.environment = {**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
        self._options = list(options)

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """A command of cachefs."""
        command = [sys.executable, "-m", "cachefs", *map(str, arguments)]
        return subprocess.run(
            command, env=self.environment, cwd="/", capture_output=True, text=True, check=False, timeout=60
        )

    def status(self, disk: str = "") -> Any:
        return json.loads(os.getxattr(self.path / disk if disk else self.path, "user.cachefs.status"))

    @property
    def keeper_pid(self) -> int:
        raise NotImplementedError

    @property
    def pid(self) -> int:
        return int(self.status()["daemon"]["pid"])

    def kill(self) -> int:
        """kill -9 of the daemon; its pid. What comes next waits for its successor."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: is_gone(pid), "the daemon's end")
        return pid

    def upgrade(self) -> float:
        """The pause in ms. Fails when it was refused."""
        done = self.run("upgrade", self.path)
        assert done.returncode == 0, done.stderr
        found = re.search(r"took over from .*: a pause of (\d+) ms", done.stdout)
        assert found, done.stdout
        return float(found[1])

    def umount(self) -> None:
        done = self.run("umount", self.path)
        assert done.returncode == 0, done.stderr
        self.wait_ended()

    def log(self) -> str:
        raise NotImplementedError

    def wait_ended(self) -> None:
        """Until the keeper holds nothing any more."""
        raise NotImplementedError

    def clean_up(self) -> None:
        raise NotImplementedError


class Supervised(Served):
    def start(self) -> None:
        done = self.run("mount", *self._options, self.config, self.path)
        assert done.returncode == 0, done.stderr
        self._log = Path(re.sub(r"^.*; log: ", "", done.stdout.strip()))
        self.supervisor = int(Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[1])

    def log(self) -> str:
        return self._log.read_text()

    @property
    def keeper_pid(self) -> int:
        return self.supervisor

    def wait_ended(self) -> None:
        wait_for(lambda: is_gone(self.supervisor), "the supervisor's end")

    def clean_up(self) -> None:
        daemons = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _parent(path) == self.supervisor]
        for pid in (self.supervisor, *daemons):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _parent(process: Path) -> int:
    with contextlib.suppress(OSError):
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    return 0


class Kept(Served):
    """Below the stand-in for PID 1, with Restart=always."""

    def start(self) -> None:
        self._log = self.folder / "log"
        command = [sys.executable, "-m", "cachefs", "mount", "--foreground", *self._options, self.config, self.path]
        keeper = [sys.executable, "-m", "cachefs.testing.keeper", self.folder / "notify", *command]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                list(map(str, keeper)),
                env={**self.environment, "PYTHONPATH": f"{self.environment['PYTHONPATH']}:{ROOT}"},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n", self.log()

    def log(self) -> str:
        return self._log.read_text()

    @property
    def keeper_pid(self) -> int:
        return self.process.pid

    def wait_ended(self) -> None:
        assert self.process.wait(DEADLINE_S) == 0, "something is still kept"

    def clean_up(self) -> None:
        daemons = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _names(path, self.path)]
        self.process.kill()
        for pid in daemons:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()


def _names(process: Path, mountpoint: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.fsencode(mountpoint) in (process / "cmdline").read_bytes().split(b"\0")
    return False
