"""QEMU's own image locks, so that QEMU and qemu-img refuse what we hold, and we what they hold.

QEMU takes open-file-description locks on single bytes of an image: byte 100+p, shared, for every permission p that it uses,
and byte 200+p, shared, for every permission that it does not let others use. Then it looks whether somebody else holds the
counterpart. Permissions: 0 consistent read, 1 write, 2 write unchanged, 3 resize.

    we open     use                     do not share
    read-only   0                       1, 3
    writable    0, 1                    1, 3

Source: QEMU block/file-posix.c (RAW_LOCK_PERM_BASE, raw_apply_lock_bytes, raw_check_lock_bytes), include/block/block-common.h.
"""

from __future__ import annotations

import fcntl
import os
import struct

from cachefs.errors import LockedError

USED_BASE, UNSHARED_BASE = 100, 200
CONSISTENT_READ, WRITE, RESIZE = 0, 1, 3
_NAMES = {CONSISTENT_READ: "read", WRITE: "write", RESIZE: "resize"}
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: l_type, l_whence, l_start, l_len, l_pid


def lock_image(descriptor: int, where: str, *, writable: bool) -> None:
    """Take QEMU's locks on an image or block device; they last as long as the descriptor is open.

    Raises: LockedError when another program's locks disagree. Where the file system knows no such locks, nothing happens.
    """
    used = (CONSISTENT_READ, WRITE) if writable else (CONSISTENT_READ,)
    unshared = (WRITE, RESIZE)
    try:
        for permission in used:
            _lock(descriptor, fcntl.F_RDLCK, USED_BASE + permission)
        for permission in unshared:
            _lock(descriptor, fcntl.F_RDLCK, UNSHARED_BASE + permission)
    except BlockingIOError:
        raise _conflict(where, "use") from None
    except OSError:
        return  # ENOLCK and the like (some network file systems): nobody can lock there
    for permission in used:
        if _is_held_by_others(descriptor, UNSHARED_BASE + permission):
            raise _conflict(where, _NAMES[permission])
    for permission in unshared:
        if _is_held_by_others(descriptor, USED_BASE + permission):
            raise _conflict(where, _NAMES[permission])


def _conflict(where: str, permission: str) -> LockedError:
    return LockedError(
        where,
        f"is in use by another program (QEMU's image lock, permission to {permission}); stop the VM or tool that has it open",
    )


def _lock(descriptor: int, kind: int, start: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, 1, 0))


def _is_held_by_others(descriptor: int, start: int) -> bool:
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
