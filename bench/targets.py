"""The servers that a benchmark compares, each started over the same base image and pinned to one CPU.

Every target presents one file of the same size and content. Targets are started before the first measurement of a
storage and stopped after the last, so an idle one must cost nothing; `cpu_seconds` lets the caller check that.

What is left behind: nothing. Servers live in sessions of their own (Ctrl-C on the terminal does not reach them), get
SIGTERM when this process dies, and `workspace` removes what a killed run left, mounts included.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = "cachefs-bench-"
CHUNK = 1 << 20
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
ROOT = Path(__file__).resolve().parent.parent


class TargetError(Exception):
    """A target cannot be started or serves wrong bytes; the message ends with what its server said."""


@dataclass(frozen=True)
class Place:
    """Where the targets of one storage live: `directory` holds everything, `base` is the image they share."""

    directory: Path
    base: Path
    size: int
    server_cpu: int
    cachefs_command: tuple[str, ...]


class Target(ABC):
    """One file to measure. `start` returns when the file answers with its full size."""

    title: str
    packages: dict[str, str] = {}  # noqa: RUF012  # program -> Debian package
    flushes = True  # an fsync of the file makes its data durable

    def __init__(self, name: str, place: Place) -> None:
        self.name = name
        self.place = place
        self.directory = place.directory / name
        self.server: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def path(self) -> Path: ...

    @abstractmethod
    def command(self) -> list[str]:
        """The server's command line, with nothing prepared yet; empty when there is no server."""

    def prepare(self) -> None:  # noqa: B027
        """Create what the command expects."""

    def unmount(self) -> bool:
        """Ask for the mount to go, by which the server ends. False: SIGTERM is the way to ask."""
        return False

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    @classmethod
    def missing_packages(cls) -> list[str]:
        return sorted({package for program, package in cls.packages.items() if shutil.which(program) is None})

    def start(self) -> None:
        self.directory.mkdir()
        self.prepare()
        command = self.command()
        if command:
            # setpriv: the server ends when we are killed; a session of its own: Ctrl-C is for us alone
            pinned = ["setpriv", "--pdeathsig", "TERM", "taskset", "-c", str(self.place.server_cpu), *command]
            with open(self.directory / "log", "wb") as log:
                self.server = subprocess.Popen(
                    pinned,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self.environment(),
                    start_new_session=True,
                )
        self._wait_until_served()

    def stop(self) -> None:
        server, self.server = self.server, None
        if server is None:
            return
        try:
            if not (self.unmount() and _ended(server, STOP_TIMEOUT_S / 4)):
                server.terminate()
                _ended(server, STOP_TIMEOUT_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)  # also helpers it left, e.g. nbdkit below nbdfuse
            server.wait()

    def cpu_seconds(self) -> float:
        """CPU time used so far by all processes of the server together; 0 without a server."""
        return 0.0 if self.server is None else sum(_cpu_seconds(pid) for pid in _session(self.server.pid))

    def check_content(self) -> None:
        """Compare samples of the file with the base. Call before the first write."""
        length = min(64 << 10, self.place.size)
        with open(self.path, "rb", buffering=0) as ours, open(self.place.base, "rb", buffering=0) as base:
            for step in range(17):
                offset = (self.place.size - length) * step // 16
                if os.pread(ours.fileno(), length, offset) != os.pread(base.fileno(), length, offset):
                    raise TargetError(f"{self.name}: wrong bytes at offset {offset}")

    def _wait_until_served(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            with suppress(OSError):
                if self.path.stat().st_size == self.place.size:
                    return
            if self.server is not None and self.server.poll() is not None:
                raise TargetError(f"{self.name}: server ended with status {self.server.returncode}\n{self._log_tail()}")
            time.sleep(0.05)
        raise TargetError(f"{self.name}: {self.path} did not appear within {START_TIMEOUT_S:.0f} s\n{self._log_tail()}")

    def _log_tail(self) -> str:
        try:
            return "\n".join((self.directory / "log").read_text(errors="replace").splitlines()[-15:])
        except FileNotFoundError:
            return ""


class Cachefs(Target):
    title = "cachefs: cow over file"

    @property
    def mountpoint(self) -> Path:
        return self.directory / "mnt"

    @property
    def path(self) -> Path:
        return self.mountpoint / "vm1"

    def disks(self) -> dict[str, Any]:
        """As in the configuration; `vm1` is the one that is measured."""
        return {"vm1": {"layers": [{"cow": {}}], "image": "base"}}

    def lower_layers(self) -> list[Any]:
        """Layers of the image."""
        return []

    def configuration(self) -> dict[str, Any]:
        return {
            "state_dir": str(self.directory / "state"),
            "pools": {
                "node": {"path": str(self.directory / "pool"), "quota": str(self.place.size * 5 // 4 + (64 << 20))}
            },
            "images": {"base": {"layers": self.lower_layers(), "backend": {"file": {"path": str(self.place.base)}}}},
            "disks": self.disks(),
        }

    def prepare(self) -> None:
        self.mountpoint.mkdir()
        (self.directory / "config.yaml").write_text(json.dumps(self.configuration(), indent=2))  # JSON is YAML

    def command(self) -> list[str]:
        return [*self.place.cachefs_command, "mount", "-f", str(self.directory / "config.yaml"), str(self.mountpoint)]

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return super().environment() | {"PYTHONPATH": path}

    def unmount(self) -> bool:
        return _run([*self.place.cachefs_command, "umount", str(self.mountpoint)], self.environment())

    def status(self) -> dict[str, Any] | None:
        """What the daemon says about itself and this disk, or None where it says nothing."""
        try:
            status = json.loads(os.getxattr(self.path, "user.cachefs.status"))
        except (OSError, ValueError):
            return None
        return status if isinstance(status, dict) else None


class CachefsCache(Cachefs):
    """What is read from the base comes from a pool beside it, in the same storage."""

    title = "cachefs: cow over cache over file"

    def lower_layers(self) -> list[Any]:
        return [{"cache": {"pool": "node"}}]


class Bare(Target):
    title = "the bare file, no server"

    @property
    def path(self) -> Path:
        return self.directory / "disk.raw"

    def prepare(self) -> None:
        subprocess.run(["cp", "--reflink=never", "--sparse=never", self.place.base, self.path], check=True)

    def command(self) -> list[str]:
        return []


class StorageDaemon(Target):
    title = "qemu-storage-daemon FUSE export of a qcow2 overlay"
    packages = {"qemu-storage-daemon": "qemu-system-common", "qemu-img": "qemu-utils"}  # noqa: RUF012

    @property
    def path(self) -> Path:
        return self.directory / "disk"

    def prepare(self) -> None:
        self.path.touch()
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(self.place.base)]
        subprocess.run([*create, str(self.directory / "overlay.qcow2")], check=True)

    def command(self) -> list[str]:
        base = f"driver=file,node-name=base-file,read-only=on,filename={self.place.base}"
        overlay = f"driver=file,node-name=overlay-file,filename={self.directory / 'overlay.qcow2'}"
        export = f"type=fuse,id=disk,node-name=disk,mountpoint={self.path},writable=on,growable=off,allow-other=auto"
        options = ["--blockdev", base, "--blockdev", "driver=raw,node-name=base,read-only=on,file=base-file"]
        options += ["--blockdev", overlay, "--blockdev", "driver=qcow2,node-name=disk,file=overlay-file,backing=base"]
        return ["qemu-storage-daemon", *options, "--export", export]  # SIGTERM unmounts


class NbdFuse(Target):
    """nbdkit started by nbdfuse over one connection, with cow blocks of 4 KiB: the fastest setting on one CPU.

    Measured beside it: 64 KiB blocks (the default) give 0.75x of the random reads and 0.6x of the random writes and
    1.3x of the sequential writes; two or four connections over a Unix socket give 0.6x to 0.8x of the random I/O.
    """

    title = "nbdfuse + nbdkit --filter=cow file"
    packages = {"nbdfuse": "libnbd-bin", "nbdkit": "nbdkit"}  # noqa: RUF012
    flushes = False  # the cow filter answers a flush without a sync (its overlay is gone after a crash anyway)

    @property
    def mountpoint(self) -> Path:
        return self.directory / "mnt"

    @property
    def path(self) -> Path:
        return self.mountpoint / "disk"

    def prepare(self) -> None:
        self.mountpoint.mkdir()

    def command(self) -> list[str]:
        nbdkit = ["nbdkit", "--filter=cow", "file", str(self.place.base), "cow-block-size=4096"]
        return ["nbdfuse", str(self.path), "[", *nbdkit, "]"]

    def environment(self) -> dict[str, str]:
        return super().environment() | {"TMPDIR": str(self.directory)}  # where nbdkit keeps the overlay

    def unmount(self) -> bool:
        return _run(["fusermount3", "-u", str(self.mountpoint)], None)


TARGETS: dict[str, type[Target]] = {
    "cachefs": Cachefs,
    "control": Cachefs,
    "cache": CachefsCache,
    "bare": Bare,
    "qsd": StorageDaemon,
    "nbdfuse": NbdFuse,
}
PEERS = ("qsd", "nbdfuse")


@contextmanager
def workspace(parent: Path) -> Iterator[Path]:
    """A directory of our own below `parent`, removed at the end with all mounts in it; so are those of killed runs."""
    parent.mkdir(parents=True, exist_ok=True)
    for old in parent.glob(PREFIX + "*"):
        _remove_if_abandoned(old)
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield directory
        finally:
            remove(directory)


def create_base(path: Path, size: int) -> None:
    """Random bytes, so that nothing on the way can save work on zeros."""
    with open(path, "wb") as file:
        for offset in range(0, size, CHUNK):
            file.write(os.urandom(min(CHUNK, size - offset)))
        file.flush()
        os.fsync(file.fileno())


def mounts_below(directory: Path) -> list[Path]:
    """Mountpoints at or below `directory`, innermost first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mountpoint = Path(_unescape(line.split()[4]))
        if mountpoint.is_relative_to(directory):
            found.append(mountpoint)
    return sorted(found, key=lambda path: len(path.parts), reverse=True)


def file_system_of(directory: Path) -> str:
    best = (0, "unknown")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        mountpoint = Path(_unescape(fields[4]))
        if directory.is_relative_to(mountpoint):
            best = max(best, (len(mountpoint.parts), fields[fields.index("-") + 1]), key=lambda entry: entry[0])
    return best[1]


def remove(directory: Path) -> None:
    for mountpoint in mounts_below(directory):
        subprocess.run(["umount", "-l", mountpoint], check=False, capture_output=True)
    if left := mounts_below(directory):
        raise TargetError(f"still mounted, so nothing is deleted: {', '.join(map(str, left))}")
    shutil.rmtree(directory)


def _remove_if_abandoned(directory: Path) -> None:
    with suppress(FileNotFoundError, BlockingIOError), open(directory / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(directory)


def _unescape(field: str) -> str:
    return field.encode().decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")


def _ended(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _run(command: Sequence[str], environment: dict[str, str] | None) -> bool:
    with suppress(subprocess.TimeoutExpired, FileNotFoundError):
        done = subprocess.run(command, check=False, capture_output=True, timeout=STOP_TIMEOUT_S, env=environment)
        return done.returncode == 0
    return False


def _session(leader: int) -> list[int]:
    """All processes of the session that `leader` started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader:
                    found.append(int(entry.name))
    return found


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process with the threads it had; in nanoseconds, where /proc/PID/stat counts in 10 ms."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # Source: clock_getcpuclockid(3), CPUCLOCK_SCHED of the process
    except OSError:
        return 0.0
