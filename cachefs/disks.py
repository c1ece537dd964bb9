"""The disks of a mount, and the pools and images that they stand on: each opened by a task of its own.

Pools, images and disks are *parts*: a task opens one, whoever stands on it waits for that, and it is closed when all that
stand on it are. At a first mount every part must open, and what keeps one from it ends the mount. In a successor the mount
is there already and is served at once: a part that cannot be opened is tried again, its disks' requests wait (`Unopened`), and
after PATIENCE_S they fail until it can; other disks do not notice.

    pool, image:  opening -> open ---------------------------------> closed
    disk:         opening -> open (serving, or failed: no flush can clear it) -> closed
                     '-> refused: EIO -> open
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import trio

from cachefs.config import Config, DiskSpec, ImageSpec, LayerSpec, PoolSpec
from cachefs.disk import Disk
from cachefs.errors import CachefsError, LayoutError, StoreError, unwrap
from cachefs.graph import open_stack, refuse_inside
from cachefs.layers.base import Environment, Layer
from cachefs.layers.cache import CacheConfig
from cachefs.mountstate import FIRST_INODE
from cachefs.pool.pool import Pool, open_pool
from cachefs.survivor import Survivors
from cachefs.unopened import Unopened

log = logging.getLogger(__name__)

PATIENCE_S = 60.0
FIRST_DELAY_S, LONGEST_DELAY_S = 0.005, 0.25  # before a part is tried again

T = TypeVar("T")


class Part(Generic[T]):
    """Something that others stand on. value: once it is open. Without one after `tried`, it is not going to be."""

    def __init__(self) -> None:
        self.value: T | None = None
        self.tried = trio.Event()

    async def wait(self) -> T | None:
        await self.tried.wait()
        return self.value


class Disks:
    """All disks of *config*; made by `open_disks`.

    known: the sizes of those that the mount shows already, in a successor; None at a first mount. inode: of a disk by its
    name. on_new: called with a disk that is open and that the mount does not show yet. refused: reasons by name, of disks
    that are not opened. on_opening: called with a disk's name and whether it is being opened. on_resume: with the inode of
    one that is open now, for each of the requests that waited for it. forced_stop: set when what hangs is not to be
    waited for any more.
    """

    def __init__(
        self,
        config: Config,
        mountpoint: Path | None,
        survivors: Survivors,
        known: Mapping[str, int] | None = None,
        refused: Mapping[str, str] | None = None,
        inode: Callable[[str], int] | None = None,
        on_opening: Callable[[str, bool], None] = lambda name, opening: None,
        on_resume: Callable[[int], None] = lambda inode: None,
        forced_stop: trio.Event | None = None,
    ) -> None:
        self._config = config
        self._mountpoint = mountpoint
        self._survivors = survivors
        self._known = known
        self._refused = refused or {}
        self._inode = inode or (lambda name: FIRST_INODE + list(config.disks).index(name))
        self._on_opening = on_opening
        self._forced_stop = trio.Event() if forced_stop is None else forced_stop
        self.on_new: Callable[[Disk], None] = lambda disk: None
        self.disks: dict[str, Disk] = {}
        self.problems: list[tuple[str, str]] = []  # what could not be opened at a first mount, and why
        self.failures: list[Exception] = []  # met while a part was closed
        self._pools: dict[str, Part[Pool]] = {name: Part() for name in sorted(_used_pools(config))}
        used = {disk.image for disk in config.disks.values()}
        self._images: dict[str, Part[Layer]] = {name: Part() for name in config.images if name in used}
        self._tried = {name: trio.Event() for name in config.disks}
        self._attempts: dict[trio.CancelScope, trio.Event] = {}  # to open something, and who ends them
        self._closing = {kind: trio.Event() for kind in ("pool", "image", "disk")}
        for name, size in (known or {}).items():
            if name in config.disks:
                resume = partial(on_resume, self._inode(name))
                self.disks[name] = self._make(config.disks[name], Unopened(name, size, resume))

    @property
    def pools(self) -> list[Pool]:
        """Those that are open."""
        return [part.value for part in self._pools.values() if part.value is not None]

    async def wait_tried(self) -> None:
        """Until every disk is open or is known not to be, for now."""
        for tried in self._tried.values():
            await tried.wait()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Opens everything; at the end closes disks, then images, then pools.

        Raises: StoreError with one line for all that could not be opened at a first mount.
        """
        async with trio.open_nursery() as pools, self._closing_after("pool"):
            for name, pool in self._pools.items():
                pools.start_soon(self._run_part, pool, f"pools.{name}", self._open_pool, self._config.pools[name])
            async with trio.open_nursery() as images, self._closing_after("image"):
                for name, image in self._images.items():
                    spec = self._config.images[name]
                    images.start_soon(self._run_part, image, f"images.{name}", self._open_image, spec)
                async with trio.open_nursery() as disks, self._closing_after("disk"):
                    for disk in self._config.disks.values():
                        disks.start_soon(self._run_disk, disk)
                    if self._known is None:
                        await self.wait_tried()
                        self._raise_problems()
                    yield
        if self.failures:
            raise self.failures[0]

    @asynccontextmanager
    async def _closing_after(self, kind: str) -> AsyncIterator[None]:
        """Tell the tasks of that kind at the end that they may close; their nursery waits for them."""
        try:
            yield
        finally:
            self._closing[kind].set()
            for scope in list(self._attempts):
                if self._attempts[scope] is self._closing[kind]:
                    scope.cancel()

    def _raise_problems(self) -> None:
        config = self._config
        order = [f"pools.{name}" for name in config.pools] + [f"images.{name}" for name in config.images]
        order += list(config.disks)
        if self.problems:
            lines = [line for _, line in sorted(self.problems, key=lambda problem: order.index(problem[0]))]
            raise StoreError(str(config.file), "\n".join(lines))

    # ---- tasks

    async def _run_part(
        self, part: Part[T], where: str, open_it: Callable[[AsyncExitStack, object], Awaitable[T | None]], spec: object
    ) -> None:
        """A pool or an image: open until nobody needs it. In a successor it is tried until it opens."""
        kind = "pool" if isinstance(spec, PoolSpec) else "image"

        async def attempt(stack: AsyncExitStack) -> bool:
            part.value = await open_it(stack, spec)
            if part.value is None and self._known is not None:
                return False
            part.tried.set()
            return True

        await self._try(where, attempt, self._closing[kind], lambda reason, patient: None)
        part.tried.set()

    async def _run_disk(self, spec: DiskSpec) -> None:
        disk = self.disks.get(spec.name)
        unopened = disk.top if disk is not None else None
        assert unopened is None or isinstance(unopened, Unopened)
        if spec.name in self._refused:
            if unopened is not None:
                unopened.refuse(self._refused[spec.name])
            self._tried[spec.name].set()
            return

        async def attempt(stack: AsyncExitStack) -> bool:
            top = await self._open_disk(stack, spec)
            if top is None:
                return False
            self._show(spec, top, unopened)
            self._tried[spec.name].set()
            return True

        def failed(reason: str, patient: bool) -> None:
            self._tried[spec.name].set()
            if unopened is not None:
                (unopened.wait if patient else unopened.refuse)(reason)

        try:
            await self._try(spec.name, attempt, self._closing["disk"], failed)
        finally:
            self._tried[spec.name].set()

    async def _try(
        self,
        where: str,
        attempt: Callable[[AsyncExitStack], Awaitable[bool]],
        closing: trio.Event,
        failed: Callable[[str, bool], None],
    ) -> None:
        """Open a part with *attempt* (False: what it stands on will not be there), and close it after *closing*.

        failed: told the reason of each failure, and whether it is too early to give up.
        """
        since, delay, said = trio.current_time(), FIRST_DELAY_S, ""
        is_open = False
        while not closing.is_set():
            try:
                with trio.CancelScope() as scope:
                    self._attempts[scope] = closing
                    async with AsyncExitStack() as stack:
                        is_open = await attempt(stack)
                        del self._attempts[scope]
                        if is_open:
                            await closing.wait()
                return
            except Exception as exc:
                error = unwrap(exc)
                if is_open:
                    assert isinstance(error, Exception)
                    self.failures.append(error)
                    if not isinstance(error, CachefsError):
                        self._note_bug(where)
                        raise
                    return
                if not isinstance(error, StoreError):
                    self._note_bug(where)
                    raise
            finally:
                self._attempts.pop(scope, None)
            if self._known is None:
                self.problems.append((where, str(error)))
                return
            patient = isinstance(error, LayoutError) or trio.current_time() - since < PATIENCE_S
            failed(str(error), patient)
            if str(error) != said and trio.current_time() - since > LONGEST_DELAY_S:
                said = str(error)
                log.error("%s cannot be opened: %s; it is tried again", where, error)
            with trio.move_on_after(delay):
                await closing.wait()
            delay = min(LONGEST_DELAY_S, delay * 1.5)

    def _note_bug(self, where: str) -> None:
        """The daemon is about to die of what *where* met: log it, and leave word of the disk that it was."""
        log.critical("%s failed on a bug in cachefs; please report this:", where, exc_info=True)
        if where in self.disks:
            self._on_opening(where, True)

    # ---- opening

    async def _open_pool(self, stack: AsyncExitStack, spec: object) -> Pool:
        assert isinstance(spec, PoolSpec)
        keys = spec.options
        refuse_inside(self._mountpoint, self._config.state_dir, spec)
        return await stack.enter_async_context(
            open_pool(
                keys.path,
                spec.name,
                quota=keys.quota,
                min_free=keys.min_free,
                evict=keys.evict,
                block_size=keys.block_size,
                direct=keys.direct,
                patience_s=keys.cache_timeout,
                survivors=self._survivors,
            )
        )

    async def _open_image(self, stack: AsyncExitStack, spec: object) -> Layer | None:
        assert isinstance(spec, ImageSpec)
        env = await self._environment(spec.name, spec.layers, writable=False)
        if env is None:
            return None
        refuse_inside(self._mountpoint, self._config.state_dir, *spec.layers, spec.backend)
        return await open_stack(stack, spec.layers, spec.backend, env)

    async def _open_disk(self, stack: AsyncExitStack, spec: DiskSpec) -> Layer | None:
        bottom = spec.backend if spec.image is None else await self._images[spec.image].wait()
        env = await self._environment(spec.name, spec.layers, writable=spec.writable)
        if env is None or bottom is None:
            return None  # the line of its pool or image says why
        refuse_inside(
            self._mountpoint, self._config.state_dir, *spec.layers, *((spec.backend,) if spec.backend else ())
        )
        self._on_opening(spec.name, True)
        try:
            return await open_stack(stack, spec.layers, bottom, env)
        finally:
            self._on_opening(spec.name, False)

    async def _environment(self, owner: str, layers: tuple[LayerSpec, ...], *, writable: bool) -> Environment | None:
        """None when a pool of these layers is not going to be there."""
        pools = {name: await self._pools[name].wait() for name in _pools_of(layers)}
        there = {name: pool for name, pool in pools.items() if pool is not None}
        if len(there) < len(pools):
            return None
        return Environment(
            owner,
            self._config.state_dir,
            writable=writable,
            pools=there,
            survivors=self._survivors,
            forced_stop=self._forced_stop,
            is_successor=self._known is not None,
        )

    def _show(self, spec: DiskSpec, top: Layer, unopened: Unopened | None) -> None:
        disk = self.disks.get(spec.name)
        if disk is None or unopened is None:
            disk = self.disks[spec.name] = self._make(spec, top)
            self.on_new(disk)
            return
        if top.geometry.size != disk.size:
            raise StoreError(spec.name, f"has {top.geometry.size} bytes; while it is mounted it has {disk.size}")
        disk.top = top
        unopened.open(top)

    def _make(self, spec: DiskSpec, top: Layer) -> Disk:
        return Disk(
            name=spec.name,
            top=top,
            inode=self._inode(spec.name),
            writable=spec.writable,
            mode=spec.mode,
            uid=os.getuid() if spec.uid is None else spec.uid,
            gid=os.getgid() if spec.gid is None else spec.gid,
            page_cache=spec.page_cache,
        )


@asynccontextmanager
async def open_disks(config: Config, mountpoint: Path | None) -> AsyncIterator[tuple[list[Disk], list[Pool]]]:
    """Every disk of *config*, open, and the pools that they use. On exit all are flushed and closed, disks first.

    mountpoint: where they will be served, if they will: no store may lie in there.
    Raises: StoreError with one line for every disk or image that cannot be opened.
    """
    disks = Disks(config, mountpoint, Survivors())
    async with disks.running():
        yield [disks.disks[name] for name in config.disks], disks.pools


def _pools_of(layers: tuple[LayerSpec, ...]) -> Iterator[str]:
    return (layer.options.pool for layer in layers if isinstance(layer.options, CacheConfig))


def _used_pools(config: Config) -> set[str]:
    images = {disk.image for disk in config.disks.values()}
    stacks = [disk.layers for disk in config.disks.values()]
    stacks += [image.layers for name, image in config.images.items() if name in images]
    return {name for layers in stacks for name in _pools_of(layers)}
