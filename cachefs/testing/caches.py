"""Caches for tests: some disks over one image, in a pool whose every call can be held, failed and counted.

    bench = CacheBench(folder, content, block_size=4096)
    async with bench.open(disks=2) as opened:
        held = opened.disks[0].below.hold("read_into")
        ...

A disk is `Checked(Cache)` over gate, faults and recorder over a memory backend that says it lasts. `crash` keeps what a
`kill -9` of this moment would leave; `disk_bytes` is what `du` says.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from unittest import mock

from cachefs.backends.memory import Memory
from cachefs.extent import Extent
from cachefs.graph import edge
from cachefs.layers.base import Environment, Later, Layer
from cachefs.layers.cache import Cache, CacheConfig
from cachefs.layers.checked import Checked
from cachefs.pool import pool as pool_module
from cachefs.pool.image import PoolImage
from cachefs.pool.pool import Pool, open_pool
from cachefs.store.files import Header
from cachefs.store.identity import Identity
from cachefs.store.mapfile import StoreFiles
from cachefs.survivor import Survivors
from cachefs.testing.faults import Faults
from cachefs.testing.gate import Gate, PoolGate
from cachefs.testing.stacks import fill
from cachefs.testing.wrapper import SlowOnly, Wrapper

_open_image_files = pool_module.open_image_files


class Recorder(Wrapper):
    """reads: offset and length of each read that came through. asked: how often it was asked for extents."""

    def __init__(self, child: Layer) -> None:
        super().__init__(child)
        self.reads: list[tuple[int, int]] = []
        self.asked = 0

    @property
    def read_bytes(self) -> int:
        return sum(length for _, length in self.reads)

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        if not self.child.try_read_into(offset, buffer):
            return False
        self.reads.append((offset, len(buffer)))
        return True

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        return False

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads.append((offset, len(buffer)))
        await self.child.read_into(offset, buffer)

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        self.asked += 1
        return await self.child.extents(offset, length, limit)


@dataclass(frozen=True)
class CachedDisk:
    """top: what a dataplane would hold. below, faults, recorder: what lies between the cache and the backend."""

    top: Layer
    cache: Cache
    below: Gate
    faults: Faults
    recorder: Recorder


@dataclass(frozen=True)
class Opened:
    pool: Pool
    gate: PoolGate
    disks: list[CachedDisk]

    @property
    def disk(self) -> CachedDisk:
        return self.disks[0]

    @property
    def top(self) -> Layer:
        return self.disks[0].top

    @property
    def image(self) -> PoolImage:
        return self.disks[0].cache.image

    @property
    def read_below(self) -> int:
        """Bytes that all disks together read from the backend."""
        return sum(disk.recorder.read_bytes for disk in self.disks)

    async def settled(self) -> None:
        """What was read is installed, and nothing is under way."""
        for image in self.pool.images.values():
            await image.wait_installed()
            await image.wait_idle()


@dataclass
class CacheBench:
    """A pool in *folder*/pool and the image over which disks are opened. slow: the fast path below is forbidden."""

    folder: Path
    content: bytes
    quota: int = 64 << 20
    block_size: int = 4096
    evict: Literal["never", "sieve"] = "sieve"
    min_free: int = 0
    patience_s: float = 20.0
    mode: Literal["read-only", "write-through"] = "read-only"
    identity: Identity = field(default_factory=lambda: Identity("file", {"inode": "7"}))
    slow: bool = False
    survivors: Survivors = field(default_factory=Survivors)

    def __post_init__(self) -> None:
        self.chunks: dict[int, bytearray] = {}
        fill(self.chunks, self.content)
        self.gate = PoolGate(forbid_inline=self.slow)
        self.pool_path = self.folder / "pool"

    @property
    def blocks(self) -> int:
        return -(-len(self.content) // self.block_size)

    @asynccontextmanager
    async def open(self, disks: int = 1) -> AsyncIterator[Opened]:
        """The pool and *disks* disks, each with layers of its own over the same image."""
        async with AsyncExitStack() as stack:
            pool = await stack.enter_async_context(self.open_pool())
            opened = [await stack.enter_async_context(self.open_disk(pool)) for _ in range(disks)]
            yield Opened(pool, self.gate, opened)

    @asynccontextmanager
    async def open_pool(self) -> AsyncIterator[Pool]:
        with mock.patch.object(pool_module, "open_image_files", self._open_gated):
            async with open_pool(
                self.pool_path,
                "node",
                quota=self.quota,
                min_free=self.min_free,
                evict=self.evict,
                block_size=self.block_size,
                patience_s=self.patience_s,
                survivors=self.survivors,
            ) as pool:
                yield pool

    @asynccontextmanager
    async def open_disk(self, pool: Pool, owner: str = "image") -> AsyncIterator[CachedDisk]:
        memory = Memory(f"{owner}/memory", len(self.content), chunks=self.chunks)
        memory.identity = self.identity
        recorder = Recorder(memory)
        faults = Faults(recorder)
        below = Gate(SlowOnly(faults) if self.slow else faults)
        env = Environment(owner, self.folder / "state", pools={"node": pool})
        config = CacheConfig(pool="node", mode=self.mode)
        async with Cache.open(config, edge(below), env) as cache:
            top = Checked(cache)
            yield CachedDisk(SlowOnly(top) if self.slow else top, cache, below, faults, recorder)

    def _open_gated(self, path: Path, header: Header, survivors: Survivors, direct: bool) -> StoreFiles:
        opened = _open_image_files(path, header, survivors, direct)
        self.gate.watch(opened.data, opened.map_file)
        return opened

    def crash(self, name: str = "crashed") -> CacheBench:
        """A bench over a copy of the pool as it is on disk now: what is left when the daemon is killed."""
        folder = self.folder / name
        folder.mkdir()
        copy_sparse(self.pool_path, folder / "pool")
        return CacheBench(
            folder,
            self.content,
            self.quota,
            self.block_size,
            self.evict,
            self.min_free,
            self.patience_s,
            self.mode,
            self.identity,
            self.slow,
        )

    def image_path(self) -> Path:
        """The directory of the only image."""
        (found,) = (self.pool_path / "images").iterdir()
        return found

    def disk_bytes(self) -> int:
        return disk_bytes(self.pool_path)


def disk_bytes(path: Path) -> int:
    """What `du` says of the directory: room on disk, holes left out."""
    return sum(found.lstat().st_blocks * 512 for found in (path, *path.rglob("*")))


def copy_sparse(source: Path, target: Path) -> None:
    """A copy in which a hole is a hole."""
    shutil.copytree(source, target, copy_function=_copy_sparse)


def _copy_sparse(source: str, target: str) -> None:
    size = os.stat(source).st_size
    with open(source, "rb") as reader, open(target, "wb") as writer:
        writer.truncate(size)
        at = 0
        while at < size:
            try:
                at = os.lseek(reader.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but hole up to the end
                return
            end = os.lseek(reader.fileno(), at, os.SEEK_HOLE)
            os.pwrite(writer.fileno(), os.pread(reader.fileno(), end - at, at), at)
            at = end


__all__ = ["CacheBench", "CachedDisk", "Opened", "Recorder", "copy_sparse", "disk_bytes"]
