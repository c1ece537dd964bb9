"""Taking a mount away: patiently, saying what is waited for, or by force."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

from cachefs import mounts, statusview
from cachefs.errors import CachefsError

LOOK_S = 0.3  # between two tries
FORCE_WAIT_S = 5.0  # for the daemon to end by itself after a forced stop
SAY_S = 10.0  # between two reminders of what is waited for


def unmount(mountpoint: Path, *, force: bool, say: Callable[[str], None]) -> None:
    """Returns when the mount is gone and its daemon has ended.

    Raises: CachefsError when nothing of ours is mounted there.
    """
    absolute = Path(os.path.abspath(mountpoint))
    found = mounts.find_mount(absolute)
    if found is None or found[0] != mounts.FILE_SYSTEM_TYPE:
        raise CachefsError(
            f"umount {absolute}", "no cachefs is mounted there (`findmnt -t fuse.cachefs` lists them)", errno.EINVAL
        )
    try:
        pid = _daemon_pid(absolute)
    except statusview.DeadError:
        mounts.try_unmount(absolute, lazy=True)
        say(f"the daemon of {absolute} was dead already; the mount is gone now")
        return
    if force:
        _force(absolute, found[1], pid, say)
    elif pid is None:
        raise CachefsError(f"umount {absolute}", f"its daemon does not answer: cachefs umount --force {absolute}")
    else:
        _wait_until_free(absolute, say)
        _wait_for_end(pid, say)


def _daemon_pid(mountpoint: Path) -> int | None:
    """None when it does not answer. Raises: DeadError."""
    try:
        return int(statusview.read_one(mountpoint)["daemon"]["pid"])
    except TimeoutError:
        return None


def _wait_until_free(mountpoint: Path, say: Callable[[str], None]) -> None:
    said, said_at = "", 0.0
    while not mounts.try_unmount(mountpoint):
        waits = "; ".join(mounts.find_holders(mountpoint)) or "somebody whose files we may not see (ask as root)"
        if waits != said or time.monotonic() - said_at > SAY_S:
            said, said_at = waits, time.monotonic()
            say(f"waiting for {waits} (Ctrl-C leaves the mount as it is)")
        time.sleep(LOOK_S)


def _wait_for_end(pid: int, say: Callable[[str], None], timeout: float | None = None) -> bool:
    """Until process *pid* has ended; False when it has not after *timeout* seconds."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        since = time.monotonic()
        while not select.select([descriptor], [], [], 2.0 if timeout is None else timeout)[0]:
            if timeout is not None:
                return False
            say(f"unmounted; the daemon (pid {pid}) is still writing, {time.monotonic() - since:.0f} s so far")
    finally:
        os.close(descriptor)
    return True


def _is_cachefs(pid: int) -> bool:
    """systemd keeps the connection too, and is none of our business."""
    with contextlib.suppress(OSError):
        return b"cachefs" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _force(mountpoint: Path, device: str, pid: int | None, say: Callable[[str], None]) -> None:
    if pid is not None:
        os.kill(pid, signal.SIGQUIT)
        if _wait_for_end(pid, say, FORCE_WAIT_S):
            if mounts.find_mount(mountpoint) is not None:
                mounts.try_unmount(mountpoint, lazy=True)
            return
    others = [server for server in mounts.find_servers(device) if server != pid and _is_cachefs(server)]
    for server in (*others, *([pid] if pid is not None else [])):  # first the supervisor, which would start another one
        with contextlib.suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)
    if not mounts.abort_connection(device):
        say("cannot abort the FUSE connection (only root may); taking the mount off the tree all the same")
    mounts.try_unmount(mountpoint, lazy=True)
    say("the daemon did not end by itself and was cut off; what was not flushed may be lost")
