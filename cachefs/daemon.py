"""The daemon of one mount: opens the stacks, mounts, serves, drains, closes.

    open stores -> mount -> serve -> (signal) drain: serve on until nobody has a file open, unmount -> flush -> close

SIGTERM, SIGINT: drain. A second one, or SIGQUIT: forced stop; requests that wait are cancelled, the mount is cut off,
stores are flushed, and whatever still hangs FORCE_GRACE_S later is left behind.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import trio

from cachefs import __version__, mounts
from cachefs.config import Config
from cachefs.disk import Disk, open_disks
from cachefs.errors import CachefsError
from cachefs.fuse import namespace
from cachefs.fuse.boundary import Boundary
from cachefs.fuse.channel import Channel, mount_device
from cachefs.fuse.dataplane import Dataplane
from cachefs.fuse.protocol import MAX_BACKGROUND, Open
from cachefs.fuse.spill import Spill
from cachefs.graph import refuse_inside
from cachefs.nbd.child import kill_servers
from cachefs.notify import notify
from cachefs.pool.pool import Pool

log = logging.getLogger(__name__)

FORCE_GRACE_S = 3.0
DRAIN_LOOK_S = 0.5  # between two tries to unmount while files are open
LAG_PROBE_S = 1.0
PR_SET_IO_FLUSHER = 57


class Daemon:
    """One mount. `run` returns when it is unmounted, or raises what kept it from serving."""

    def __init__(self, config: Config, mountpoint: Path) -> None:
        self._config = config
        self._mountpoint = mountpoint
        self._boundary = Boundary()
        self._started = time.time()
        self._draining = False
        self._forced_stop = trio.Event()
        self._longest_lag_s = 0.0
        self._dataplane: Dataplane
        self._pools: list[Pool] = []

    async def run(self, ready: Callable[[], None]) -> None:
        """*ready* is called once, when the mount answers.

        Raises: StoreError and its kinds; CachefsError when it cannot be mounted.
        """
        _become_io_flusher()
        refuse_inside(self._mountpoint, self._config.state_dir)  # before anything is made in there
        self._config.state_dir.mkdir(parents=True, exist_ok=True)
        async with open_disks(self._config, self._mountpoint, self._forced_stop) as (disks, pools):
            self._pools = pools
            # The receiver before the mount: a signal in between would leave a dead one.
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGQUIT) as signals:
                await self._mount_and_serve(disks, ready, signals)
            self._cut_short_by_signals()
        failed = [f"{disk.name}, which failed: {error}" for disk in disks if (error := disk.top.pending_error())]
        if failed:
            log.error("unmounted %s; every disk is closed, and flushed but for %s", self._mountpoint, "; ".join(failed))
        else:
            log.info("unmounted %s; every disk is flushed and closed", self._mountpoint)

    async def _mount_and_serve(
        self, disks: Sequence[Disk], ready: Callable[[], None], signals: AsyncIterator[int]
    ) -> None:
        device = await trio.to_thread.run_sync(mount_device, self._mountpoint, mount_options(disks))
        try:
            await self._serve(device, disks, ready, signals)
        finally:
            # Reached without an unmount only by a forced stop or a bug: the tree must not keep a dead mount.
            if mounts.find_mount(self._mountpoint) is not None:
                mounts.try_unmount(self._mountpoint, lazy=True)

    async def _serve(
        self, device: int, disks: Sequence[Disk], ready: Callable[[], None], signals: AsyncIterator[int]
    ) -> None:
        directory = namespace.Namespace(disks, self._boundary, str(self._config.state_dir), self.status)
        flags = {disk.inode: _open_flags(disk) for disk in disks}
        channel: Channel | None = None
        spill = Spill(self._config.state_dir, self._config.spill)
        try:
            async with trio.open_nursery() as services:
                try:
                    async with trio.open_nursery() as requests:
                        self._dataplane = Dataplane(
                            device, disks, requests, self._boundary, _effective_background(), spill
                        )
                        channel = Channel(device, self._dataplane, flags, self._config.poll)
                        services.start_soon(namespace.serve, directory, channel.hand_over())
                        services.start_soon(channel.serve_replies)
                        services.start_soon(self._watch_signals, signals, services.cancel_scope, requests.cancel_scope)
                        services.start_soon(self._dataplane.waiting.watch_clients)
                        services.start_soon(self._watch_lag)
                        services.start_soon(self._announce, ready)
                        gc.collect()
                        gc.freeze()  # what lives from here on is requests; do not walk the rest again
                        await channel.serve_requests()
                        # The mount is gone. What a request still does is for the disk, and is waited for.
                        await self._dataplane.waiting.drain()
                finally:
                    services.cancel_scope.cancel()
        finally:
            spill.close()
            if channel is not None:
                self._dataplane.waiting.stop()
                channel.close()  # now that nobody reads from it any more: one who was just woken would find it closed

    async def _announce(self, ready: Callable[[], None]) -> None:
        """Say that we serve, once the mount has answered somebody else."""
        await trio.to_thread.run_sync(os.listdir, self._mountpoint)
        count = len(self._config.disks)
        notify(READY="1", STATUS=f"serving {count} disks at {self._mountpoint}")
        ready()
        log.info("serving %d disk%s at %s", count, "" if count == 1 else "s", self._mountpoint)

    # ---- the end

    async def _watch_signals(
        self, signals: AsyncIterator[int], everything: trio.CancelScope, requests: trio.CancelScope
    ) -> None:
        async with trio.open_nursery() as nursery:
            async for number in signals:
                if number == signal.SIGQUIT or self._draining:
                    self._force(everything, requests)
                else:
                    self._draining = True
                    notify(STOPPING="1", STATUS="draining")
                    nursery.start_soon(self._drain)

    async def _drain(self) -> None:
        """Unmount as soon as nobody has a file open; serve until then, and say who has."""
        said = ""
        while True:
            try:
                if await trio.to_thread.run_sync(mounts.try_unmount, self._mountpoint):
                    return
                holders = await trio.to_thread.run_sync(mounts.find_holders, self._mountpoint)
                waits = "; ".join(holders) or "somebody whose files we may not see"
            except CachefsError as exc:
                waits = f"the kernel: {exc}"
            if waits != said:
                said = waits
                log.warning("still serving %s: waiting for %s", self._mountpoint, waits)
            notify(STATUS=f"draining: waiting for {waits}", EXTEND_TIMEOUT_USEC="10000000")
            await trio.sleep(DRAIN_LOOK_S)

    def _force(self, everything: trio.CancelScope, requests: trio.CancelScope) -> None:
        if self._forced_stop.is_set():
            return
        log.warning("forced stop of %s: requests that wait get EIO", self._mountpoint)
        self._end_by_force()
        requests.cancel()
        everything.cancel()

    def _cut_short_by_signals(self) -> None:
        """The mount is gone, and stores are being flushed: a store that hangs now is given up at the next signal."""
        token = trio.lowlevel.current_trio_token()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, lambda *_: token.run_sync_soon(self._end_by_force))

    def _end_by_force(self) -> None:
        """Whatever waits for a store gives up; a thread stuck in the kernel is left behind."""
        timer = threading.Timer(FORCE_GRACE_S, _leave)
        timer.daemon = True
        timer.start()
        self._forced_stop.set()

    # ---- figures

    async def _watch_lag(self) -> None:
        """How late the event loop comes to a task that is due: the longest so far."""
        while True:
            due = trio.current_time() + LAG_PROBE_S
            await trio.sleep_until(due)
            self._longest_lag_s = max(self._longest_lag_s, trio.current_time() - due)

    def status(self) -> dict[str, object]:
        dataplane = self._dataplane
        return {
            "pid": os.getpid(),
            "version": __version__,
            "state": "draining" if self._draining else "serving",
            "config": str(self._config.file),
            "mountpoint": str(self._mountpoint),
            "uptime_s": round(time.time() - self._started, 1),
            "requests": dataplane.statistics(),
            **dataplane.waiting.statistics(),
            "malformed_requests": dataplane.malformed,
            "request_errors": self._boundary.request_errors,
            "internal_errors": self._boundary.internal_errors,
            "pools": {pool.name: pool.statistics() for pool in self._pools},
            "longest_loop_lag_ms": round(self._longest_lag_s * 1000, 3),
        }


def _leave() -> None:
    log.error("something still hangs in the kernel after the forced stop; leaving it behind")
    kill_servers()  # one that hangs too would not hear that we have ended
    os._exit(1)


def _open_flags(disk: Disk) -> Open:
    return Open.KEEP_CACHE if disk.page_cache else Open.DIRECT_IO | Open.PARALLEL_DIRECT_WRITES


def mount_options(disks: Sequence[Disk]) -> str:
    """Options for fusermount3. Others than the owner can only come in with allow_other, which users may lack."""
    options = "rw,nosuid,nodev,fsname=cachefs,subtype=cachefs,default_permissions"
    if os.getuid() == 0 or any(disk.mode & 0o077 for disk in disks) or _users_may_allow_other():
        options += ",allow_other"
    return options


def _effective_background() -> int:
    """max_background as the kernel takes it: it cuts what a user asks for."""
    if os.getuid() == 0:
        return MAX_BACKGROUND
    try:
        limit = int(Path("/sys/module/fuse/parameters/max_user_bgreq").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return MAX_BACKGROUND
    return min(MAX_BACKGROUND, limit) if limit else MAX_BACKGROUND


def _users_may_allow_other() -> bool:
    try:
        lines = Path("/etc/fuse.conf").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def _become_io_flusher() -> None:
    """Memory that we need to write out a guest's data is not to wait for the guest's data to be written out."""
    ctypes.CDLL(None).prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0)  # refused to users: no harm
