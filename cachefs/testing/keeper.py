"""A stand-in for PID 1, as systemd documents it: keeps descriptors for a process and hands them to the next one.

    keeper = Keeper(folder / "notify")
    process = keeper.start([sys.executable, "-m", "cachefs", "mount", "--foreground", ...])
    keeper.wait(lambda: keeper.is_ready)            # turns its loop until then
    process.kill()
    process = keeper.start([...])                   # finds LISTEN_FDS, LISTEN_FDNAMES, LISTEN_PID

Or as a program, which is a unit with Restart=always: `python -m cachefs.testing.keeper SOCKET COMMAND...`. It says "ready"
when the process has, starts it anew whenever it ends, and ends itself after STOPPING=1: with 0 when nothing is kept by then.
(Whoever forks must not have files of the mount open: the child would close them, and wait for a daemon.)

What systemd does and this must: a datagram counts only from the main process (NotifyAccess=main, by its credentials); FDSTORE
with FDNAME, which has at most 255 characters and no colon; the same open file twice is stored once; FDPOLL=0 or a descriptor
that polls as an error or hung up is dropped; FDSTOREREMOVE takes away all of a name; BARRIER closes what it came with, after
all that came before; MAINPID names another main process; descriptors keep their order and names.

Source: sd_notify(3), sd_pid_notify_with_fds(3), sd_notify_barrier(3), sd_listen_fds(3), systemd.service(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SYS_KCMP = 312  # x86-64
_EXEC = """
import fcntl, os, sys
numbers = [int(number) for number in sys.argv[1].split(",") if number]
moved = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3 + len(numbers)) for number in numbers]
for place, number in enumerate(moved, 3):
    os.dup2(number, place)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


class Keeper:
    """path: of its socket, which is made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept: list[tuple[str, int]] = []
        self.unpolled: set[int] = set()  # stored with FDPOLL=0
        self.status = ""
        self.is_ready = self.is_stopping = False
        self.main_pid = 0
        self.messages: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(path))

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Run *command* as the main process, with what is kept."""
        environment: dict[str, str] = {**options.pop("env", os.environ), "NOTIFY_SOCKET": str(self.path)}
        if self.kept:
            environment["LISTEN_FDS"] = str(len(self.kept))
            environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in self.kept)
        numbers = [descriptor for _, descriptor in self.kept]
        program = [sys.executable, "-c", _EXEC, ",".join(map(str, numbers)), *command]
        self.is_ready = False
        process = subprocess.Popen(program, env=environment, pass_fds=numbers, **options)
        self.main_pid = process.pid
        return process

    def wait(self, condition: Callable[[], Any], timeout: float = 20.0) -> bool:
        """Turn the loop until *condition*; False when it does not come true in time."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                return False
            self.turn(0.01)
        return True

    def turn(self, patience_s: float = 0.0) -> None:
        """Take in what has come, or comes within *patience_s*."""
        select.select([self._socket], [], [], patience_s)
        with contextlib.suppress(BlockingIOError):
            while True:
                content, ancillary, _, _ = self._socket.recvmsg(8192, socket.CMSG_SPACE(253 * 4) + 64)
                sender, descriptors = 0, list[int]()
                for _, kind, data in ancillary:
                    numbers = memoryview(data[: len(data) // 4 * 4]).cast("i").tolist()
                    if kind == socket.SCM_RIGHTS:
                        descriptors += numbers
                    else:
                        sender = numbers[0]
                self._take(dict(line.split("=", 1) for line in content.decode().split("\n")), sender, descriptors)
        for name, descriptor in list(self.kept):
            poll = select.poll()
            poll.register(descriptor, 0)
            if descriptor not in self.unpolled and poll.poll(0):
                self._remove([(name, descriptor)])
                self.messages.append({"dropped": name})

    def _take(self, message: Mapping[str, str], sender: int, descriptors: list[int]) -> None:
        if sender != self.main_pid:
            for descriptor in descriptors:
                os.close(descriptor)
            return
        self.messages.append(dict(message))
        self.status = message.get("STATUS", self.status)
        self.is_ready |= message.get("READY") == "1"
        self.is_stopping |= message.get("STOPPING") == "1"
        if "MAINPID" in message:
            self.main_pid = int(message["MAINPID"])
        if message.get("FDSTOREREMOVE") == "1":
            self._remove([entry for entry in self.kept if entry[0] == message["FDNAME"]])
        elif message.get("FDSTORE") == "1":
            name = message.get("FDNAME", "stored")
            assert len(name) <= 255
            assert ":" not in name
            assert name.isascii()
            assert name.isprintable()
            for descriptor in descriptors:
                if any(_is_same(descriptor, other) for _, other in self.kept):
                    os.close(descriptor)
                    continue
                self.kept.append((name, descriptor))
                if message.get("FDPOLL") == "0":
                    self.unpolled.add(descriptor)
            descriptors = []
        for descriptor in descriptors:  # a barrier's
            os.close(descriptor)

    def _remove(self, entries: Sequence[tuple[str, int]]) -> None:
        for entry in entries:
            self.kept.remove(entry)
            self.unpolled.discard(entry[1])
            os.close(entry[1])

    def let_go(self) -> None:
        """The unit has stopped: everything is closed."""
        self._remove(list(self.kept))

    def close(self) -> None:
        self.let_go()
        self._socket.close()
        self.path.unlink()


def _is_same(one: int, other: int) -> bool:
    """kcmp(2): whether both are the same open file, not merely the same file."""
    pid = os.getpid()
    return bool(ctypes.CDLL(None).syscall(SYS_KCMP, pid, pid, 0, one, other) == 0)


def is_gone(pid: int) -> bool:
    """Whether process *pid* has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def main(arguments: Sequence[str]) -> int:
    socket_path, *command = arguments
    keeper = Keeper(Path(socket_path))
    processes = [keeper.start(command)]
    is_said = False
    while True:
        keeper.turn(0.01)
        for process in processes:
            process.poll()
        if keeper.is_ready and not is_said:
            is_said = True
            print("ready", flush=True)
        if is_gone(keeper.main_pid):
            keeper.turn()  # what it said last
            if keeper.is_stopping or not is_said:
                break
            processes.append(keeper.start(command))
    left = len(keeper.kept)
    keeper.close()
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

__all__ = ["Keeper", "is_gone"]
