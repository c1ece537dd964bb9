"""`cachefs map`: what each layer of a disk has of it, and which of them answers for each range.

Of a disk that is mounted the daemon is asked: the xattr `user.cachefs.map` of its file names the layers, those behind it
give a layer's runs in pages. Of one that is not mounted the stores are read as they lie there, under their locks, and nothing
in them is changed; the backend is opened read-only.

The map of the disk as a whole says what is data and what zeros; the topmost layer that has something of a range is its
source, at the depth that `depth` says: 0 is the top. An extent cache has nothing itself and does not count.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import trio

from cachefs import mounts, statusview
from cachefs.backends import BACKENDS
from cachefs.bytebar import ByteBar
from cachefs.config import Config, LayerSpec, load
from cachefs.disk import runs_of
from cachefs.errors import CachefsError, StoreError, unwrap
from cachefs.extent import MapRun, MapState, unpack_runs
from cachefs.graph import edge
from cachefs.layers.base import Environment, Layer, OpenBackend
from cachefs.layers.cache import CacheConfig, map_runs
from cachefs.layers.cow import CowConfig, overlay_path
from cachefs.pool.pool import digest_of
from cachefs.pooltool import held, opened
from cachefs.store.blockmap import BlockMap, State, working_size
from cachefs.store.files import Header, StoreLock, map_size
from cachefs.store.localfile import LocalFile
from cachefs.store.mapfile import load_sectors, read_header

T = TypeVar("T")

XATTR = "user.cachefs.map"
PAGE = 2000
PATIENCE_S = 3.0
_KEPT = (MapState.DATA, MapState.ZERO, MapState.HOLE, MapState.CACHED)


@dataclass(frozen=True)
class LayerMap:
    """One layer's runs, in order and without gaps over all of the disk."""

    name: str
    runs: list[MapRun]

    @property
    def only_knows(self) -> bool:
        """Whether it is an extent cache."""
        return self.name.endswith("/extents")

    def sizes(self) -> Counter[MapState]:
        found: Counter[MapState] = Counter()
        for run in self.runs:
            found[run.state] += run.length
        return found


@dataclass(frozen=True)
class DiskMap:
    """whole: of the disk, all layers together. layers: top to bottom; the backend is the last."""

    size: int
    whole: LayerMap
    layers: list[LayerMap]

    def pieces(self) -> Iterator[tuple[int, int, bool, int]]:
        """Offset, end, whether it is data, and the depth of the layer that answers; neighbours that agree are one."""
        before: tuple[int, int, bool, int] | None = None
        cursors = [_Cursor(layer.runs) for layer in (self.whole, *self.sources)]
        offset = 0
        while offset < self.size:
            runs = [cursor.at(offset) for cursor in cursors]
            end = min(run.end for run in runs)
            is_data = runs[0].state is MapState.DATA
            depth = self._source([run.state for run in runs[1:]])
            if before is not None and before[2:] == (is_data, depth):
                before = (before[0], end, is_data, depth)
            else:
                if before is not None:
                    yield before
                before = (offset, end, is_data, depth)
            offset = end
        if before is not None:
            yield before

    def _source(self, states: list[MapState]) -> int:
        """The depth of the topmost layer that has something."""
        kept = (depth for depth, state in enumerate(states[:-1]) if state in _KEPT)
        return next(kept, len(states) - 1)

    @property
    def sources(self) -> list[LayerMap]:
        """Those that may answer for a range, by depth."""
        return [layer for layer in self.layers if not layer.only_knows]

    def as_qemu(self) -> list[dict[str, object]]:
        """In the form of `qemu-img map --output=json`. offset: in the store of the layer at that depth, where it is data."""
        return [
            {
                "start": start,
                "length": end - start,
                "depth": depth,
                "present": True,
                "zero": not is_data,
                "data": is_data,
                **({"offset": start} if is_data else {}),
            }
            for start, end, is_data, depth in self.pieces()
        ]


class _Cursor:
    """The run at an offset that only goes up."""

    def __init__(self, runs: list[MapRun]) -> None:
        self._runs = runs
        self._index = 0

    def at(self, offset: int) -> MapRun:
        while self._runs[self._index].end <= offset:
            self._index += 1
        return self._runs[self._index]


