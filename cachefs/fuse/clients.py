"""Whether the process behind a request has been killed, so that an answer would reach nobody.

The kernel says little: INTERRUPT comes for any signal and never for asynchronous I/O. So requests that wait are looked at:
the thread in the header is resolved once, early, to its process and that process's start time. It is dead only when the
same process has SIGKILL pending, or nothing is left of it but a zombie leader. A thread that has ended is no dead client
(io_uring workers, threads that submit and end); pid 0, kernel threads and whatever cannot be resolved never are.

Source: proc(5); Linux kernel/signal.c (complete_signal leaves SIGKILL in the shared set), fs/aio.c (exit_aio waits for us).
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import NamedTuple

SIGKILL_BIT = 1 << (signal.SIGKILL - 1)  # 0x100
PF_KTHREAD = 0x00200000  # include/linux/sched.h
PROC = Path("/proc")
_STATE, _FLAGS, _THREADS, _STARTED = 0, 6, 17, 19  # in /proc/N/stat, counted from its third field


class Client(NamedTuple):
    process: int  # its thread group
    started: str  # clock ticks since boot: with the number, unmistakable


def _stat(process: int) -> list[str] | None:
    """The fields of /proc/N/stat from the third (state) on."""
    try:
        text = (PROC / str(process) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _status(thread: int) -> dict[str, str] | None:
    try:
        lines = (PROC / str(thread) / "status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def resolve(thread: int) -> Client | None:
    """The process of *thread* (the pid in a request's header); None for what is never dead."""
    status = _status(thread) if thread else None
    if status is None:
        return None
    process = int(status.get("Tgid", "0"))
    stat = _stat(process)
    if stat is None or int(stat[_FLAGS]) & PF_KTHREAD:
        return None
    return Client(process, stat[_STARTED])


def is_dead(client: Client) -> bool:
    """Whether *client* will never look at an answer. Two small reads in /proc."""
    stat, status = _stat(client.process), _status(client.process)
    if stat is None or status is None or stat[_STARTED] != client.started:
        return False  # gone altogether: nothing that we could free it from
    if stat[_STATE] == "Z" and stat[_THREADS] == "1":
        return True
    pending = int(status.get("SigPnd", "0"), 16) | int(status.get("ShdPnd", "0"), 16)
    return bool(pending & SIGKILL_BIT)
