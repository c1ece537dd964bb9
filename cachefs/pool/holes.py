"""What is known of an image's extents, in a file beside its blocks: a restart need not ask the backend again.

The file is replaced as a whole: written under another name, synced, renamed, its directory synced. It is believed when its
checksum is right and it names the image's own base; anything else is forgotten, with a line in the log, because what it
says would be served as zeros. It lies in the image's directory, so it goes when the image is dropped, and its room counts.

No fault of the pool's file system reaches anybody: what cannot be written is kept in memory, what cannot be read is unknown.
Byte table: docs/formats/pool.md.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import trio

from cachefs.errors import FormatError
from cachefs.extent import Extent, ExtentKind, merge_extents
from cachefs.pool.image import PoolImage
from cachefs.store.files import sync_directory
from cachefs.store.identity import Identity
from cachefs.units import align_up

log = logging.getLogger(__name__)

MAGIC = b"cfsextn\n"
VERSION = 1
NAME = "extents"
TEMPORARY = ".extents.new"
# magic, crc32 of all behind it, version, size of the image, number of runs, length of the base's identity
HEAD = struct.Struct("<8sIIQII")
RUN = struct.Struct("<QQ")  # offset; length with the kind in its two lowest bits, shifted left by them
_CODES = {ExtentKind.DATA: 0, ExtentKind.ZERO: 1, ExtentKind.HOLE: 2}
_KINDS = {code: kind for kind, code in _CODES.items()}
_BODY_AT = 12
_PATIENCE_S = 3.0  # for what the end of a mount waits for


def encode(base: Identity, size: int, known: Iterable[Extent]) -> bytes:
    """*known* in order; neighbours of one kind become one."""
    identity, extents = _encode_identity(base), merge_extents(known)
    body = HEAD.pack(MAGIC, 0, VERSION, size, len(extents), len(identity))[_BODY_AT:] + identity
    body += b"".join(RUN.pack(one.offset, one.length << 2 | _CODES[one.kind]) for one in extents)
    return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def _encode_identity(base: Identity) -> bytes:
    return json.dumps({"kind": base.kind, "facts": dict(base.facts)}, sort_keys=True).encode()


def decode(content: bytes, where: str, base: Identity, size: int) -> list[Extent]:
    """Raises: FormatError when *content* is damaged, of another version, or about another base."""
    if len(content) < HEAD.size or content[: len(MAGIC)] != MAGIC:
        raise FormatError(where, "does not begin with the magic bytes")
    _, crc, version, found_size, count, length = HEAD.unpack_from(content)
    if crc != zlib.crc32(content[_BODY_AT:]):
        raise FormatError(where, "its checksum does not match")
    if version != VERSION:
        raise FormatError(where, f"has version {version}, this cachefs knows {VERSION}")
    at = HEAD.size + length
    if (found_size, content[HEAD.size : at]) != (size, _encode_identity(base)):
        raise FormatError(where, "is about another image")
    if len(content) != at + count * RUN.size:
        raise FormatError(where, f"has {len(content)} bytes, which are not those of {count} runs")
    extents, end = [], 0
    for offset, packed in RUN.iter_unpack(content[at:]):
        kind = _KINDS.get(packed & 3)
        if kind is None or offset < end or not packed >> 2 or offset + (packed >> 2) > size:
            raise FormatError(where, f"has a run at {offset} that cannot be")
        extents.append(Extent(offset, packed >> 2, kind))
        end = extents[-1].end
    return extents


class HolesFile:
    """That of *image*, which stays attached as long as this is used."""

    def __init__(self, image: PoolImage) -> None:
        self._image = image
        self._path = image.path / NAME

    async def load(self) -> list[Extent]:
        """What it says; empty where there is none that can be believed."""
        try:
            return await self._image.calls.run(_load_now, self._path, self._image.header.base, self._image.size)
        except FormatError as exc:
            log.warning("%s; it is forgotten, and the backend is asked again", exc)
        except OSError as exc:
            log.warning("%s: cannot be read: %s; the backend is asked again", self._path, exc.strerror)
        return []

    async def save(self, known: Iterable[Extent]) -> bool:
        """Replace it. False: there is no room, or the pool's file system does not work now."""
        async with self._image.holes_lock:
            return await self._save(known)

    async def _save(self, known: Iterable[Extent]) -> bool:
        image = self._image
        if image.is_leaving or not image.writing.may_try(trio.current_time()):
            return False
        content = await image.calls.run(encode, image.header.base, image.size, known)
        room = align_up(len(content), 4096)
        if not image.pool.account.take(room):  # while it is written the old one is there too
            return False
        before, image.holes_bytes = image.holes_bytes, image.holes_bytes + room
        try:
            await image.calls.run(_replace_now, self._path, content)
        except OSError as exc:
            # Whether the new one is there is not known: both are counted until the next one.
            log.warning("%s: cannot be written: %s; what it would say is kept in memory", self._path, exc.strerror)
            return False
        image.holes_bytes -= before
        image.pool.account.give_back(before)
        return True

    async def save_last(self, known: Iterable[Extent]) -> None:
        """At close, also when that is cancelled; a file system that hangs is not waited for."""
        with trio.CancelScope(shield=True), trio.move_on_after(_PATIENCE_S):
            await self.save(known)


def _load_now(path: Path, base: Identity, size: int) -> list[Extent]:
    """Empty where there is none. Raises: OSError, FormatError."""
    with contextlib.suppress(FileNotFoundError):
        return decode(path.read_bytes(), str(path), base, size)
    return []


def _replace_now(path: Path, content: bytes) -> None:
    temporary = path.with_name(TEMPORARY)
    with temporary.open("wb") as file:
        os.chmod(temporary, 0o600)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_directory(path.parent)


def room_on_disk(image: Path) -> int:
    """What the file takes in the directory of an image, in bytes; what a crash left of a new one is deleted."""
    with contextlib.suppress(OSError):
        (image / TEMPORARY).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        return align_up((image / NAME).stat().st_size, 4096)
    return 0


__all__ = ["HEAD", "MAGIC", "NAME", "RUN", "VERSION", "HolesFile", "decode", "encode", "room_on_disk"]
