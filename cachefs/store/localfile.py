"""Reading and writing a file on a local disk without ever stalling the event loop.

What may run on the loop is decided per file, from what its file system can promise:

    reads    preadv(RWF_NOWAIT): it answers from the page cache or says EAGAIN, then a worker thread reads.
             tmpfs without NOWAIT: plain preadv. Anything else without NOWAIT: always a thread.
    writes   tmpfs: plain pwritev. File systems with NOWAIT writes (xfs, btrfs): pwritev(RWF_NOWAIT), else a thread.
             The rest (ext4): a plain pwritev while nothing slow goes on in that file system, else a thread.

"Slow" is shared by all files of one file system, because they share its journal and dirty throttling: a sync, a punch or
a slow write under way, or a write on the loop that took longer than SLOW_WRITE_S less than SLOW_PERIOD_S ago (measured:
an inline write beside a 2 GiB punch on the same ext4 stalled every disk for 6.9 s).

Threads come from a limiter of the file system's own, so that a slow device takes them from nobody else. A call that was
handed to a thread runs to its end, and its buffer stays in use until then; cancellation is delivered afterwards.

Errors are OSError here: the layer that knows what the file is to the user turns them into CachefsErrors.
Sources: preadv2(2), fallocate(2), statfs(2), linux/magic.h, linux/falloc.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, TypeVar

import trio

from cachefs.extent import Extent, ExtentKind

T = TypeVar("T")

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10
TMPFS_MAGIC, NFS_MAGIC, FUSE_MAGIC = 0x01021994, 0x6969, 0x65735546
BLOCK_DEVICE = 0  # in place of a magic
THREADS_PER_FILE_SYSTEM = 16
SLOW_WRITE_S = 0.002
SLOW_PERIOD_S = 0.1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class _StatFs(ctypes.Structure):
    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_char * 248))


def file_system_magic(descriptor: int) -> int:
    """The f_type of fstatfs(2)."""
    result = _StatFs()
    if _libc.fstatfs(descriptor, ctypes.byref(result)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result.f_type) & 0xFFFFFFFF


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its mode, which `os` does not offer. Releases the GIL; tries again on EINTR."""
    while _libc.fallocate(descriptor, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


class FileSystem:
    """What all open files of one file system share: `FileSystem.of(descriptor)` gives the same one for the same st_dev."""

    _known: ClassVar[dict[tuple[int, int], FileSystem]] = {}

    def __init__(self, magic: int) -> None:
        self.magic = magic
        self.is_tmpfs = magic == TMPFS_MAGIC
        self.limiter = trio.CapacityLimiter(THREADS_PER_FILE_SYSTEM)
        self.slow = 0  # calls under way that may hold the journal; counted on the loop
        # Rounds that sync it. A thread takes its own out before it answers, so that the write which follows finds none.
        self.syncs: set[object] = set()
        self.slow_until = 0.0  # time.monotonic()

    @classmethod
    def of(cls, descriptor: int) -> FileSystem:
        status = os.fstat(descriptor)
        # The node of a block device lies in devtmpfs, which says nothing about the device.
        is_device = stat.S_ISBLK(status.st_mode)
        key = (status.st_rdev, BLOCK_DEVICE) if is_device else (status.st_dev, file_system_magic(descriptor))
        return cls._known.setdefault(key, cls(key[1]))

    @property
    def may_hang(self) -> bool:
        """Remote, or served by a process: a thread can stick in it for ever."""
        return self.magic in (NFS_MAGIC, FUSE_MAGIC)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While it lasts, no write of this file system runs on the loop."""
        self.slow += 1
        try:
            yield
        finally:
            self.slow -= 1


class LocalFile:
    """An open regular file or block device of *size* bytes. Owns *descriptor*.

    inline_writes=False: never write on the loop (files of a pool).
    """

    def __init__(self, descriptor: int, size: int, *, inline_writes: bool = True) -> None:
        self.descriptor = descriptor
        self.size = size
        self.alignment = 1  # of offsets and lengths, in bytes
        self.file_system = FileSystem.of(descriptor)
        self._read_flags: int | None = self._probe_reads()
        # Whether writes know NOWAIT cannot be asked without writing; the first one tells.
        self._write_flags = 0 if self.file_system.is_tmpfs else os.RWF_NOWAIT
        self._inline_writes = inline_writes
        self._allocated_bytes = os.fstat(descriptor).st_blocks * 512

    def close(self) -> None:
        # Whoever comes late must not meet another file under its number.
        descriptor, self.descriptor = self.descriptor, -1
        os.close(descriptor)

    def let_go(self) -> None:
        """As `close`, but the descriptor was and is somebody else's."""
        self.descriptor = -1

    def _probe_reads(self) -> int | None:
        """Flags for a read on the loop, or None where none is safe."""
        try:
            os.preadv(self.descriptor, [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return os.RWF_NOWAIT
        except OSError:
            return 0 if self.file_system.is_tmpfs else None
        return os.RWF_NOWAIT

    # ---- on the loop

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        """Fill *buffer* now, or return False."""
        flags = self._read_flags
        if flags is None:
            return False
        try:
            return os.preadv(self.descriptor, (buffer,), offset, flags) == len(buffer)
        except OSError:  # EAGAIN; and what is a real error the slow path meets again, and has words for
            return False

    def try_read_later(self, offset: int, buffer: memoryview, done: Callable[[float | None], None]) -> bool:
        """As `cachefs.layers.base.Layer.try_read_later`."""
        return False

    def try_write(self, offset: int, data: memoryview) -> bool:
        """Write all of *data* now, or return False (part of it may be there then); errors are for the slow path."""
        system = self.file_system
        if not self._inline_writes:
            return False
        if self._write_flags:
            try:
                return os.pwritev(self.descriptor, (data,), offset, self._write_flags) == len(data)
            except OSError as exc:
                if exc.errno != errno.EOPNOTSUPP:
                    return False
                self._write_flags = 0
        try:
            if system.is_tmpfs:  # memory: nothing to stall on
                return os.pwrite(self.descriptor, data, offset) == len(data)
            before = time.monotonic()
            if system.slow or system.syncs or before < system.slow_until:
                return False
            done = os.pwrite(self.descriptor, data, offset) == len(data)
        except OSError:
            return False
        after = time.monotonic()
        if after - before > SLOW_WRITE_S:
            system.slow_until = after + SLOW_PERIOD_S
        return done

    # ---- in a thread

    async def run(self, call: Callable[..., T], *arguments: object) -> T:
        """Run *call* in a thread of this file system. Cancellation waits for it."""
        return await trio.to_thread.run_sync(call, *arguments, limiter=self.file_system.limiter)

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Fill *buffer*; zeros beyond the end of the file."""
        await self.run(self.read_now, offset, buffer)

    def read_now(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self.descriptor, (buffer[done:],), offset + done)
            if count == 0:
                buffer[done:] = bytes(len(buffer) - done)
                return
            done += count

    async def write(self, offset: int, pieces: Sequence[memoryview | bytes]) -> None:
        """Write *pieces* one behind the other, all or raise."""
        with self.file_system.busy():
            await self.run(self.write_now, offset, pieces)

    def write_now(self, offset: int, pieces: Sequence[memoryview | bytes]) -> None:
        views = [memoryview(piece) for piece in pieces if len(piece)]
        while views:
            count = os.pwritev(self.descriptor, views, offset)
            offset += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if views and count:
                views[0] = views[0][count:]

    async def punch(self, offset: int, length: int) -> None:
        """Free the range; it reads as zeros. Raises OSError EOPNOTSUPP where the file system cannot."""
        with self.file_system.busy():
            await self.run(fallocate, self.descriptor, PUNCH_HOLE | KEEP_SIZE, offset, length)

    def punch_now(self, offset: int, length: int) -> None:
        """`punch`, in the thread that calls it."""
        fallocate(self.descriptor, PUNCH_HOLE | KEEP_SIZE, offset, length)

    def sync_now(self) -> None:
        """fdatasync. Raises: OSError, which is final for what was written since the last good one."""
        os.fdatasync(self.descriptor)

    async def zero_range(self, offset: int, length: int) -> None:
        """The range reads as zeros and keeps its space."""
        with self.file_system.busy():
            await self.run(fallocate, self.descriptor, ZERO_RANGE | KEEP_SIZE, offset, length)

    async def extents(self, offset: int, length: int, limit: int) -> list[Extent]:
        """What SEEK_DATA and SEEK_HOLE tell: a non-empty prefix of the range, at most *limit* entries."""
        return await self.run(self.extents_now, offset, length, limit)

    def extents_now(self, offset: int, length: int, limit: int) -> list[Extent]:
        found: list[Extent] = []
        end = offset + length
        while offset < end and len(found) < limit:
            try:
                data = os.lseek(self.descriptor, offset, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno != errno.ENXIO:
                    raise
                data = end  # nothing but hole up to the end of the file
            if data > offset:
                found.append(Extent(offset, min(data, end) - offset, ExtentKind.HOLE))
                offset = data
                continue
            hole = os.lseek(self.descriptor, offset, os.SEEK_HOLE)
            found.append(Extent(offset, min(hole, end) - offset, ExtentKind.DATA))
            offset = hole
        return found

    def allocated_bytes(self) -> int:
        """What it was last known to be where not even fstat(2) answers any more (xfs after it shut itself down)."""
        with contextlib.suppress(OSError):
            self._allocated_bytes = os.fstat(self.descriptor).st_blocks * 512
        return self._allocated_bytes
