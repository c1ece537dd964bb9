"""The directory that a mount shows: one regular file per disk, of its exact size, that cannot be made, moved or resized.

Served by pyfuse3; a disk's bytes never come this way. Every handler is `guarded`. Attributes come from memory.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Sequence
from typing import Any

import pyfuse3

from cachefs.disk import Disk
from cachefs.extent import pack_runs
from cachefs.fuse.boundary import Boundary, guarded

ROOT = pyfuse3.ROOT_INODE
STATUS_XATTR = b"user.cachefs.status"
MAP_XATTR = b"user.cachefs.map"
MAP_PAGE = 2000  # runs, of 16 bytes each
ATTRIBUTES_VALID_S = 1.0  # sizes never change; times and blocks may, by a trim that is carried out later
_STATUS_UNIT = 512  # statuses are padded to this, so that one does not outgrow the buffer its reader just asked for


async def _refuse(*_: object) -> None:
    raise pyfuse3.FUSEError(errno.EPERM)


_refuse_change: Any = _refuse  # stands for handlers of many signatures


class Namespace(pyfuse3.Operations):
    """daemon_status: what the status of the mount says beside that of its disks."""

    enable_writeback_cache = False
    supports_dot_lookup = True

    def __init__(
        self, disks: Sequence[Disk], boundary: Boundary, state_dir: str, daemon_status: Callable[[], dict[str, object]]
    ) -> None:
        super().__init__()
        self.boundary = boundary
        self._disks = {disk.inode: disk for disk in disks}
        self._by_name = {disk.name.encode(): disk for disk in disks}
        self._state_dir = state_dir
        self._daemon_status = daemon_status
        self._started_ns = min((disk.mtime_ns for disk in disks), default=0)

    def add(self, disk: Disk) -> None:
        """Show one more."""
        self._disks[disk.inode] = disk
        self._by_name[disk.name.encode()] = disk

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.attr_timeout = ATTRIBUTES_VALID_S
        entry.entry_timeout = 300
        entry.st_blksize = 4096
        if inode == ROOT:
            entry.st_mode = stat.S_IFDIR | 0o755
            entry.st_nlink = 2
            entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
            times = self._started_ns
        else:
            disk = self._disk(inode)
            entry.st_mode = stat.S_IFREG | disk.mode
            entry.st_nlink = 1
            entry.st_uid, entry.st_gid = disk.uid, disk.gid
            entry.st_size = disk.size
            entry.st_blocks = -(-disk.allocated_bytes() // 512)
            times = disk.mtime_ns
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = times
        return entry

    def _disk(self, inode: int) -> Disk:
        disk = self._disks.get(inode)
        if disk is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return disk

    @guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if name in (b".", b".."):
            return self._attributes(ROOT)
        disk = self._by_name.get(name)
        if disk is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(disk.inode)

    @guarded
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    @guarded
    async def setattr(
        self,
        inode: int,
        attributes: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        handle: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Times may be set, and the size to what it is; all else stands in the configuration."""
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise pyfuse3.FUSEError(errno.EPERM)
        if inode != ROOT:
            disk = self._disk(inode)
            if fields.update_size and attributes.st_size != disk.size:
                raise pyfuse3.FUSEError(errno.EPERM)
            if fields.update_mtime:
                disk.mtime_ns = attributes.st_mtime_ns
        return self._attributes(inode)

    @guarded
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        disk = self._disk(inode)
        if flags & os.O_ACCMODE != os.O_RDONLY and not disk.writable:
            raise pyfuse3.FUSEError(errno.EROFS)
        if flags & os.O_TRUNC:
            raise pyfuse3.FUSEError(errno.EPERM)
        return pyfuse3.FileInfo(fh=inode)  # how it is cached is said by the channel

    @guarded
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        if inode != ROOT:
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        return inode

    @guarded
    async def readdir(self, handle: int, start: int, token: pyfuse3.ReaddirToken) -> None:
        """*start* is the inode after which to go on; inodes rise in the order of the configuration."""
        for inode, disk in self._disks.items():
            if inode > start and not pyfuse3.readdir_reply(token, disk.name.encode(), self._attributes(inode), inode):
                return

    @guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Sizes of all disks; what is free is what the state directory's file system has."""
        below = os.statvfs(self._state_dir)
        result = pyfuse3.StatvfsData()
        result.f_bsize = result.f_frsize = 4096
        free = below.f_bavail * below.f_frsize // 4096
        result.f_blocks = max(sum(-(-disk.size // 4096) for disk in self._disks.values()), free)
        result.f_bfree = result.f_bavail = free
        result.f_files = len(self._disks)
        result.f_ffree = result.f_favail = 0
        result.f_namemax = 255
        return result

    def status(self, inode: int) -> bytes:
        """JSON: of the mount, and of one disk when *inode* is one."""
        status: dict[str, object] = {"daemon": self._daemon_status()}
        if inode == ROOT:
            status["disks"] = [disk.name for disk in self._disks.values()]
        else:
            status["disk"] = self._disk(inode).status()
        text = json.dumps(status).encode()
        return text.ljust(-(-len(text) // _STATUS_UNIT) * _STATUS_UNIT)

    async def map(self, inode: int, what: bytes) -> bytes:
        """*what* is empty: {"size": ..., "layers": [names]} of the disk; ".LAYER.OFFSET": a page of that layer's runs.

        A value has 64 KiB at most, and the reader asks for it twice, so a map comes in pages.
        """
        disk = self._disk(inode)
        layers = disk.map_layers()
        if not what:
            text = json.dumps({"size": disk.size, "layers": [layer.name for layer in layers]}).encode()
            return text.ljust(-(-len(text) // _STATUS_UNIT) * _STATUS_UNIT)
        parts = what.split(b".")
        if len(parts) != 3 or parts[0] or not all(part.isdigit() for part in parts[1:]):
            raise pyfuse3.FUSEError(errno.ENODATA)
        number, offset = int(parts[1]), int(parts[2])
        if number >= len(layers) or offset >= disk.size:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return pack_runs(await layers[number].ask(offset, MAP_PAGE))

    @guarded
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        if name.startswith(MAP_XATTR):
            return await self.map(inode, name[len(MAP_XATTR) :])
        if name != STATUS_XATTR:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return self.status(inode)

    @guarded
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        return [STATUS_XATTR]

    # Disks are made, named and sized in the configuration.
    create = mknod = mkdir = unlink = rmdir = rename = link = symlink = setxattr = removexattr = _refuse_change

    async def flush(self, handle: int) -> None:
        """FLUSH of a disk is the data plane's; a directory has nothing to flush."""

    async def fsyncdir(self, handle: int, datasync: bool) -> None:
        """Nothing in the directory is ours to lose."""

    async def release(self, handle: int) -> None: ...

    async def releasedir(self, handle: int) -> None: ...

    async def forget(self, inodes: Sequence[tuple[int, int]]) -> None:
        """Inodes live as long as the mount."""

    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return True  # default_permissions: the kernel checks modes itself


async def serve(namespace: Namespace, libfuse_path: str) -> None:
    """Answer what comes through *libfuse_path* (`Channel.hand_over`) until cancelled. One at a time per process."""
    pyfuse3.init(namespace, libfuse_path, set(pyfuse3.default_options))
    try:
        await pyfuse3.main()
    finally:
        pyfuse3.close(unmount=False)
