"""A successor takes a larger share of the processors until it serves: machines stand still meanwhile.

On a node that is busy in full a process of ordinary priority needs seconds for the half second of work that a start is. Only
where it is allowed, which is for root. Source: sched(7), "The autogroup feature": where that is on, and no control group
decides, it is the session's nice value that counts.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

NICE = -10


def begin() -> None:
    """Threads that start from here on do the same."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    _set_autogroup(NICE)


def end() -> None:
    """All threads of the process are as others again."""
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            if os.getpriority(os.PRIO_PROCESS, int(thread.name)) == NICE:
                os.setpriority(os.PRIO_PROCESS, int(thread.name), 0)
    _set_autogroup(0)


def _set_autogroup(nice: int) -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(nice), encoding="utf-8")
