"""What many small trims at random places of a large overlay cost in memory: the block map, and what is to be punched."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import trio

from cachefs.backends.memory import Memory
from cachefs.graph import edge
from cachefs.layers.base import Environment
from cachefs.layers.cow import Cow, CowConfig
from cachefs.store.blockmap import State

SIZE, BLOCK = 1 << 40, 4096
ZEROES = 250_000

# Of the two planes, 32 MiB each for 1 TiB, zeroes touch one.
MAP_MEMORY = 64 << 20
# A tuple in a queue for each would be 25 MiB; one bit per 4 MiB of the disk is 32 KiB. The rest is the allocator's.
MORE_THAN_THE_MAP = 2 << 20


def own_memory() -> int:
    """Bytes of this process that no file and no memfd holds."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 10


@pytest.mark.slow
async def test_zeroes_whose_punches_are_held_up_take_no_more_than_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    punches = trio.Event()
    places = random.Random(20261121)
    async with Cow.open(CowConfig(), edge(Memory("vm1/memory", SIZE)), Environment("vm1", tmp_path)) as cow:
        store = cow.store

        async def held_look(*_: Any) -> Any:
            await punches.wait()
            return await look(*_)

        await store.wait_punched()
        look = store.data.extents
        monkeypatch.setattr(store.data, "extents", held_look)
        before = own_memory()
        for number in range(ZEROES):
            await cow.zero(places.randrange(SIZE // BLOCK) * BLOCK, BLOCK)
            if number % 1000 == 0:
                await trio.lowlevel.checkpoint()
        grown = own_memory() - before
        memfd = os.fstat(store.memory.descriptor).st_blocks * 512
        print(f"map {memfd / 2**20:.2f} MiB, beside it {grown / 2**20:.2f} MiB")
        assert memfd <= MAP_MEMORY
        assert grown <= MORE_THAN_THE_MAP
        assert store.map.zero.count(1) > ZEROES * 0.99  # a few hit the same block
        assert store.map.state(random.Random(20261121).randrange(SIZE // BLOCK)) is State.ZERO
        punches.set()
        with trio.fail_after(20):
            await store.wait_punched()
