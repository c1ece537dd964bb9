"""A store's directory: made whole or not at all, described by a header, held by one process.

    <path>/data    the blocks, each at its own disk offset; a sparse raw file
    <path>/map     one header sector of 4096 bytes, then the block map's sectors
    <path>/epoch   8 bytes: bumped by whoever opens the store for writing without its survivor memory
    <path>/lock    flock'ed by the daemon that serves the store; its text names that daemon

A new directory is filled under a temporary name, synced, renamed, and its parent synced. The header is written once and
never rewritten. The overlay and the cache share this; what differs is a `StoreFormat`. All functions here block; call
them in a thread.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import uuid
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from cachefs.errors import FormatError, LockedError, StoreError, VersionError
from cachefs.store import blockmap
from cachefs.store.identity import Identity
from cachefs.store.sectors import SECTOR_SIZE

HEADER_SIZE = 4096
# magic, crc32 of all behind it, version, uuid, size, block size, checksum, flags, length of the base's identity
_HEAD = struct.Struct("<8sII16sQIIII")
_EPHEMERAL = 1  # flag: deleted when its disk is detached
_BODY_AT = 12


@dataclass(frozen=True)
class StoreFormat:
    """A kind of store. checksum: a number that stands for the algorithms over its header, map sectors and data."""

    noun: str
    magic: bytes
    version: int
    checksum: int
    blocks_per_sector: int
    advice: str
    """What to do about one that is damaged."""


OVERLAY = StoreFormat("store", b"cachefs\n", 1, 1, blockmap.BLOCKS_PER_SECTOR, "restore it from a backup")
"""Checksum 1: crc32 as in zlib over header and map sectors; the data carries none. Byte table: docs/formats/overlay.md"""


@dataclass(frozen=True)
class Header:
    """What a store is: `uuid`, `size` and `block_size` in bytes, and the identity of the base it lies over."""

    size: int
    block_size: int
    base: Identity
    ephemeral: bool = False
    uuid: uuid.UUID = field(default_factory=uuid.uuid4)
    format: StoreFormat = OVERLAY

    def encode(self) -> bytes:
        base = json.dumps({"kind": self.base.kind, "facts": dict(self.base.facts)}, sort_keys=True).encode()
        body = _HEAD.pack(
            self.format.magic,
            0,
            self.format.version,
            self.uuid.bytes,
            self.size,
            self.block_size,
            self.format.checksum,
            int(self.ephemeral),
            len(base),
        )[_BODY_AT:]
        body = (body + base).ljust(HEADER_SIZE - _BODY_AT, b"\0")
        if len(body) != HEADER_SIZE - _BODY_AT:
            raise ValueError("the base's identity does not fit into a header")
        return self.format.magic + zlib.crc32(body).to_bytes(4, "little") + body


def decode_header(content: bytes, where: str, wanted: StoreFormat = OVERLAY) -> Header:
    """Raises: FormatError when *content* is no header, a damaged one, or one of a version that is not known here."""
    if len(content) != HEADER_SIZE or content[:8] != wanted.magic:
        raise FormatError(
            where, f"this is no cachefs {wanted.noun} (its header does not begin with the magic bytes); check the path"
        )
    _, crc, version, identifier, size, block_size, checksum, flags, base_length = _HEAD.unpack_from(content)
    if crc != zlib.crc32(content[_BODY_AT:]):
        raise FormatError(
            where, f"the {wanted.noun}'s header is damaged (its checksum does not match); {wanted.advice}"
        )
    if version != wanted.version or checksum != wanted.checksum or flags & ~_EPHEMERAL:
        raise VersionError(
            where,
            f"the {wanted.noun} has format version {version}, checksum {checksum}, flags {flags:#x}; this cachefs knows "
            f"version {wanted.version}, checksum {wanted.checksum}: open it with the cachefs that made it, or a later one",
        )
    try:
        base = json.loads(content[_HEAD.size : _HEAD.size + base_length])
        identity = Identity(str(base["kind"]), {str(name): str(value) for name, value in base["facts"].items()})
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise FormatError(
            where, f"the identity of the base in the header cannot be read ({exc}); {wanted.advice}"
        ) from exc
    if block_size < SECTOR_SIZE or block_size & (block_size - 1):
        raise FormatError(
            where, f"the header says {block_size} bytes per block, which is no power of two; {wanted.advice}"
        )
    return Header(size, block_size, identity, bool(flags & _EPHEMERAL), uuid.UUID(bytes=identifier), wanted)


def map_size(header: Header) -> int:
    """Bytes of the map file. It has them from the start, so that one which was cut short is noticed."""
    blocks = -(-header.size // header.block_size)
    return HEADER_SIZE + -(-blocks // header.format.blocks_per_sector) * SECTOR_SIZE


def create(path: Path, header: Header) -> None:
    """Make the store's directory with an empty map.

    Raises: StoreError with the reason, e.g. that the parent cannot be written.
    """
    temporary = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        _write_synced(temporary / "data", b"", size=header.size)
        _write_synced(temporary / "map", header.encode(), size=map_size(header))
        _write_synced(temporary / "epoch", bytes(8))
        _write_synced(temporary / "lock", b"")
        sync_directory(temporary)
        temporary.rename(path)
        sync_directory(path.parent)
    except OSError as exc:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StoreError(
            str(path), f"cannot create the store: {exc.strerror or exc}; check the path and its rights"
        ) from exc


def _write_synced(path: Path, content: bytes, size: int = 0) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if content:
            os.write(descriptor, content)
        if size:
            os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StoreLock:
    """The exclusive lock of a store, held from construction to `close` (or the end of the process).

    advice: what to do about it when somebody else has it.
    Raises: LockedError naming the holder; StoreError when the lock file cannot be opened.
    """

    def __init__(
        self, path: Path, holder: str, advice: str = "unmount it there, or give this disk a path of its own"
    ) -> None:
        try:
            self._descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as exc:
            raise StoreError(str(path), f"cannot open the store's lock: {exc.strerror}; check its rights") from exc
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(self._descriptor, 512, 0).decode(errors="replace").strip() or "another process"
            os.close(self._descriptor)
            raise LockedError(str(path), f"is in use by {text}; {advice}") from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{holder}, pid {os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        os.close(self._descriptor)


def remove(path: Path) -> None:
    """Delete the store. Raises: StoreError."""
    try:
        shutil.rmtree(path)
    except OSError as exc:
        raise StoreError(
            str(path), f"cannot be deleted: {exc.strerror or exc}; check its rights, or delete it by hand"
        ) from exc
