"""What a mount is, in survivor memory: the agreed INIT, the configuration, disks with their inodes and open counts, crashes.

A kill can fall between any two stores: each change ends with one 8-byte store that makes it count, and what is repeated
because of a kill (an OPEN that is sent again) is recognised and not counted twice. Byte table: docs/formats/survivor.md.

Concurrency: one event loop; nothing here blocks.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cachefs.errors import StoreError
from cachefs.survivor import SurvivorMemory, Survivors, memory_name

KIND, LAYOUT = "mount", 1
CRASHES = 8  # that are remembered
_CRASHES_AT, _CRASH = 128, struct.Struct("<QQ")  # time in ms, inode
_INIT_AT, _INIT_SIZE = 256, 376  # request and reply, each its length in 8 bytes, then bytes
_CONFIG_AT, _CONFIG_SIZE = 4096, 64 << 20  # two of them, of which one counts
_DISKS_AT = _CONFIG_AT + 2 * _CONFIG_SIZE
DISKS, _DISK_SIZE, _NAME_AT, _NAME_SIZE = 1 << 16, 256, 64, 128
SIZE = _DISKS_AT + DISKS * _DISK_SIZE

# numbers of the 8-byte words at the beginning
_NEXT_INODE, _HANDLING, _CONFIGS, _SUCCESSIONS, _DRAINING, _STOPPED_NS = range(6)
_COUNTED_UNIQUE, _COUNTED_INODE, _COUNTED = range(6, 9)
_CRASH_COUNT, _AGREED, _ROWS = range(9, 12)
# and of those of a disk
_INODE, _OPENS, _BYTES, _OPENING, _WAITING = range(5)
FIRST_INODE = 2  # 1 is the root directory
RESENT = 1 << 63  # in the unique of a request: the kernel sends it again


STORE = uuid.uuid5(uuid.NAMESPACE_URL, "cachefs:mount")  # a daemon has one mount
NAME = memory_name(KIND, STORE)


def open_state(survivors: Survivors) -> MountState:
    """That of a predecessor, or an empty one, which is not kept yet. Raises: LayoutError."""
    return MountState(survivors.memory(KIND, {LAYOUT}, STORE, SIZE, None))


class Crash(NamedTuple):
    """at_ms: on the clock that goes on while the machine sleeps. inode: of the disk that was worked for, or 0."""

    at_ms: int
    inode: int


class MountState:
    """*memory*: SIZE bytes, zeros for a mount that begins."""

    def __init__(self, memory: SurvivorMemory) -> None:
        self.memory = memory
        self._body = memory.body
        self._words = memory.body[: 16 * 8].cast("Q")
        self.handling = self._words[_HANDLING : _HANDLING + 1]
        """One word: the inode of the disk whose request is being handled on the loop, 0 for none."""
        if not self._words[_NEXT_INODE]:
            self._words[_NEXT_INODE] = FIRST_INODE
        self._rows: dict[str, memoryview] = {}
        self._by_inode: dict[int, memoryview] = {}
        for number in range(self._words[_ROWS]):
            row = self._row(number)
            if row[_INODE]:
                self._know(self._name(number), row)

    def wait_alone(self) -> None:
        """Until no other daemon serves the mount; from here on none does until this process has ended. Blocks.

        A keeper that starts a successor in the middle of a hand-over would else have two of them.
        """
        self._alone = os.open(f"/proc/self/fd/{self.memory.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(self._alone, fcntl.LOCK_EX)  # of a description of our own, which nobody keeps or inherits

    # ---- the connection

    @property
    def agreed(self) -> tuple[bytes, bytes] | None:
        """The request and the reply of INIT, once the kernel may have the reply."""
        if not self._words[_AGREED]:
            return None
        return self._blob(_INIT_AT), self._blob(_INIT_AT + _INIT_SIZE)

    def agree(self, request: bytes, reply: bytes) -> None:
        """*reply* is about to be sent."""
        self._put_blob(_INIT_AT, request, _INIT_SIZE)
        self._put_blob(_INIT_AT + _INIT_SIZE, reply, _INIT_SIZE)
        self._words[_AGREED] = 1

    def forget_connection(self) -> None:
        """The mount is gone: nobody has anything open."""
        self._words[_AGREED] = 0
        for row in self._rows.values():
            row[_OPENS] = 0

    # ---- the configuration

    @property
    def config(self) -> tuple[Path, Path, str]:
        """The mountpoint, the file that the configuration came from, and its values as JSON."""
        mountpoint, file, values = os.fsdecode(self._blob(self._config_at())).split("\0")
        return Path(mountpoint), Path(file), values

    def set_config(self, mountpoint: Path, file: Path, values: str) -> None:
        content = os.fsencode(f"{mountpoint}\0{file}\0{values}")
        if len(content) > _CONFIG_SIZE - 8:
            raise StoreError(str(file), f"is too long: {len(content)} bytes of values")
        other = _CONFIG_AT + (self._words[_CONFIGS] + 1) % 2 * _CONFIG_SIZE
        self._put_blob(other, content, _CONFIG_SIZE)
        self._words[_CONFIGS] += 1

    def _config_at(self) -> int:
        return _CONFIG_AT + self._words[_CONFIGS] % 2 * _CONFIG_SIZE

    # ---- disks

    def sizes(self) -> dict[str, int]:
        """Of the disks that the mount shows, by name."""
        return {name: row[_BYTES] for name, row in self._rows.items() if row[_BYTES]}

    def inode(self, name: str) -> int:
        """Of disk *name*, a new one if it is not known. No inode is ever used again."""
        if name not in self._rows:
            number = self._words[_ROWS]
            if number > len(self._rows):
                number = next(n for n in range(number) if not self._row(n)[_INODE])
            if number >= DISKS:
                raise StoreError(name, f"a mount has at most {DISKS} disks")
            row = self._row(number)
            row[_OPENS] = row[_BYTES] = row[_OPENING] = row[_WAITING] = 0
            at = _DISKS_AT + number * _DISK_SIZE + _NAME_AT
            self._body[at : at + _NAME_SIZE] = name.encode().ljust(_NAME_SIZE, b"\0")
            inode = self._words[_NEXT_INODE]
            self._words[_NEXT_INODE] = inode + 1
            row[_INODE] = inode
            self._words[_ROWS] = max(self._words[_ROWS], number + 1)
            self._know(name, row)
        return self._rows[name][_INODE]

    def set_size(self, name: str, size: int) -> None:
        self._rows[name][_BYTES] = size

    def drop(self, name: str) -> None:
        row = self._rows.pop(name)
        del self._by_inode[row[_INODE]]
        row[_INODE] = 0

    def name_of(self, inode: int) -> str | None:
        return next((name for name, row in self._rows.items() if row[_INODE] == inode), None)

    def set_opening(self, name: str, opening: bool) -> None:
        """Whether the daemon is opening the disk's stores: should it die of that, we know which ones."""
        self._rows[name][_OPENING] = opening

    def set_waiting(self, inode: int, waiting: bool) -> None:
        """Whether requests of the disk are being worked on in tasks: the same."""
        if inode in self._by_inode:
            self._by_inode[inode][_WAITING] = waiting

    def set_handling(self, inode: int) -> None:
        """A request of the disk is handled now, until the next ones come."""
        self.handling[0] = inode

    def _suspects(self, word: int) -> list[int]:
        return [row[_INODE] for row in self._rows.values() if row[word]]

    # ---- who has them open

    def opens(self, name: str) -> int:
        """How often the disk is open; 0 for one that is not known."""
        return self._rows[name][_OPENS] if name in self._rows else 0

    def count(self, unique: int, inode: int, change: int) -> None:
        """An OPEN (+1) or RELEASE (-1) is about to be answered; the same one again changes nothing."""
        row = self._by_inode.get(inode)
        if row is None:
            return
        if unique & RESENT and self._words[_COUNTED_UNIQUE] == unique & ~RESENT:
            row[_OPENS] = self._words[_COUNTED]  # the kill fell between this note and the reply
            return
        self._words[_COUNTED_UNIQUE] = 0
        self._words[_COUNTED_INODE] = inode
        self._words[_COUNTED] = max(0, row[_OPENS] + change)
        self._words[_COUNTED_UNIQUE] = unique & ~RESENT
        row[_OPENS] = self._words[_COUNTED]

    # ---- successions

    @property
    def is_draining(self) -> bool:
        return bool(self._words[_DRAINING])

    def drain(self) -> None:
        self._words[_DRAINING] = 1

    @property
    def successions(self) -> int:
        """How often somebody took over."""
        return self._words[_SUCCESSIONS]

    def note_succession(self) -> None:
        self._words[_SUCCESSIONS] += 1

    @property
    def stopped_ns(self) -> int:
        """When the last daemon stopped serving to hand over, time.monotonic_ns(); 0: it was not asked to."""
        return self._words[_STOPPED_NS]

    @stopped_ns.setter
    def stopped_ns(self, now: int) -> None:
        self._words[_STOPPED_NS] = now

    def note_crash(self) -> None:
        """The predecessor died; what it was working for is noted with it."""
        inode = self.handling[0]
        for word in (_WAITING, _OPENING):
            suspects = self._suspects(word)
            if not inode and len(suspects) == 1:
                inode = suspects[0]
        number = self._words[_CRASH_COUNT]
        at_ms = int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1000)
        _CRASH.pack_into(self._body, _CRASHES_AT + number % CRASHES * _CRASH.size, at_ms, inode)
        self._words[_CRASH_COUNT] = number + 1
        self.handling[0] = 0
        for row in self._rows.values():
            row[_OPENING] = row[_WAITING] = 0

    def forget_crashes(self) -> None:
        self._words[_CRASH_COUNT] = 0

    def crashes(self, within_s: float) -> list[Crash]:
        """Those of the last *within_s* seconds, the latest last; CRASHES at most."""
        count = self._words[_CRASH_COUNT]
        found = [
            Crash(*_CRASH.unpack_from(self._body, _CRASHES_AT + number % CRASHES * _CRASH.size))
            for number in range(max(0, count - CRASHES), count)
        ]
        since_ms = (time.clock_gettime(time.CLOCK_BOOTTIME) - within_s) * 1000
        return [crash for crash in found if crash.at_ms >= since_ms]

    # ---- how it lies there

    def _blob(self, at: int) -> bytes:
        length = int.from_bytes(self._body[at : at + 8], "little")
        return bytes(self._body[at + 8 : at + 8 + length])

    def _put_blob(self, at: int, content: bytes, room: int) -> None:
        if len(content) + 8 > room:
            raise ValueError(f"{len(content)} bytes do not fit into {room}")
        self._body[at : at + 8 + len(content)] = len(content).to_bytes(8, "little") + content

    def _row(self, number: int) -> memoryview:
        at = _DISKS_AT + number * _DISK_SIZE
        return self._body[at : at + _NAME_AT].cast("Q")

    def _name(self, number: int) -> str:
        at = _DISKS_AT + number * _DISK_SIZE + _NAME_AT
        return bytes(self._body[at : at + _NAME_SIZE]).rstrip(b"\0").decode()

    def _know(self, name: str, row: memoryview) -> None:
        self._rows[name] = row
        self._by_inode[row[_INODE]] = row

    def __iter__(self) -> Iterator[str]:
        """Names of the disks, in the order of their inodes."""
        return iter(sorted(self._rows, key=lambda name: self._rows[name][_INODE]))
