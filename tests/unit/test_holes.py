"""What is known of an image's extents across restarts: kept with the image in the pool, believed only when it is sound."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.backends.memory import CHUNK, Memory
from cachefs.errors import FormatError
from cachefs.extent import Extent, ExtentKind, merge_extents
from cachefs.graph import edge
from cachefs.layers import extents as module
from cachefs.layers.base import Environment, Layer
from cachefs.layers.cache import Cache, CacheConfig
from cachefs.layers.extents import Extents, ExtentsConfig
from cachefs.pool import holes
from cachefs.pool.pool import Pool, open_pool
from cachefs.store.identity import Identity
from cachefs.testing.caches import disk_bytes
from cachefs.testing.wrapper import SlowOnly, Wrapper

SIZE = 64 * CHUNK
BASE = Identity("file", {"inode": "7"})
DATA, ZERO, HOLE = ExtentKind


class Asked(Wrapper):
    def __init__(self, child: Layer) -> None:
        super().__init__(child)
        self.questions = 0

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        self.questions += 1
        return await self.child.extents(offset, length, limit)


@asynccontextmanager
async def opened(
    pool: Pool | None, identity: Identity = BASE, *, filled: int = 1, writable: bool = False
) -> AsyncIterator[tuple[Extents, Asked]]:
    """The layer over a base of which every second chunk holds *filled*, in a stack with a cache in *pool*."""
    memory = Memory("disk/memory", SIZE)
    for at in range(0, SIZE, 2 * CHUNK):
        memory.try_write(at, memoryview(bytes([filled]) * CHUNK))
    memory.identity = identity
    if not writable:
        memory.caps = type(memory.caps).FLUSH | type(memory.caps).EXTENTS
    asked = Asked(SlowOnly(memory))
    env = Environment("disk", Path("/nonexistent"), pool=pool)
    async with Extents.open(ExtentsConfig(), edge(asked), env) as layer:
        yield layer, asked


async def mapped(layer: Extents) -> list[Extent]:
    found: list[Extent] = []
    while not found or found[-1].end < SIZE:
        at = found[-1].end if found else 0
        found += await layer.extents(at, SIZE - at)
    return merge_extents(found)


async def test_second_map_asks_nothing_also_after_a_restart(folder: Path) -> None:
    async with open_pool(folder / "pool", "node", quota=16 << 20) as pool, opened(pool) as (layer, asked):
        first = await mapped(layer)
        assert await mapped(layer) == first
        assert asked.questions == 1
    async with open_pool(folder / "pool", "node", quota=16 << 20) as pool, opened(pool) as (layer, asked):
        assert await mapped(layer) == first
        assert asked.questions == 0
        buffer = bytearray(b"\xa5" * 10)
        assert layer.try_read_into(CHUNK, memoryview(buffer))
        assert buffer == bytes(10)


async def test_what_is_known_is_written_from_time_to_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = trio.Event()
    save = holes.HolesFile.save

    async def watched_save(file: holes.HolesFile, extents: Iterable[Extent]) -> bool:
        done = await save(file, extents)
        saved.set()
        return done

    monkeypatch.setattr(module, "SAVE_AFTER_S", 0.001)
    monkeypatch.setattr(holes.HolesFile, "save", watched_save)
    async with open_pool(folder / "pool", "node", quota=16 << 20) as pool, opened(pool) as (layer, _):
        (image,) = pool.images.values()
        assert not (image.path / holes.NAME).exists()
        await mapped(layer)
        await saved.wait()
        content = (image.path / holes.NAME).read_bytes()
        assert holes.decode(content, "", BASE, SIZE) == merge_extents(layer.known.snapshot())


async def test_disk_that_may_be_written_keeps_nothing_on_disk(folder: Path) -> None:
    async with open_pool(folder / "pool", "node", quota=16 << 20) as pool:
        async with opened(pool, writable=True) as (layer, _):
            await mapped(layer)
        assert not pool.images


async def test_base_that_does_not_outlive_the_daemon_keeps_nothing_on_disk(folder: Path) -> None:
    async with open_pool(folder / "pool", "node", quota=16 << 20) as pool:
        async with opened(pool, Identity("memory", {})) as (layer, _):
            await mapped(layer)
        assert not pool.images


async def test_image_shares_its_directory_with_the_cache_and_goes_with_it(folder: Path) -> None:
    async with open_pool(folder / "pool", "node", quota=16 << 20) as pool:
        async with opened(pool) as (layer, _):
            env = Environment("disk", folder, pools={"node": pool})
            async with Cache.open(CacheConfig(pool="node"), edge(layer), env) as cache:
                await mapped(layer)
                assert list(pool.images.values()) == [cache.image]
        assert (cache.image.path / holes.NAME).exists()
        used = pool.account.used
        await pool.drop(cache.image)
        assert not cache.image.path.exists()
        assert pool.account.used < used
    async with open_pool(folder / "pool", "node", quota=16 << 20) as pool, opened(pool) as (layer, asked):
        await mapped(layer)
        assert asked.questions == 1


@pytest.mark.logs("is about another image")
async def test_what_was_known_of_another_base_is_not_believed(folder: Path) -> None:
    """The same directory, as if somebody had put the file there."""
    async with open_pool(folder / "pool", "node", quota=16 << 20) as pool, opened(pool) as (layer, _):
        await mapped(layer)
        (image,) = pool.images.values()
    foreign = holes.encode(Identity("file", {"inode": "8"}), SIZE, [Extent(0, SIZE, HOLE)])
    (image.path / holes.NAME).write_bytes(foreign)
    async with open_pool(folder / "pool", "node", quota=16 << 20) as pool, opened(pool) as (layer, asked):
        assert (await mapped(layer))[0] == Extent(0, CHUNK, DATA)
        assert asked.questions == 1


@pytest.mark.logs("is forgotten, and the backend is asked again")
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content + bytes(16),
        lambda content: b"X" + content[1:],
        lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
        lambda content: content[:-8] + bytes([content[-8] ^ 4]) + content[-7:],
        lambda content: holes.MAGIC + _summed(b"\x02\0\0\0" + content[16:]),
    ],
    ids=["empty", "head", "short", "long", "magic", "identity", "run", "version"],
)
async def test_damaged_file_is_dropped_and_the_backend_asked(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    async with open_pool(folder / "pool", "node", quota=16 << 20) as pool, opened(pool) as (layer, _):
        first = await mapped(layer)
        (image,) = pool.images.values()
    path = image.path / holes.NAME
    path.write_bytes(damage(path.read_bytes()))
    async with open_pool(folder / "pool", "node", quota=16 << 20) as pool, opened(pool) as (layer, asked):
        assert len(layer.known) == 0
        assert await mapped(layer) == first
        assert asked.questions == 1
    async with open_pool(folder / "pool", "node", quota=16 << 20) as pool, opened(pool) as (layer, asked):
        assert await mapped(layer) == first
        assert asked.questions == 0


def _summed(body: bytes) -> bytes:
    return zlib.crc32(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(
    "runs",
    [
        [Extent(0, 10, HOLE), Extent(5, 10, DATA)],
        [Extent(SIZE - 1, 2, HOLE)],
        [Extent(0, 0, HOLE), Extent(0, 5, DATA)],
    ],
    ids=["overlap", "beyond", "empty"],
)
def test_runs_that_cannot_be_are_refused_though_the_sum_is_right(runs: list[Extent]) -> None:
    with pytest.raises(FormatError, match="that cannot be"):
        holes.decode(holes.encode(BASE, SIZE, runs), "", BASE, SIZE)


async def test_its_room_counts_under_the_quota_and_is_given_back(folder: Path) -> None:
    async with open_pool(folder / "pool", "node", quota=16 << 20) as pool, opened(pool) as (layer, _):
        (image,) = pool.images.values()
        empty = pool.account.used
        file = holes.HolesFile(image)
        for runs in (3000, 10, 5000):
            assert await file.save([Extent(at * 8, 4, HOLE) for at in range(runs)])
            room = -(-os.stat(image.path / holes.NAME).st_size // 4096) * 4096
            assert pool.account.used == empty + room
            assert disk_bytes(folder / "pool") <= pool.account.used
        full = pool.account.free // 4096 * 4096
        assert pool.account.take(full)
        assert not await file.save([Extent(at * 8, 4, HOLE) for at in range(9000)])
        pool.account.give_back(full)
        del layer
    async with open_pool(folder / "pool", "node", quota=16 << 20) as pool:
        assert pool.account.used == empty + room


async def test_two_stacks_over_one_image_take_turns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, begun, may_go_on = holes._replace_now, list[Path](), threading.Event()

    def held_replace(path: Path, content: bytes) -> None:
        begun.append(path)
        assert may_go_on.wait(20)
        replace(path, content)

    monkeypatch.setattr(holes, "_replace_now", held_replace)
    made = open_pool(folder / "pool", "node", quota=16 << 20, patience_s=30)
    async with made as pool, opened(pool), opened(pool):
        (image,) = pool.images.values()
        empty = pool.account.used
        known = [[Extent(at * 8, 4, HOLE) for at in range(runs)] for runs in (4000, 30, 9000)]
        async with trio.open_nursery() as nursery:
            for runs in known:
                nursery.start_soon(holes.HolesFile(image).save, runs)
            await wait_all_tasks_blocked(0.2)
            assert len(begun) <= 1
            may_go_on.set()
        content = (image.path / holes.NAME).read_bytes()
        assert holes.decode(content, "", BASE, SIZE) in known
        assert pool.account.used == empty + -(-len(content) // 4096) * 4096


@pytest.mark.logs("cannot be written")
async def test_file_that_cannot_be_written_costs_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_pool(folder / "pool", "node", quota=16 << 20) as pool, opened(pool) as (layer, _):
        (image,) = pool.images.values()

        def fail(*_: object) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(holes, "_replace_now", fail)
        await mapped(layer)
        assert not await holes.HolesFile(image).save(layer.known.snapshot())
        assert (await mapped(layer))[1] == Extent(CHUNK, CHUNK, HOLE)


async def test_what_a_crash_left_of_a_new_file_is_deleted(folder: Path) -> None:
    async with open_pool(folder / "pool", "node", quota=16 << 20) as pool, opened(pool) as (layer, _):
        first = await mapped(layer)
        (image,) = pool.images.values()
    (image.path / holes.TEMPORARY).write_bytes(b"half")
    async with open_pool(folder / "pool", "node", quota=16 << 20) as pool, opened(pool) as (layer, asked):
        assert not (image.path / holes.TEMPORARY).exists()
        assert await mapped(layer) == first
        assert asked.questions == 0


def test_golden_file_of_version_1_is_read() -> None:
    path = Path(__file__).parents[1] / "crash" / "data" / "extents-v1.bin"
    base = Identity("nbd", {"export": "debian12", "size": str(1 << 34), "content sample": "00ff"})
    assert holes.decode(path.read_bytes(), "", base, 1 << 34) == [
        Extent(0, 1 << 20, DATA),
        Extent(1 << 20, 4096, ZERO),
        Extent((1 << 34) - 5, 5, HOLE),
    ]
