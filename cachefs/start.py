"""Starting the daemon: in the foreground, or in the background with a parent that waits until the mount answers."""

from __future__ import annotations

import logging
import logging.handlers
import os
import subprocess
import sys
from pathlib import Path

import click

from cachefs.errors import CachefsError, unwrap

JOURNAL = Path("/run/systemd/journal/dev-log")


def run_in_foreground(config: Path, mountpoint: Path, ready_fd: int | None) -> None:
    """Serve until unmounted. *ready_fd*: a parent waits there for one byte; from then on we log elsewhere than stderr.

    Raises: CachefsError.
    """
    import trio

    from cachefs.config import load
    from cachefs.daemon import Daemon

    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    loaded = load(config)
    where = _check_mountpoint(mountpoint)

    def ready() -> None:
        if ready_fd is None:
            click.echo(f"serving at {where}; Ctrl-C drains and unmounts", err=True)
            return
        destination = _log_in_background(loaded.state_dir, where)
        os.write(ready_fd, destination.encode())
        os.close(ready_fd)

    try:
        trio.run(Daemon(loaded, where).run, ready)
    except BaseExceptionGroup as group:
        raise unwrap(group) from group


def _check_mountpoint(mountpoint: Path) -> Path:
    """The absolute path of a directory where nothing of ours is mounted yet."""
    from cachefs import mounts, statusview

    absolute = Path(os.path.abspath(mountpoint))
    found = mounts.find_mount(absolute)
    if found is not None and found[0] == mounts.FILE_SYSTEM_TYPE:
        try:
            statusview.read_one(absolute)
        except statusview.DeadError:
            mounts.try_unmount(absolute, lazy=True)
            click.echo(f"{absolute} was left by a daemon that died; mounting anew", err=True)
            return _check_mountpoint(absolute)
        except TimeoutError:
            pass
        raise CachefsError(f"mount at {absolute}", f"something is served there already: cachefs umount {absolute}")
    if not absolute.is_dir():
        raise CachefsError(f"mount at {absolute}", f"there is no such directory: mkdir -p {absolute}")
    return Path(os.path.realpath(absolute))


def _log_in_background(state_dir: Path, mountpoint: Path) -> str:
    """Send the log to the journal, else to a file; stdout and stderr too. Returns where it goes, for people."""
    root = logging.getLogger()
    if JOURNAL.is_socket():
        journal = logging.handlers.SysLogHandler(str(JOURNAL))
        journal.ident = "cachefs: "
        journal.setFormatter(logging.Formatter("%(message)s"))
        root.handlers[:] = [journal]
        _redirect(os.open(os.devnull, os.O_RDWR))
        return "journalctl -t cachefs"
    path = state_dir / f"cachefs{str(mountpoint).replace('/', '-')}.log"
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
    root.handlers[:] = [file]
    _redirect(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    return str(path)


def _redirect(descriptor: int) -> None:
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def run_in_background(config: Path, mountpoint: Path) -> int:
    """Start the daemon and wait until its mount answers. Returns the exit code; what went wrong is on stderr by then."""
    wait, tell = os.pipe()
    command = [
        sys.executable,
        "-m",
        "cachefs",
        "mount",
        "--foreground",
        "--ready-fd",
        str(tell),
        str(config),
        str(mountpoint),
    ]
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(tell,), start_new_session=True
    )
    os.close(tell)
    try:
        with open(wait, "rb") as pipe:
            log = pipe.read()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        click.echo("interrupted; nothing is mounted", err=True)
        return 1
    if not log:
        return child.wait() or 1
    click.echo(f"mounted at {os.path.abspath(mountpoint)}; log: {log.decode()}")
    return 0
