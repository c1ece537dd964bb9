"""READ, WRITE, FSYNC, FLUSH, FALLOCATE and LSEEK, straight from the request's bytes to the stack and back.

A READ or WRITE is first offered to the fast path: a plain call down the stack that finishes it here and now. Where that
says False, or where a request has to wait by nature, a task takes it over together with its buffer.

A pooled buffer is laid out so that the data of a WRITE and of a READ's reply begin on a page, and nothing is copied:

    ... | 80 bytes: header + WRITE_IN | data, 1 MiB ... |        as it comes from the kernel
    ...            | 16 bytes: header | data ...        |        as a READ's reply goes back
                                      ^ DATA_AT

Traps, each of which has its test: O_DIRECT + O_DSYNC sends no FSYNC, so such a WRITE is flushed before its reply. FLUSH is
close(): it reports pending errors and flushes nothing. While an FSYNC, FALLOCATE or LSEEK waits the kernel lets no write of
that file through, so an LSEEK that waited LSEEK_PATIENCE_S answers "data". A WRITE that crosses the end is short, one past
it EFBIG (ENOSPC would pause a guest for ever). An INTERRUPT is a hint that says nothing about whether its sender has died;
it needs no reply and gets none.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import time
from collections.abc import Awaitable, Callable, Sequence

import trio

from cachefs.disk import Disk
from cachefs.errors import CachefsError
from cachefs.extent import ExtentKind
from cachefs.fuse.boundary import Boundary
from cachefs.fuse.protocol import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
    FALLOCATE_IN,
    IN_HEADER,
    LSEEK_IN,
    LSEEK_REPLY,
    MAX_WRITE,
    OPCODE_NAMES,
    OUT_HEADER,
    READ_IN,
    READ_WHERE,
    WRITE_REPLY,
    WRITE_REQUEST_SIZE,
    WRITE_WHERE,
    Opcode,
    error_reply,
)

log = logging.getLogger(__name__)

PAGE = 4096
DATA_AT = PAGE
REQUEST_AT = DATA_AT - WRITE_REQUEST_SIZE
BODY_AT = REQUEST_AT + IN_HEADER.size
REPLY_AT = DATA_AT - OUT_HEADER.size
O_SYNCS = os.O_DSYNC | os.O_SYNC
LSEEK_PATIENCE_S = 2.0
SEEK_DATA, SEEK_HOLE = os.SEEK_DATA, os.SEEK_HOLE

READ, WRITE, FSYNC, FLUSH = int(Opcode.READ), int(Opcode.WRITE), int(Opcode.FSYNC), int(Opcode.FLUSH)
FALLOCATE, LSEEK, INTERRUPT = int(Opcode.FALLOCATE), int(Opcode.LSEEK), int(Opcode.INTERRUPT)
DATA_OPCODES = frozenset((READ, WRITE, FSYNC, FLUSH, FALLOCATE, LSEEK, INTERRUPT))


class Buffer:
    """Room for one request or READ reply; `vector` is what a readv of a request fills."""

    __slots__ = ("vector", "view")

    def __init__(self) -> None:
        self.view = memoryview(mmap.mmap(-1, DATA_AT + MAX_WRITE + PAGE))
        self.vector = (self.view[REQUEST_AT:],)


class BufferPool:
    """Buffers that are free; a few dozen are kept."""

    KEPT = 128

    def __init__(self) -> None:
        self._free: list[Buffer] = []

    def take(self) -> Buffer:
        return self._free.pop() if self._free else Buffer()

    def give_back(self, buffer: Buffer) -> None:
        if len(self._free) < self.KEPT:
            self._free.append(buffer)


class Dataplane:
    """Serves the data requests of all disks of a mount.

    device: the descriptor that replies are written to. nursery: where requests wait that cannot be finished at once.
    """

    def __init__(self, device: int, disks: Sequence[Disk], nursery: trio.Nursery, boundary: Boundary) -> None:
        self._device = device
        self._disks = {disk.inode: disk for disk in disks}
        self._nursery = nursery
        self._boundary = boundary
        self.pool = BufferPool()
        self.waiting = 0  # requests that a task has
        self.counts = [0] * 64  # by opcode, of all requests, namespace included
        self.malformed = 0
        self.now_ns = time.time_ns()  # brought up to date once per batch by the channel

    # ---- one request

    def handle(self, buffer: Buffer, length: int, opcode: int, unique: int, node: int) -> bool:
        """Serve the data request of *length* bytes in *buffer*. True: the buffer may be used again; False: a task has it.

        *opcode*, *unique* and *node* are of its header.
        """
        view = buffer.view
        disk = self._disks.get(node)
        if disk is None:
            return opcode == INTERRUPT or self._refuse(unique, errno.EBADF)
        if opcode == READ:
            if length < IN_HEADER.size + READ_IN.size:
                return self._reject(unique, opcode, length)
            offset, size = READ_WHERE.unpack_from(view, BODY_AT)
            if offset + size > disk.size:  # read past the end: short
                size = max(0, disk.size - offset)
            if not size:
                return self._refuse(unique, 0)
            if size > MAX_WRITE:
                return self._reject(unique, opcode, length)
            data = view[DATA_AT : DATA_AT + size]
            try:
                done = disk.top.try_read_into(offset, data)
            except Exception as exc:
                return self._refuse(unique, self._boundary.errno_of(exc, f"READ {offset}+{size} of {disk.name}"))
            if done:
                OUT_HEADER.pack_into(view, REPLY_AT, OUT_HEADER.size + size, 0, unique)
                self.reply(view[REPLY_AT : DATA_AT + size])
                return True
            self._later(self._read, disk, buffer, unique, offset, size)
            return False
        if opcode == WRITE:
            return self._handle_write(disk, buffer, unique, length)
        return self._handle_other(disk, buffer, opcode, unique, length)

    def _handle_write(self, disk: Disk, buffer: Buffer, unique: int, length: int) -> bool:
        view = buffer.view
        if length < WRITE_REQUEST_SIZE:
            return self._reject(unique, WRITE, length)
        offset, size, flags = WRITE_WHERE.unpack_from(view, BODY_AT)
        if length != WRITE_REQUEST_SIZE + size:
            return self._reject(unique, WRITE, length)
        if not disk.writable:
            return self._refuse(unique, errno.EROFS)
        if offset + size > disk.size:
            if offset >= disk.size:
                return self._refuse(unique, errno.EFBIG if size else 0)
            size = disk.size - offset
        disk.mtime_ns = self.now_ns
        if not flags & O_SYNCS:
            try:
                done = disk.top.try_write(offset, view[DATA_AT : DATA_AT + size])
            except Exception as exc:
                return self._refuse(unique, self._boundary.errno_of(exc, f"WRITE {offset}+{size} of {disk.name}"))
            if done:
                self.reply(WRITE_REPLY.pack(WRITE_REPLY.size, 0, unique, size, 0))
                return True
        self._later(self._write, disk, buffer, unique, offset, size, bool(flags & O_SYNCS))
        return False

    def _handle_other(self, disk: Disk, buffer: Buffer, opcode: int, unique: int, length: int) -> bool:
        if opcode == FSYNC:
            if disk.top.try_flush(lambda error: self._flushed(disk, unique, error)):
                return True
            self._later(self._fsync, disk, buffer, unique)
            return False
        if opcode == FLUSH:
            try:
                error = disk.top.pending_error()
            except Exception as exc:
                return self._refuse(unique, self._boundary.errno_of(exc, f"FLUSH of {disk.name}"))
            code = 0 if error is None else error.errno if isinstance(error, CachefsError) else errno.EIO
            return self._refuse(unique, code)
        if opcode == INTERRUPT:
            return True
        body = FALLOCATE_IN if opcode == FALLOCATE else LSEEK_IN
        if length < IN_HEADER.size + body.size:
            return self._reject(unique, opcode, length)
        if opcode == FALLOCATE:
            _, offset, count, mode, _ = FALLOCATE_IN.unpack_from(buffer.view, BODY_AT)
            answer = self._check_fallocate(disk, offset, count, mode)
            if answer is not None:
                return self._refuse(unique, answer)
            self._later(self._fallocate, disk, buffer, unique, offset, min(count, disk.size - offset), mode)
        else:
            _, offset, whence, _ = LSEEK_IN.unpack_from(buffer.view, BODY_AT)
            if whence not in (SEEK_DATA, SEEK_HOLE):
                return self._refuse(unique, errno.EINVAL)
            if offset >= disk.size:
                return self._refuse(unique, errno.ENXIO)
            self._later(self._lseek, disk, buffer, unique, offset, whence)
        return False

    @staticmethod
    def _check_fallocate(disk: Disk, offset: int, length: int, mode: int) -> int | None:
        """The errno of a request that is answered at once (0 for those that have nothing to do), else None."""
        punch, zero = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, FALLOC_ZERO_RANGE
        if mode not in (0, FALLOC_KEEP_SIZE, punch, zero, zero | FALLOC_KEEP_SIZE):
            return errno.EOPNOTSUPP
        if not disk.writable:
            return errno.EROFS
        beyond = offset + length > disk.size
        if mode == punch or (mode == zero | FALLOC_KEEP_SIZE):
            return 0 if offset >= disk.size or not length else None  # what lies past the end is zeros already
        if beyond:
            return errno.EOPNOTSUPP if mode & FALLOC_KEEP_SIZE else errno.EFBIG
        return 0 if mode in (0, FALLOC_KEEP_SIZE) or not length else None

    def _flushed(self, disk: Disk, unique: int, error: Exception | None) -> None:
        """Answer an FSYNC; in the thread of the flush."""
        code = 0 if error is None else self._boundary.errno_of(error, f"FSYNC of {disk.name}")
        self.reply(error_reply(unique, code))

    # ---- requests that wait

    def _later(
        self, work: Callable[..., Awaitable[bytes | memoryview]], disk: Disk, buffer: Buffer, unique: int, *args: int
    ) -> None:
        self.waiting += 1
        self._nursery.start_soon(self._finish, work, disk, buffer, unique, args)

    async def _finish(
        self,
        work: Callable[..., Awaitable[bytes | memoryview]],
        disk: Disk,
        buffer: Buffer,
        unique: int,
        args: tuple[int, ...],
    ) -> None:
        """Await *work* and write its reply; the buffer is free afterwards, whatever happened."""
        reply: bytes | memoryview = error_reply(unique, errno.EIO)  # for one that is cancelled
        try:
            reply = await work(disk, buffer, unique, *args)
        except Exception as exc:
            name = work.__name__.strip("_").upper()
            where = "+".join(str(arg) for arg in args[:2])
            reply = error_reply(unique, self._boundary.errno_of(exc, f"{name} {where} of {disk.name}"))
        finally:
            self.waiting -= 1
            self.reply(reply)
            self.pool.give_back(buffer)

    async def _read(self, disk: Disk, buffer: Buffer, unique: int, offset: int, size: int) -> memoryview:
        view = buffer.view
        await disk.top.read_into(offset, view[DATA_AT : DATA_AT + size])
        OUT_HEADER.pack_into(view, REPLY_AT, OUT_HEADER.size + size, 0, unique)
        return view[REPLY_AT : DATA_AT + size]

    async def _write(self, disk: Disk, buffer: Buffer, unique: int, offset: int, size: int, sync: bool) -> bytes:
        await disk.top.write(offset, buffer.view[DATA_AT : DATA_AT + size])
        if sync:
            await disk.top.flush()
        return WRITE_REPLY.pack(WRITE_REPLY.size, 0, unique, size, 0)

    async def _fsync(self, disk: Disk, buffer: Buffer, unique: int) -> bytes:
        await disk.top.flush()
        return error_reply(unique, 0)

    async def _fallocate(self, disk: Disk, buffer: Buffer, unique: int, offset: int, length: int, mode: int) -> bytes:
        disk.mtime_ns = time.time_ns()
        if mode & FALLOC_PUNCH_HOLE:
            await disk.top.trim(offset, length)
        else:
            await disk.top.zero(offset, length)
        return error_reply(unique, 0)

    async def _lseek(self, disk: Disk, buffer: Buffer, unique: int, offset: int, whence: int) -> bytes:
        found: int | None = offset if whence == SEEK_DATA else disk.size
        with trio.move_on_after(LSEEK_PATIENCE_S):
            found = await self._seek(disk, offset, whence)
        if found is None:
            return error_reply(unique, errno.ENXIO)
        return LSEEK_REPLY.pack(LSEEK_REPLY.size, 0, unique, found)

    @staticmethod
    async def _seek(disk: Disk, offset: int, whence: int) -> int | None:
        """The next data or hole at or behind *offset*; None when there is no more data. A hole is at the end at last."""
        limit = 4  # the answer is mostly the first or second extent
        while offset < disk.size:
            extents = await disk.top.extents(offset, disk.size - offset, limit)
            limit = min(1024, limit * 4)
            for extent in extents:
                if (extent.kind is ExtentKind.DATA) == (whence == SEEK_DATA):
                    return extent.offset
            offset = extents[-1].end
        return None if whence == SEEK_DATA else disk.size

    # ---- replies

    def reply(self, message: bytes | memoryview) -> None:
        """Write a reply to the device. One that nobody waits for any more is dropped."""
        try:
            os.write(self._device, message)
        except OSError as exc:
            # ENOENT: the request was interrupted or aborted. ENODEV: the mount is gone. Both are nobody's fault.
            if exc.errno not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):
                log.error("the kernel refused a reply of %d bytes: %s", len(message), exc)

    def _refuse(self, unique: int, code: int) -> bool:
        self.reply(error_reply(unique, code))
        return True

    def _reject(self, unique: int, opcode: int, length: int) -> bool:
        """A request whose lengths contradict each other."""
        self.malformed += 1
        log.error("malformed %s request of %d bytes; it was answered EIO", OPCODE_NAMES.get(opcode, opcode), length)
        return self._refuse(unique, errno.EIO)

    def statistics(self) -> dict[str, int]:
        return {OPCODE_NAMES.get(opcode, str(opcode)): count for opcode, count in enumerate(self.counts) if count}


__all__ = ["DATA_OPCODES", "REQUEST_AT", "Buffer", "Dataplane"]
