"""The daemon of one mount: opens the stacks, mounts, serves, drains, closes.

    open stores -> mount -> serve -> (signal) drain: serve on until nobody has a file open, unmount -> flush -> close

SIGTERM, SIGINT: drain. A second one, or SIGQUIT: forced stop; requests that wait are cancelled, the mount is cut off,
stores are flushed, and whatever still hangs FORCE_GRACE_S later is left behind.

A successor finds the mount there: it takes the connection over and serves at once, while the stores are opened beside that.
Its predecessor has died, or has handed over (`cachefs.leaving`) and then ended in the same way: without closing anything,
because all that it had acknowledged is in files or in survivor memory. The first daemon of a mount and every successor
are the same code; `Daemon.predecessor` says which it is.
"""

from __future__ import annotations

import ctypes
import enum
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import trio

from cachefs import __version__, control, hurry, mounts
from cachefs.config import Config
from cachefs.disk import Disk, DiskState
from cachefs.disks import Disks
from cachefs.errors import CachefsError
from cachefs.fuse import namespace
from cachefs.fuse.boundary import Boundary
from cachefs.fuse.channel import Channel, mount_device
from cachefs.fuse.dataplane import Dataplane
from cachefs.fuse.protocol import MAX_BACKGROUND, Open
from cachefs.fuse.spill import Spill
from cachefs.graph import refuse_inside
from cachefs.leaving import Leaving
from cachefs.mountstate import MountState
from cachefs.nbd.child import kill_servers
from cachefs.notify import barrier, has_keeper, notify, say
from cachefs.survivor import Survivors

log = logging.getLogger(__name__)

FORCE_GRACE_S = 3.0
DRAIN_LOOK_S = 0.5  # between two tries to unmount while files are open
LAG_PROBE_S = 1.0
ALIVE_S = 1.0  # between two signs of life to the keeper
CRASH_LIMIT, CRASH_PERIOD_S = 5, 60.0
PR_SET_IO_FLUSHER = 57
DEVICE = "device"  # the name under which /dev/fuse is kept


class Predecessor(enum.Enum):
    """How the daemon before this one ended."""

    NONE = "none"
    DIED = "died"
    HANDED_OVER = "handed over"


