"""file: a raw image or a block device on this machine, through the page cache or past it.

Read-only below an overlay, writable as a disk of its own. Carries QEMU's image locks, so that a VM or qemu-img does not
open what is served here for writing, and the other way round.

Trims and zeros are PUNCH_HOLE and ZERO_RANGE, which guarantee zeros on files and on block devices; where the file system
has neither, zeros are written. Long ones go in pieces of PIECE, so that others have their turn between. The map is
SEEK_DATA and SEEK_HOLE for files; a block device is all data.

Concurrency: none of its own; the kernel orders overlapping requests per page. A failed fdatasync is final: every later
flush fails and writes are refused (`cachefs.store.failedflag`), because the kernel may have dropped the pages.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from cachefs.errors import BackendError, StoreError, from_os_error
from cachefs.extent import Extent, ExtentKind
from cachefs.layers.base import ALL_CAPS, Caps, Done, Environment, Geometry, Later, Options, Statistics
from cachefs.store.directfile import DirectFile, open_direct
from cachefs.store.failedflag import FailedFlag
from cachefs.store.identity import Identity, identity_of_device, identity_of_file
from cachefs.store.imagelock import lock_image
from cachefs.store.localfile import LocalFile
from cachefs.store.rounds import FlushRounds
from cachefs.survivor import Survivors
from cachefs.units import LocalPath

log = logging.getLogger(__name__)

PIECE = 64 << 20  # bytes of one fallocate: a long one holds the journal, and with it every disk of the file system
_ZEROS = memoryview(bytes(1 << 20))


class FileConfig(Options):
    path: LocalPath
    """The raw image or block device. It must exist: `truncate -s 20G disk.raw` makes an empty one."""
    direct: bool = False
    """Bypass the page cache (O_DIRECT): memory belongs to the guests. Small writes then want a coalesce layer above."""


class File:
    """An open image; `File.open` makes it. Takes any byte range, with O_DIRECT aligned ones."""

    Config = FileConfig

    def __init__(
        self,
        name: str,
        path: str,
        file: LocalFile,
        identity: Identity,
        flag: FailedFlag,
        *,
        device: bool,
        writable: bool,
        witness: int | None = None,
    ) -> None:
        self.name = name
        self.geometry = Geometry(file.size, file.alignment, max(4096, file.alignment))
        self.caps = ALL_CAPS if writable else Caps.FLUSH | Caps.EXTENTS
        self.identity = identity
        self._path = path
        self._file = file
        self._is_device = device
        self._is_direct = isinstance(file, DirectFile)
        self._can_punch = self._can_zero_range = True
        self._flag = flag
        self.try_read_into = file.try_read
        # A predecessor may have written, and been killed in a sync of whose failure it was told: the witness was not.
        self._written = witness is not None
        self._witness = witness
        self._rounds = FlushRounds(name, self._begin_round, self._sync, self._end_round)

    @classmethod
    @asynccontextmanager
    async def open(cls, config: FileConfig, env: Environment) -> AsyncIterator[File]:
        """Raises: StoreError when the path is missing, no image, empty, or held by somebody else."""
        name = f"{env.owner}/file"
        opened = await trio.to_thread.run_sync(_open_now, name, config, env.writable, env.survivors)
        file, identity, is_device, kept = opened
        flag = FailedFlag(env.state_dir, env.owner, name)
        backend = cls(
            name,
            str(config.path),
            file,
            identity,
            flag,
            device=is_device,
            writable=env.writable,
            witness=kept.witness if kept is not None and kept.inherited else None,
        )
        problem: BackendError | None = None
        try:
            yield backend
        finally:
            with trio.CancelScope(shield=True):
                if flag.error is None:
                    try:
                        await backend.flush()
                    except BackendError as exc:
                        problem = exc
                        log.error("%s: the last flush failed: %s", backend.name, exc.detail)
                await backend._rounds.wait_idle()
            backend._rounds.close()
            if kept is not None:
                kept.drop()
            backend._file.close()
        if problem is not None:
            raise problem

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        return self._file.try_read_later(offset, buffer, done)

    def try_write(self, offset: int, data: memoryview) -> bool:
        self._written = True
        return self._flag.error is None and self._file.try_write(offset, data)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        if self._file.try_read(offset, buffer):
            return
        try:
            await self._file.read(offset, buffer)
        except OSError as exc:
            raise from_os_error(exc, self.name, f"pread {offset}+{len(buffer)} of {self._path}") from exc

    async def write(self, offset: int, data: memoryview) -> None:
        self._check_writable()
        try:
            await self._file.write(offset, (data,))
        except OSError as exc:
            raise from_os_error(exc, self.name, f"pwrite {offset}+{len(data)} of {self._path}") from exc

    def _check_writable(self) -> None:
        self._written = True
        self._flag.check_writable()

    def try_flush(self, done: Done) -> bool:
        if self._flag.error is not None or not self._written:
            done(self._flag.error)
        else:
            self._rounds.ask(done)
        return True

    async def flush(self) -> None:
        if self._flag.error is not None:
            raise self._flag.error
        if self._written:
            await self._rounds.flush()

    def _begin_round(self) -> None:
        self._file.file_system.syncs.add(self)

    def _end_round(self, _: None, error: Exception | None) -> None:
        pass

    def _sync(self, _: None) -> None:
        """One round, in its thread."""
        try:
            if self._flag.error is not None:
                raise self._flag.error
            if self._witness is not None:
                os.fdatasync(self._witness)
                self._witness = None
            self._file.sync_now()
        except OSError as exc:
            raise self._flag.fail(exc, self._path) from exc
        finally:
            self._file.file_system.syncs.discard(self)

    async def trim(self, offset: int, length: int) -> None:
        self._check_writable()
        for at in range(offset, offset + length, PIECE):
            await self._trim_piece(at, min(PIECE, offset + length - at))

    async def _trim_piece(self, offset: int, length: int) -> None:
        if self._can_punch:
            try:
                await self._file.punch(offset, length)
                return
            except OSError as exc:
                if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise from_os_error(exc, self.name, f"punch {offset}+{length} of {self._path}") from exc
                self._can_punch = exc.errno == errno.EINVAL  # EINVAL: only this range does not suit a device
        await self._zero_piece(offset, length)

    async def zero(self, offset: int, length: int) -> None:
        self._check_writable()
        for at in range(offset, offset + length, PIECE):
            await self._zero_piece(at, min(PIECE, offset + length - at))

    async def _zero_piece(self, offset: int, length: int) -> None:
        if self._can_zero_range:
            try:
                await self._file.zero_range(offset, length)
                return
            except OSError as exc:
                if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise from_os_error(exc, self.name, f"zero {offset}+{length} of {self._path}") from exc
                self._can_zero_range = exc.errno == errno.EINVAL
        for at in range(offset, offset + length, len(_ZEROS)):
            await self.write(at, _ZEROS[: min(len(_ZEROS), offset + length - at)])

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        if self._is_device:
            return [Extent(offset, length, ExtentKind.DATA)]
        try:
            return await self._file.extents(offset, length, limit)
        except OSError as exc:
            raise from_os_error(exc, self.name, f"SEEK_DATA at {offset} of {self._path}") from exc

    def try_extent(self, offset: int, length: int) -> Extent | None:
        # SEEK_DATA may have to read the file's own map from the disk
        return Extent(offset, length, ExtentKind.DATA) if self._is_device else None

    async def prefetch(self, offset: int, length: int) -> None:
        if self._is_direct:
            return
        await self._file.run(os.posix_fadvise, self._file.descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def allocated_bytes(self) -> int:
        return self.geometry.size if self._is_device else self._file.allocated_bytes()

    def pending_error(self) -> Exception | None:
        return self._flag.error

    def statistics(self) -> Statistics:
        values: dict[str, int | float | str] = {"path": self._path, "state": "failed" if self._flag.error else "ok"}
        return Statistics(self.name, values)


class _Kept:
    """Two descriptors of a file that outlive the process: the one in use, and a witness that nobody syncs through."""

    def __init__(self, path: str, survivors: Survivors) -> None:
        status = os.stat(path)
        key = f"{status.st_dev:x}-{status.st_ino:x}"
        self._survivors = survivors
        self._names = (f"file.{key}", f"file-witness.{key}")
        found = [survivors.take(name) for name in self._names]
        self.inherited = None not in found
        self.descriptor, self.witness = (os.open(path, os.O_RDWR) if one is None else one for one in found)

    def keep(self) -> None:
        if not self.inherited:
            self._survivors.keep(dict(zip(self._names, (self.descriptor, self.witness), strict=True)))

    def give_back(self) -> None:
        self._survivors.give_back(dict(zip(self._names, (self.descriptor, self.witness), strict=True)))

    def drop(self) -> None:
        """The file is synced, or will never be; whoever uses `descriptor` closes it."""
        self._survivors.drop(self._names)
        os.close(self.witness)


def _open_now(
    name: str, config: FileConfig, writable: bool, survivors: Survivors
) -> tuple[LocalFile, Identity, bool, _Kept | None]:
    """The open file, what it is known by, whether it is a block device; and what is kept of one that is writable."""
    path = str(config.path)
    kept: _Kept | None = None
    try:
        mode = os.stat(path).st_mode  # before the open: to open a pipe would wait for its other end
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise StoreError(name, f"{path} is neither a regular file nor a block device; name a raw image")
        if writable:
            kept = _Kept(path, survivors)
        descriptor = os.open(path, os.O_RDONLY) if kept is None else kept.descriptor
    except OSError as exc:
        raise StoreError(name, f"cannot open {path}: {exc.strerror}; check backend.file.path") from exc
    try:
        is_device = stat.S_ISBLK(mode)
        size = os.lseek(descriptor, 0, os.SEEK_END)
        if size == 0:
            raise StoreError(name, f"{path} is empty, and a disk cannot be: `truncate -s 20G {path}` gives it a size")
        lock_image(descriptor, f"{name}: {path}", writable=writable)
        identity = identity_of_device(descriptor, size) if is_device else identity_of_file(descriptor)
        file = (
            open_direct(DirectFile, name, path, descriptor, size, writable=writable)
            if config.direct
            else LocalFile(descriptor, size)
        )
        if kept is not None:
            kept.keep()
        return file, identity, is_device, kept
    except BaseException:
        if kept is None:
            os.close(descriptor)
        else:
            kept.give_back()
        raise
