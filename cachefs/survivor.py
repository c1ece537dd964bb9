"""What outlives the process: descriptors that a keeper holds for a successor, and shared memories among them.

What backs an acknowledged write and is not in a file yet lives in *survivor memory* and nowhere else, so that a successor
can go on where a killed daemon stopped. A kill can fall between any two instructions: owners keep their memory valid at
every instant (docs/design.md, "The two crashes").

A memory is a memfd with a 4096-byte head (docs/formats/survivor.md) that says whose it is: kind and layout, uuid of the store,
boot id, *epoch*. The epoch is a small synced file beside the store, which everybody bumps who opens the store for writing
without its memory. All match: the memory is used. Otherwise it is void, and what the store's files say counts.

The keeper (systemd, or `cachefs.supervisor`) has a descriptor before anything that needs it is acknowledged: `keep` waits
until it says so. Without a keeper memories and descriptors live as long as the process, or until `cachefs upgrade`.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import struct
import threading
import uuid
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from cachefs import notify
from cachefs.errors import LayoutError

log = logging.getLogger(__name__)

HEAD_SIZE = 4096
HEAD = struct.Struct("<8s8sI4x16s16sQQ")  # magic, kind, layout, store uuid, boot id, epoch, length of the body
MAGIC = b"cfs-mem\0"
_EPOCH = struct.Struct("<Q")


def boot_id() -> bytes:
    """16 bytes that are the same until the machine starts anew."""
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()).bytes


class Tag(NamedTuple):
    """Whose a memory is."""

    kind: str
    layout: int
    store: uuid.UUID
    boot: bytes
    epoch: int
    length: int


def read_tag(descriptor: int) -> Tag | None:
    """None: it is no survivor memory."""
    content = os.pread(descriptor, HEAD.size, 0)
    if len(content) < HEAD.size:
        return None
    magic, kind, layout, store, boot, epoch, length = HEAD.unpack(content)
    if magic != MAGIC or os.fstat(descriptor).st_size < HEAD_SIZE + length:
        return None
    return Tag(kind.rstrip(b"\0").decode(errors="replace"), layout, uuid.UUID(bytes=store), boot, epoch, length)


class SurvivorMemory:
    """A memfd of HEAD_SIZE + *length* bytes; `body` is a view of the *length* bytes, zero at first.

    descriptor: one that a predecessor made and filled, which is taken over; its head must say the same. Untouched pages take
    no memory.
    """

    def __init__(
        self, kind: str, layout: int, store: uuid.UUID, epoch: int, length: int, descriptor: int | None = None
    ) -> None:
        self.is_inherited = descriptor is not None
        self.layout = layout
        self.name = memory_name(kind, store)
        self.descriptor = (
            os.memfd_create(f"cachefs:{kind}:{store}", os.MFD_CLOEXEC) if descriptor is None else descriptor
        )
        try:
            if not self.is_inherited:
                os.ftruncate(self.descriptor, HEAD_SIZE + length)
            self._map = mmap.mmap(self.descriptor, HEAD_SIZE + length)
        except BaseException:
            os.close(self.descriptor)
            raise
        if not self.is_inherited:
            HEAD.pack_into(self._map, 0, MAGIC, kind.encode(), layout, store.bytes, boot_id(), epoch, length)
        self.body = memoryview(self._map)[HEAD_SIZE:]

    def touched(self, start: int, end: int) -> Iterable[tuple[int, int]]:
        """Parts of the body from *start* to before *end*, in order, outside of which every byte is zero. In bytes."""
        while start < end:
            try:
                first = os.lseek(self.descriptor, HEAD_SIZE + start, os.SEEK_DATA) - HEAD_SIZE
            except OSError:  # ENXIO: nothing but hole up to the end
                return
            last = os.lseek(self.descriptor, HEAD_SIZE + first, os.SEEK_HOLE) - HEAD_SIZE
            if first >= end:
                return
            yield first, min(last, end)
            start = last

    def close(self) -> None:
        """Give up the descriptor; the mapping goes with the last view of `body`."""
        os.close(self.descriptor)


def memory_name(kind: str, store: uuid.UUID) -> str:
    return f"{kind}.{store}"


class Survivors:
    """The descriptors of this process that outlive it, by name. inherited: what a predecessor left, ours from now on.

    Names: letters, digits, '.', '-'; at most 255. Any thread may call. All calls block, though not for long.
    """

    def __init__(self, inherited: Iterable[tuple[str, int]] = ()) -> None:
        self._inherited: dict[str, int] = {}
        self._kept: dict[str, int] = {}
        self._lock = threading.Lock()
        self.keeper_answers = notify.has_keeper()
        for name, descriptor in inherited:
            if name in self._inherited:  # killed between two steps of keeping: either is as good
                os.close(descriptor)
            else:
                self._inherited[name] = self._kept[name] = descriptor

    # ---- descriptors

    def keep(self, descriptors: Mapping[str, int]) -> None:
        """Have the keeper hold *descriptors*, in place of what it had under these names; on return it has.

        They stay the caller's, who says `drop` before it closes one. What it has already is not sent again.
        """
        with self._lock:
            new = {name: descriptor for name, descriptor in descriptors.items() if self._kept.get(name) != descriptor}
            if descriptors and not new:
                return
            for name, descriptor in new.items():
                if name in self._kept:
                    notify.notify(FDSTOREREMOVE="1", FDNAME=name)
                self._kept[name] = descriptor
                notify.notify(descriptor, FDSTORE="1", FDNAME=name, FDPOLL="0")
            if self.keeper_answers and not notify.barrier():
                self.keeper_answers = False
                log.error("whoever keeps this daemon alive does not answer: the mount will not outlive the daemon")

    def take(self, name: str) -> int | None:
        """The descriptor that a predecessor kept as *name*, or None. It is the caller's then, and stays kept."""
        with self._lock:
            return self._inherited.pop(name, None)

    def give_back(self, descriptors: Mapping[str, int]) -> None:
        """What was kept may be taken again, by the next who tries; what was not is closed."""
        with self._lock:
            for name, descriptor in descriptors.items():
                if self._kept.get(name) == descriptor:
                    self._inherited[name] = descriptor
                else:
                    os.close(descriptor)

    def drop(self, names: Iterable[str]) -> None:
        """Nobody is to inherit these any more."""
        with self._lock:
            for name in names:
                if self._kept.pop(name, None) is not None:
                    notify.notify(FDSTOREREMOVE="1", FDNAME=name)
                left = self._inherited.pop(name, None)
                if left is not None:
                    os.close(left)

    def has(self, name: str) -> bool:
        """Whether a predecessor left it and nobody has taken it."""
        with self._lock:
            return name in self._inherited

    def untaken(self) -> set[str]:
        """Names of what a predecessor left and nobody has taken."""
        with self._lock:
            return set(self._inherited)

    def kept(self) -> list[tuple[str, int]]:
        """All that is kept, to hand it to a successor."""
        with self._lock:
            return list(self._kept.items())

    # ---- memories

    def memory(
        self, kind: str, layouts: Collection[int], store: uuid.UUID, length: int, epoch_file: Path | None
    ) -> SurvivorMemory:
        """The memory *kind* of *store*: the one that a predecessor left, when it is valid, or a new one.

        A new one is not kept yet: a successor would take it for whole. The caller fills it first, then keeps it as
        memory.name, and acknowledges nothing before that.

        layouts: those that the caller reads; a new memory has the highest. length: bytes of a new one; an inherited one
        may have another. epoch_file: is made where there is none, its directory too; bumped, durably, with a new memory. None:
        there is no store that somebody could open without the memory.

        Raises: LayoutError: there is a valid memory, and another version of cachefs must read it; OSError.
        """
        name, epoch = memory_name(kind, store), 0 if epoch_file is None else read_epoch(epoch_file)
        descriptor = self.take(name)
        tag = None if descriptor is None else read_tag(descriptor)
        if descriptor is not None:
            if tag is not None and (tag.kind, tag.store, tag.boot, tag.epoch) == (kind, store, boot_id(), epoch):
                if tag.layout in layouts:
                    return SurvivorMemory(kind, tag.layout, store, epoch, tag.length, descriptor)
                self.give_back({name: descriptor})
                raise LayoutError(
                    name,
                    f"what was acknowledged and not flushed lies in memory of layout {tag.layout}; this version reads "
                    f"{', '.join(map(str, sorted(layouts)))}: `cachefs upgrade` to the version that wrote it, or a later one",
                )
            log.warning("%s: memory of an earlier opening is void: the store was opened without it since", name)
            self.drop([name])
            os.close(descriptor)
        epoch = 0 if epoch_file is None else bump_epoch(epoch_file)
        return SurvivorMemory(kind, max(layouts), store, epoch, length)

    def has_memory(self, kind: str, store: uuid.UUID, epoch_file: Path) -> bool:
        """Whether a predecessor left a memory of *store* that is valid."""
        with self._lock:
            descriptor = self._inherited.get(memory_name(kind, store))
            tag = None if descriptor is None else read_tag(descriptor)
        return tag is not None and (tag.boot, tag.epoch) == (boot_id(), read_epoch(epoch_file))

    def release(self, memory: SurvivorMemory) -> None:
        """What was in *memory* is durable, or of no worth any more: it is dropped and closed."""
        self.drop([memory.name])
        memory.close()


def read_epoch(path: Path) -> int:
    """0 when there is none."""
    with contextlib.suppress(FileNotFoundError):
        content = path.read_bytes()
        if len(content) == _EPOCH.size:
            return int(_EPOCH.unpack(content)[0])
    return 0


def bump_epoch(path: Path) -> int:
    """Void every survivor memory of the store: the next epoch, durable on return."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        content = os.pread(descriptor, _EPOCH.size, 0)
        epoch = (_EPOCH.unpack(content)[0] if len(content) == _EPOCH.size else 0) + 1
        os.pwrite(descriptor, _EPOCH.pack(epoch), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return int(epoch)
