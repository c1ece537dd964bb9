"""The status of a mount as people and programs see it: read from the xattr that every file of the mount carries."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachefs.errors import CachefsError
from cachefs.units import format_size, short_size

if TYPE_CHECKING:
    from rich.console import Console

XATTR = "user.cachefs.status"
TIMEOUT_S = 5.0


class DeadError(CachefsError):
    """The mount is there and its daemon is not."""

    default_errno = errno.ENOTCONN


def read_one(path: Path) -> dict[str, Any]:
    """The status that *path* (the mountpoint, or a disk in it) carries.

    Raises: DeadError; TimeoutError when there is no answer; CachefsError when it is no mount of ours.
    """
    answer: list[bytes | OSError] = []

    def ask() -> None:
        try:
            answer.append(os.getxattr(path, XATTR))
        except OSError as exc:
            answer.append(exc)

    thread = threading.Thread(target=ask, daemon=True)  # a hung daemon would hold it for ever
    thread.start()
    thread.join(TIMEOUT_S)
    if not answer:
        raise TimeoutError
    if isinstance(answer[0], OSError):
        if answer[0].errno in (errno.ENOTCONN, errno.ECONNABORTED):
            raise DeadError(str(path), "its daemon is dead: `cachefs umount` takes the mount away, then mount anew")
        raise CachefsError(
            str(path), f"is no mount of cachefs ({answer[0].strerror}); `findmnt -t fuse.cachefs` lists them"
        )
    status: dict[str, Any] = json.loads(answer[0])
    return status


def read(mountpoint: Path) -> dict[str, Any]:
    """{"daemon": ..., "disks": {name: ...}}. Raises: as `read_one`, but CachefsError instead of TimeoutError."""
    try:
        status = read_one(mountpoint)
        names = list(status["disks"])
        return {"daemon": status["daemon"], "disks": {name: read_one(mountpoint / name)["disk"] for name in names}}
    except TimeoutError:
        raise no_answer(mountpoint) from None


def no_answer(mountpoint: Path) -> CachefsError:
    """What a TimeoutError of `read_one` means."""
    detail = f"its daemon did not answer within {TIMEOUT_S:.0f} s; its log says what it waits for"
    return CachefsError(str(mountpoint), detail, errno.ETIMEDOUT)


def show(status: dict[str, Any]) -> None:
    """Print *status* as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    daemon = status["daemon"]
    console.print(
        f"{daemon['mountpoint']}: {daemon['state']}, pid {daemon['pid']}, cachefs {daemon['version']}, "
        f"up {daemon['uptime_s']:.0f} s, {daemon['waiting_requests']} requests waiting, "
        f"{daemon['request_errors']} failed, {daemon['internal_errors']} internal errors",
        soft_wrap=True,
        highlight=False,
    )
    table = Table("disk", "layer", "state", "size", "holds", "read", "written", "fast", box=None, pad_edge=False)
    for name, disk in status["disks"].items():
        first = True
        for layer in disk["layers"]:
            table.add_row(
                name if first else "",
                layer["layer"].rpartition("/")[2],
                disk["state"] if first else str(layer.get("state", "")),
                format_size(disk["size"]) if first else "",
                _size(layer.get("allocated_bytes")),
                _size(layer.get("read_bytes")),
                _size(layer.get("written_bytes")),
                _share(layer),
            )
            first = False
    console.print(table)
    _show_pools(console, daemon.get("pools", {}), _cache_layers(status))
    for name, disk in status["disks"].items():
        if said := disk.get("error", disk.get("waits_for")):
            console.print(f"{name}: {said}", soft_wrap=True, highlight=False)
    if daemon.get("survives", {}).get("keeper") == "dead":
        text = (
            "whoever kept this daemon alive has died: the mount will not outlive it; drain and mount anew when you can"
        )
        console.print(text, soft_wrap=True, highlight=False)


def _cache_layers(status: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers that use a pool, each once: disks over one image share them."""
    layers = [layer for disk in status["disks"].values() for layer in disk["layers"] if "pool" in layer]
    return list({layer["layer"]: layer for layer in layers}.values())


def _show_pools(console: Console, pools: dict[str, Any], layers: list[dict[str, Any]]) -> None:
    from rich.table import Table

    if not pools:
        return
    table = Table("pool", "used", "quota", "full", "images", "hits", box=None, pad_edge=False)
    for name, pool in pools.items():
        mine = [layer for layer in layers if layer["pool"] == name]
        hits = sum(layer["hits"] for layer in mine)
        asked = hits + sum(layer["misses"] + layer["bypassed"] for layer in mine)
        used, quota = pool["used_bytes"], pool["quota_bytes"]
        table.add_row(
            name,
            short_size(used),
            format_size(quota),
            f"{100 * used / quota:.1f} %",
            str(pool["images"]),
            f"{100 * hits / asked:.1f} %" if asked else "",
        )
    console.print()
    console.print(table)
    for layer in layers:
        if layer["bypass"] != "no":
            text = f"{layer['layer']}: served without its pool for now: {layer['bypass']}"
            console.print(text, soft_wrap=True, highlight=False)


def _size(value: int | None) -> str:
    return "" if value is None else short_size(value)


def _share(layer: dict[str, Any]) -> str:
    """Requests that were finished on the fast path, of all."""
    fast = layer.get("fast_reads", 0) + layer.get("fast_writes", 0)
    total = fast + layer.get("slow_reads", 0) + layer.get("slow_writes", 0)
    return f"{100 * fast / total:.1f} %" if total else ""
