"""Keeps a daemon alive where systemd does not: `python -m cachefs.supervisor mount --foreground CONFIG MOUNTPOINT`.

Holds the descriptors that the daemon stores with it, and starts a successor when the daemon dies. It speaks systemd's protocol
(`cachefs.notify`), so the daemon knows only one. Standard library alone, nothing that waits, nothing that grows.

    the daemon ends with 0, or before it was ready, or after STOPPING=1     we end too, with its exit code
    the daemon ends in any other way                                        a successor starts, with all descriptors
    MAINPID=N                                                               the daemon is process N from here on
    no WATCHDOG=1 for WATCHDOG_S                                            the daemon hangs: SIGKILL

SIGTERM, SIGINT and SIGQUIT go to the daemon. Should we be killed, the daemon serves on, without anybody to follow it.

Source: sd_notify(3), sd_pid_notify_with_fds(3), sd_listen_fds(3), systemd.service(5) (FileDescriptorStoreMax=).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence

PR_SET_CHILD_SUBREAPER = 36
FIRST_DESCRIPTOR = 3
MOST_DESCRIPTORS = 4096
MOST_AT_ONCE = 253  # SCM_MAX_FD
MESSAGE_BYTES = 8192
WATCHDOG_S = 60.0
LONGEST_DELAY_S = 1.0
SHORT_LIFE_S = 5.0  # a daemon that dies sooner is started again after a while only, a longer one each time
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class Supervisor:
    """command: starts the daemon. only_first: descriptors that the first daemon alone inherits."""

    def __init__(self, command: Sequence[str], only_first: Sequence[int] = ()) -> None:
        self._command = list(command)
        self._only_first = list(only_first)
        self._kept: list[tuple[str, int]] = []
        self._is_ready = self._is_stopping = False
        self._delay_s = 0.0
        self._alive_at = 0.0  # the daemon's last sign of life, time.monotonic()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("")  # an abstract address of the kernel's choice
        self._signals, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in (signal.SIGCHLD, *FORWARDED):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(wake)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # a successor that the daemon started becomes ours

    def run(self) -> int:
        """Until the daemon has ended for good; its exit code."""
        self._start()
        while True:
            select.select([self._socket.fileno(), self._signals], [], [], WATCHDOG_S / 4)
            self._receive()
            self._forward_signals()
            code = self._reap()
            if code is not None:
                self._receive()  # what it said last
                if code == 0 or not self._is_ready or self._is_stopping:
                    return code if code >= 0 else 128 - code
                self._restart()
            elif self._is_ready and time.monotonic() - self._alive_at > WATCHDOG_S:
                self._signal(signal.SIGKILL)

    # ---- the daemon

    def _start(self) -> None:
        self._started_at = self._alive_at = time.monotonic()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._become_daemon()
            finally:
                os._exit(127)
        for descriptor in self._only_first:
            os.close(descriptor)
        self._only_first.clear()

    def _become_daemon(self) -> None:
        """In the child: the descriptors that are kept get the numbers that the protocol wants."""
        signal.set_wakeup_fd(-1)
        for forwarded in (signal.SIGCHLD, *FORWARDED):
            signal.signal(forwarded, signal.SIG_DFL)
        for descriptor in self._only_first:
            os.set_inheritable(descriptor, True)
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": "@" + self._socket.getsockname()[1:].decode(),
            "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6)),
        }
        if self._kept:
            environment["LISTEN_PID"] = str(os.getpid())
            environment["LISTEN_FDS"] = str(len(self._kept))
            environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in self._kept)
        above = FIRST_DESCRIPTOR + len(self._kept)
        moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, above) for _, descriptor in self._kept]
        for number, descriptor in enumerate(moved, FIRST_DESCRIPTOR):
            os.dup2(descriptor, number)  # over our own socket and pipe, too
        os.execve(self._command[0], self._command, environment)

    def _restart(self) -> None:
        """A successor, at once; one after another that did not live long, after a while."""
        if time.monotonic() - self._started_at < SHORT_LIFE_S:
            time.sleep(self._delay_s)
            self._delay_s = min(LONGEST_DELAY_S, self._delay_s * 2 + 0.05)
        else:
            self._delay_s = 0.0
        self._start()

    def _reap(self) -> int | None:
        """The exit code of the daemon if it has ended, minus the signal that killed it."""
        found = None
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._pid:
                    found = os.waitstatus_to_exitcode(ended[1])
        return found

    def _forward_signals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for byte in os.read(self._signals, 512):
                if byte in FORWARDED:
                    self._signal(byte)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, number)

    # ---- what it says

    def _receive(self) -> None:
        rights = socket.CMSG_SPACE(MOST_AT_ONCE * 4)
        with contextlib.suppress(BlockingIOError):
            while True:
                message, ancillary, _, _ = self._socket.recvmsg(
                    MESSAGE_BYTES, rights + socket.CMSG_SPACE(12), socket.MSG_CMSG_CLOEXEC
                )
                sender, descriptors = 0, []
                for _, kind, content in ancillary:
                    numbers = memoryview(content[: len(content) // 4 * 4]).cast("i").tolist()
                    if kind == socket.SCM_RIGHTS:
                        descriptors += numbers
                    elif kind == socket.SCM_CREDENTIALS:
                        sender = numbers[0]
                lines = message.decode(errors="replace").split("\n")
                fields = dict(line.split("=", 1) for line in lines if "=" in line)
                if sender == self._pid:
                    self._take(fields, descriptors)
                else:
                    _close(descriptors)

    def _take(self, fields: dict[str, str], descriptors: list[int]) -> None:
        self._alive_at = time.monotonic()
        name = fields.get("FDNAME", "stored")
        if "FDSTOREREMOVE" in fields:
            _close([descriptor for kept, descriptor in self._kept if kept == name])
            self._kept = [entry for entry in self._kept if entry[0] != name]
        if "FDSTORE" in fields and len(self._kept) + len(descriptors) <= MOST_DESCRIPTORS:
            self._kept += [(name, descriptor) for descriptor in descriptors]
            descriptors = []
        _close(descriptors)  # those of a barrier among them
        if fields.get("MAINPID", "").isdecimal():
            self._pid = int(fields["MAINPID"])
        self._is_stopping |= "STOPPING" in fields
        if "READY" in fields and not self._is_ready:
            self._is_ready = True
            null = os.open(os.devnull, os.O_RDWR)
            for number in range(3):  # whoever started us may wait for the end of these
                os.dup2(null, number)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def main() -> None:
    """`[--only-first N]... ARGUMENTS`: supervise `cachefs ARGUMENTS`."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # for the daemon too: each disk is some descriptors
    arguments, only_first = sys.argv[1:], []
    while arguments[:1] == ["--only-first"]:
        only_first.append(int(arguments[1]))
        del arguments[:2]
    sys.exit(Supervisor([sys.executable, "-m", "cachefs", *arguments], only_first).run())


if __name__ == "__main__":
    main()
