"""Starting the daemon: in the foreground, or in the background below a supervisor; as the first of a mount or a successor.

nothing kept                          load the configuration, mount
a keeper hands descriptors over       the daemon before us died: go on with the configuration that it ran
--take-over                           the daemon before us serves: load the configuration, say so, wait until it hands over
"""

from __future__ import annotations

import gc
import logging
import logging.handlers
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cachefs import hurry
from cachefs.errors import CachefsError, unwrap

if TYPE_CHECKING:
    from cachefs.config import Config
    from cachefs.daemon import Daemon
    from cachefs.mountstate import MountState
    from cachefs.survivor import Survivors

JOURNAL = Path("/run/systemd/journal/dev-log")


@dataclass(frozen=True)
class StartOptions:
    """ready_fd: we run in the background, and a parent may wait there to be told where the log goes. take_over: two
    descriptors, of the way to the predecessor and of the mount's memory. with_resend=False: for tests of old kernels.
    """

    ready_fd: int | None = None
    take_over: tuple[int, int] | None = None
    with_resend: bool = True

    @property
    def for_successor(self) -> list[str]:
        return [
            *(["--ready-fd", "-1"] if self.ready_fd is not None else []),
            *([] if self.with_resend else ["--no-resend"]),
        ]


def run_in_foreground(config: Path, mountpoint: Path, options: StartOptions) -> None:
    """Serve until unmounted. Raises: CachefsError."""
    if "LISTEN_FDS" in os.environ:
        hurry.begin()
    # Machines may wait for us. Nothing that is imported and made now is garbage (the daemon enables this again), and no
    # plugin of pydantic's is ours (to look for them means to read the metadata of every package).
    gc.disable()
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    import trio

    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    daemon, state_dir = _prepare(config, mountpoint, options)
    where = daemon.mountpoint
    is_first = daemon.predecessor.value == "none"
    if options.ready_fd is not None and not is_first:
        _log_in_background(state_dir, where)

    def ready() -> None:
        if options.ready_fd is None:
            click.echo(f"serving at {where}; Ctrl-C drains and unmounts", err=True)
        elif is_first:
            destination = _log_in_background(state_dir, where)
            os.write(options.ready_fd, destination.encode())
            os.close(options.ready_fd)

    try:
        trio.run(daemon.run, ready)
    except BaseExceptionGroup as group:
        raise unwrap(group) from group


def _prepare(config: Path, mountpoint: Path, options: StartOptions) -> tuple[Daemon, Path]:
    """The daemon, and where its state lies."""
    from cachefs import mountstate, notify
    from cachefs.survivor import Survivors

    if options.take_over is not None:
        return _take_over(config, options, *options.take_over)
    survivors = Survivors(notify.take_descriptors())
    try:
        state = mountstate.open_state(survivors)
        if state.agreed is not None and survivors.has("device"):
            return _succeed(survivors, state, options)
    except CachefsError as exc:  # of any kind: the mount waits for a version that can, and the keeper must try again
        raise CachefsError(f"take over {mountpoint}", str(exc)) from exc
    # Nobody came before us, or died before the mount had answered anybody.
    from cachefs.config import load
    from cachefs.daemon import Daemon

    survivors.drop(["device"])
    loaded = load(config)
    where = _check_mountpoint(mountpoint)
    state.wait_alone()
    state.forget_connection()
    state.set_config(where, loaded.file, loaded.values)
    survivors.keep({mountstate.NAME: state.memory.descriptor})
    daemon = Daemon(loaded, where, survivors, state, options=options.for_successor, with_resend=options.with_resend)
    return daemon, loaded.state_dir


def _succeed(survivors: Survivors, state: MountState, options: StartOptions) -> tuple[Daemon, Path]:
    """Go on where a daemon died, with its configuration."""
    from cachefs.config import restore
    from cachefs.daemon import Daemon, Predecessor

    state.wait_alone()
    where, file, values = state.config
    restored = restore(file, values)
    state.note_crash()
    daemon = Daemon(
        restored,
        where,
        survivors,
        state,
        Predecessor.DIED,
        options=options.for_successor,
        with_resend=options.with_resend,
    )
    return daemon, restored.state_dir


def _take_over(config: Path, options: StartOptions, way: int, memory: int) -> tuple[Daemon, Path]:
    """Wait beside the predecessor until it hands over. Raises: CachefsError when that comes to nothing."""
    from cachefs import __version__, mountstate
    from cachefs.handover import Predecessor as Other
    from cachefs.survivor import Survivors

    predecessor = Other(way)
    try:
        from cachefs.config import load, restore
        from cachefs.daemon import Daemon, Predecessor
        from cachefs.graph import refuse_inside

        state = mountstate.open_state(Survivors([(mountstate.NAME, memory)]))
        where, file, values = state.config
        loaded, before = load(config), restore(file, values)
        refuse_inside(where, loaded.state_dir, *(spec for disk in loaded.disks.values() for spec in disk.layers))
        open_disks = {disk for disk in before.disks if state.opens(disk)}
        _refuse_changes(before, loaded, open_disks, "is open")
        predecessor.ready(__version__)
        inherited, unflushed = predecessor.wait_go()
        open_disks = {disk for disk in before.disks if state.opens(disk)}
        _refuse_changes(before, loaded, open_disks, "is open")
        _refuse_changes(before, loaded, unflushed, "holds what could not be flushed")
        predecessor.accept()
        hurry.begin()  # not before: the predecessor served
        predecessor.wait_gone()
    except CachefsError as exc:
        predecessor.refuse(str(exc))
        raise
    except EOFError:
        reason = "nothing is taken over: the daemon serves on, or died, and its keeper starts another"
        raise CachefsError("upgrade", reason) from None
    survivors = Survivors(inherited)
    state = mountstate.open_state(survivors)
    state.wait_alone()
    dropped = sorted(set(state) - set(loaded.disks))
    for name in dropped:
        state.drop(name)
    state.set_config(where, loaded.file, loaded.values)
    state.forget_crashes()
    daemon = Daemon(
        loaded,
        where,
        survivors,
        state,
        Predecessor.HANDED_OVER,
        options=options.for_successor,
        with_resend=options.with_resend,
        dropped=dropped,
    )
    return daemon, loaded.state_dir


def _refuse_changes(before: Config, after: Config, disks: Iterable[str], why: str) -> None:
    """Raises: CachefsError when one of *disks* is not there any more, or stands on something else."""
    for name in sorted(disks):
        if name not in after.disks:
            raise CachefsError(name, f"{why}, and the new configuration does not have it: close it first")
        if after.foundation(name) != before.foundation(name):
            raise CachefsError(
                name, f"{why}, and the new configuration stacks it differently: close it first, or put its layers back"
            )


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


def run_in_background(config: Path, mountpoint: Path, *, with_resend: bool = True) -> int:
    """Start the daemon below a supervisor and wait until its mount answers. Returns the exit code; what went wrong is on
    stderr by then.
    """
    wait, tell = os.pipe()
    command = [
        *(sys.executable, "-m", "cachefs.supervisor", "--only-first", str(tell)),
        *("mount", "--foreground", "--ready-fd", str(tell), *([] if with_resend else ["--no-resend"])),
        *(str(config), str(mountpoint)),
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
