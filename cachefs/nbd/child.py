"""An NBD server that we start: a child of the daemon, given a listening unix socket by systemd's protocol (LISTEN_FDS).

    <state_dir>/servers/<name>/         mode 0700
        lock      flock'ed by the daemon that has the child open; its text is the session of the last server
        socket    bound and kept by us: whoever connects while the server is away waits in its queue

The server runs in a session of its own, in the folder `/`. Of our descriptors it has that socket and a pipe, its stderr, which
comes line by line into our log. It gets SIGTERM when the daemon dies (setpriv --pdeathsig; that follows the thread which
started it, so it is the loop's), and it carries CACHEFS_SERVER=<folder> in its environment, by which all of its
descendants are found, by us and by a daemon that comes after us.

    starting   nobody was served yet: its end is an error of whoever opens the disk
    running    when it ends by itself it is started again, with growing pauses
    ended      by `end`: nothing that it was sent can land any more; `ensure_running` starts it again

*Gone* means: the server and all of its descendants. One task watches, reaps and starts; `end` signals and waits for it.
**Source:** sd_listen_fds(3); nbdkit-service(1); QEMU util/systemd.c
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import trio

from cachefs.errors import LockedError, StoreError
from cachefs.insistence import backoff
from cachefs.nbd.address import Address
from cachefs.nbd.descendants import end_all, has_ended

log = logging.getLogger(__name__)

GRACE_S = 10.0  # from SIGTERM to SIGKILL: qemu-nbd writes out what it holds of an image's tables
_FORCED_GRACE_S = 0.3
_LEFT_BEHIND_GRACE_S = 5.0  # for what a server that has ended left behind
_STEADY_S = 30.0  # a server that ran so long begins with short pauses again
_LONGEST_LINE = 2000
_BACKLOG = 64
_LONGEST_ADDRESS = 107  # bytes of a unix socket's path
_MARK = "CACHEFS_SERVER"
_NOT_FOR_CHILDREN = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDNAMES")
_PACKAGES = {"qemu-nbd": "qemu-utils", "nbdkit": "nbdkit", "setpriv": "util-linux"}
# The daemon that died before setpriv had its say is noticed by PPID. exec keeps the pid, which is what LISTEN_PID must be.
_START = '[ "$PPID" = "$1" ] || exit 1; shift; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null'

Found = TypeVar("Found")

_groups: set[int] = set()  # process groups of the servers that run, of all disks


def kill_servers() -> None:
    """For a daemon that ends now and cannot wait, in any thread: what its servers were asked for may be lost."""
    for group in [*_groups]:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)


class Child:
    """A server; `Child.open` makes it. address: where it serves, as long as the child is open."""

    def __init__(self, name: str, command: Sequence[str], directory: Path, listening: _Listening) -> None:
        self.name = name
        self.address = Address("", socket=listening.path)
        self.starts = 0
        self.started_at = 0.0
        """On trio's clock: the process before it was gone by then."""
        self.trouble = ""
        """How the server ended last, a sentence; empty before it has."""
        self._command = [*command]
        self._mark = f"{_MARK}={directory}"
        self._listening = listening
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._gone = trio.Event()
        self._is_wanted = True
        self._changed = trio.lowlevel.ParkingLot()
        self._starting: trio.CancelScope | None = trio.CancelScope()
        self._log_end, self._stderr = os.pipe()
        os.set_blocking(self._log_end, False)
        self._unfinished = b""
        self._last_lines: deque[str] = deque(maxlen=2)  # qemu-nbd says what is wrong, then whether that is your fault

    @property
    def pid(self) -> int:
        """Of the server, and of its session and process group; 0 when there is none."""
        return self._process.pid if self._process is not None else 0

    @property
    def pidfd(self) -> int:
        """Readable when the server has ended (its descendants may not have); -1 when there is none. Not to be kept."""
        return self._pidfd

    @classmethod
    @asynccontextmanager
    async def open(
        cls, name: str, command: Sequence[str], state_dir: Path, forced_stop: trio.Event | None = None
    ) -> AsyncIterator[Child]:
        """The server, started; on exit it is gone. To be called in the thread that lives as long as the daemon.

        What an earlier daemon left running for *name* is ended first. Cancelled, or once *forced_stop* is set, it gives the
        server little time to end.
        Raises: StoreError when the command is not there.
        """
        for program in ("setpriv", command[0]):
            _check_installed(name, program)
        directory = state_dir / "servers" / name
        async with _own_directory(name, directory) as listening:
            child = cls(name, command, directory, listening)
            problem: Exception | None = None
            try:
                await end_all(child._mark, listening.earlier_session, name, GRACE_S)
                child._start()
                scope = trio.CancelScope(shield=True)  # a cancelled owner still waits for the end
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(child._watch, scope)
                    try:
                        yield child
                    except Exception as exc:
                        problem = exc  # raised again outside, or the nursery would put it into a group
                    finally:
                        is_forced = trio.current_effective_deadline() == -math.inf
                        with trio.CancelScope(shield=True):
                            await child._end_at_last(is_forced, forced_stop)
                        scope.cancel()
            finally:
                os.close(child._log_end)
                os.close(child._stderr)
            if problem is not None:
                raise problem

    async def until_served(self, connect: Callable[[], Awaitable[Found]]) -> Found:
        """What *connect* returns, which is to be asked once, first of all.

        Raises: StoreError when the server ends meanwhile; what *connect* raises.
        """
        starting = self._starting
        assert starting is not None
        with starting:
            found = await connect()
            self._starting = None
            return found
        raise self._failure()

    async def check_lasted(self) -> None:
        """After a disk was opened, or was not. Raises: StoreError when the server that was started first has ended since."""
        if self._process is not None and has_ended(self._pidfd):
            await self._gone.wait()
        if self.trouble:
            raise self._failure()

    def _failure(self) -> StoreError:
        advice = "" if "; it " in self.trouble else "; run that command by hand to see more"
        return StoreError(self.name, f"{self.trouble}{advice}")

    async def end(self, grace_s: float = GRACE_S) -> None:
        """SIGTERM, after *grace_s* SIGKILL. On return the server and its descendants are gone: a fence.

        Close the connections first: nbdkit ends when its clients have gone, and tells them to wait (ESHUTDOWN) until then.
        It stays so until `ensure_running`. May be called any number of times, also at once. Cancelled, SIGTERM has been sent.
        """
        self._is_wanted = False
        if self._process is None:
            return
        gone = self._gone
        self._signal(signal.SIGTERM)
        with trio.move_on_after(grace_s):
            await gone.wait()
        if not gone.is_set():
            log.warning("%s: the server did not end within %.1f s: killed", self.name, grace_s)
            self._signal(signal.SIGKILL)
            await gone.wait()

    async def _end_at_last(self, is_forced: bool, forced_stop: trio.Event | None) -> None:
        async with trio.open_nursery() as nursery:
            if forced_stop is not None:
                nursery.start_soon(self._hasten_the_end, forced_stop)
            await self.end(_FORCED_GRACE_S if is_forced else GRACE_S)
            nursery.cancel_scope.cancel()

    async def _hasten_the_end(self, forced_stop: trio.Event) -> None:
        await forced_stop.wait()
        await trio.sleep(_FORCED_GRACE_S)
        log.warning("%s: the stop was forced, and the server did not end: killed", self.name)
        self._signal(signal.SIGKILL)

    def ensure_running(self) -> None:
        """Have it started again after `end`; nothing where it runs or is about to be started."""
        self._is_wanted = True
        self._changed.unpark_all()

    # ---- one process

    def _start(self) -> None:
        """Raises: StoreError."""
        inherited = {key: value for key, value in os.environ.items() if key not in _NOT_FOR_CHILDREN}
        mark, _, directory = self._mark.partition("=")
        shell = ["sh", "-c", _START, "sh", str(os.getpid())]
        try:
            # this waits for the start of setpriv only, a small local program, and not for that of the command
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "--", *shell, *self._command],
                stdin=self._listening.socket.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                env={**inherited, mark: directory},
                cwd="/",
                start_new_session=True,
            )
        except OSError as exc:
            raise StoreError(self.name, f"cannot start {shlex.join(self._command)}: {exc.strerror}") from exc
        self._listening.note_session(self._process.pid)
        self._pidfd = os.pidfd_open(self._process.pid)
        _groups.add(self._process.pid)
        self._gone = trio.Event()
        self._last_lines.clear()
        self.starts += 1
        self.started_at = trio.current_time()

    def _signal(self, number: signal.Signals) -> None:
        """To the whole group. It is ours for as long as the server is not reaped, zombie or not."""
        if self._process is not None:
            try:
                os.killpg(self._process.pid, number)
            except PermissionError:
                log.error("%s: the server runs as another user, and cannot be ended by this one", self.name)

    async def _watch(self, scope: trio.CancelScope) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_log)
                nursery.start_soon(self._supervise)

    async def _supervise(self) -> None:
        pauses = backoff()
        while True:
            began = trio.current_time()
            if self._process is not None:
                await self._wait_gone()
                if self._starting is not None and self._is_wanted:
                    self._starting.cancel()
                    return
                if trio.current_time() - began > _STEADY_S:
                    pauses = backoff()
            if self._is_wanted:
                pause = next(pauses)
                log.warning("%s: %s; starting it again in %.1f s", self.name, self.trouble, pause)
                await trio.sleep(pause)
            while not self._is_wanted:  # perhaps only since that pause
                await self._changed.park()
            try:
                self._start()
            except StoreError as exc:
                self.trouble = exc.detail

    async def _wait_gone(self) -> None:
        """Until the server has ended and its descendants too; then it is reaped."""
        process = self._process
        assert process is not None
        await trio.lowlevel.wait_readable(self._pidfd)
        await end_all(self._mark, process.pid, self.name, _LEFT_BEHIND_GRACE_S)
        _groups.discard(process.pid)
        status = process.wait()  # reaped only now: until then its number, which is the group's, is nobody else's
        os.close(self._pidfd)
        self._process, self._pidfd = None, -1
        self._take_lines(at_end=True)
        said = "".join(f": {line}" for line in self._last_lines)
        self.trouble = f"the server ({shlex.join(self._command)}) {_how_it_ended(status, said)}"
        self._gone.set()

    # ---- what it says

    async def _read_log(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._log_end)
            self._take_lines()

    def _take_lines(self, *, at_end: bool = False) -> None:
        with contextlib.suppress(BlockingIOError):
            self._unfinished += os.read(self._log_end, 1 << 16)
        *lines, self._unfinished = self._unfinished.split(b"\n")
        if at_end or len(self._unfinished) > _LONGEST_LINE:
            lines.append(self._unfinished)
            self._unfinished = b""
        for line in lines:
            text = line.decode(errors="backslashreplace").strip()[:_LONGEST_LINE]
            if text:
                self._last_lines.append(text)
                log.info("%s: server: %s", self.name, text)


