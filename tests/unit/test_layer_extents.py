"""What overlay and cache make of their child's extents and their own state."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from cachefs.errors import PermanentError
from cachefs.extent import Extent, ExtentKind, merge_extents
from cachefs.layers.base import Layer
from cachefs.testing.caches import CacheBench
from cachefs.testing.model import read_all, write
from cachefs.testing.stacks import Bench, Case, cow_layer
from cachefs.testing.strategies import patterns
from cachefs.testing.wrapper import SlowOnly, Wrapper

DATA, ZERO, HOLE = ExtentKind
BLOCK = 4096
SIZE = 64 * BLOCK


class Asked(Wrapper):
    def __init__(self, child: Layer) -> None:
        super().__init__(child)
        self.questions: list[tuple[int, int]] = []

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        self.questions.append((offset, length))
        return await self.child.extents(offset, length, limit)


# ---- overlay


async def test_cow_asks_below_once_for_all_absent_runs_of_a_question(folder: Path) -> None:
    below: list[Asked] = []

    def between(child: Layer) -> Layer:
        below.append(Asked(SlowOnly(child)))
        return below[0]

    bench = Bench(Case("cow", SIZE, cow_layer()), folder, content=bytes(SIZE))
    async with bench.open(between) as stack:
        for block in range(1, 60, 2):
            await write(stack.top, block * BLOCK, b"\x21" * BLOCK)
        found = await stack.top.extents(0, SIZE)
        assert found[-1].end == SIZE
        assert [one.kind for one in found] == [HOLE, DATA] * 30 + [HOLE]
        assert below[0].questions == [(0, SIZE)]
        assert merge_extents(await stack.top.extents(BLOCK, BLOCK)) == [Extent(BLOCK, BLOCK, DATA)]
        assert len(below[0].questions) == 1


async def test_cow_tells_a_prefix_where_the_child_does(folder: Path) -> None:
    class Short(Wrapper):
        async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
            return [Extent(offset, min(length, 3 * BLOCK), HOLE)]

    bench = Bench(Case("cow", SIZE, cow_layer()), folder, content=bytes(SIZE))
    async with bench.open(lambda child: Short(SlowOnly(child))) as stack:
        await write(stack.top, BLOCK, b"\x21" * BLOCK)
        await write(stack.top, 3 * BLOCK, b"\x21" * BLOCK)
        assert await stack.top.extents(0, SIZE) == [
            Extent(0, BLOCK, HOLE),
            Extent(BLOCK, BLOCK, DATA),
            Extent(2 * BLOCK, BLOCK, HOLE),
            Extent(3 * BLOCK, BLOCK, DATA),
        ]


async def test_cow_tells_what_was_written_while_the_child_was_asked(folder: Path) -> None:
    bench = Bench(Case("cow", SIZE, cow_layer(), slow=True), folder, content=bytes(SIZE))
    async with bench.open() as stack:
        held = stack.gate.hold("extents", after=True)
        found: list[Extent] = []

        async def ask() -> None:
            found.extend(await stack.top.extents(0, SIZE))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await held.wait_until_held()
            await write(stack.top, 0, b"\x21" * BLOCK)
            held.open()
        assert found[0] == Extent(0, BLOCK, DATA)


# ---- cache


async def test_cache_tells_the_zeros_that_it_found_in_what_the_child_calls_data(folder: Path) -> None:
    content = bytearray(patterns(3, SIZE))
    content[8 * BLOCK : 16 * BLOCK] = bytes(8 * BLOCK)
    async with CacheBench(folder, bytes(content)).open() as opened:
        assert await opened.top.extents(0, SIZE) == [Extent(0, SIZE, DATA)]  # memory keeps 64 KiB pieces
        await read_all(opened.top)
        await opened.settled()
        for offset in range(0, SIZE, BLOCK):
            known = opened.top.try_extent(offset, SIZE - offset)
            assert known is not None
            is_zero = 8 * BLOCK <= offset < 16 * BLOCK
            assert (known.kind, known.offset) == (ZERO if is_zero else DATA, offset)
            assert (await opened.top.extents(offset, SIZE - offset))[0][::2] == known[::2]


async def test_cache_tells_what_it_holds_while_nothing_answers_below(folder: Path) -> None:
    async with CacheBench(folder, patterns(3, SIZE), slow=True).open() as opened:
        buffer = bytearray(10 * BLOCK)
        await opened.top.read_into(0, memoryview(buffer))
        await opened.settled()
        opened.disk.faults.add("extents", once=False)
        (held,) = await opened.top.extents(0, SIZE)
        assert (held.offset, held.kind) == (0, DATA)
        assert 10 * BLOCK <= held.end < SIZE
        with pytest.raises(PermanentError):
            await opened.top.extents(held.end, SIZE - held.end)
