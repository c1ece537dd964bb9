"""Overlays of every format version that was released open, with exactly their contents.

data/overlay-v<N>: `map` and `epoch` as they are, `data` with xz. Version 1: a disk of 4000 blocks of 4096 bytes over a memory
base; DATA are blocks 0, 5, 6, 8, 9 and 1919 to 1921, ZERO are 7 and 3999. Under 7, 3999 and the ABSENT block 100 lie bytes
that must not be seen. Block N of the data file holds the pattern of seed N % 250 + 1. Never written again: a new version
gets a folder of its own.
"""

from __future__ import annotations

import lzma
import tempfile
from pathlib import Path

from powercut import overlays

from cachefs.testing.model import Model, Trim, Write, check_all, run_one
from cachefs.testing.stacks import Bench, Case, cow_layer, read_overlay
from cachefs.testing.strategies import patterns
from cachefs.testing.writelog import materialise

BLOCK, BLOCKS = 4096, 4000
HELD = (0, 5, 6, 8, 9, 1919, 1920, 1921)
GOLDEN = Path(__file__).with_name("data") / "overlay-v1"


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