def _check_installed(name: str, program: str) -> None:
    """Raises: StoreError."""
    if shutil.which(program) is None:
        package = _PACKAGES.get(program)
        todo = f"apt-get install {package}" if package else "install it, or write its whole path"
        raise StoreError(name, f"there is no program {program!r} to start: {todo}")


def _how_it_ended(status: int, said: str) -> str:
    """A sentence from the exit status, as `subprocess` has it, and the last lines of stderr."""
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    if "socket activation" in said:
        advice = "; it is given its socket: leave out what names one (-k, -U, -p, -i, -b)"
    else:
        advice = "" if status else "; it must stay in the foreground: leave out --fork and the like"
    return f"{how}{said}{advice}"


@dataclass(frozen=True)
class _Listening:
    """A bound socket, the path by which this process can connect to it, and the descriptors that keep both ours."""

    socket: socket.socket
    path: str
    folder: int
    lock: int
    earlier_session: int
    """Of the server that was started last, perhaps by another daemon."""

    def note_session(self, session: int) -> None:
        with contextlib.suppress(OSError):  # a full disk must not keep a server from starting
            os.pwrite(self.lock, b"%-20d\n" % session, 0)

    def close(self) -> None:
        self.socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink("socket", dir_fd=self.folder)
        os.close(self.folder)
        os.close(self.lock)


