"""The processes that a server has left behind, found by a mark in their environment and ended.

Gone is what a pidfd says: it is readable when the last thread of a process has ended. Before that a process can be without an
environment, or a zombie, and still be writing; such ones are known by their session.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import signal
from pathlib import Path

import trio

log = logging.getLogger(__name__)


async def end_all(mark: str, session: int, name: str, grace_s: float) -> None:
    """Until no process is left that has *mark*: SIGTERM, after *grace_s* SIGKILL. Each is waited for to its very end."""
    kill_at = trio.current_time() + grace_s
    number = signal.SIGTERM
    while left := await trio.to_thread.run_sync(_signal_left, mark, session, number):
        log.info("%s: sent %s to what a server left behind: pid %s", name, number.name, ", ".join(map(str, left)))
        try:
            with trio.move_on_at(kill_at if number is signal.SIGTERM else math.inf):
                for pidfd in left.values():
                    await trio.lowlevel.wait_readable(pidfd)
        finally:
            for pidfd in left.values():
                os.close(pidfd)
        if trio.current_time() >= kill_at:
            number = signal.SIGKILL


def _signal_left(mark: str, session: int, number: signal.Signals) -> dict[int, int]:
    """Send *number* to each process that has *mark* in its environment. Blocks for milliseconds.

    Returns: pid -> pidfd of each that has not ended, with those of *session* that are about to: they have no environment any
    more, and may still write.
    """
    pids = [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]
    held = ((pid, _hold(pid, mark, session, number)) for pid in pids)
    return {pid: pidfd for pid, pidfd in held if pidfd is not None}


def _hold(pid: int, mark: str, session: int, number: signal.Signals) -> int | None:
    try:
        pidfd = os.pidfd_open(pid)  # before the look: what is seen is this process, and none that has its number later
    except OSError:
        return None
    with contextlib.suppress(OSError):  # it has gone, or is somebody else's
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        is_marked = mark.encode() in environment.split(b"\0")
        if (is_marked or (not environment and os.getsid(pid) == session)) and not has_ended(pidfd):
            if is_marked:
                signal.pidfd_send_signal(pidfd, number)
            return pidfd
    os.close(pidfd)
    return None


def has_ended(pidfd: int) -> bool:
    """Whether the process has, with all of its threads; reaped or not."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
