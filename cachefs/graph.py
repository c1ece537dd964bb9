"""From the configuration to open stacks: the only place that knows the order of layers.

Every layer and backend gets a `checked` edge above it, and an `align` above that where it takes only aligned requests and
the layer above does not see to that.
An image is opened once, read-only, and shared by all disks that name it.
"""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

from cachefs.backends import BACKENDS
from cachefs.config import Config, LayerSpec, PoolSpec
from cachefs.errors import StoreError
from cachefs.layers import LAYERS
from cachefs.layers.align import Align
from cachefs.layers.base import Environment, Layer, OpenBackend, OpenLayer
from cachefs.layers.cache import CacheConfig
from cachefs.layers.checked import Checked
from cachefs.store.localfile import FileSystem
from cachefs.units import format_size, short_size


def edge(layer: Layer) -> Layer:
    """*layer* as the one above it sees it: checked, and taking any byte range."""
    return aligned(Checked(layer))


def aligned(checked: Layer) -> Layer:
    """*checked*, taking any byte range."""
    return checked if checked.geometry.alignment == 1 else Checked(Align(checked))


async def open_stack(
    stack: AsyncExitStack, layers: tuple[LayerSpec, ...], bottom: LayerSpec | Layer, env: Environment
) -> Layer:
    """Open *layers* (top to bottom) over *bottom*, a backend to open or an open, checked layer; *stack* closes them.

    Raises: StoreError and its kinds.
    """
    if isinstance(bottom, LayerSpec):
        # Below any layer that keeps the writes, or refuses them, the backend stays as it is.
        backend_env = replace(env, writable=env.writable and all(spec.options.passes_writes for spec in layers))
        backend = cast("OpenBackend", BACKENDS[bottom.kind])
        child: Layer = Checked(await stack.enter_async_context(backend.open(bottom.options, backend_env)))
    else:
        child = bottom
    used = [spec.options.pool for spec in layers if isinstance(spec.options, CacheConfig)]
    env = replace(env, pool=env.pools[used[0]] if used else None)
    for spec in reversed(layers):
        layer = cast("OpenLayer", LAYERS[spec.kind])
        below = child if spec.options.aligns else aligned(child)
        child = Checked(await stack.enter_async_context(layer.open(spec.options, below, env)))
    return aligned(child)


def refuse_inside(mountpoint: Path | None, state_dir: Path, *specs: LayerSpec | PoolSpec) -> None:
    """Raises: StoreError when a store would lie inside the mount that it is to serve."""
    if mountpoint is None:
        return
    # Resolved without touching the mountpoint: in a successor nobody answers there yet.
    inside = os.path.join(os.path.realpath(mountpoint.parent), mountpoint.name)
    named = [(spec.path, value) for spec in specs for _, value in spec.options if isinstance(value, Path)]
    for where, path in [("state_dir", state_dir), *named]:
        real = os.path.realpath(path)
        if real == inside or real.startswith(inside.rstrip("/") + "/"):
            raise StoreError(where, f"{path} lies inside the mountpoint {mountpoint}; a disk cannot be its own store")


def warnings_about(config: Config) -> list[str]:
    """What a mount of *config* would trip over, or an operator regret; looked up without opening a store."""
    found: list[str] = []
    stacks = [(image.layers, image.backend) for image in config.images.values()]
    stacks += [(disk.layers, disk.backend) for disk in config.disks.values() if disk.backend is not None]
    for _, backend in stacks:
        path = getattr(backend.options, "path", None)
        if not isinstance(path, Path):
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as exc:
            found.append(f"{backend.path}: cannot open {path}: {exc.strerror}")
            continue
        # a qcow2 image is opened by a server, which can be left behind when it hangs
        if backend.kind == "file" and FileSystem.of(descriptor).may_hang:
            found.append(
                f"{backend.path}: {path} lies on a network or FUSE file system; when that hangs, so does the disk, and the "
                "daemon cannot be stopped"
            )
        os.close(descriptor)
    found += [warning for pool in config.pools.values() for warning in _warnings_about_pool(pool)]
    return found + [warning for layers, backend in stacks for warning in _warnings_about_cache(layers, backend)]


def _warnings_about_pool(pool: PoolSpec) -> list[str]:
    """*pool* need not be there yet: then its nearest directory says what its file system is."""
    path, keys = pool.options.path, pool.options
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    try:
        descriptor = os.open(there, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as exc:
        return [f"{pool.path}: cannot open {there}: {exc.strerror}"]
    try:
        may_hang = FileSystem.of(descriptor).may_hang
        status = os.fstatvfs(descriptor)
    finally:
        os.close(descriptor)
    found = []
    if may_hang:
        found.append(
            f"{pool.path}: {path} lies on a network or FUSE file system; a cache pays on a disk of this machine, and when "
            "that hangs every disk over it waits until cache_timeout"
        )
    size = status.f_blocks * status.f_frsize
    if keys.quota + keys.min_free > size:
        kept = f" and min_free {format_size(keys.min_free)}" if keys.min_free else ""
        found.append(
            f"{pool.path}: quota {format_size(keys.quota)}{kept} are more than its file system has, {short_size(size)}; "
            "it will be full before the quota is reached"
        )
    return found


def _warnings_about_cache(layers: tuple[LayerSpec, ...], backend: LayerSpec) -> list[str]:
    """What a cache over *backend* cannot know of it."""
    found = []
    for layer in layers:
        if not isinstance(layer.options, CacheConfig):
            continue
        if backend.kind == "memory":
            found.append(
                f"{layer.path}: memory is gone when the daemon ends, so this cache begins empty at every mount"
            )
        path = getattr(backend.options, "path", None)
        if isinstance(path, Path) and path.is_block_device():
            found.append(
                f"{layer.path}: the contents of a block device are known by a sample of 64KiB; after you change {path}, run "
                f"`cachefs pool drop`, or the old contents are served"
            )
    return found
