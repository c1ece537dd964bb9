"""The matrix that the conformance suite runs over: layers over memory, backends, and the stacks of a configuration.

A `Case` says how a stack is built, a `Bench` is one of them in a folder: it can be opened, closed and opened again, and its
contents can be looked at from outside (`Stack.outside`), past the layers. Between the layers, `align` among them, and the
backend is always a `Gate`, which does nothing until a test tells it to. In a *slow* case every fast path is forbidden.
"""

from __future__ import annotations

import functools
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from cachefs.backends.file import File, FileConfig
from cachefs.backends.memory import CHUNK, Memory, MemoryConfig
from cachefs.backends.nbd import Nbd
from cachefs.backends.nbdoptions import NbdConfig
from cachefs.backends.qcow2 import Qcow2, Qcow2Config
from cachefs.config import LayerSpec, load
from cachefs.graph import open_stack
from cachefs.layers.base import Environment, Layer
from cachefs.layers.cache import Cache, CacheConfig
from cachefs.layers.checked import Checked
from cachefs.layers.coalesce import Coalesce, CoalesceConfig
from cachefs.layers.cow import Cow, CowConfig
from cachefs.layers.extents import ExtentsConfig
from cachefs.pool.pool import open_pool
from cachefs.survivor import Survivors
from cachefs.testing.gate import FileGate, Gate
from cachefs.testing.nbdserver import serve_image
from cachefs.testing.wrapper import SlowOnly

ODD_SIZE = 130000  # no multiple of anything
EVEN_SIZE = (1 << 20) + (64 << 10)  # more than the longest request