@asynccontextmanager
async def _own_directory(name: str, directory: Path) -> AsyncIterator[_Listening]:
    """The listening socket in *directory*, which is ours alone meanwhile.

    Raises: LockedError, StoreError.
    """
    try:
        listening = await trio.to_thread.run_sync(_listen_in, name, directory)
    except OSError as exc:
        raise StoreError(name, f"cannot make a socket in {directory}: {exc.strerror}") from exc
    try:
        yield listening
    finally:
        listening.close()


def _listen_in(name: str, directory: Path) -> _Listening:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=folder)
    # Always short enough, and a name that the server cannot resolve: qemu-nbd unlinks the address of its socket at its end.
    address = f"/proc/self/fd/{folder}/socket"
    path = str(directory / "socket")
    listening = socket.socket(socket.AF_UNIX)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            os.unlink("socket", dir_fd=folder)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except BaseException as exc:
        listening.close()
        os.close(folder)
        os.close(lock)
        if isinstance(exc, BlockingIOError):
            wrong = f"another daemon has a server in {directory}: each mount needs a state_dir of its own"
            raise LockedError(name, wrong) from None
        raise
    if len(os.fsencode(path)) > _LONGEST_ADDRESS:
        path = address
    noted = os.pread(lock, 20, 0).strip()
    return _Listening(listening, path, folder, lock, int(noted) if noted.isdigit() else 0)
