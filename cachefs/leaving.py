"""A daemon hands its mount over to another one of the version that is installed: `cachefs upgrade`, the daemon's side.

    serve, and meanwhile: start the successor; flush; wait until no thread is stuck in the kernel
    pause: read no more requests, answer those that are quick      (again and again, a tenth of a second each)
    hand over (`cachefs.handover`), and end like a daemon that dies

Flushed so that a disk may be dropped or moved, not for the guests' sake: what is acknowledged is in files and survivor
memory. A disk whose store hangs is handed over as it is; the flush that it was asked for is left behind. A thread that is stuck
in the kernel is another matter: its process cannot end, and nobody would serve until it has. Then we serve on, and say so.
For the same reason the pause begins at a moment at which no thread waits for a device.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import trio

from cachefs import control, handover
from cachefs.disk import Disk
from cachefs.errors import CachefsError
from cachefs.fuse.channel import Channel
from cachefs.mountstate import MountState
from cachefs.notify import barrier, has_keeper, notify
from cachefs.store.transfers import batches_under_way
from cachefs.survivor import Survivors

log = logging.getLogger(__name__)

PATIENCE_S = 10.0  # with flushes and stuck threads, while we still serve
STUCK_LOOK_S = 0.25
PAUSES, PAUSE_S, BETWEEN_PAUSES_S = 5, 0.1, 0.2  # to answer what is under way
PAUSE_WITHOUT_RESEND_S = 10.0


class Leaving:
    """config: the file. options: of `cachefs mount`, for the successor. nursery: where flushes go on that nobody waits for."""

    def __init__(
        self,
        config: Path,
        mountpoint: Path,
        disks: Mapping[str, Disk],
        channel: Channel,
        survivors: Survivors,
        state: MountState,
        nursery: trio.Nursery,
        options: Sequence[str],
    ) -> None:
        self._mountpoint = mountpoint
        self._disks = disks
        self._channel = channel
        self._survivors = survivors
        self._state = state
        self._nursery = nursery
        self._make_candidate = partial(
            handover.Candidate, config, mountpoint, options=options, state=state.memory.descriptor
        )
        self._is_under_way = False
        self._resumed = trio.Event()

    async def wait_resumed(self) -> None:
        """After the channel was paused: until requests are to be served again."""
        await self._resumed.wait()

    async def upgrade(self, reply: control.Reply) -> None:
        """Hand over to the version that is installed, which reads the configuration anew, and end.

        Raises: CachefsError: we serve on.
        """
        if self._is_under_way or self._state.is_draining:
            raise CachefsError("upgrade", "the daemon is about to end already")
        self._is_under_way = True
        candidate: handover.Candidate | None = None
        try:
            candidate = await trio.to_thread.run_sync(self._make_candidate)
            version = await trio.to_thread.run_sync(candidate.wait_ready)
            unflushed = await self._flush_all()
            await self._refuse_while_stuck()
            await self._pause()
            kept = self._survivors.kept()
            await trio.to_thread.run_sync(candidate.hand_over, kept, unflushed)
        except BaseException:
            if candidate is not None:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(candidate.dismiss)
            self._is_under_way = False
            self._resumed.set()
            raise
        with trio.CancelScope(shield=True):
            notify(MAINPID=str(candidate.pid))
            if has_keeper():
                await trio.to_thread.run_sync(barrier)
            candidate.leave()
            await reply({"pid": candidate.pid, "version": version})
        log.info("handed %s over to pid %d, version %s", self._mountpoint, candidate.pid, version)
        logging.shutdown()
        os._exit(0)  # like a daemon that dies: nothing is closed, nothing is flushed, everything is there

    async def _flush_all(self) -> list[str]:
        """Make what is acknowledged durable, for as long as the patience lasts; the disks that did not come to an end."""
        left, under_way, over = set(self._disks), set(self._disks), trio.Event()

        async def flush(disk: Disk) -> None:
            try:
                await disk.top.flush()
                left.discard(disk.name)
            except CachefsError as exc:
                log.warning("%s: the flush before the hand-over failed: %s", disk.name, exc)
            finally:
                under_way.discard(disk.name)
                if not under_way:
                    over.set()

        for disk in self._disks.values():
            self._nursery.start_soon(flush, disk)
        with trio.move_on_after(PATIENCE_S):
            await over.wait()
        if under_way:
            log.warning("handing over without the flush of %s, which does not end", ", ".join(sorted(under_way)))
        return sorted(left)

    async def _refuse_while_stuck(self) -> None:
        """Raises: CachefsError when a thread is in one and the same wait for as long as the patience lasts."""
        stuck = stuck_threads()
        with trio.move_on_after(PATIENCE_S):
            while stuck:
                await trio.sleep(STUCK_LOOK_S)
                stuck &= stuck_threads()
        if stuck:
            raise CachefsError(
                "upgrade",
                "a file that the daemon reads or writes hangs in the kernel, and a process that waits there cannot end: "
                "nobody would serve until then. `cachefs status` says which disk waits; mend its store, and try again",
            )

    async def _pause(self) -> None:
        """Stop reading requests, at a moment at which few are under way. Those are sent again to the successor.

        Raises: CachefsError where the kernel cannot send them again and some do not end.
        """
        for _ in range(PAUSES):
            if await self._stop_serving() and not stuck_threads():
                return
            self._resumed.set()
            await trio.sleep(BETWEEN_PAUSES_S)
        await self._stop_serving()

    async def _stop_serving(self) -> bool:
        """Whether nothing is under way any more."""
        self._resumed = trio.Event()
        self._state.stopped_ns = time.monotonic_ns()
        self._channel.pause()
        if self._channel.can_resend:
            return await self._channel.wait_idle(PAUSE_S)
        if await self._channel.wait_idle(PAUSE_WITHOUT_RESEND_S):
            return True
        raise CachefsError("upgrade", "some requests do not end, and this kernel cannot send them again")


def stuck_threads() -> set[tuple[str, str]]:
    """Threads of this process in a wait that no signal ends: the number of each, and how often it has waited so far.

    And what the kernel does for threads that could be woken: the process cannot end before that either.
    """
    found = batches_under_way()
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            status = dict(
                line.split(":\t", 1) for line in (thread / "status").read_text().splitlines() if ":\t" in line
            )
            if status["State"].startswith("D"):
                found.add((thread.name, status["voluntary_ctxt_switches"]))
    return found