def read(path: Path, disk: str) -> DiskMap:
    """The map of *disk* of the configuration *path*, or of the mount there. Raises: CachefsError and its kinds."""
    # not by a look at it: a daemon that is dead or hangs would fail or hold us there
    if mounts.find_mount(path) is not None:
        return read_mounted(path, disk)
    if path.is_dir():
        raise CachefsError(str(path), "nothing is mounted there; `findmnt -t fuse.cachefs` lists the mounts of cachefs")
    return read_stores(path, disk)


# ---- of a mount


def read_mounted(mountpoint: Path, disk: str) -> DiskMap:
    """Asks the daemon. Raises: CachefsError; KeyboardInterrupt at any moment."""
    path = mountpoint / disk
    head = json.loads(_ask(path, ""))
    names, size = head["layers"], int(head["size"])
    with ByteBar(size * len(names)) as bar:
        found = []
        # The disk as a whole is the first and asked last: by then an extent cache knows all, and could not show what it knew.
        for done, number in enumerate((*range(1, len(names)), 0)):
            runs: list[MapRun] = []
            at = 0
            while at < size:
                runs += _page(path, number, at)
                at = runs[-1].end
                bar.update(size * done + at, what=disk, text=names[number])
            found.append(LayerMap(names[number], merge(runs)))
    return DiskMap(size, found[-1], found[:-1])


def _page(path: Path, number: int, offset: int) -> list[MapRun]:
    try:
        runs = unpack_runs(_ask(path, f".{number}.{offset}"))
    except (ValueError, struct.error):
        runs = []
    if not runs or runs[0].offset != offset:
        raise CachefsError(
            str(path), "its daemon is of another version and tells no map: upgrade it, or use its cachefs"
        )
    return runs


def _ask(path: Path, what: str) -> bytes:
    try:
        return wait_for_answer(partial(os.getxattr, path, XATTR + what), path.parent)
    except OSError as exc:
        why = {
            errno.ENOENT: "there is no such disk; `cachefs status` lists them",
            errno.ENODATA: "its daemon is of another version and tells no map: upgrade it, or use its cachefs",
            errno.EOPNOTSUPP: "is no file of a mount of cachefs; `findmnt -t fuse.cachefs` lists them",
            errno.ENOTCONN: "its daemon is dead: `cachefs umount` takes the mount away, then mount anew",
            errno.EACCES: "permission denied: be its owner, or root",
        }.get(
            exc.errno or 0, f"{exc.strerror}: the backend did not tell; `cachefs status` and the daemon's log say more"
        )
        raise CachefsError(str(path), why, exc.errno) from exc


def wait_for_answer(call: Callable[[], T], mountpoint: Path) -> T:
    """*call* in a thread, so that Ctrl-C ends the wait: a daemon that hangs would hold the caller in the kernel.

    A store may take as long as its deadline to tell; so a daemon that lets us wait is asked whether it answers at all.
    Raises: what *call* raises; CachefsError when the daemon does not answer.
    """
    answer: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(call())
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    while thread.is_alive():
        try:
            statusview.read_one(mountpoint)
        except TimeoutError:
            raise statusview.no_answer(mountpoint) from None
        thread.join(PATIENCE_S)
    if errors:
        raise errors[0]
    return answer[0]


# ---- of stores that are not mounted


def read_stores(file: Path, name: str) -> DiskMap:
    """Reads what lies there. Raises: ConfigError, StoreError, LockedError, CachefsError."""
    config = load(file)
    disk = config.disks.get(name)
    if disk is None:
        raise CachefsError(str(config.file), f"has no disk {name!r}; it has {', '.join(config.disks)}")
    image = config.images[disk.image] if disk.image is not None else None
    own, below = disk.layers, image.layers if image else ()
    backend = image.backend if image else disk.backend
    assert backend is not None
    owner = image.name if image else name
    try:
        base = trio.run(_read_backend, config, owner, backend)
    except BaseExceptionGroup as group:
        raise unwrap(group) from group
    layers = []
    for place, specs in ((name, own), (owner, below)):
        for spec in specs:
            found = _read_layer(config, place, spec, base)
            if found is not None:
                layers.append(found)
    layers.append(base.map)
    return DiskMap(base.size, LayerMap(name, merge(_combine(base.size, layers))), layers)


@dataclass(frozen=True)
class _Base:
    size: int
    layer: Layer
    map: LayerMap


