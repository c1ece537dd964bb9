"""What a full pool costs in memory, and how long one takes to open; figures are printed, only the memory is judged."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cachefs.pool.pool import POOL_IMAGE, open_pool
from cachefs.pool.summap import BLOCKS_PER_SECTOR, SECTOR_MAGIC
from cachefs.store import files
from cachefs.store.files import Header
from cachefs.store.identity import Identity
from cachefs.store.sectors import BODY_SIZE, encode_sector

BLOCK = 64 << 10
FULL = 819_200  # blocks of 50 GiB
MOST_BYTES_PER_BLOCK = 24

MEASURE = """
import random, sys
from cachefs.pool.evict import Sieve
from cachefs.pool.readahead import ReadAhead
from cachefs.pool.summap import SumMap, working_size
from cachefs.survivor import SurvivorMemory
import uuid

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

blocks = int(sys.argv[1])
resident()
before = resident()
memory = SurvivorMemory("sums", 1, uuid.uuid4(), 1, working_size(blocks))
found = SumMap(memory.body, blocks)
policy = Sieve(blocks)
image = policy.add_image(blocks)
order = list(range(0, blocks, 16))
random.Random(1).shuffle(order)
for start in order:
    for block in range(start, min(blocks, start + 16)):
        found.set_data(block, block + 1000)
        policy.insert(image.base | block, 5)
del order
print((resident() - before) / len(policy))
"""


def test_full_pool_costs_at_most_24_bytes_of_memory_per_cached_block(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = 200_000
    ran = subprocess.run([sys.executable, "-c", MEASURE, str(blocks)], capture_output=True, text=True, check=True)
    each = float(ran.stdout)
    with capsys.disabled():
        print(f"\n{each:.1f} bytes per cached block", file=sys.stderr)
    assert each <= MOST_BYTES_PER_BLOCK


def make_full_pool(path: Path) -> None:
    """A pool that was closed in order, full of blocks; nothing lies in its data file, and nobody has noticed yet."""
    header = Header(FULL * BLOCK, BLOCK, Identity("file", {"inode": "7"}), format=POOL_IMAGE)
    image = path / "images" / "0123456789abcdef"
    image.parent.mkdir(parents=True)
    files.create(image, header)
    (image / "label").write_text("image")
    (path / "pool").write_bytes(b"cachefs pool 1\n")
    (path / "clean").touch()
    with (image / "map").open("r+b") as file:
        file.seek(files.HEADER_SIZE)
        for sector in range(-(-FULL // BLOCKS_PER_SECTOR)):
            inside = min(BLOCKS_PER_SECTOR, FULL - sector * BLOCKS_PER_SECTOR)
            file.write(encode_sector(SECTOR_MAGIC, 1, sector, os.urandom(8 * inside).ljust(BODY_SIZE, b"\0")))


@pytest.mark.slow
async def test_full_pool_of_50_gib_is_opened_again_with_all_it_holds(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_full_pool(folder / "pool")
    gc.collect()
    began = time.monotonic()
    async with open_pool(folder / "pool", "node", quota=52 << 30, patience_s=20) as pool:
        took = time.monotonic() - began
        assert len(pool.policy) >= FULL - 1
        assert pool.account.used > FULL * BLOCK
    with capsys.disabled():
        print(f"\nopened a pool of {FULL} blocks in {took:.2f} s", file=sys.stderr)
