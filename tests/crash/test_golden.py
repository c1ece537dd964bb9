"""Overlays and pools of every format version that was released open, with exactly their contents.

data/overlay-v<N>: `map` and `epoch` as they are, `data` with xz. Version 1: a disk of 4000 blocks of 4096 bytes over a memory
base; DATA are blocks 0, 5, 6, 8, 9 and 1919 to 1921, ZERO are 7 and 3999. Under 7, 3999 and the ABSENT block 100 lie bytes
that must not be seen. Block N of the data file holds the pattern of seed N % 250 + 1.

data/pool-v1: the same files of one image in a pool, 500 blocks of 4096 bytes less 1000 bytes at the end, map sectors of 60
blocks. DATA are GOOD, with that pattern; 11, with a wrong byte; and 12, which holds what belongs into block 5, with that
one's checksum. ZERO are 7 and 498, EVICTING 9, SPOILED 10; under both, and under the ABSENT block 13, lie bytes that must not
be seen.

Never written again: a new version gets a folder of its own.
"""

from __future__ import annotations

import lzma
import tempfile
from pathlib import Path

import pytest
from powercut import overlays

from cachefs.backends.memory import Memory
from cachefs.graph import edge
from cachefs.layers.base import Environment
from cachefs.layers.cache import Cache, CacheConfig
from cachefs.pool.pool import Pool, digest_of, open_pool
from cachefs.store.identity import Identity
from cachefs.testing.model import Model, Trim, Write, check_all, run_one
from cachefs.testing.stacks import Bench, Case, cow_layer, read_overlay
from cachefs.testing.strategies import patterns
from cachefs.testing.writelog import materialise

BLOCK, BLOCKS = 4096, 4000
HELD = (0, 5, 6, 8, 9, 1919, 1920, 1921)
GOLDEN = Path(__file__).with_name("data") / "overlay-v1"

POOL = GOLDEN.with_name("pool-v1")
POOL_SIZE = 500 * BLOCK - 1000
GOOD = (0, 1, 5, 59, 60, 61, 119, 120, 499)
BASE = Identity("file", {"size": str(POOL_SIZE), "modification time": "1795219200000000000", "inode": "12345"})
DIGEST = "f29705f4cf91e80912152970d0eb95fb"


def on_block(block: int) -> Write:
    return Write(block * BLOCK, patterns(block % 250 + 1, BLOCK))


async def test_overlay_of_version_1_has_its_contents_and_can_be_written() -> None:
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as name:
        path = overlays(Path(name)) / "disk"
        files = {"map": (GOLDEN / "map").read_bytes(), "epoch": (GOLDEN / "epoch").read_bytes()}
        materialise({**files, "data": lzma.decompress((GOLDEN / "data.xz").read_bytes())}, path)
        bench = Bench(Case("cow", BLOCKS * BLOCK, cow_layer()), Path(name))
        model = Model(bench.content)
        for block in HELD:
            model.apply(on_block(block))
        for block in (7, 3999):
            model.apply(Trim(block * BLOCK, BLOCK))
        assert read_overlay(path, bench.content) == model.content
        async with bench.open() as stack:
            await check_all(stack.top, model)
            in_zero, in_absent = Write(7 * BLOCK + 100, b"zero"), Write(100 * BLOCK + 9, b"absent")
            for op in (in_zero, in_absent, Trim(0, BLOCK)):
                await run_one(stack.top, op, model)
            await check_all(stack.top, model)
        assert read_overlay(path, bench.content) == model.content
        async with bench.open() as stack:
            await check_all(stack.top, model)


def pool_of_version_1(folder: Path) -> Path:
    files = {name: (POOL / name).read_bytes() for name in ("map", "epoch")}
    materialise({**files, "data": lzma.decompress((POOL / "data.xz").read_bytes())}, folder / "images" / DIGEST)
    (folder / "images" / DIGEST / "label").write_text("golden")
    (folder / "pool").write_text("cachefs pool 1\n")
    return folder


async def read_through(pool: Pool) -> tuple[bytes, Cache]:
    """All of a disk over a base of 0xbb, through the pool."""
    base = Memory("base", POOL_SIZE, 1, {})
    await base.write(0, memoryview(b"\xbb" * POOL_SIZE))
    base.identity = BASE
    buffer = bytearray(POOL_SIZE)
    env = Environment("golden", Path("/nonexistent"), pools={"node": pool})
    async with Cache.open(CacheConfig(pool="node"), edge(base), env) as cache:
        for offset in range(0, POOL_SIZE, 16 * BLOCK):
            await cache.read_into(offset, memoryview(buffer)[offset : offset + 16 * BLOCK])
        await cache.image.wait_installed()
        return bytes(buffer), cache


@pytest.mark.logs(f"the block at {11 * BLOCK} disagrees", f"the block at {12 * BLOCK} disagrees")
@pytest.mark.parametrize("clean", [True, False], ids=["closed", "killed"])
async def test_pool_of_version_1_has_its_contents_and_is_mended(clean: bool) -> None:
    expected = bytearray(b"\xbb" * POOL_SIZE)
    for block in GOOD:
        where = slice(block * BLOCK, min(POOL_SIZE, (block + 1) * BLOCK))
        expected[where] = patterns(block % 250 + 1, where.stop - where.start)
    for block in (7, 498):
        expected[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as name:
        path = pool_of_version_1(Path(name))
        if clean:
            (path / "clean").touch()
        async with open_pool(path, "node", quota=16 << 20, block_size=BLOCK) as pool:
            assert list(pool.images) == [DIGEST] == [digest_of(BASE, POOL_SIZE, BLOCK)]
            await pool.images[DIGEST].wait_settled()
            content, cache = await read_through(pool)
            assert content == expected
            assert cache.image.corrupt_blocks == 2
            assert cache.fetched_bytes == POOL_SIZE - (len(GOOD) + 2) * BLOCK + 1000
        async with open_pool(path, "node", quota=16 << 20, block_size=BLOCK) as pool:
            content, cache = await read_through(pool)
            assert content == expected
            assert (cache.image.corrupt_blocks, cache.fetched_bytes) == (0, 0)
