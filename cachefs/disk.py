"""One disk: its stack, and what the file that presents it says of it."""

from __future__ import annotations

import enum
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cachefs.config import Config, DiskSpec
from cachefs.errors import StoreError
from cachefs.graph import open_stack, refuse_inside
from cachefs.layers.base import Environment, Layer

FIRST_INODE = 2  # 1 is the root directory


class DiskState(enum.Enum):
    SERVING = "serving"
    FAILED = "failed"  # a write-out error that no flush can clear: see its layers' statistics


@dataclass
class Disk:
    """A named stack. inode: its file's, never used twice in a mount. mode, uid, gid: of the file."""

    name: str
    top: Layer
    inode: int
    writable: bool
    mode: int
    uid: int
    gid: int
    page_cache: bool = False
    mtime_ns: int = field(default_factory=time.time_ns)
    """Of the last write, from memory: tools like rsync look at it to see whether the disk changed."""

    def __post_init__(self) -> None:
        self.size = self.top.geometry.size

    @property
    def state(self) -> DiskState:
        return DiskState.SERVING if self.top.pending_error() is None else DiskState.FAILED

    def allocated_bytes(self) -> int:
        """For st_blocks: space held in the stack, never 0, or `tar -S` would archive nothing but zeros."""
        return max(4096, self.top.allocated_bytes())

    def status(self) -> dict[str, object]:
        """For people and programs; values are JSON."""
        error = self.top.pending_error()
        return {
            "name": self.name,
            "state": self.state.value,
            "size": self.size,
            "writable": self.writable,
            **({"error": str(error)} if error is not None else {}),
            "layers": [{"layer": s.layer, **s.values} for s in self.top.statistics().chain()],
        }


@asynccontextmanager
async def open_disks(config: Config, mountpoint: Path) -> AsyncIterator[list[Disk]]:
    """Every disk of *config*, open. On exit all are flushed and closed, the last one first.

    Raises: StoreError with one line for every disk or image that cannot be opened.
    """
    async with AsyncExitStack() as stack:
        problems: list[str] = []
        images: dict[str, Layer] = {}
        disks: list[Disk] = []
        used = {disk.image for disk in config.disks.values()}
        for name, image in config.images.items():
            if name not in used:
                continue
            env = Environment(name, config.state_dir, writable=False)
            try:
                refuse_inside(mountpoint, config.state_dir, *image.layers, image.backend)
                images[name] = await open_stack(stack, image.layers, image.backend, env)
            except StoreError as exc:
                problems.append(str(exc))
        for spec in config.disks.values():
            if spec.image is not None and spec.image not in images:
                continue  # its image's line says why
            try:
                refuse_inside(mountpoint, config.state_dir, *spec.layers, *((spec.backend,) if spec.backend else ()))
                disks.append(await _open_disk(stack, spec, images, config, FIRST_INODE + len(disks)))
            except StoreError as exc:
                problems.append(str(exc))
        if problems:
            raise StoreError(str(config.file), "\n".join(problems))
        yield disks


async def _open_disk(
    stack: AsyncExitStack, spec: DiskSpec, images: dict[str, Layer], config: Config, inode: int
) -> Disk:
    bottom = images[spec.image] if spec.image is not None else spec.backend
    assert bottom is not None
    env = Environment(spec.name, config.state_dir, writable=spec.writable)
    top = await open_stack(stack, spec.layers, bottom, env)
    return Disk(
        name=spec.name,
        top=top,
        inode=inode,
        writable=spec.writable,
        mode=spec.mode,
        uid=os.getuid() if spec.uid is None else spec.uid,
        gid=os.getgid() if spec.gid is None else spec.gid,
        page_cache=spec.page_cache,
    )
