"""A pool: a directory with one hard quota that all its images share, and the tasks that keep it in order.

    <path>/pool             magic and version: that this is a pool
    <path>/clean            there while the pool is closed, if maps and data files agree
    <path>/lock             flock'ed by the process that has the pool open; there is never more than one
    <path>/images/<digest>  a store (`cachefs.store.files`) for each image; the digest is of the image's identity
    <path>/images/<digest>/label    whose image it was first, for people
    <path>/images/<digest>/extents  what is known of its holes (`cachefs.pool.holes`)

Every image in the directory is opened, used or not: the space of all of them counts, and may be evicted. An image that is
attached under a label whose earlier image has another identity drops that one: its base has changed.

Tasks, in the pool's nursery: one installer for each image; the *evictor*, which makes room when less than a small share of
the quota is free, so that installs seldom wait; the *syncer*, every SYNC_S or SYNC_BYTES; the *watch*, which notices calls
that hang, looks at the free space of the file system, and tries again what failed.

No fault of the pool's file system reaches a guest: see `cachefs.pool.image`. Byte tables: docs/formats/pool.md.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import trio

from cachefs.errors import FormatError, LayoutError, LockedError, StoreError, VersionError
from cachefs.pool import summap
from cachefs.pool.account import FIXED_BYTES, LARGEST_INSTALL, Account
from cachefs.pool.evict import BLOCK_MASK, KEY_SHIFT, RING_SHARE, STEPS_PER_CALL, Never, Policy, Sieve
from cachefs.pool.holes import room_on_disk
from cachefs.pool.image import INSTALLERS, Flight, PoolImage
from cachefs.pool.summap import PAGE_SIZE
from cachefs.store import files
from cachefs.store.directfile import refuse_without_direct
from cachefs.store.files import Header, StoreFormat, StoreLock
from cachefs.store.identity import Identity
from cachefs.store.localfile import KEEP_SIZE, PUNCH_HOLE, fallocate
from cachefs.store.mapfile import StoreFiles, open_files, read_header
from cachefs.survivor import Survivors

log = logging.getLogger(__name__)

POOL_IMAGE = StoreFormat(
    "pool image", b"cfspool\n", 1, 2, summap.BLOCKS_PER_SECTOR, "delete it: a cache can be filled again"
)
"""Checksum 2: crc32 as in zlib over header and map sectors, xxh3-64 over blocks."""
MEMORY_KIND = "sums"
POOL_TEXT = b"cachefs pool 1\n"
SYNC_S = 5.0
SYNC_BYTES = 64 << 20
BACKLOG_BYTES = 64 << 20  # fetched and not installed
LOOK_S = 1.0  # between two looks of the watch, at most
VICTIMS = 64  # at a time
CLOSE_PATIENCE_S = 3.0


class Pool:
    """Made by `open_pool`. patience_s: seconds after which a call to the file system counts as hung."""

    def __init__(
        self,
        path: Path,
        name: str,
        quota: int,
        min_free: int,
        evict: Literal["never", "sieve"],
        block_size: int,
        direct: bool,
        patience_s: float,
        survivors: Survivors,
    ) -> None:
        self.path = path
        self.name = name
        self.min_free = min_free
        self.block_size = block_size
        self.direct = direct
        self.patience_s = patience_s
        self.survivors = survivors
        self.account = Account(quota)
        capacity = max(1, self.account.limit // block_size)
        self.policy: Policy = Sieve(capacity) if evict == "sieve" else Never(capacity)
        self.evicts = evict == "sieve"
        self.images: dict[str, PoolImage] = {}  # by digest
        self._by_number: dict[int, PoolImage] = {}
        self._backlog = 0
        self._installed = 0  # bytes since the last sync
        self._much_installed = trio.Event()
        self._room_wanted = trio.Event()
        self._room_made = trio.Event()
        self._changing_images = trio.Lock()  # one is made or deleted
        self._is_open = False
        self._nursery: trio.Nursery

    # ---- images

    @asynccontextmanager
    async def attach(
        self, identity: Identity, size: int, label: str, *, is_written: bool = False
    ) -> AsyncIterator[PoolImage]:
        """The image of *identity*, made where there is none. Raises: StoreError.

        One that *is_written* through, or whose identity does not last, is the caller's alone and deleted at the end: after
        a crash the identity may be what it was, and the contents not.
        """
        is_kept = identity.lasts and not is_written
        if is_kept:
            digest = digest_of(identity, size, self.block_size, label if identity.is_sampled else "")
        else:
            digest = uuid.uuid4().hex
        async with self._changing_images:
            for other in [image for image in self.images.values() if image.label == label and not image.users]:
                if other.path.name == digest:
                    continue
                if is_kept and other.header.base.lasts and other.header.base.changes(identity):
                    log.warning(
                        "%s: the base of %s has changed: what the pool held of the old one is dropped", self.path, label
                    )
                await self.drop(other)
            image = self.images.get(digest)
            if image is None:
                image = await self._create(digest, identity, size, label)
            image.users += 1
        try:
            yield image
        finally:
            image.users -= 1
            if not is_kept:
                with trio.CancelScope(shield=True):
                    async with self._changing_images:
                        await self.drop(image)

    async def _create(self, digest: str, identity: Identity, size: int, label: str) -> PoolImage:
        if self.evicts and self.account.free < FIXED_BYTES:
            await self._reclaim()
        if not self.account.take(FIXED_BYTES):
            raise StoreError(
                str(self.path), f"the quota of {self.account.quota} bytes has no room for one more image; raise it"
            )
        path = self.path / "images" / digest
        header = Header(size, self.block_size, identity, format=POOL_IMAGE)
        try:
            await trio.to_thread.run_sync(_make_image, path, header, label)
            opened = await trio.to_thread.run_sync(open_image_files, path, header, self.survivors, self.direct)
            image = PoolImage(self, path, label, header, opened)
            image.map.settle()
            await trio.to_thread.run_sync(opened.keep)
        except BaseException:
            self.account.give_back(FIXED_BYTES)
            raise
        self._add(image)
        return image

    def _add(self, image: PoolImage) -> None:
        self.images[image.path.name] = image
        self._by_number[image.blocks.number] = image
        # What they are writing cannot be evicted: were it more than the ring holds, others would have to go for it.
        for _ in range(max(1, min(INSTALLERS, self.account.limit // RING_SHARE // LARGEST_INSTALL))):
            self._nursery.start_soon(image.run_installer)

    async def drop(self, image: PoolImage) -> None:
        """Delete an image that nobody uses, and count its room as free."""
        del self.images[image.path.name]
        image.leave()
        self._wake_waiters()
        with trio.move_on_after(CLOSE_PATIENCE_S):
            await image.wait_idle()
        del self._by_number[image.blocks.number]
        self.policy.drop_image(image.blocks)
        image.close_files()
        await trio.to_thread.run_sync(files.remove, image.path)
        self.account.give_back(self._room_of(image))

    def _room_of(self, image: PoolImage) -> int:
        return (
            (image.map.held << image.shift)
            + image.map.pages * PAGE_SIZE
            + FIXED_BYTES
            + image.holes_bytes
            + image.unowned
        )

    # ---- room

    @property
    def backlog_bytes(self) -> int:
        """Fetched and not installed."""
        return self._backlog

    def take_backlog(self, count: int) -> bool:
        if self._backlog + count > BACKLOG_BYTES:
            return False
        self._backlog += count
        return True

    def has_place_ahead(self) -> bool:
        """Whether there is room for more than what is asked for: in memory, and in the quota."""
        return self._backlog * 2 < BACKLOG_BYTES and (self.evicts or self.account.free >= self.block_size + PAGE_SIZE)

    def room_for_hints(self) -> int:
        """Bytes that may be fetched though nobody waits for them, beside what is on its way or waits to be installed."""
        under_way = sum(len(image.flights) << image.shift for image in self.images.values())
        return max(0, BACKLOG_BYTES // 2 - under_way)

    def give_back_backlog(self, count: int) -> None:
        self._backlog -= count

    async def take_room(self, image: PoolImage, blocks: Iterable[int]) -> list[int]:
        """Those of *blocks* that may be installed now, and for which room was taken; none when there is no room.

        Waits for the evictor, no longer than the pool's patience.
        """
        deadline = trio.current_time() + self.patience_s
        most = max(1, (self.account.enough_free - 2 * PAGE_SIZE) >> image.shift)  # more than that is never made free
        while True:
            wanted = [block for block in blocks if image.may_install(block)][:most]
            if not wanted:
                return []
            fresh = sum(not image.map.holds(block) for block in wanted)
            pages = image.map.new_pages(wanted[0], wanted[-1] + 1)
            if self.account.take((fresh << image.shift) + pages * PAGE_SIZE):
                if self.account.wants_room:
                    self._room_wanted.set()
                return wanted
            if not self.evicts or trio.current_time() >= deadline:
                return self._take_what_fits(image, wanted)
            self._room_wanted.set()
            with trio.move_on_at(deadline):
                await self._room_made.wait()

    def _take_what_fits(self, image: PoolImage, wanted: list[int]) -> list[int]:
        while wanted:
            fresh = sum(not image.map.holds(block) for block in wanted)
            pages = image.map.new_pages(wanted[0], wanted[-1] + 1)
            if self.account.take((fresh << image.shift) + pages * PAGE_SIZE):
                return wanted
            wanted.pop()
        return []

    @property
    def takes_more(self) -> bool:
        """Whether there is room for a block, or can be made."""
        return self._backlog < BACKLOG_BYTES and (self.evicts or self.account.free >= self.block_size + PAGE_SIZE)

    def insert(self, image: PoolImage, block: int, flight: Flight) -> None:
        """The block has room now."""
        self.policy.insert(
            image.blocks.base | block, flight.run, sequential=flight.sequential, prefetched=block in flight.unread
        )

    def give_back(self, image: PoolImage, block: int) -> None:
        """The block needs no room after all, and none was used."""
        self.policy.forget(image.blocks.base | block)
        image.map.set_absent(block)
        self.account.give_back(1 << image.shift)

    def note_installed(self, count: int) -> None:
        self._installed += count
        if self._installed >= SYNC_BYTES:
            self._much_installed.set()

    def _is_pinned(self, key: int) -> bool:
        image = self._by_number[key >> KEY_SHIFT]
        return key & BLOCK_MASK in image.pins or not self._may_punch(image)

    def _may_punch(self, image: PoolImage) -> bool:
        return image.writing.works or image.writing.may_try(trio.current_time())

    async def _evict(self) -> None:
        """Make room whenever it is wanted, until there is enough of it."""
        while True:
            await self._room_wanted.wait()
            self._room_wanted = trio.Event()
            if not await self._reclaim():
                await trio.sleep(0.02)  # all pinned, or nothing can be punched: not again at once
            self._wake_waiters()

    async def _reclaim(self) -> bool:
        """Evict until there is enough room. False: it cannot be had."""
        barren = 0
        while not self.account.has_enough:
            if not any(map(self._may_punch, self.images.values())):
                return False
            wanted = -(-(self.account.enough_free - self.account.free) // self.block_size)
            keys = self.policy.victims(min(VICTIMS, wanted), self._is_pinned)
            barren = 0 if keys else barren + 1
            if barren * STEPS_PER_CALL > 2 * len(self.policy) + STEPS_PER_CALL:
                return False  # every block was looked at, twice: the first look may only have taken its mark
            if keys and not await self._evict_keys(keys):
                return False
            self._wake_waiters()
            await trio.lowlevel.checkpoint()
        return True

    def _wake_waiters(self) -> None:
        self._room_made.set()
        self._room_made = trio.Event()

    async def _evict_keys(self, keys: list[int]) -> bool:
        """Punch the victims out. False: some could not be."""
        by_image: dict[int, list[int]] = {}
        for key in keys:
            by_image.setdefault(key >> KEY_SHIFT, []).append(key & BLOCK_MASK)
        for number, blocks in by_image.items():
            if not self._by_number[number].is_leaving:
                for block in blocks:  # of all images, before the first wait: nobody pins and reads them from here on
                    self._by_number[number].map.set_evicting(block)
        whole = True
        for number, blocks in by_image.items():
            image = self._by_number.get(number)
            if image is None or image.is_leaving:
                continue  # all of it goes
            kept = set(await image.punch_out(blocks))
            if number not in self._by_number:
                continue  # dropped meanwhile, and its room with it
            for block in blocks:
                if block in kept:
                    self.policy.restore(image.blocks.base | block)
                else:
                    self.policy.forget(image.blocks.base | block)
                    self.account.give_back(self.block_size)
            if not image.settled:
                image.recount()
            whole = whole and not kept
        return whole

    async def shrink(self) -> None:
        """Bring the pool below its quota, also where nothing is evicted otherwise: it was opened with a smaller one."""
        if self.account.free >= 0:
            return
        if not isinstance(self.policy, Never):
            await self._reclaim()
            return
        for image in reversed(self.images.values()):
            for start, end in reversed(list(image.map.held_runs())):
                while start < end:
                    if self.account.free >= 0:
                        return
                    missing = -(self.account.free >> image.shift)  # blocks
                    first = max(start, end - min(VICTIMS, missing))
                    keys = [image.blocks.base | block for block in range(first, end)]
                    for key in keys:
                        self.policy.give_up(key)
                    if not await self._evict_keys(keys):
                        return
                    end = first

    # ---- tasks

    async def _sync(self) -> None:
        while True:
            with trio.move_on_after(SYNC_S):
                await self._much_installed.wait()
            self._much_installed = trio.Event()
            self._installed = 0
            for image in list(self.images.values()):
                await image.sync()

    async def _watch(self) -> None:
        """Notice what hangs, keep free space for others, and try again what failed."""
        while True:
            await trio.sleep(min(LOOK_S, self.patience_s / 4))
            now = trio.current_time()
            for image in list(self.images.values()):
                if image.calls.is_stalled:
                    image.fail(image.writing, f"no answer in {self.patience_s:g} s")
                elif not image.reading.works and image.reading.may_try(now):
                    image.reading.begin_try()
                    self._nursery.start_soon(image.try_reading)
            await self._look_at_free_space()

    async def _look_at_free_space(self) -> None:
        if not self.min_free or not any(image.writing.works for image in self.images.values()):
            return
        try:
            found = await trio.to_thread.run_sync(os.statvfs, self.path, abandon_on_cancel=True)
        except OSError:
            return  # whatever it is, the next read or write will say it
        self.account.withhold(found.f_bavail * found.f_frsize - self.min_free)
        if self.account.wants_room and self.evicts:
            self._room_wanted.set()

    # ---- opening and closing

    async def _open_images(self) -> None:
        was_clean = await trio.to_thread.run_sync(take_clean_mark, self.path)
        for path in sorted((self.path / "images").iterdir()):
            try:
                header = await trio.to_thread.run_sync(read_header, path, POOL_IMAGE)
                if header.block_size != self.block_size:
                    raise FormatError(str(path), f"has blocks of {header.block_size} bytes, the pool {self.block_size}")
                opened = await trio.to_thread.run_sync(open_image_files, path, header, self.survivors, self.direct)
            except (VersionError, LayoutError, LockedError):
                raise
            except StoreError as exc:
                log.warning("%s; dropped", exc)
                await trio.to_thread.run_sync(shutil.rmtree, path, True)
                continue
            image = PoolImage(self, path, read_label(path), header, opened)
            image.holes_bytes = await trio.to_thread.run_sync(room_on_disk, path)
            try:
                await trio.to_thread.run_sync(image.load)
            except OSError as exc:
                log.warning("%s: its map cannot be read: %s; dropped", path, exc.strerror)
                self.policy.drop_image(image.blocks)
                image.close_files()
                await trio.to_thread.run_sync(shutil.rmtree, path, True)
                continue
            self.account.add(self._room_of(image))
            for start, end in image.map.held_runs():
                self.policy.adopt(image.blocks, start, end)
            self._add(image)
            if was_clean and not image.is_damaged:
                image.map.settle()
            if not image.settled:
                self._nursery.start_soon(image.settle)

    async def _close(self) -> None:
        """End what is being installed, and sync; a file system that hangs keeps nobody."""
        images = list(self.images.values())
        with trio.move_on_after(CLOSE_PATIENCE_S):
            for image in images:
                await image.wait_installed()
        with trio.move_on_after(CLOSE_PATIENCE_S):
            for image in images:
                image.drop_queue()
                await image.wait_installed()
                await image.sync()
            agree = all(image.settled and not image.map.dirty_sectors and not image.calls for image in images)
            if self._is_open and agree:
                await trio.to_thread.run_sync(mark_clean, self.path, abandon_on_cancel=True)

    def close_files(self) -> None:
        """After all tasks have ended. Blocks while threads have not, not for long."""
        deadline = time.monotonic() + CLOSE_PATIENCE_S
        for image in self.images.values():
            image.calls.wait_for_threads(deadline)
            image.close_files()

    def statistics(self) -> dict[str, int | float | str]:
        """Of the pool as a whole."""
        return {
            "quota_bytes": self.account.quota,
            "used_bytes": self.account.used,
            "images": len(self.images),
            "cached_blocks": len(self.policy),
            "backlog_bytes": self._backlog,
        }


@asynccontextmanager
async def open_pool(
    path: Path,
    name: str,
    *,
    quota: int,
    min_free: int = 0,
    evict: Literal["never", "sieve"] = "sieve",
    block_size: int = 64 << 10,
    direct: bool = False,
    patience_s: float = 1.0,
    survivors: Survivors | None = None,
) -> AsyncIterator[Pool]:
    """The pool in the directory *path*, made where there is none. On exit it is synced and closed. direct: past the page cache.

    After a start with a smaller quota it is brought below that before this returns. Raises: StoreError, LockedError.
    """
    lock = await trio.to_thread.run_sync(_prepare, path, name, evict, direct)
    pool = Pool(path, name, quota, min_free, evict, block_size, direct, patience_s, survivors or Survivors())
    try:
        async with trio.open_nursery() as nursery:
            pool._nursery = nursery
            try:
                await pool._open_images()
                await pool.shrink()
                pool._is_open = True
                for task in (pool._evict, pool._sync, pool._watch):
                    nursery.start_soon(_go_on, task)
                yield pool
            finally:
                with trio.CancelScope(shield=True):
                    await pool._close()
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(pool.close_files)
        # A thread that is stuck may punch or write later: nobody else may open the pool before this process ends.
        if not any(image.calls for image in pool.images.values()):
            lock.close()


async def _go_on(task: Callable[[], Awaitable[None]]) -> None:
    """Run *task* for ever; a bug in it is logged, and costs nobody a disk."""
    while True:
        try:
            await task()
        except Exception:
            log.exception("a task of the cache failed; it is started again")
            await trio.sleep(1)


def digest_of(identity: Identity, size: int, block_size: int, owner: str = "") -> str:
    """The name of an image's directory. owner: whose it is, where the identity alone may name two bases."""
    known_by = {"kind": identity.kind, "facts": dict(identity.facts), "size": size, "block_size": block_size}
    if owner:
        known_by["owner"] = owner
    return hashlib.sha256(json.dumps(known_by, sort_keys=True).encode()).hexdigest()[:32]


