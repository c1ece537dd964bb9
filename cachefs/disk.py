"""One disk: its stack, and what the file that presents it says of it."""

from __future__ import annotations

import enum
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import trio

from cachefs.config import Config, DiskSpec, LayerSpec
from cachefs.errors import StoreError
from cachefs.extent import STATE_OF, MapRun
from cachefs.graph import open_stack, refuse_inside
from cachefs.layers.base import Environment, Layer
from cachefs.layers.cache import Cache, CacheConfig
from cachefs.layers.cow import Cow
from cachefs.layers.extents import Extents
from cachefs.pool.pool import Pool, open_pool

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

    def map_layers(self) -> list[MapLayer]:
        """The disk as a whole; then the layers that have a map of their own, top to bottom; then the backend.

        An extent cache above the backend answers for it, so that it is asked once.
        """
        nodes = list(_layers(self.top))
        own = [node for node in nodes if isinstance(node, Cow | Cache | Extents)]
        keepers = [index for index, node in enumerate(nodes) if isinstance(node, Cow | Cache)]
        below = nodes[keepers[-1] + 1 if keepers else 0]
        return [
            MapLayer(self.name, partial(runs_of, self.top)),
            *(MapLayer(layer.name, partial(_own_runs, layer)) for layer in own),
            MapLayer(nodes[-1].name, partial(runs_of, below)),
        ]

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


class MapLayer(NamedTuple):
    """A layer that has a map of its own. ask: from an offset on, at most so many runs; CachefsError when nobody tells."""

    name: str
    ask: Callable[[int, int], Awaitable[list[MapRun]]]


async def _own_runs(layer: Cow | Cache | Extents, offset: int, limit: int) -> list[MapRun]:
    return layer.map_runs(offset, limit)


async def runs_of(layer: Layer, offset: int, limit: int) -> list[MapRun]:
    """What *layer* with all below it holds, from *offset* on: a non-empty prefix of the rest."""
    found = await layer.extents(offset, layer.geometry.size - offset, limit)
    return [MapRun(extent.offset, extent.length, STATE_OF[extent.kind]) for extent in found]


def _layers(top: Layer) -> Iterator[Layer]:
    node: Layer | None = top
    while node is not None:
        yield node
        node = getattr(node, "child", None)


@asynccontextmanager
async def open_disks(
    config: Config, mountpoint: Path | None, forced_stop: trio.Event | None = None
) -> AsyncIterator[tuple[list[Disk], list[Pool]]]:
    """Every disk of *config*, open, and the pools that they use. On exit all are flushed and closed, the last one first.

    mountpoint: where they will be served, if they will: no store may lie in there. forced_stop: set when what hangs is
    not to be waited for any more.
    Raises: StoreError with one line for every disk or image that cannot be opened.
    """
    async with AsyncExitStack() as stack:
        problems: list[str] = []
        if forced_stop is None:
            forced_stop = trio.Event()
        pools = await _open_pools(stack, config, mountpoint, problems)
        images: dict[str, Layer] = {}
        disks: list[Disk] = []
        used = {disk.image for disk in config.disks.values()}
        for name, image in config.images.items():
            if name not in used:
                continue
            env = Environment(name, config.state_dir, writable=False, pools=pools, forced_stop=forced_stop)
            if not _has_pools(image.layers, pools):
                continue
            try:
                refuse_inside(mountpoint, config.state_dir, *image.layers, image.backend)
                images[name] = await open_stack(stack, image.layers, image.backend, env)
            except StoreError as exc:
                problems.append(str(exc))
        for spec in config.disks.values():
            if spec.image is not None and spec.image not in images:
                continue  # its image's line says why
            if not _has_pools(spec.layers, pools):
                continue
            try:
                refuse_inside(mountpoint, config.state_dir, *spec.layers, *((spec.backend,) if spec.backend else ()))
                env = Environment(
                    spec.name, config.state_dir, writable=spec.writable, pools=pools, forced_stop=forced_stop
                )
                disks.append(await _open_disk(stack, spec, images, env, FIRST_INODE + len(disks)))
            except StoreError as exc:
                problems.append(str(exc))
        if problems:
            raise StoreError(str(config.file), "\n".join(problems))
        yield disks, list(pools.values())


def _pools_of(layers: tuple[LayerSpec, ...]) -> Iterator[str]:
    return (layer.options.pool for layer in layers if isinstance(layer.options, CacheConfig))


def _has_pools(layers: tuple[LayerSpec, ...], pools: dict[str, Pool]) -> bool:
    """Whether the pools of these layers are open; where one is not, its own line says why."""
    return all(name in pools for name in _pools_of(layers))


async def _open_pools(
    stack: AsyncExitStack, config: Config, mountpoint: Path | None, problems: list[str]
) -> dict[str, Pool]:
    """The pools that some stack uses."""
    images = {disk.image for disk in config.disks.values()}
    stacks = [disk.layers for disk in config.disks.values()]
    stacks += [image.layers for name, image in config.images.items() if name in images]
    used = {name for layers in stacks for name in _pools_of(layers)}
    pools: dict[str, Pool] = {}
    for name in sorted(used):
        spec = config.pools[name]
        keys = spec.options
        try:
            refuse_inside(mountpoint, config.state_dir, spec)
            pools[name] = await stack.enter_async_context(
                open_pool(
                    keys.path,
                    name,
                    quota=keys.quota,
                    min_free=keys.min_free,
                    evict=keys.evict,
                    block_size=keys.block_size,
                    patience_s=keys.cache_timeout,
                )
            )
        except StoreError as exc:
            problems.append(str(exc))
    return pools


async def _open_disk(
    stack: AsyncExitStack,
    spec: DiskSpec,
    images: dict[str, Layer],
    env: Environment,
    inode: int,
) -> Disk:
    bottom = images[spec.image] if spec.image is not None else spec.backend
    assert bottom is not None
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
