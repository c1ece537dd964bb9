"""What the kernel knows of our mounts: where they are, who has files of them open, how they are taken away.

Source: proc(5) (mountinfo, fd), /sys/block/loopN/loop/backing_file, fusermount3(1), Linux fs/fuse/control.c.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from cachefs.errors import CachefsError

FILE_SYSTEM_TYPE = "fuse.cachefs"


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def find_mount(mountpoint: Path) -> tuple[str, str] | None:
    """(type, "major:minor") of the topmost mount at *mountpoint*, or None when nothing is mounted there."""
    # Resolved without touching the mountpoint itself: a daemon that hangs must not hang us.
    wanted = os.path.join(
        os.path.realpath(os.path.dirname(os.path.abspath(mountpoint))), os.path.basename(os.path.abspath(mountpoint))
    )
    found = None
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(" ")
        if _unescape(fields[4]) == wanted:
            found = (fields[fields.index("-") + 1], fields[2])
    return found


def find_holders(mountpoint: Path) -> list[str]:
    """Who keeps files of the mount open, a phrase each: "qemu-system-x86 (pid 71), which has vm1 open". Blocks briefly.

    As a user other than root only one's own processes are seen.
    """
    prefix = os.path.abspath(mountpoint).rstrip("/") + "/"
    holders: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        names: set[str] = set()
        with contextlib.suppress(OSError):
            for descriptor in os.scandir(process / "fd"):
                with contextlib.suppress(OSError):
                    target = os.readlink(descriptor.path)
                    if target.startswith(prefix):
                        names.add(target[len(prefix) :])
        with contextlib.suppress(OSError):
            if (os.readlink(process / "cwd") + "/").startswith(prefix):
                names.add("the directory")
        if names:
            command = "a process"
            with contextlib.suppress(OSError):
                command = (process / "comm").read_text().strip()
            holders.append(f"{command} (pid {process.name}), which has {', '.join(sorted(names))} open")
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            target = backing.read_text().strip()
            if target.startswith(prefix):
                device = backing.parent.parent.name
                holders.append(
                    f"loop device /dev/{device}, which is set up over {target[len(prefix) :]} (losetup -d /dev/{device})"
                )
    return holders


def find_servers(device: str) -> list[int]:
    """Pids of the processes that hold the FUSE connection of the mount *device* ("major:minor"); none on kernels that
    do not tell (fuse_connection in fdinfo is newer than Linux 6.1)."""
    wanted = re.compile(rf"^fuse_connection:\s*{device.partition(':')[2]}$", re.MULTILINE)
    servers: list[int] = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            process = link.parts[2]
            if os.readlink(link) == "/dev/fuse" and wanted.search((link.parents[1] / "fdinfo" / link.name).read_text()):
                servers.append(int(process))
    return servers


def try_unmount(mountpoint: Path, *, lazy: bool = False) -> bool:
    """Take the mount away. False while files of it are open. Blocks.

    lazy: off the tree at once, though files of it may be open.

    Raises: CachefsError with what fusermount3 said, when waiting would not help.
    """
    done = subprocess.run(
        ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(mountpoint)],
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        check=False,
    )
    if done.returncode == 0:
        return True
    said = done.stderr.decode(errors="replace").strip()
    if os.strerror(errno.EBUSY) in said or find_mount(mountpoint) is None:
        return find_mount(mountpoint) is None  # somebody else may have taken it away meanwhile
    raise CachefsError(f"umount {mountpoint}", f"{said}; as root, `umount {mountpoint}` may know better")


def abort_connection(device: str) -> bool:
    """Make the kernel fail everything that waits on the FUSE mount *device* ("major:minor"); root only."""
    try:
        Path(f"/sys/fs/fuse/connections/{device.partition(':')[2]}/abort").write_text("1")
    except OSError:
        return False
    return True


def options_for(modes: Iterable[int]) -> str:
    """Options for fusermount3, for files of these *modes*. Others than the owner can only come in with allow_other, which
    users may lack.
    """
    options = "rw,nosuid,nodev,fsname=cachefs,subtype=cachefs,default_permissions"
    if os.getuid() == 0 or any(mode & 0o077 for mode in modes) or _users_may_allow_other():
        options += ",allow_other"
    return options


def _users_may_allow_other() -> bool:
    try:
        lines = Path("/etc/fuse.conf").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)
