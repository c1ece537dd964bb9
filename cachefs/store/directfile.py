"""Reading and writing a file with O_DIRECT: past the page cache, whole units at a time, from aligned memory.

Never on the loop. What the caller hands over goes to the kernel as it is where its address is aligned, as the buffers of FUSE
requests and of `coalesce` are, and together with what else is asked for (`cachefs.store.transfers`); anything else is copied
through aligned memory of a pool, in one of a few threads (`cachefs.store.workers`). The caller of a `DirectFile` keeps to the
alignment of offsets and lengths, that of a `CompletedFile` need not. Where the size of a file is no multiple of it, the last
bytes go through the page cache, which the kernel keeps in agreement with direct I/O, and a sync covers them.

Sources: open(2) O_DIRECT, statx(2) STATX_DIOALIGN, linux/stat.h.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from cachefs.errors import StoreError
from cachefs.store.localfile import THREADS_PER_FILE_SYSTEM, LocalFile
from cachefs.store.transfers import READ, WRITE, Transfer, Transfers
from cachefs.store.workers import Workers
from cachefs.units import align_down, align_up

T = TypeVar("T")

MEMORY = 1 << 20  # bytes of one piece of aligned memory
_STATX_DIOALIGN = 0x2000
_AT_EMPTY_PATH = 0x1000
_MASK = struct.Struct("<I")
_DIOALIGN = struct.Struct("<II")  # at 0x98 of struct statx: of memory, of offset and length
_PROBED = (512, 4096)

_libc = ctypes.CDLL(None, use_errno=True)


class Alignment(NamedTuple):
    """Bytes, powers of two."""

    memory: int
    offset: int


def ask_alignment(descriptor: int) -> Alignment | None:
    """What direct I/O on *descriptor*, opened with O_DIRECT, must keep to; None where there is none. Blocks."""
    statx = bytearray(256)
    memory = (ctypes.c_char * len(statx)).from_buffer(statx)
    if _libc.statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, memory) == 0:
        (mask,) = _MASK.unpack_from(statx)
        if mask & _STATX_DIOALIGN:
            found = Alignment(*_DIOALIGN.unpack_from(statx, 0x98))
            return Alignment(found.memory, max(512, found.offset)) if found.offset else None
    return _probe_alignment(descriptor)  # before Linux 6.1, and file systems that do not say


def _probe_alignment(descriptor: int) -> Alignment | None:
    """The smallest unit in which it can be read, at an odd multiple of it."""
    with mmap.mmap(-1, 4096) as memory:
        for unit in _PROBED:
            try:
                with memoryview(memory)[:unit] as view:
                    os.preadv(descriptor, (view,), unit)
            except OSError:
                continue
            return Alignment(unit, unit)
    return None


class _Pool:
    """Pieces of MEMORY bytes that begin on a page; as many are kept as there are threads. Any thread.

    Shared maps: a process that is started while the device writes into a private one could get the page, and we a copy.
    """

    def __init__(self) -> None:
        self._free: list[memoryview] = []

    def take(self) -> memoryview:
        try:
            return self._free.pop()
        except IndexError:
            return memoryview(mmap.mmap(-1, MEMORY))

    def give_back(self, memory: memoryview) -> None:
        if len(self._free) < THREADS_PER_FILE_SYSTEM:
            self._free.append(memory)


_pool = _Pool()


class DirectFile(LocalFile):
    """*descriptor* was opened with O_DIRECT, *buffered* without, both of one file of *size* bytes. Owns both."""

    def __init__(self, descriptor: int, buffered: int, size: int, alignment: Alignment) -> None:
        super().__init__(descriptor, size)
        self.alignment = alignment.offset
        self._memory_mask = alignment.memory - 1
        self._buffered = buffered
        self._direct_end = align_down(size, alignment.offset)
        self._workers = Workers("direct I/O", self.file_system.limiter)
        self._transfers = Transfers(self)

    async def run(self, call: Callable[..., T], *arguments: object) -> T:
        return await self._workers.run(call, *arguments)

    def close(self) -> None:
        self._workers.close()
        self._transfers.close()
        super().close()
        buffered, self._buffered = self._buffered, -1
        os.close(buffered)

    def let_go(self) -> None:
        """The buffered descriptor stays open."""
        self._workers.close()
        self._transfers.close()
        os.close(self.descriptor)
        self.descriptor = self._buffered = -1

    def sync_now(self) -> None:
        # Of the two the one that a predecessor may have had, and with it the kernel's word of what it failed to write.
        os.fdatasync(self._buffered)

    def _probe_reads(self) -> int | None:
        return None  # nothing runs on the loop

    def try_read_later(self, offset: int, buffer: memoryview, done: Callable[[float | None], None]) -> bool:
        address = self._address_for(offset, buffer)
        if address is None:
            return False
        length = len(buffer)

        def then(one: Transfer) -> None:
            done(None if one.error is None and one.result == length else math.inf)  # `read` finds out why

        return self._transfers.try_begin(READ, offset, buffer, address, then)

    def try_write(self, offset: int, data: memoryview) -> bool:
        return False

    async def read(self, offset: int, buffer: memoryview) -> None:
        address = self._address_for(offset, buffer)
        done = 0
        if address is not None:
            done = await self._transfers.transfer(READ, offset, buffer, address)
            if done == len(buffer):
                return
            done = align_down(done, self.alignment)
        await super().read(offset + done, buffer[done:])

    async def write(self, offset: int, pieces: Sequence[memoryview | bytes]) -> None:
        pieces = [piece for piece in pieces if len(piece)]
        data = pieces[0] if len(pieces) == 1 else b""
        address = self._address_for(offset, data) if isinstance(data, memoryview) else None
        if address is not None and isinstance(data, memoryview):
            with self.file_system.busy():
                done = await self._transfers.transfer(WRITE, offset, data, address)
            if done == len(data):
                return
            done = align_down(done, self.alignment)
            pieces = (data[done:],)
            offset += done
        await super().write(offset, pieces)

    def _address_for(self, offset: int, view: memoryview) -> int | None:
        """Of *view* in memory, if the range can go to or come from there as it is; None where it has to be seen to first."""
        length = len(view)
        if not length or view.readonly or (offset | length) & self.alignment - 1 or offset + length > self._direct_end:
            return None
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        return None if address & self._memory_mask else address

    def read_now(self, offset: int, buffer: memoryview) -> None:
        """Fill *buffer*; zeros beyond the end of the file."""
        direct = min(len(buffer), max(0, self._direct_end - offset))
        for at, part in _parts(buffer[:direct]):
            if self._is_aligned(part):
                self._read_direct(offset + at, part)
                continue
            memory = _pool.take()
            self._read_direct(offset + at, memory[: len(part)])
            part[:] = memory[: len(part)]
            _pool.give_back(memory)
        if direct < len(buffer):
            count = os.preadv(self._buffered, (buffer[direct:],), offset + direct)
            buffer[direct + count :] = bytes(len(buffer) - direct - count)

    def _read_direct(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self.descriptor, (buffer[done:],), offset + done)
            done += count
            if not count or count % self.alignment:  # the end of a file that was cut short
                buffer[done:] = bytes(len(buffer) - done)
                return

    def write_now(self, offset: int, pieces: Sequence[memoryview | bytes]) -> None:
        """Write *pieces* one behind the other, all or raise."""
        pieces = [piece for piece in pieces if len(piece)]
        data = memoryview(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        direct = min(len(data), max(0, self._direct_end - offset))
        for at, part in _parts(data[:direct]):
            if self._is_aligned(part):
                self._write_direct(offset + at, part)
                continue
            memory = _pool.take()
            memory[: len(part)] = part
            self._write_direct(offset + at, memory[: len(part)])
            _pool.give_back(memory)
        while direct < len(data):
            direct += os.pwritev(self._buffered, (data[direct:],), offset + direct)

    def _write_direct(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            count = align_down(os.pwritev(self.descriptor, (data[done:],), offset + done), self.alignment)
            if not count:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            done += count

    def _is_aligned(self, view: memoryview) -> bool:
        """Whether the kernel takes its address. Of read-only memory nobody can say."""
        return not view.readonly and not ctypes.addressof(ctypes.c_char.from_buffer(view)) & self._memory_mask


class CompletedFile(DirectFile):
    """Takes any range. What a write has only in part of its first and last unit is read first: whoever writes sees to it
    that nobody else writes these units meanwhile, as one does who holds a lock on the blocks of a store.
    """

    def _units(self, offset: int, length: int) -> tuple[int, int]:
        """Where the units that the range touches begin and end."""
        return align_down(offset, self.alignment), min(align_up(offset + length, self.alignment), self.size)

    def read_now(self, offset: int, buffer: memoryview) -> None:
        start, end = self._units(offset, len(buffer))
        if end - start == len(buffer):
            super().read_now(offset, buffer)
            return
        whole = memoryview(bytearray(end - start))
        super().read_now(start, whole)
        buffer[:] = whole[offset - start : offset - start + len(buffer)]

    def write_now(self, offset: int, pieces: Sequence[memoryview | bytes]) -> None:
        length = sum(map(len, pieces))
        start, end = self._units(offset, length)
        if end - start == length:
            super().write_now(offset, pieces)
            return
        whole = memoryview(bytearray(end - start))
        last = align_down(end - 1, self.alignment)
        if offset > start:
            super().read_now(start, whole[: self.alignment])
        if offset + length < end and (last > start or offset == start):
            super().read_now(last, whole[last - start :])
        whole[offset - start : offset - start + length] = b"".join(pieces)
        super().write_now(start, (whole,))


def refuse_without_direct(where: str, path: Path) -> None:
    """Raises: StoreError when the file at *path* cannot be opened with O_DIRECT, and what to do about its like."""
    descriptor = os.open(path, os.O_RDWR)
    open_direct(DirectFile, where, str(path), descriptor, 0, writable=True).close()


AnyDirectFile = TypeVar("AnyDirectFile", bound=DirectFile)


def open_direct(
    kind: type[AnyDirectFile], where: str, path: str, buffered: int, size: int, *, writable: bool
) -> AnyDirectFile:
    """The file of *buffered*, opened once more with O_DIRECT. *where*: the owner, for errors. Raises: StoreError."""
    advice = "take `direct: true` out, or move the file to a file system that has it, such as ext4 or xfs"
    try:
        descriptor = os.open(f"/proc/self/fd/{buffered}", (os.O_RDWR if writable else os.O_RDONLY) | os.O_DIRECT)
    except OSError as exc:
        raise StoreError(where, f"cannot open {path} with O_DIRECT: {exc.strerror}; {advice}") from exc
    try:
        alignment = ask_alignment(descriptor)
        if alignment is None:
            raise StoreError(where, f"the file system of {path} has no direct I/O; {advice}")
        return kind(descriptor, buffered, size, alignment)
    except BaseException:
        os.close(descriptor)
        raise


def _parts(view: memoryview) -> list[tuple[int, memoryview]]:
    """*view* in pieces of MEMORY bytes, with where they begin."""
    return [(at, view[at : at + MEMORY]) for at in range(0, len(view), MEMORY)]
