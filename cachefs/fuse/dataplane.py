"""READ, WRITE, FSYNC, FLUSH, FALLOCATE and LSEEK, straight from the request's bytes to the stack and back.

A READ or WRITE is first offered to the fast path: a plain call down the stack that finishes it here and now. Where that
says False, or where a request has to wait by nature, `cachefs.fuse.waiting` takes it over together with its buffer
(`cachefs.fuse.buffers` has the layout).

Traps, each of which has its test: O_DIRECT + O_DSYNC sends no FSYNC, so such a WRITE is flushed before its reply. FLUSH is
close(): it reports pending errors and flushes nothing. While an FSYNC, FALLOCATE or LSEEK waits the kernel lets no write of
that file through, so an LSEEK is answered after LSEEK_PATIENCE_S: what is not known by then counts as data. A WRITE that
crosses the end is short, one past it EFBIG (ENOSPC would pause a guest for ever). An INTERRUPT is a hint that says nothing
about whether its sender has died; it needs no reply and gets none.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Sequence

import trio

from cachefs.disk import Disk
from cachefs.errors import CachefsError
from cachefs.extent import ExtentKind
from cachefs.fuse.boundary import Boundary
from cachefs.fuse.buffers import BODY_AT, DATA_AT, REQUEST_AT, Buffer, BufferPool, read_reply
from cachefs.fuse.protocol import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
    FALLOCATE_IN,
    IN_HEADER,
    LSEEK_IN,
    LSEEK_REPLY,
    MAX_BACKGROUND,
    MAX_WRITE,
    OPCODE_NAMES,
    READ_IN,
    READ_WHERE,
    WRITE_REPLY,
    WRITE_REQUEST_SIZE,
    WRITE_WHERE,
    Opcode,
    error_reply,
)
from cachefs.fuse.spill import Spill
from cachefs.fuse.waiting import Request, Waiting
from cachefs.layers.base import Later

log = logging.getLogger(__name__)

O_SYNCS = os.O_DSYNC | os.O_SYNC
LSEEK_PATIENCE_S = 2.0
LSEEK_LOOKS = 256  # extents that one LSEEK passes on the loop
SEEK_DATA, SEEK_HOLE = os.SEEK_DATA, os.SEEK_HOLE

READ, WRITE, FSYNC, FLUSH = int(Opcode.READ), int(Opcode.WRITE), int(Opcode.FSYNC), int(Opcode.FLUSH)
FALLOCATE, LSEEK, INTERRUPT = int(Opcode.FALLOCATE), int(Opcode.LSEEK), int(Opcode.INTERRUPT)
DATA_OPCODES = frozenset((READ, WRITE, FSYNC, FLUSH, FALLOCATE, LSEEK, INTERRUPT))


class Dataplane:
    """Serves the data requests of all disks of a mount.

    device: the descriptor that replies are written to. nursery: where requests wait that cannot be finished at once.
    spill: for the data of writes that wait; without it all of that stays in memory.
    """

    def __init__(
        self,
        device: int,
        disks: Sequence[Disk],
        nursery: trio.Nursery,
        boundary: Boundary,
        background: int = MAX_BACKGROUND,
        spill: Spill | None = None,
    ) -> None:
        self.device = device
        self._disks = {disk.inode: disk for disk in disks}
        self._boundary = boundary
        self.pool = BufferPool()
        self.waiting = Waiting(
            nursery,
            self.pool,
            boundary,
            self.reply,
            self._begin,
            self._work,
            background,
            spill or Spill(directory=None),
        )
        self.counts = [0] * 64  # by opcode, of all requests, namespace included
        self.malformed = 0
        self.now_ns = time.time_ns()  # brought up to date once per batch by the channel

    def add(self, disk: Disk) -> None:
        """Serve one more."""
        self._disks[disk.inode] = disk

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
                self.reply(read_reply(view, unique, size))
                return True
            return self._later(Request(disk, READ, unique, self._pid(view), offset, size), buffer)
        if opcode == WRITE:
            return self._handle_write(disk, buffer, unique, length)
        try:
            return self._handle_other(disk, buffer, opcode, unique, length)
        except Exception as exc:
            name = OPCODE_NAMES.get(opcode, opcode)
            return self._refuse(unique, self._boundary.errno_of(exc, f"{name} of {disk.name}"))

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
        return self._later(Request(disk, WRITE, unique, self._pid(view), offset, size, flags & O_SYNCS), buffer)

    def _handle_other(self, disk: Disk, buffer: Buffer, opcode: int, unique: int, length: int) -> bool:
        if opcode == FSYNC:
            return self._handle_fsync(Request(disk, FSYNC, unique, self._pid(buffer.view)), buffer)
        if opcode == FLUSH:
            error = disk.top.pending_error()
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
            count = min(count, disk.size - offset)
            return self._later(Request(disk, opcode, unique, self._pid(buffer.view), offset, count, mode), buffer)
        _, offset, whence, _ = LSEEK_IN.unpack_from(buffer.view, BODY_AT)
        if whence not in (SEEK_DATA, SEEK_HOLE):
            return self._refuse(unique, errno.EINVAL)
        if offset >= disk.size:
            return self._refuse(unique, errno.ENXIO)
        found = self._try_seek(disk, offset, whence)
        if found is not None:
            self.reply(self._sought(unique, found, disk.size, whence))
            return True
        return self._later(Request(disk, opcode, unique, self._pid(buffer.view), offset, 0, whence), buffer)

    def _handle_fsync(self, request: Request, buffer: Buffer) -> bool:
        def done(error: Exception | None) -> None:
            """In the thread of the flush, or here and now."""
            code = 0 if error is None else self._boundary.errno_of(error, str(request))
            self.waiting.finish(request, error_reply(request.unique, code))

        self.waiting.register(request)
        try:
            begun = request.disk.top.try_flush(done)
        except Exception:
            del self.waiting.table[request.unique]
            raise
        if begun:
            return True
        del self.waiting.table[request.unique]
        return self._later(request, buffer)

    @staticmethod
    def _pid(view: memoryview) -> int:
        """Of the thread that the request in *view* is from."""
        return int(IN_HEADER.unpack_from(view, REQUEST_AT)[6])

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

    # ---- requests that wait

    def _later(self, request: Request, buffer: Buffer) -> bool:
        return self.waiting.add(request, buffer)

    @staticmethod
    def _begin(request: Request, done: Later) -> bool:
        """Begin *request* without a task, if that can be; see `cachefs.layers.base.Layer.try_read_later`."""
        if request.opcode != READ or request.buffer is None:
            return False
        data = request.buffer.view[DATA_AT : DATA_AT + request.size]
        return request.disk.top.try_read_later(request.offset, data, done)

    async def _work(self, request: Request) -> bytes | memoryview:
        """Carry *request* out and return its reply."""
        disk, unique, offset, size = request.disk, request.unique, request.offset, request.size
        match request.opcode:
            case Opcode.READ:
                return await self._read(request)
            case Opcode.WRITE:
                return await self._write(request)
            case Opcode.FSYNC:
                await disk.top.flush()
                return error_reply(unique, 0)
            case Opcode.LSEEK:
                return await self._lseek(disk, unique, offset, request.flags)
        disk.mtime_ns = time.time_ns()
        if request.flags & FALLOC_PUNCH_HOLE:
            await disk.top.trim(offset, size)
        else:
            await disk.top.zero(offset, size)
        return error_reply(unique, 0)

    async def _read(self, request: Request) -> memoryview:
        assert request.buffer is not None
        view, size = request.buffer.view, request.size
        await request.disk.top.read_into(request.offset, view[DATA_AT : DATA_AT + size])
        return read_reply(view, request.unique, size)

    async def _write(self, request: Request) -> bytes:
        assert request.buffer is not None
        await request.disk.top.write(request.offset, request.buffer.view[DATA_AT : DATA_AT + request.size])
        if request.flags:  # O_DSYNC: durable before the reply
            await request.disk.top.flush()
        return WRITE_REPLY.pack(WRITE_REPLY.size, 0, request.unique, request.size, 0)

    @staticmethod
    def _try_seek(disk: Disk, offset: int, whence: int) -> int | None:
        """The answer of an LSEEK as far as it is known at once; the size of the disk when there is nothing more."""
        size, look = disk.size, disk.top.try_extent
        wants_data = whence == SEEK_DATA
        for _ in range(LSEEK_LOOKS):
            extent = look(offset, size - offset)
            if extent is None:
                return None
            if (extent.kind is ExtentKind.DATA) == wants_data:
                return offset
            offset = extent.end
            if offset == size:
                return size
        return None

    @staticmethod
    def _sought(unique: int, found: int, size: int, whence: int) -> bytes:
        """A hole is at the end at last; data is not."""
        if found == size and whence == SEEK_DATA:
            return error_reply(unique, errno.ENXIO)
        return LSEEK_REPLY.pack(LSEEK_REPLY.size, 0, unique, found)

    async def _lseek(self, disk: Disk, unique: int, begin: int, whence: int) -> bytes:
        at, size = begin, disk.size
        with trio.move_on_after(LSEEK_PATIENCE_S):
            limit = 4  # the answer is mostly the first or second extent
            while at < size:
                for extent in await disk.top.extents(at, size - at, limit):
                    if (extent.kind is ExtentKind.DATA) == (whence == SEEK_DATA):
                        return self._sought(unique, extent.offset, size, whence)
                    at = extent.end
                limit = min(1024, limit * 4)
            return self._sought(unique, size, size, whence)
        # What is not known counts as data; a hole of no length ends what is known to be some.
        found = size if whence == SEEK_HOLE and at == begin else at
        return self._sought(unique, found, size, whence)

    # ---- replies

    def reply(self, message: bytes | memoryview) -> None:
        """Write a reply to the device. One that nobody waits for any more is dropped."""
        try:
            os.write(self.device, message)
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
