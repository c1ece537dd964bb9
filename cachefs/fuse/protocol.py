"""Message layouts and numbers of the FUSE protocol, here and nowhere else.

Source: include/uapi/linux/fuse.h of Linux 6.18 (protocol 7.45); names are the kernel's without their FUSE_ prefix.
"""

from __future__ import annotations

import enum
import struct

IN_HEADER = struct.Struct("<IIQQIIIHH")  # len opcode unique nodeid uid gid pid total_extlen padding
REQUEST_HEAD = struct.Struct("<4xIQQ")  # of IN_HEADER what every request needs: opcode unique nodeid
OUT_HEADER = struct.Struct("<IiQ")  # len error unique
READ_IN = struct.Struct("<QQIIQII")  # fh offset size read_flags lock_owner flags padding
WRITE_IN = struct.Struct("<QQIIQII")  # fh offset size write_flags lock_owner flags padding
READ_WHERE = struct.Struct("<8xQI")  # of READ_IN: offset size
WRITE_WHERE = struct.Struct("<8xQI12xI")  # of WRITE_IN: offset size flags
WRITE_REPLY = struct.Struct("<IiQII")  # out header, size padding
FALLOCATE_IN = struct.Struct("<QQQII")  # fh offset length mode padding
LSEEK_IN = struct.Struct("<QQII")  # fh offset whence padding
LSEEK_REPLY = struct.Struct("<IiQQ")  # out header, offset
INIT_IN = struct.Struct("<IIIII")  # major minor max_readahead flags flags2
# out header; major minor max_readahead flags max_background congestion_threshold max_write time_gran max_pages
# map_alignment flags2 max_stack_depth (then reserved words up to 80 bytes)
INIT_REPLY = struct.Struct("<IiQ IIII HHII HHII")
INIT_REPLY_SIZE = 80
OPEN_REPLY = struct.Struct("<IiQ QII")  # out header, fh open_flags backing_id

WRITE_REQUEST_SIZE = IN_HEADER.size + WRITE_IN.size  # 80: what stands before the data of a WRITE


class Opcode(enum.IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52


OPCODE_NAMES = {int(opcode): opcode.name for opcode in Opcode}


NOTIFY_INVAL_ENTRY, NOTIFY_RESEND = 3, 7
INVAL_ENTRY = struct.Struct("<IiQ QII")  # out header, parent namelen flags; then the name and a zero byte
NO_REPLY = frozenset((Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT))
FUSE_DEV_IOC_CLONE = 0x8004E500  # _IOR(229, 0, uint32_t)


class Init(enum.IntFlag):
    """INIT flags; those from bit 32 on travel in flags2."""

    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    EXPLICIT_INVAL_DATA = 1 << 25
    HANDLE_KILLPRIV_V2 = 1 << 28
    INIT_EXT = 1 << 30
    HAS_RESEND = 1 << 39


class Open(enum.IntFlag):
    """Flags of the reply to OPEN."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    PARALLEL_DIRECT_WRITES = 1 << 6


FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 0x01, 0x02, 0x10

MAX_WRITE = 1 << 20
MAX_PAGES = 256
MAX_BACKGROUND = 65535

# Taken where the kernel offers it. HANDLE_KILLPRIV_V2: without it each write costs a GETXATTR. AUTO_INVAL_DATA and
# WRITEBACK_CACHE are never taken: the first halves mixed I/O, the second keeps acknowledged writes in the kernel's cache.
WANTED = (
    Init.ASYNC_READ
    | Init.ATOMIC_O_TRUNC
    | Init.BIG_WRITES
    | Init.ASYNC_DIO
    | Init.PARALLEL_DIROPS
    | Init.MAX_PAGES
    | Init.EXPLICIT_INVAL_DATA
    | Init.HANDLE_KILLPRIV_V2
    | Init.INIT_EXT
    | Init.HAS_RESEND
)
# Of what libfuse answers only this is its own business: how it wants directories listed.
LIBFUSE_DECIDES = Init.DO_READDIRPLUS | Init.READDIRPLUS_AUTO


def agreed_flags(reply: bytes) -> int:
    """The flags, all 64 bits, in a reply to INIT that we composed."""
    fields = INIT_REPLY.unpack_from(reply)
    return int(fields[6] | fields[13] << 32)


def compose_init_reply(reply: bytes, offered: int) -> bytes:
    """The reply to INIT: libfuse's *reply* with our flags and limits. *offered*: the kernel's flags, all 64 bits.

    Shorter than 7.23's layout, or an error: returned as it is.
    """
    if len(reply) < INIT_REPLY.size or OUT_HEADER.unpack_from(reply)[1] != 0:
        return reply
    fields = list(INIT_REPLY.unpack_from(reply))
    flags = offered & (WANTED | (fields[6] & LIBFUSE_DECIDES))
    fields[6] = flags & 0xFFFFFFFF
    fields[7:10] = [MAX_BACKGROUND, MAX_BACKGROUND, MAX_WRITE]
    fields[11:14] = [MAX_PAGES, 0, flags >> 32 if flags & Init.INIT_EXT else 0]
    fields[14] = 0
    return INIT_REPLY.pack(*fields) + reply[INIT_REPLY.size :]


def error_reply(unique: int, errno: int) -> bytes:
    """A reply without a body; *errno* 0 means done."""
    return OUT_HEADER.pack(OUT_HEADER.size, -errno, unique)
