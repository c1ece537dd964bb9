"""`cachefs upgrade`: ask a daemon to hand over, and say what came of it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from cachefs import control, statusview
from cachefs.errors import CachefsError

HAND_OVER_TIMEOUT_S = 180.0
TAKE_OVER_TIMEOUT_S = 15.0
LOOK_S = 0.05


def upgrade(mountpoint: Path) -> str:
    """What happened, for people. Raises: CachefsError with the reason why the daemon serves on."""
    absolute = Path(os.path.abspath(mountpoint))
    try:
        before = statusview.read_one(absolute)["daemon"]
    except TimeoutError:
        raise CachefsError(f"upgrade {absolute}", "its daemon does not answer; nothing was changed") from None
    if "control" not in before:
        raise CachefsError(
            f"upgrade {absolute}", f"cachefs {before['version']} cannot hand over: unmount, and mount anew"
        )
    answer = control.ask(Path(before["control"]), "upgrade", HAND_OVER_TIMEOUT_S)
    after = _wait_taken_over(absolute, answer["pid"])
    return (
        f"{absolute}: cachefs {after['version']} (pid {after['pid']}) took over from {before['version']} "
        f"(pid {before['pid']}): a pause of {after['survives']['took_over_ms']:.0f} ms"
    )


def _wait_taken_over(mountpoint: Path, pid: int) -> dict[str, Any]:
    """The status of daemon *pid* once all disks are served again. Raises: CachefsError."""
    deadline = time.monotonic() + TAKE_OVER_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            daemon: dict[str, Any] = statusview.read_one(mountpoint)["daemon"]
        except TimeoutError:
            continue
        if daemon["pid"] != pid and daemon["survives"]["predecessor"] == "died":
            raise CachefsError(f"upgrade {mountpoint}", "the successor died while it took over; the log says why")
        if daemon["survives"]["took_over_ms"] is not None:
            return daemon
        time.sleep(LOOK_S)
    raise CachefsError(f"upgrade {mountpoint}", "not all disks are served again yet: `cachefs status` says which wait")
