"""Survivor memory: named, shared memory whose contents outlive the process as long as somebody holds its descriptor.

What backs an acknowledged write and is not in a file yet lives here and nowhere else, so that a successor can go on
where a killed daemon stopped. A kill can fall between any two instructions: owners keep their memory valid at every
instant (docs/design.md, "The two crashes").

Each memory is a memfd with a 4096-byte head (`docs/formats/survivor.md`) that says whose it is: kind and layout
version, uuid of the store, boot id, epoch. All match: a successor may use it. Nobody hands descriptors over yet; every
start makes its memories anew and bumps the store's epoch, which is what will void a stale one.
"""

from __future__ import annotations

import mmap
import os
import struct
import uuid
from pathlib import Path

HEAD_SIZE = 4096
HEAD = struct.Struct("<8s8sI4x16s16sQQ")  # magic, kind, layout, store uuid, boot id, epoch, length of the body
MAGIC = b"cfs-mem\0"


def boot_id() -> bytes:
    """16 bytes that are the same until the machine starts anew."""
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()).bytes


class SurvivorMemory:
    """A memfd of HEAD_SIZE + *length* bytes; `body` is a view of the *length* bytes, zero at first.

    Untouched pages take no memory.
    """

    def __init__(self, kind: str, layout: int, store: uuid.UUID, epoch: int, length: int) -> None:
        self.descriptor = os.memfd_create(f"cachefs:{kind}:{store}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.descriptor, HEAD_SIZE + length)
            self._map = mmap.mmap(self.descriptor, HEAD_SIZE + length)
        except BaseException:
            os.close(self.descriptor)
            raise
        HEAD.pack_into(self._map, 0, MAGIC, kind.encode(), layout, store.bytes, boot_id(), epoch, length)
        self.body = memoryview(self._map)[HEAD_SIZE:]

    def close(self) -> None:
        """Give up the descriptor; the mapping goes with the last view of `body`."""
        os.close(self.descriptor)