@functools.lru_cache(maxsize=4)
def pattern(size: int) -> bytes:
    """What a fresh disk of a case holds: no two sectors alike, no zeros, and one run of 64 KiB of nothing but zeros."""
    parts = [
        bytes((number >> 8 & 0x7F | 0x80, number & 0x7F | 0x80, 0x21, 0x7E)) * 128 for number in range(size // 512 + 1)
    ]
    content = bytearray(b"".join(parts)[:size])
    content[16384 : 16384 + 65536] = bytes(65536)
    return bytes(content[:size])


@dataclass(frozen=True)
class Case:
    """One stack. keeps: what was flushed is there when it is opened again. alignment: of a memory backend."""

    name: str
    size: int
    layers: tuple[LayerSpec, ...] = ()
    backend: str = "memory"
    alignment: int = 1
    slow: bool = False
    keeps: bool = True
    writable: bool = True
    direct: bool = False
    """The file of a file backend bypasses the page cache, and so does the pool."""
    on_disk: bool = False
    """In a folder on a real disk instead of tmpfs."""
    quota: int = 64 << 20
    """Of the pool that a cache in the stack lies in."""
    block_size: int = 64 << 10
    """Of that pool."""

    def __str__(self) -> str:
        return f"{self.name}-{self.size}" + ("-slow" if self.slow else "")


@dataclass
class Stack:
    """An open stack. gate: between the layers and the backend. file: the store that takes the writes, if it is a file."""

    top: Layer
    gate: Gate
    backend: Layer
    cow: Cow | None
    file: FileGate | None
    cache: Cache | None
    coalesce: Coalesce | None
    outside: Callable[[], bytes | None]


@dataclass
class Bench:
    """A case in a folder. *content* is what the disk holds at first."""

    case: Case
    folder: Path
    chunks: dict[int, bytearray] = field(default_factory=dict)

    content: bytes = b""
    survivors: Survivors = field(default_factory=Survivors)

    def __post_init__(self) -> None:
        self.content = self.content or pattern(self.case.size)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.image = self.folder / "base.raw"
        if self.case.backend in ("file", "nbd", "qcow2"):
            write_sparse(self.image, self.content)
            if self.case.backend == "qcow2":
                self.image = convert_image(self.image, self.folder / "base.qcow2")
        else:
            fill(self.chunks, self.content)

    @asynccontextmanager
    async def open(self, between: Callable[[Layer], Layer] | None = None) -> AsyncIterator[Stack]:
        """The stack, open. Closed and opened again it is what a new mount would see.

        between: puts a layer of the test's own between gate and backend.
        """
        case = self.case
        async with AsyncExitStack() as stack:
            pools = {}
            for name in {spec.options.pool for spec in case.layers if isinstance(spec.options, CacheConfig)}:
                pool = open_pool(
                    self.folder / "pools" / name,
                    name,
                    quota=case.quota,
                    block_size=case.block_size,
                    direct=case.direct,
                    survivors=self.survivors,
                )
                pools[name] = await stack.enter_async_context(pool)
            env = Environment(
                "disk", self.folder / "state", writable=case.writable, pools=pools, survivors=self.survivors
            )
            backend = await self._open_backend(stack, env)
            wrapped = between(Checked(backend)) if between is not None else Checked(backend)
            gate = Gate(SlowOnly(wrapped) if case.slow else wrapped)
            top = await open_stack(stack, case.layers, Checked(gate), env)
            cow = next((layer for layer in layers_of(top) if isinstance(layer, Cow)), None)
            cache = next((layer for layer in layers_of(top) if isinstance(layer, Cache)), None)
            coalesce = next((layer for layer in layers_of(top) if isinstance(layer, Coalesce)), None)
            file = None
            if cow is not None:
                file = FileGate(cow.store.data, cow.store.rounds, forbid_inline=case.slow)
            elif isinstance(backend, File):
                file = FileGate(backend._file, backend._rounds, forbid_inline=case.slow)
            found = SlowOnly(top) if case.slow else top
            yield Stack(found, gate, backend, cow, file, cache, coalesce, functools.partial(self._outside, cow))

    async def _open_backend(self, stack: AsyncExitStack, env: Environment) -> Layer:
        if self.case.backend == "memory":
            return Memory("disk/memory", self.case.size, self.case.alignment, self.chunks)
        env = replace(env, writable=env.writable and all(spec.options.passes_writes for spec in self.case.layers))
        if self.case.backend == "nbd":
            uri = stack.enter_context(serve_image(self.image, self.folder / "nbd.sock"))
            return await stack.enter_async_context(Nbd.open(NbdConfig(uri=uri), env))
        if self.case.backend == "qcow2":
            return await stack.enter_async_context(Qcow2.open(Qcow2Config(path=self.image), env))
        return await stack.enter_async_context(File.open(FileConfig(path=self.image, direct=self.case.direct), env))

    def _outside(self, cow: Cow | None) -> bytes | None:
        """The disk, read past all layers; call it after a flush. None where nothing durable is kept to look at."""
        if self.case.backend == "memory":
            below = unfold(self.chunks, self.case.size)
        elif self.case.backend == "qcow2":
            below = convert_image(self.image, self.folder / "outside.raw").read_bytes()
        else:
            below = self.image.read_bytes()
        if cow is None:
            return below
        return read_overlay(cow.store.path, below) if cow.store.durable else None


def layers_of(top: Layer) -> Iterator[Layer]:
    """*top*, its child, and so on down to the backend, edges included."""
    node: Layer | None = top
    while node is not None:
        yield node
        node = getattr(node, "child", None)


def fill(chunks: dict[int, bytearray], content: bytes) -> None:
    """Lay *content* into the chunks of a memory backend, zeros left out."""
    for at in range(0, len(content), CHUNK):
        part = content[at : at + CHUNK]
        if any(part):
            chunks[at // CHUNK] = bytearray(part.ljust(CHUNK, b"\0"))


def unfold(chunks: dict[int, bytearray], size: int) -> bytes:
    """The disk of *size* bytes that a memory backend holds."""
    parts = (bytes(chunks.get(index, bytes(CHUNK))) for index in range(-(-size // CHUNK)))
    return b"".join(parts)[:size]


def write_sparse(path: Path, content: bytes) -> None:
    """A raw image whose zeros are holes."""
    with path.open("wb") as file:
        for at in range(0, len(content), 65536):
            if any(content[at : at + 65536]):
                file.seek(at)
                file.write(content[at : at + 65536])
        file.truncate(len(content))


def convert_image(image: Path, target: Path) -> Path:
    """*image* as what *target*'s suffix says, made by qemu-img, whoever has it open. Skips the test where there is none."""
    if shutil.which("qemu-nbd") is None:
        pytest.skip("qemu-nbd and qemu-img are not installed")
    formats = ["-f", image.suffix[1:], "-O", target.suffix[1:]]
    subprocess.run(["qemu-img", "convert", "-U", *formats, str(image), str(target)], check=True)
    return target


def read_overlay(path: Path, base: bytes) -> bytes:
    """The disk that the overlay at *path* over *base* describes on disk, decoded by docs/formats/overlay.md alone."""
    data, block_map = (path / "data").read_bytes(), (path / "map").read_bytes()
    size, block_size = struct.unpack_from("<QI", block_map, 32)
    assert size == len(base) == len(data), "size of the overlay"
    content = bytearray(base)
    for at in range(4096, len(block_map), 512):
        sector = block_map[at : at + 512]
        first = (at - 4096) // 512 * 1920
        for number in range(1920):
            bit = 1 << number % 8
            where = slice((first + number) * block_size, min(size, (first + number + 1) * block_size))
            if sector[272 + number // 8] & bit:
                content[where] = bytes(where.stop - where.start)
            elif sector[32 + number // 8] & bit:
                content[where] = data[where]
    return bytes(content)


# ---- the matrix


def cow_layer(**options: object) -> tuple[LayerSpec, ...]:
    """The layers of a case that is an overlay with *options*, as in YAML."""
    return (LayerSpec("cow", CowConfig.model_validate(options), "layers[0].cow"),)


def cache_layer(mode: str = "read-only") -> tuple[LayerSpec, ...]:
    """A cache in the pool of the case."""
    return (LayerSpec("cache", CacheConfig.model_validate({"pool": "node", "mode": mode}), "layers[0].cache"),)


def extents_layer(**options: object) -> tuple[LayerSpec, ...]:
    return (LayerSpec("extents", ExtentsConfig.model_validate(options), "layers[0].extents"),)


def coalesce_layer(**options: object) -> tuple[LayerSpec, ...]:
    """A coalescer with *options*, as in YAML."""
    return (LayerSpec("coalesce", CoalesceConfig.model_validate(options), "layers[0].coalesce"),)


SMALL_QUOTA = 160 << 10  # room for a few blocks of 4 KiB: it evicts all the time


def _own_cases(size: int) -> Iterator[Case]:
    yield Case("memory", size)
    yield Case("file", size, backend="file", on_disk=True)
    yield Case("file-tmpfs", size, backend="file")
    yield Case("nbd", size, backend="nbd")
    if size % 512 == 0:
        yield Case("qcow2", size, backend="qcow2")
    yield Case("align512", size, alignment=512)
    yield Case("align4096", size, alignment=4096)
    yield Case("cow", size, cow_layer())
    yield Case("cow-64KiB", size, cow_layer(block_size="64KiB"))
    yield Case("cow-limit", size, cow_layer(limit="1GiB"))
    yield Case("cow-detect-zeroes", size, cow_layer(detect_zeroes=True))
    yield Case("cow-ephemeral", size, cow_layer(ephemeral=True), keeps=False)
    yield Case("cow-align", size, cow_layer(), alignment=4096)
    yield Case("cache", size, cache_layer(), writable=False)
    yield Case("cache-on-disk", size, cache_layer(), backend="file", writable=False, on_disk=True)
    yield Case("cache-small", size, cache_layer(), writable=False, quota=SMALL_QUOTA, block_size=4096)
    yield Case("cache-through", size, cache_layer("write-through"))
    yield Case("cache-through-file", size, cache_layer("write-through"), backend="file", block_size=4096)
    yield Case("cow-cache", size, cow_layer() + cache_layer())
    yield Case("cow-cache-small", size, cow_layer() + cache_layer(), quota=SMALL_QUOTA, block_size=4096)
    yield Case("cache-align", size, cow_layer() + cache_layer(), alignment=4096, block_size=4096)
    yield Case("extents", size, extents_layer())
    yield Case("extents-file", size, extents_layer(), backend="file", on_disk=True)
    yield Case("extents-align", size, extents_layer(), alignment=4096)
    yield Case("extents-cow", size, extents_layer() + cow_layer(block_size="64KiB"))
    yield Case("cow-extents-nbd", size, cow_layer() + extents_layer(), backend="nbd")
    yield Case("cow-cache-extents", size, cow_layer() + cache_layer() + extents_layer(), block_size=4096)
    yield Case("cache-through-extents", size, cache_layer("write-through") + extents_layer(), backend="file")
    yield Case("coalesce", size, coalesce_layer(cluster="64KiB", buffer="512KiB"))
    yield Case("coalesce-small", size, coalesce_layer(cluster="64KiB", buffer="320KiB"), alignment=512)
    yield Case("coalesce-large", size, coalesce_layer(cluster="4MiB", buffer="20MiB"), alignment=4096)
    yield Case("coalesce-nbd", size, coalesce_layer(cluster="64KiB", buffer="1MiB"), backend="nbd")
    yield Case("coalesce-read-only", size, coalesce_layer(), backend="file", writable=False)
    yield Case("coalesce-cow", size, coalesce_layer() + cow_layer(block_size="64KiB"))
    yield Case("direct", size, backend="file", direct=True, on_disk=True)
    yield Case("coalesce-direct", size, coalesce_layer(cluster="64KiB"), backend="file", direct=True, on_disk=True)
    yield Case("cow-direct", size, cow_layer(direct=True), on_disk=True)
    yield Case(
        "cow-cache-direct",
        size,
        cow_layer() + cache_layer(),
        "file",
        direct=True,
        on_disk=True,
        quota=SMALL_QUOTA,
        block_size=4096,
    )
    yield Case("cache-through-direct", size, cache_layer("write-through"), "file", direct=True, on_disk=True)
    yield Case("cow-on-disk", size, cow_layer(), backend="file", on_disk=True)


def _example_cases(config: Path, size: int) -> Iterator[Case]:
    """Every disk of the configuration file *config*, its paths put into the folder of the bench."""
    loaded = load(config)
    seen: list[Case] = []
    for disk in loaded.disks.values():
        image = loaded.images[disk.image] if disk.image is not None else None
        backend = image.backend if image is not None else disk.backend
        assert backend is not None
        layers = tuple(_moved(spec) for spec in (*disk.layers, *(image.layers if image else ())))
        alignment = backend.options.alignment if isinstance(backend.options, MemoryConfig) else 1
        keeps = not any(isinstance(spec.options, CowConfig) and spec.options.ephemeral for spec in layers)
        direct = isinstance(backend.options, FileConfig) and backend.options.direct
        case = Case(
            f"example-{disk.name}",
            size,
            layers,
            backend.kind,
            alignment,
            keeps=keeps,
            writable=disk.writable,
            direct=direct,
        )
        if not any(replace(case, name=other.name) == other for other in seen):  # two disks may have the same stack
            seen.append(case)
            yield case


def _moved(spec: LayerSpec) -> LayerSpec:
    """*spec* with the store where it lies when the configuration names none: below the folder of the bench."""
    if "path" not in type(spec.options).model_fields:
        return LayerSpec(spec.kind, spec.options, spec.kind)
    return LayerSpec(spec.kind, spec.options.model_copy(update={"path": None}), spec.kind)


def cases(example: Path) -> list[Case]:
    """The whole matrix; *example* is the configuration whose stacks belong to it.

    Every stack with both sizes and with the fast path allowed and forbidden; both forbidden and of even size only cow.
    """
    found = [case for size in (EVEN_SIZE, ODD_SIZE) for case in (*_own_cases(size), *_example_cases(example, size))]
    slow = [replace(case, slow=True) for case in found if case.size == ODD_SIZE or case.name == "cow"]
    return found + slow