async def _read_backend(config: Config, owner: str, spec: LayerSpec) -> _Base:
    env = Environment(owner, config.state_dir, writable=False)
    async with AsyncExitStack() as stack:
        kind = cast("OpenBackend", BACKENDS[spec.kind])
        layer = edge(await stack.enter_async_context(kind.open(spec.options, env)))
        size, runs, at = layer.geometry.size, list[MapRun](), 0
        with ByteBar(size) as bar:
            while at < size:
                runs += await runs_of(layer, at, PAGE)
                at = runs[-1].end
                bar.update(at, what=owner, text=layer.name)
        return _Base(size, layer, LayerMap(layer.name, merge(runs)))
    raise AssertionError("an exit stack swallows nothing")


def _read_layer(config: Config, owner: str, spec: LayerSpec, base: _Base) -> LayerMap | None:
    """None: what such a layer has lies in memory only."""
    options = spec.options
    if isinstance(options, CowConfig):
        return _read_overlay(overlay_path(config.state_dir, owner, options.path), f"{owner}/cow", base.size)
    if isinstance(options, CacheConfig):
        return _read_cache(config, owner, options, base)
    return None


def _read_overlay(path: Path, name: str, size: int) -> LayerMap:
    if not path.exists():  # the first mount makes it
        return LayerMap(name, [MapRun(0, size, MapState.ABSENT)])
    lock = StoreLock(path, "cachefs map", "name the mountpoint instead of the configuration to see it there")
    with ExitStack() as stack:
        stack.callback(lock.close)
        header = read_header(path)
        if header.size != size:
            raise StoreError(
                str(path), f"is an overlay of {header.size} bytes, over a base of {size}: put the old base back"
            )
        states = _load_overlay(path, header)
    kinds = {State.ABSENT: MapState.ABSENT, State.DATA: MapState.DATA, State.ZERO: MapState.ZERO}
    return LayerMap(name, [MapRun(run.offset, run.length, kinds[run.state]) for run in states.runs(0, size)])


def _load_overlay(path: Path, header: Header) -> BlockMap:
    blocks = -(-header.size // header.block_size)
    states = BlockMap(memoryview(mmap.mmap(-1, working_size(blocks))), blocks, header.block_size)
    try:
        file = LocalFile(os.open(path / "map", os.O_RDONLY), map_size(header))
    except OSError as exc:
        raise StoreError(str(path), f"cannot open the store's map: {exc.strerror}; check its rights") from exc
    try:
        load_sectors(file, header, lambda number, content: states.load(number, content, str(path / "map")))
    finally:
        file.close()
    return states


def _read_cache(config: Config, owner: str, options: CacheConfig, base: _Base) -> LayerMap:
    spec, name, size = config.pools[options.pool], f"{owner}/cache", base.size
    identity, nothing = base.layer.identity, LayerMap(name, [MapRun(0, size, MapState.ABSENT)])
    if not (spec.options.path / "pool").exists() or not identity.lasts:
        return nothing
    block_size = spec.options.block_size
    digest = digest_of(identity, size, block_size, owner if identity.is_sampled else "")
    with held(spec) as pool:
        path = pool / "images" / digest
        if not path.exists():
            return nothing
        with opened(path, block_size) as image:
            if image.map is None:
                return nothing
            runs: list[MapRun] = []
            while not runs or runs[-1].end < size:
                runs += map_runs(image.map, image.shift, size, runs[-1].end if runs else 0, PAGE)
            return LayerMap(name, merge(runs))


def _combine(size: int, layers: list[LayerMap]) -> Iterator[MapRun]:
    """What the disk as a whole holds: of each range what its topmost layer says, of a copy what was copied."""
    cursors = [_Cursor(layer.runs) for layer in layers]
    offset = 0
    while offset < size:
        runs = [cursor.at(offset) for cursor in cursors]
        end = min(run.end for run in runs)
        states = (run.state for run in runs if run.state not in (MapState.ABSENT, MapState.CACHED))
        yield MapRun(offset, end - offset, next(states))
        offset = end


def merge(runs: Iterable[MapRun]) -> list[MapRun]:
    """Neighbours in one state become one."""
    merged: list[MapRun] = []
    for run in runs:
        if merged and merged[-1].state is run.state:
            merged[-1] = MapRun(merged[-1].offset, run.end - merged[-1].offset, run.state)
        else:
            merged.append(run)
    return merged
