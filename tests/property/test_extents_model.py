"""Extents beside concurrent changes: what is reported as zeros reads as zeros, unless a change began before the reply."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.extent import Extent, ExtentKind
from cachefs.layers.cow import Cow
from cachefs.layers.extents import Extents
from cachefs.testing.gate import open_in_random_order
from cachefs.testing.model import Changing, Model, Write, check_all, perform, read
from cachefs.testing.stacks import Bench, Case, Stack, cache_layer, cow_layer, extents_layer, layers_of
from cachefs.testing.strategies import changes

BLOCK = 65536  # in which the memory backend keeps its data
SIZE = 6 * BLOCK + 1000
CONTENT = b"".join(bytes(BLOCK) if number % 2 else b"\x21" * BLOCK for number in range(7))[:SIZE]

kinds = st.sampled_from(
    [
        Case("extents", SIZE, extents_layer()),
        Case("extents-slow", SIZE, extents_layer(), slow=True),
        Case("extents-file", SIZE, extents_layer(), backend="file"),
        Case("extents-align", SIZE, extents_layer(), alignment=4096),
        Case("extents-cow", SIZE, extents_layer() + cow_layer()),
        Case("cow-extents", SIZE, cow_layer() + extents_layer()),
        Case("through-extents", SIZE, cache_layer("write-through") + extents_layer(), backend="file", block_size=4096),
    ]
)
rounds = st.lists(st.lists(changes(SIZE, BLOCK), min_size=1, max_size=4), min_size=1, max_size=3)
pauses = st.lists(st.integers(0, 6), min_size=1, max_size=12)


class Watched:
    """Writers and a mapper over one stack. zeros: what was reported as zeros and no change has begun upon since."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        # The extent cache answers reads of zeros itself: what really lies there is asked below it, too. Not below an overlay.
        layers = list(layers_of(stack.top))
        at = next(index for index, layer in enumerate(layers) if isinstance(layer, Extents))
        self.readers = [stack.top, *layers[at + 1 : at + 2]]
        if any(isinstance(layer, Cow) for layer in layers[:at]):
            self.readers.pop()
        self.under_way: list[Changing] = []
        self.begun: list[Changing] = []  # since the last question was asked
        self.zeros: list[Extent] = []

    async def change(self, op: Changing) -> None:
        self.under_way.append(op)
        self.begun.append(op)
        self.zeros = [one for one in self.zeros if not _overlap(one, op)]
        await perform(self.stack.top, op)
        self.under_way = [one for one in self.under_way if one is not op]

    async def map_and_look(self, pauses: list[int]) -> None:
        for pause in pauses:
            for _ in range(pause):
                await trio.lowlevel.checkpoint()
            await self.map()
            await self.look()

    async def map(self) -> None:
        offset = 0
        while offset < SIZE:
            self.begun = list(self.under_way)
            known = self.stack.top.try_extent(offset, SIZE - offset)
            found = [known] if known is not None else await self.stack.top.extents(offset, SIZE - offset)
            zeros = [one for one in found if one.kind is not ExtentKind.DATA]
            self.zeros += [one for one in zeros if not any(_overlap(one, op) for op in self.begun)]
            offset = found[-1].end

    async def look(self) -> None:
        for reader, extent in [(reader, extent) for reader in self.readers for extent in self.zeros]:
            got = await read(reader, extent.offset, extent.length)
            if extent in self.zeros:  # no change of it has begun while it was read
                assert not any(got), f"{extent} was reported as zeros"


def _overlap(extent: Extent, op: Changing) -> bool:
    return extent.offset < op.offset + op.length and op.offset < extent.end


@pytest.mark.slow
@given(kinds, rounds, pauses, st.integers(0, 1 << 32))
@settings(max_examples=30, deadline=None)
async def test_what_was_reported_as_zeros_reads_as_zeros(
    case: Case, rounds: list[list[Changing]], pauses: list[int], seed: int
) -> None:
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as folder:
        bench = Bench(case, Path(folder), content=CONTENT)
        async with bench.open() as stack:
            watched, order = Watched(stack), random.Random(seed)
            for ops in rounds:
                gates = [stack.gate, *([stack.file] if stack.file else [])]
                for nth in range(1, 5):
                    for op in ("extents", "write", "zero", "trim", "read_into"):
                        stack.gate.hold(op, nth=nth, after=order.random() < 0.5)
                    if stack.file and nth < 3:
                        stack.file.hold("write", nth=nth)
                async with trio.open_nursery() as opener:
                    opener.start_soon(open_in_random_order, gates, order)
                    async with trio.open_nursery() as nursery:
                        for op in ops:
                            nursery.start_soon(watched.change, op)
                        nursery.start_soon(watched.map_and_look, pauses)
                    opener.cancel_scope.cancel()
            await watched.map()
            await watched.look()


@pytest.mark.slow
@given(kinds, st.lists(changes(SIZE, BLOCK), min_size=1, max_size=12))
@settings(max_examples=30, deadline=None)
async def test_disk_agrees_with_the_model_when_it_is_mapped_between_all_changes(
    case: Case, ops: list[Changing]
) -> None:
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as folder:
        bench = Bench(case, Path(folder), content=CONTENT)
        model = Model(bench.content)
        async with bench.open() as stack:
            for op in [Write(0, b"x"), *ops]:
                await check_all(stack.top, model)
                await perform(stack.top, op)
                model.apply(op)
            await check_all(stack.top, model)
