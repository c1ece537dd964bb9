"""cachefs whose overlays say in which thread their files are read and written, and hold what is slow. Runs instead of
`python -m cachefs`.

    HELD=<punch, sync or write> python gatedfiles.py mount ...

The first such call that a thread makes on a file of disk vm1 waits until the daemon gets SIGUSR1. In the statistics of each
cow: held (calls that wait now), and what was done with its data file: reads_on_loop, reads_in_threads, writes_in_threads,
and of the writes on the loop those which may block, plain_writes_on_loop, and those which may not, nowait_writes_on_loop.
A write is never slow by the clock here.
"""

from __future__ import annotations

import collections
import math
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from cachefs.cli import main
from cachefs.store import localfile
from cachefs.store.blockstore import BlockStore

DEADLINE_S = 60.0  # a thread that nobody let go would keep the daemon from ending

COUNTERS = ("reads_on_loop", "reads_in_threads", "plain_writes_on_loop", "nowait_writes_on_loop", "writes_in_threads")
counts: collections.Counter[tuple[int, str]] = collections.Counter()  # by descriptor and counter
held: list[int] = []  # descriptors
gate = threading.Event()
to_hold = [os.environ["HELD"]]  # empty once it has come


def is_on_loop() -> bool:
    return threading.current_thread() is threading.main_thread()


def meet(operation: str, descriptor: int) -> None:
    """Wait here if this is the call to be held."""
    if operation in to_hold and not is_on_loop() and "/vm1/data" in os.readlink(f"/proc/self/fd/{descriptor}"):
        to_hold.clear()
        held.append(descriptor)
        assert gate.wait(DEADLINE_S)
        held.remove(descriptor)


def watched(call: Callable[..., Any], operation: str) -> Callable[..., Any]:
    """*call*, held and counted. Its last argument is its flags when it has four."""

    def instead(descriptor: int, *arguments: Any) -> Any:
        meet(operation, descriptor)
        result = call(descriptor, *arguments)
        place = "on_loop" if is_on_loop() else "in_threads"
        how = ""
        if operation == "write" and is_on_loop():
            how = "nowait_" if len(arguments) == 3 and arguments[2] & os.RWF_NOWAIT else "plain_"
        counts[descriptor, f"{how}{operation}s_{place}"] += 1
        return result

    return instead


def told(store: BlockStore) -> dict[str, int | str]:
    descriptor = store.data.descriptor
    return {
        **_statistics(store),
        "held": held.count(descriptor),
        **{name: counts[descriptor, name] for name in COUNTERS},
    }


_statistics = BlockStore.statistics

if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, lambda *_: gate.set())
    localfile.SLOW_WRITE_S = math.inf
    localfile.fallocate = watched(localfile.fallocate, "punch")
    os.fdatasync = watched(os.fdatasync, "sync")
    os.pwrite, os.pwritev = watched(os.pwrite, "write"), watched(os.pwritev, "write")
    os.preadv = watched(os.preadv, "read")
    BlockStore.statistics = told  # type: ignore[method-assign, assignment]
    main()