class Daemon:
    """One mount. `run` returns when it is unmounted, or raises what kept it from serving.

    state: the mount's memory, which is kept. options: of `cachefs mount`, for a successor. with_resend=False: serve as if
    the kernel could not send requests again. dropped: disks that the mount showed and does not show any more.
    """

    def __init__(
        self,
        config: Config,
        mountpoint: Path,
        survivors: Survivors,
        state: MountState,
        predecessor: Predecessor = Predecessor.NONE,
        *,
        options: Sequence[str] = (),
        with_resend: bool = True,
        dropped: Sequence[str] = (),
    ) -> None:
        self._dropped = dropped
        self._config = config
        self.mountpoint = mountpoint
        self._survivors = survivors
        self._state = state
        self.predecessor = predecessor
        self._options = options
        self._with_resend = with_resend
        self._boundary = Boundary()
        self._started = time.time()
        self._draining = False
        self._forced_stop = trio.Event()
        self._longest_lag_s = 0.0
        self._took_over_ms: float | None = None  # until every disk was served again
        self._dataplane: Dataplane
        self._channel: Channel
        self._disks: Disks

    async def run(self, ready: Callable[[], None]) -> None:
        """*ready* is called once, when the mount answers.

        Raises: StoreError and its kinds; CachefsError when it cannot be mounted.
        """
        _become_io_flusher()
        refuse_inside(self.mountpoint, self._config.state_dir)  # before anything is made in there
        self._config.state_dir.mkdir(parents=True, exist_ok=True)
        for name in self._config.disks:  # in this order, which is that of the directory
            self._state.inode(name)
        is_successor = self.predecessor is not Predecessor.NONE
        self._disks = Disks(
            self._config,
            self.mountpoint,
            self._survivors,
            known=self._state.sizes() if is_successor else None,
            refused=self._refused(),
            inode=self._state.inode,
            on_opening=self._state.set_opening,
            on_resume=self._state.set_handling,
            forced_stop=self._forced_stop,
        )
        # The receiver before the mount: a signal in between would leave a dead one.
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGQUIT) as signals:
            async with self._disks.running():
                await self._mount_and_serve(ready, signals)
                self._cut_short_by_signals()
        await trio.to_thread.run_sync(self._survivors.drop, [name for name, _ in self._survivors.kept()])
        notify(STOPPING="1")
        if has_keeper():
            await trio.to_thread.run_sync(barrier)
        disks = self._disks.disks.values()
        failed = [f"{disk.name}, which failed: {error}" for disk in disks if (error := disk.top.pending_error())]
        if failed:
            log.error("unmounted %s; every disk is closed, and flushed but for %s", self.mountpoint, "; ".join(failed))
        else:
            log.info("unmounted %s; every disk is flushed and closed", self.mountpoint)

    def _leave_to_successor(self) -> None:
        """After a bug: where somebody takes over, to die is better than to close, which may hang, and to unmount."""
        if self._forced_stop.is_set() or not self._survivors.keeper_answers:
            return
        log.critical("the daemon failed on a bug in cachefs, and ends; please report this:", exc_info=sys.exc_info()[1])
        logging.shutdown()
        os._exit(os.EX_SOFTWARE)

    def _refused(self) -> dict[str, str]:
        """Disks that are not to be opened, because the daemon dies again and again."""
        crashes = self._state.crashes(CRASH_PERIOD_S)
        if len(crashes) < CRASH_LIMIT:
            return {}
        culprits = {crash.inode for crash in crashes[-CRASH_LIMIT:]}
        culprit = self._state.name_of(culprits.pop()) if len(culprits) == 1 else None
        whose = f"each time at work for {culprit}" if culprit is not None else "nobody knows of what"
        reason = (
            f"the daemon died {len(crashes)} times within {CRASH_PERIOD_S:.0f} s, {whose}; its requests fail until "
            f"`cachefs upgrade {self.mountpoint}`"
        )
        names = [culprit] if culprit is not None else list(self._config.disks)
        log.critical("%s: %s", ", ".join(names), reason)
        return dict.fromkeys(names, reason)

    # ---- serving

    async def _mount_and_serve(self, ready: Callable[[], None], signals: AsyncIterator[int]) -> None:
        device = await trio.to_thread.run_sync(self._open_device)
        try:
            await self._serve(device, ready, signals)
        finally:
            # Reached without an unmount only by a forced stop or a bug.
            if mounts.find_mount(self.mountpoint) is not None:
                self._leave_to_successor()
                mounts.try_unmount(self.mountpoint, lazy=True)  # the tree must not keep a dead mount

    def _open_device(self) -> int:
        """The connection of a predecessor, or that of a new mount. Blocks."""
        found = self._survivors.take(DEVICE)
        if found is not None:
            os.set_blocking(found, False)
            return found
        for disk in self._disks.disks.values():
            self._state.set_size(disk.name, disk.size)
        device = mount_device(self.mountpoint, mounts.options_for(disk.mode for disk in self._disks.disks.values()))
        self._survivors.keep({DEVICE: device})
        return device

    async def _serve(self, device: int, ready: Callable[[], None], signals: AsyncIterator[int]) -> None:
        disks = sorted(self._disks.disks.values(), key=lambda disk: disk.inode)
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
                        channel = self._channel = Channel(
                            device,
                            self._dataplane,
                            flags,
                            self._config.poll,
                            self._state,
                            with_resend=self._with_resend,
                        )
                        self._dataplane.waiting.on_waiting = self._state.set_waiting
                        self._disks.on_new = lambda disk: self._show(disk, directory, flags)
                        services.start_soon(namespace.serve, directory, channel.hand_over())
                        services.start_soon(channel.serve_replies)
                        services.start_soon(self._watch_signals, signals, services.cancel_scope, requests.cancel_scope)
                        services.start_soon(self._dataplane.waiting.watch_clients)
                        services.start_soon(self._watch_lag)
                        services.start_soon(self._say_alive)
                        leaving = Leaving(
                            self._config.file,
                            self.mountpoint,
                            self._disks.disks,
                            channel,
                            self._survivors,
                            self._state,
                            services,
                            self._options,
                        )
                        services.start_soon(self._take_commands, leaving)
                        await self._begin(channel, services, ready)
                        if self.predecessor is Predecessor.NONE:  # else somebody waits
                            gc.collect()
                        gc.freeze()  # what lives from here on is requests; do not walk the rest again
                        gc.enable()
                        while not await channel.serve_requests():
                            await leaving.wait_resumed()
                        # The mount is gone. What a request still does is for the disk, and is waited for.
                        await self._dataplane.waiting.drain()
                finally:
                    services.cancel_scope.cancel()
        finally:
            spill.close()
            if channel is not None:
                self._dataplane.waiting.stop()
                channel.close()  # now that nobody reads from it any more: one who was just woken would find it closed

    async def _begin(self, channel: Channel, services: trio.Nursery, ready: Callable[[], None]) -> None:
        agreed = self._state.agreed
        if agreed is None:
            services.start_soon(self._announce, ready)
            return
        await channel.take_over(*agreed)
        self._state.note_succession()
        services.start_soon(self._announce_succession, ready)
        if self._state.is_draining:
            self._draining = True
            services.start_soon(self._drain)

    def _show(self, disk: Disk, directory: namespace.Namespace, flags: dict[int, Open]) -> None:
        """A disk that was opened while the mount is there."""
        self._state.set_size(disk.name, disk.size)
        flags[disk.inode] = _open_flags(disk)
        self._dataplane.add(disk)
        directory.add(disk)

    async def _announce(self, ready: Callable[[], None]) -> None:
        """Say that we serve, once the mount has answered somebody else."""
        await trio.to_thread.run_sync(os.listdir, self.mountpoint)
        count = len(self._config.disks)
        notify(READY="1", STATUS=f"serving {count} disks at {self.mountpoint}")
        ready()
        log.info("serving %d disk%s at %s", count, "" if count == 1 else "s", self.mountpoint)
        if not self._channel.can_resend:
            log.info("this kernel cannot send requests again: those in flight fail when the daemon dies; nothing hangs")

    async def _announce_succession(self, ready: Callable[[], None]) -> None:
        """Say what became of the mount, and of its disks when all have been tried."""
        began_ns = self._state.stopped_ns or _process_start_ns()
        notify(READY="1", STATUS=f"serving {len(self._config.disks)} disks at {self.mountpoint}")
        ready()
        for name in self._dropped:
            await self._channel.forget_entry(name)
        await self._disks.wait_tried()
        hurry.end()
        self._took_over_ms = round((time.monotonic_ns() - began_ns) / 1e6, 1)
        self._state.stopped_ns = 0
        disks = self._disks.disks
        waiting = [disk.name for disk in disks.values() if disk.state in (DiskState.OPENING, DiskState.REFUSED)]
        log.info(
            "serving %d disks at %s: the daemon before this one %s; took over in %.0f ms, requests in flight %s%s",
            len(disks),
            self.mountpoint,
            self.predecessor.value,
            self._took_over_ms,
            "were sent again" if self._channel.can_resend else "failed",
            f"; not open yet: {', '.join(waiting)}" if waiting else "",
        )
        if not waiting:
            await trio.to_thread.run_sync(lambda: self._survivors.drop(self._survivors.untaken()))

    async def _say_alive(self) -> None:
        """To the keeper, which may restart a daemon that does not; and see whether it lives itself."""
        while True:
            await trio.sleep(ALIVE_S)
            if self._survivors.keeper_answers and not say(WATCHDOG="1"):
                self._survivors.keeper_answers = False
                log.error("whoever keeps this daemon alive has died: the mount will not outlive the daemon any more")

    async def _take_commands(self, leaving: Leaving) -> None:
        path = control.socket_path(self._config.state_dir, self.mountpoint)
        async with control.listening(path, {"upgrade": leaving.upgrade}):
            await trio.sleep_forever()

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
                    self._state.drain()
                    say(STATUS="draining")
                    nursery.start_soon(self._drain)

    async def _drain(self) -> None:
        """Unmount as soon as nobody has a file open; serve until then, and say who has."""
        said = ""
        while True:
            try:
                if await trio.to_thread.run_sync(mounts.try_unmount, self.mountpoint):
                    return
                holders = await trio.to_thread.run_sync(mounts.find_holders, self.mountpoint)
                waits = "; ".join(holders) or "somebody whose files we may not see"
            except CachefsError as exc:
                waits = f"the kernel: {exc}"
            if waits != said:
                said = waits
                log.warning("still serving %s: waiting for %s", self.mountpoint, waits)
            say(STATUS=f"draining: waiting for {waits}", EXTEND_TIMEOUT_USEC="10000000")
            await trio.sleep(DRAIN_LOOK_S)

    def _force(self, everything: trio.CancelScope, requests: trio.CancelScope) -> None:
        if self._forced_stop.is_set():
            return
        notify(STOPPING="1", STATUS="forced stop")
        log.warning("forced stop of %s: requests that wait get EIO", self.mountpoint)
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
        timer = threading.Timer(FORCE_GRACE_S, self._leave)
        timer.daemon = True
        timer.start()
        self._forced_stop.set()

    def _leave(self) -> None:
        log.error("something still hangs in the kernel after the forced stop; leaving it behind")
        kill_servers()  # one that hangs too would not hear that we have ended
        self._survivors.drop([name for name, _ in self._survivors.kept()])
        os._exit(1)

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
            "mountpoint": str(self.mountpoint),
            "control": str(control.socket_path(self._config.state_dir, self.mountpoint)),
            "uptime_s": round(time.time() - self._started, 1),
            "requests": dataplane.statistics(),
            **dataplane.waiting.statistics(),
            "malformed_requests": dataplane.malformed,
            "request_errors": self._boundary.request_errors,
            "internal_errors": self._boundary.internal_errors,
            "pools": {pool.name: pool.statistics() for pool in self._disks.pools},
            "survives": self._survives(),
            "longest_loop_lag_ms": round(self._longest_lag_s * 1000, 3),
        }

    def _survives(self) -> dict[str, object]:
        """What becomes of the mount when the daemon dies, and what became of it so far."""
        return {
            "keeper": "alive" if self._survivors.keeper_answers else "dead" if has_keeper() else "none",
            "requests_in_flight": "sent again" if self._channel.can_resend else "fail",
            "successions": self._state.successions,
            "predecessor": self.predecessor.value,
            "took_over_ms": self._took_over_ms,
            "crashes_in_a_minute": len(self._state.crashes(CRASH_PERIOD_S)),
        }


def _process_start_ns() -> int:
    """On the clock of time.monotonic_ns(); as exact as a tick of the kernel, 10 ms."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    since_boot_ns = int(fields[19]) * 10**9 // os.sysconf("SC_CLK_TCK")
    return time.monotonic_ns() - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - since_boot_ns)


def _open_flags(disk: Disk) -> Open:
    return Open.KEEP_CACHE if disk.page_cache else Open.DIRECT_IO | Open.PARALLEL_DIRECT_WRITES


def _effective_background() -> int:
    """max_background as the kernel takes it: it cuts what a user asks for."""
    if os.getuid() == 0:
        return MAX_BACKGROUND
    try:
        limit = int(Path("/sys/module/fuse/parameters/max_user_bgreq").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return MAX_BACKGROUND
    return min(MAX_BACKGROUND, limit) if limit else MAX_BACKGROUND


def _become_io_flusher() -> None:
    """Memory that we need to write out a guest's data is not to wait for the guest's data to be written out."""
    ctypes.CDLL(None).prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0)  # refused to users: no harm