def open_image_files(path: Path, header: Header, survivors: Survivors, direct: bool = False) -> StoreFiles:
    size = summap.working_size(-(-header.size // header.block_size))
    return open_files(path, header, survivors, MEMORY_KIND, summap.LAYOUT, size, inline_writes=False, direct=direct)


def read_label(path: Path) -> str:
    """Whose the image at *path* was first, for people."""
    try:
        return (path / "label").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "?"


def _make_image(path: Path, header: Header, label: str) -> None:
    files.create(path, header)
    (path / "label").write_text(label, encoding="utf-8")


def _prepare(path: Path, name: str, evict: str, direct: bool) -> StoreLock:
    """Make the directory where there is none, and lock it. Blocks. Raises: StoreError."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        mark = path / "pool"
        if not mark.exists() or not mark.stat().st_size:  # empty: made when the power was cut
            if any(entry != mark and entry.name != "lost+found" for entry in path.iterdir()):
                raise StoreError(
                    str(path),
                    "is no pool, and not empty: name a directory of its own for the pool, which may be missing",
                )
            with (path / "pool").open("wb") as file:
                file.write(POOL_TEXT)
                file.flush()
                os.fsync(file.fileno())
            files.sync_directory(path)
        else:
            check_version(path)
    except OSError as exc:
        raise StoreError(str(path), f"cannot make the pool: {exc.strerror or exc}; check pools.{name}.path") from exc
    lock = StoreLock(path, f"pool {name} of cachefs", "unmount it there, or give this pool a path of its own")
    try:
        (path / "images").mkdir(exist_ok=True)
        for left in (path / "images").glob(".*.new-*"):  # of a process that died while it made one
            shutil.rmtree(left, ignore_errors=True)
        if direct:  # an image that cannot be opened so would be dropped
            refuse_without_direct(f"pools.{name}", path / "pool")
        if evict == "sieve" and not _can_punch(path):
            raise StoreError(
                str(path),
                "its file system cannot free a part of a file, which eviction needs: put the pool on ext4, xfs, btrfs or "
                "tmpfs, or set evict: never",
            )
    except OSError as exc:
        lock.close()
        raise StoreError(str(path), f"cannot open the pool: {exc.strerror or exc}") from exc
    except BaseException:
        lock.close()
        raise
    return lock


def check_version(path: Path) -> None:
    """Raises: FormatError, OSError."""
    if (path / "pool").read_bytes() != POOL_TEXT:
        raise FormatError(str(path / "pool"), "this pool is of another version; use its cachefs, or delete the pool")


def mark_clean(path: Path) -> None:
    """Say that maps and data files agree."""
    with contextlib.suppress(OSError):  # the next start looks for itself then
        (path / "clean").touch()


def take_clean_mark(path: Path) -> bool:
    """Whether the pool was closed in order; durably gone on return."""
    try:
        (path / "clean").unlink()
    except FileNotFoundError:
        return False
    files.sync_directory(path)
    return True


def _can_punch(path: Path) -> bool:
    """Whether a punched range comes back as space. A file system that is too full to try is believed to be able to."""
    descriptor = os.open(path / "punch-test", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.pwrite(descriptor, b"\1" * (128 << 10), 0)
        os.fsync(descriptor)
        before = os.fstat(descriptor).st_blocks
        fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, 32 << 10, 64 << 10)
        os.fsync(descriptor)
        return os.fstat(descriptor).st_blocks < before
    except OSError as exc:
        return exc.errno in (errno.ENOSPC, errno.EDQUOT)
    finally:
        os.close(descriptor)
        os.unlink(path / "punch-test")


__all__ = ["POOL_IMAGE", "Pool", "digest_of", "open_pool"]
