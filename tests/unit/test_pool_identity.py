"""Whose image in a pool is whose: what is shared, what never is, and what is not believed after a crash."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cachefs.backends.memory import Memory
from cachefs.graph import edge
from cachefs.layers.base import Environment
from cachefs.layers.cache import Cache, CacheConfig
from cachefs.pool.pool import Pool, open_pool
from cachefs.store.identity import Identity

SIZE = 1 << 20
FILE = Identity("file", {"size": str(SIZE), "modification time": "1", "inode": "2"})
OTHER_FILE = Identity("file", {"size": str(SIZE), "modification time": "3", "inode": "2"})
DEVICE = Identity("block-device", {"size": str(SIZE), "content sample": "abcd"})
MEMORY = Identity("memory", {"size": str(SIZE)})


@asynccontextmanager
async def cached(
    pool: Pool, owner: str, identity: Identity, fill: bytes, mode: str = "read-only"
) -> AsyncIterator[tuple[Cache, Memory]]:
    """A cache over a base that is full of *fill* and says that it is *identity*."""
    base = Memory(owner, SIZE, 1, {})
    await base.write(0, memoryview(fill * SIZE))
    base.identity = identity
    env = Environment(owner, Path("/nonexistent"), pools={"node": pool})
    config = CacheConfig.model_validate({"pool": "node", "mode": mode})
    async with Cache.open(config, edge(base), env) as cache:
        yield cache, base


async def first_byte(cache: Cache) -> bytes:
    buffer = bytearray(1)
    await cache.read_into(0, memoryview(buffer))
    await cache.image.wait_installed()
    return bytes(buffer)


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        pytest.param(FILE, FILE, True, id="one-file"),
        pytest.param(FILE, OTHER_FILE, False, id="two-files"),
        pytest.param(MEMORY, MEMORY, False, id="memory"),
        pytest.param(DEVICE, DEVICE, False, id="two-devices-with-one-sample"),
    ],
)
async def test_only_what_is_known_to_be_the_same_is_shared(
    folder: Path, one: Identity, other: Identity, shared: bool
) -> None:
    async with (
        open_pool(folder / "pool", "node", quota=16 << 20) as pool,
        cached(pool, "a", one, b"a") as (first, _),
        cached(pool, "b", other, b"a" if shared else b"b") as (second, _),
    ):
        assert await first_byte(first) == b"a"
        assert await first_byte(second) == (b"a" if shared else b"b")
        assert (first.image is second.image) is shared
        assert second.fetches == (0 if shared else 1)


async def test_a_device_finds_its_image_again(folder: Path) -> None:
    for fetches in (1, 0):
        async with (
            open_pool(folder / "pool", "node", quota=16 << 20) as pool,
            cached(pool, "a", DEVICE, b"a") as (cache, _),
        ):
            assert await first_byte(cache) == b"a"
            assert cache.fetches == fetches


@pytest.mark.parametrize("identity", [FILE, DEVICE], ids=["file", "device"])
async def test_nothing_that_was_written_through_is_believed_after_a_crash(folder: Path, identity: Identity) -> None:
    """BUG: the pool's map on disk still had the block's checksum from before the write, and the identity was the same."""
    async with (
        open_pool(folder / "pool", "node", quota=16 << 20) as pool,
        cached(pool, "a", identity, b"a", "write-through") as (cache, _),
    ):
        assert await first_byte(cache) == b"a"
        await cache.image.sync()
        await cache.write(0, memoryview(b"b"))
        shutil.copytree(folder / "pool", folder / "crashed")
    for mode in ("write-through", "read-only"):
        async with (
            open_pool(folder / "crashed", "node", quota=16 << 20) as pool,
            cached(pool, "a", identity, b"b", mode) as (cache, _),
        ):
            assert await first_byte(cache) == b"b"


async def test_an_image_that_is_written_through_is_gone_when_it_is_closed(folder: Path) -> None:
    async with open_pool(folder / "pool", "node", quota=16 << 20) as pool:
        before = pool.account.used
        async with cached(pool, "a", FILE, b"a", "write-through") as (cache, _):
            assert await first_byte(cache) == b"a"
            assert pool.account.used > before
        assert (list(pool.images), pool.account.used) == ([], before)
        assert list((folder / "pool" / "images").iterdir()) == []


async def test_what_a_crash_left_of_it_goes_with_the_next_that_has_its_name(folder: Path) -> None:
    async with (
        open_pool(folder / "pool", "node", quota=16 << 20) as pool,
        cached(pool, "a", FILE, b"a", "write-through") as (cache, _),
    ):
        await first_byte(cache)
        shutil.copytree(folder / "pool", folder / "crashed")
    async with open_pool(folder / "crashed", "node", quota=16 << 20) as pool:
        assert len(pool.images) == 1
        async with cached(pool, "a", FILE, b"a", "write-through"):
            assert len(pool.images) == 1


@pytest.mark.logs("the base of a has changed")
async def test_a_base_that_changed_is_dropped_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for identity, fill in ((FILE, b"a"), (OTHER_FILE, b"b")):
        async with (
            open_pool(folder / "pool", "node", quota=16 << 20) as pool,
            cached(pool, "a", identity, fill) as (cache, _),
        ):
            assert await first_byte(cache) == fill
            assert len(pool.images) == 1
    assert "the base of a has changed: what the pool held of the old one is dropped" in caplog.text


async def test_what_is_expected_is_spared_probation(folder: Path) -> None:
    async with (
        open_pool(folder / "pool", "node", quota=16 << 20, block_size=4096) as pool,
        cached(pool, "a", FILE, b"a") as (cache, _),
    ):
        pool.policy.capacity = 8  # so that it is full at once
        for block in range(8):
            await cache.prefetch(block * 4096, 1)
            await cache.image.wait_installed()
        cache.image.blocks.expect(100, 101)
        for block in (100, 101):
            await cache.prefetch(block * 4096, 1)
            await cache.image.wait_installed()
        states = [cache.image.blocks.words[block] & 0b111 for block in (100, 101)]
        assert states == [1, 2]  # MAIN, RING
