"""From the configuration to open stacks: the only place that knows the order of layers.

Every layer and backend gets a `checked` edge above it, and an `align` above that where it takes only aligned requests.
An image is opened once, read-only, and shared by all disks that name it.
"""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

from cachefs.backends import BACKENDS
from cachefs.config import Config, LayerSpec
from cachefs.errors import StoreError
from cachefs.layers import LAYERS
from cachefs.layers.align import Align
from cachefs.layers.base import Environment, Layer, OpenBackend, OpenLayer
from cachefs.layers.checked import Checked
from cachefs.store.localfile import FileSystem


def edge(layer: Layer) -> Layer:
    """*layer* as the one above it sees it: checked, and taking any byte range."""
    checked = Checked(layer)
    return checked if layer.geometry.alignment == 1 else Checked(Align(checked))


async def open_stack(
    stack: AsyncExitStack, layers: tuple[LayerSpec, ...], bottom: LayerSpec | Layer, env: Environment
) -> Layer:
    """Open *layers* (top to bottom) over *bottom*, a backend to open or an open layer; *stack* closes them.

    Raises: StoreError and its kinds.
    """
    if isinstance(bottom, LayerSpec):
        # Below any layer that takes the writes the backend stays as it is.
        backend_env = replace(env, writable=env.writable and not layers)
        backend = cast("OpenBackend", BACKENDS[bottom.kind])
        child = edge(await stack.enter_async_context(backend.open(bottom.options, backend_env)))
    else:
        child = bottom
    for spec in reversed(layers):
        layer = cast("OpenLayer", LAYERS[spec.kind])
        child = edge(await stack.enter_async_context(layer.open(spec.options, child, env)))
    return child


def refuse_inside(mountpoint: Path, state_dir: Path, *specs: LayerSpec) -> None:
    """Raises: StoreError when a store would lie inside the mount that it is to serve."""
    inside = os.path.realpath(mountpoint)
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
        if FileSystem.of(descriptor).may_hang:
            found.append(
                f"{backend.path}: {path} lies on a network or FUSE file system; when that hangs, so does the disk, and the "
                "daemon cannot be stopped"
            )
        os.close(descriptor)
    return found
