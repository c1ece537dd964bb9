"""The two files of a store, opened, and the sectors of its map, read and written. Blocks; call it in a thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from cachefs.errors import FormatError, StoreError
from cachefs.extent import ExtentKind
from cachefs.store import files
from cachefs.store.files import HEADER_SIZE, OVERLAY, Header, StoreFormat
from cachefs.store.localfile import LocalFile
from cachefs.store.sectors import SECTOR_SIZE, SectorCopy
from cachefs.survivor import bump_epoch

_CHUNK_SECTORS = 2048  # read or written at once


def read_header(path: Path, wanted: StoreFormat = OVERLAY) -> Header:
    """Raises: FormatError, StoreError."""
    try:
        with (path / "map").open("rb") as file:
            content = file.read(HEADER_SIZE)
    except OSError as exc:
        raise StoreError(
            str(path), f"cannot read the store's map: {exc.strerror}; check the path and its rights"
        ) from exc
    return files.decode_header(content, str(path / "map"), wanted)


def open_files(path: Path, header: Header, *, inline_writes: bool = True) -> tuple[LocalFile, LocalFile, int]:
    """Data, map, and the epoch that this opening began."""
    descriptors: list[int] = []
    try:
        for part, wanted in (("data", header.size), ("map", files.map_size(header))):
            descriptors.append(os.open(path / part, os.O_RDWR))
            size = os.fstat(descriptors[-1]).st_size
            if size != wanted:
                raise FormatError(
                    str(path / part), f"has {size} bytes and should have {wanted}; {header.format.advice}"
                )
        data = LocalFile(descriptors[0], header.size, inline_writes=inline_writes)
        map_file = LocalFile(descriptors[1], files.map_size(header))
        return data, map_file, bump_epoch(path / "epoch")
    except BaseException as exc:
        for descriptor in descriptors:
            os.close(descriptor)
        if isinstance(exc, OSError):
            detail = f"cannot open the store: {exc.strerror}; check its rights and its device"
            raise StoreError(str(path), detail) from exc
        raise


def load_sectors(map_file: LocalFile, header: Header, load: Callable[[int, bytes], None]) -> None:
    """Hand every sector of the map to *load* with its index. What was never written is a hole, and is not read."""
    offset, end = HEADER_SIZE, files.map_size(header)
    while offset < end:
        for extent in map_file.extents_now(offset, end - offset, 256):
            if extent.kind is ExtentKind.DATA:
                first = (extent.offset - HEADER_SIZE) // SECTOR_SIZE
                _load_range(map_file, first, -(-(extent.end - HEADER_SIZE) // SECTOR_SIZE), load)
            offset = extent.end


def _load_range(map_file: LocalFile, first: int, last: int, load: Callable[[int, bytes], None]) -> None:
    for start in range(first, last, _CHUNK_SECTORS):
        count = min(_CHUNK_SECTORS, last - start)
        content = os.pread(map_file.descriptor, count * SECTOR_SIZE, HEADER_SIZE + start * SECTOR_SIZE)
        for number in range(count):
            load(start + number, content[number * SECTOR_SIZE : (number + 1) * SECTOR_SIZE])


def write_sectors(map_file: LocalFile, copies: Iterable[SectorCopy]) -> None:
    """Neighbouring sectors are one write. Raises: OSError."""
    first, run = 0, list[bytes]()
    for number, content in copies:
        if run and (number != first + len(run) or len(run) == _CHUNK_SECTORS):
            map_file.write_now(HEADER_SIZE + first * SECTOR_SIZE, (b"".join(run),))
            run = []
        if not run:
            first = number
        run.append(content)
    if run:
        map_file.write_now(HEADER_SIZE + first * SECTOR_SIZE, (b"".join(run),))
