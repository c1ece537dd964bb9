"""The two files of a store, opened, and the sectors of its map, read and written. Blocks; call it in a thread."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from cachefs.errors import FormatError, LockedError, StoreError
from cachefs.extent import ExtentKind
from cachefs.store import files
from cachefs.store.directfile import CompletedFile, open_direct
from cachefs.store.files import HEADER_SIZE, OVERLAY, Header, StoreFormat
from cachefs.store.localfile import LocalFile
from cachefs.store.sectors import SECTOR_SIZE, SectorCopy
from cachefs.survivor import SurvivorMemory, Survivors, bump_epoch, memory_name

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


def open_pair(path: Path, header: Header) -> tuple[LocalFile, LocalFile]:
    """Data and map, to be changed without survivor memory: that of any daemon is void then.

    Raises: FormatError, StoreError; LockedError when a keeper holds such memory.
    """
    descriptors: list[int] = []
    try:
        for part in ("data", "map"):
            descriptors.append(os.open(path / part, os.O_RDWR))
            _check_size(path / part, descriptors[-1], header)
        refuse_held(path, descriptors[0])
        bump_epoch(path / "epoch")
        return LocalFile(descriptors[0], header.size, inline_writes=False), LocalFile(
            descriptors[1], files.map_size(header)
        )
    except BaseException as exc:
        for descriptor in descriptors:
            os.close(descriptor)
        if isinstance(exc, OSError):
            raise _cannot_open(path, exc) from exc
        raise


def _check_size(path: Path, descriptor: int, header: Header) -> None:
    size, wanted = os.fstat(descriptor).st_size, header.size if path.name == "data" else files.map_size(header)
    if size != wanted:
        raise FormatError(str(path), f"has {size} bytes and should have {wanted}; {header.format.advice}")


def _cannot_open(path: Path, exc: OSError) -> StoreError:
    return StoreError(str(path), f"cannot open the store: {exc.strerror}; check its rights and its device")


def refuse_held(path: Path, descriptor: int) -> None:
    """Take the lock that says that a store's memory is held; *descriptor* is of its data file.

    A successor finds the descriptor, and the lock with it. Raises: LockedError when another keeper holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError(
            str(path),
            "what was acknowledged and not flushed lies in memory that is kept for its daemon, which is about to come back; "
            "`cachefs umount` its mount first",
        ) from None
    except OSError:
        return  # ENOLCK and the like: nobody can lock there


class StoreFiles:
    """What is open of a store, and outlives the process: data and map file, survivor memory, and *witnesses*.

    A write error is told once to each description of a file. A daemon that is killed inside of an fdatasync may have been
    told, and have had no time to say so. A witness is a second description of the same file, made before anything was
    written, that nobody syncs through: it is asked what became of a sync that was cut off. Where to ask has been cut off
    too, there is nobody left to ask, and the sync counts as failed.

    inherited: whether `memory` is a predecessor's. Made by `open_files`; all of it blocks.
    """

    _PARTS = (("data", "data"), ("map", "mapfile"), ("data", "data-witness"), ("map", "map-witness"))

    def __init__(
        self,
        survivors: Survivors,
        path: Path,
        header: Header,
        memory: SurvivorMemory,
        *,
        inline_writes: bool,
        direct: bool,
    ) -> None:
        self.survivors = survivors
        self.header = header
        self.memory = memory
        self.inherited = memory.is_inherited
        self._descriptors = {memory.name: memory.descriptor}
        try:
            for part, name in self._PARTS:
                name = f"{name}.{header.uuid}"
                self._descriptors[name] = self._open(path / part, name)
            _, data, map_file, *self._witnesses = self._descriptors.values()
            refuse_held(path, data)  # no news where the descriptor is a predecessor's: the lock came with it
            self.data = (
                open_direct(CompletedFile, str(path), str(path / "data"), data, header.size, writable=True)
                if direct
                else LocalFile(data, header.size, inline_writes=inline_writes)
            )
            self.map_file = LocalFile(map_file, files.map_size(header))
        except BaseException:
            survivors.give_back(self._descriptors)
            raise

    def _open(self, path: Path, name: str) -> int:
        """What a predecessor had open, which carries the error that the kernel may have for us, or anew."""
        found = self.survivors.take(name)
        if found is not None:
            if os.path.samestat(os.fstat(found), os.stat(path)):
                return found
            self.survivors.drop([name])
            os.close(found)
        descriptor = os.open(path, os.O_RDWR)
        try:
            _check_size(path, descriptor, self.header)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def keep(self) -> None:
        """The memory says all that it has to: from here on a successor may go on with it.

        A predecessor may have been killed before it had kept everything.
        """
        self.survivors.keep(self._descriptors)

    def ask_witnesses(self) -> None:
        """Raises: OSError when the kernel has failed to write something out since the store was opened."""
        for witness in self._witnesses:
            os.fdatasync(witness)

    def close(self, *, is_durable: bool) -> None:
        """is_durable: the memory says nothing that the files do not. Else whoever opens the store next goes on with it."""
        if is_durable:
            self.survivors.drop(self._descriptors)
        for file in (self.data, self.map_file):  # whoever comes late must not meet another file
            file.let_go()
        self.survivors.give_back(self._descriptors)


def kept_names(kind: str, header: Header) -> list[str]:
    """Under which a store's memory and files are kept."""
    return [memory_name(kind, header.uuid), *(f"{name}.{header.uuid}" for _, name in StoreFiles._PARTS)]


def open_files(
    path: Path,
    header: Header,
    survivors: Survivors,
    kind: str,
    layout: int,
    length: int,
    *,
    inline_writes: bool = True,
    direct: bool = False,
) -> StoreFiles:
    """The files of the store at *path*, and its memory *kind* of *length* bytes. direct: its data past the page cache.

    Raises: StoreError and its kinds.
    """
    try:
        memory = survivors.memory(kind, {layout}, header.uuid, length, path / "epoch")
        return StoreFiles(survivors, path, header, memory, inline_writes=inline_writes, direct=direct)
    except OSError as exc:
        raise _cannot_open(path, exc) from exc


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
