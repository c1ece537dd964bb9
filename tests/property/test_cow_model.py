"""The overlay against the model: any operations, one after the other with reopening, and at the same time."""

from __future__ import annotations

import random
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.testing.gate import open_in_random_order
from cachefs.testing.model import Model, Op, Read, check_all, run_one, run_overlapping
from cachefs.testing.stacks import Bench, Case, cow_layer
from cachefs.testing.strategies import changes, operations, ranges

SIZE, BLOCK, BIG_BLOCK = 130000, 4096, 65536
SMALL = 3 * BLOCK + 1000  # so that requests meet

REOPEN = "reopen"
kinds = st.sampled_from(
    [
        Case("cow", SIZE, cow_layer()),
        Case("cow-slow", SIZE, cow_layer(), slow=True),
        Case("cow-64KiB", SIZE, cow_layer(block_size="64KiB")),
        Case("cow-zeroes", SIZE, cow_layer(detect_zeroes=True)),
        Case("cow-file", SIZE, cow_layer(), backend="file"),
        Case("cow-align", SIZE, cow_layer(), alignment=4096),
        Case("cow-direct", SIZE, cow_layer(direct=True), on_disk=True),
        Case("align", SIZE, alignment=512),
    ]
)


@given(kinds, st.lists(st.one_of(operations(SIZE, BLOCK), st.just(REOPEN)), min_size=1, max_size=25))
@settings(max_examples=60, deadline=None)
async def test_disk_agrees_with_the_model_after_any_operations(case: Case, steps: list[Op | str]) -> None:
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir=None if case.on_disk else "/dev/shm") as folder:
        bench = Bench(case, Path(folder))
        model = Model(bench.content)
        async with AsyncExitStack() as opened:
            stack = await opened.enter_async_context(bench.open())
            for step in steps:
                if isinstance(step, str):
                    await opened.aclose()
                    stack = await opened.enter_async_context(bench.open())
                else:
                    await run_one(stack.top, step, model)
            await check_all(stack.top, model)
            await stack.top.flush()
            assert stack.outside() == model.content


overlapping_kinds = st.sampled_from(
    [
        Case("cow", SMALL, cow_layer()),
        Case("cow-slow", SMALL, cow_layer(), slow=True),
        Case("cow-8KiB-zeroes", SMALL, cow_layer(block_size="8KiB", detect_zeroes=True)),
        Case("cow-file", SMALL, cow_layer(), backend="file"),
        Case("cow-direct", SMALL, cow_layer(direct=True), on_disk=True),
        Case("cow-align", SMALL, cow_layer(), alignment=4096),
        Case("align", SMALL, alignment=4096),
    ]
)
rounds = st.lists(
    st.lists(st.one_of(changes(SMALL, BLOCK), changes(SMALL, BLOCK), operations(SMALL, BLOCK)), min_size=2, max_size=6),
    min_size=1,
    max_size=3,
)


@given(overlapping_kinds, rounds, st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
async def test_operations_at_the_same_time_leave_what_some_order_leaves(
    case: Case, rounds: list[list[Op]], seed: int
) -> None:
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir=None if case.on_disk else "/dev/shm") as folder:
        bench = Bench(case, Path(folder))
        model = Model(bench.content)
        async with bench.open() as stack:
            gates = [stack.gate, *([stack.file] if stack.file else [])]
            order = random.Random(seed)
            for ops in rounds:
                for nth in range(1, 7):
                    stack.gate.hold("read_into", nth=nth)
                    if stack.file and nth < 4:
                        stack.file.hold("write", nth=nth)
                await run_overlapping(stack.top, ops, model, lambda: open_in_random_order(gates, order))
            await check_all(stack.top, model)
            await stack.top.flush()
            assert stack.outside() == model.content


@given(st.data())
def test_ranges_lie_within_the_disk(data: st.DataObject) -> None:
    size, block = data.draw(st.integers(1, 200000)), data.draw(st.sampled_from((512, 4096, 65536)))
    offset, length = data.draw(ranges(size, block))
    assert offset >= 0
    assert length > 0
    assert offset + length <= size


async def test_the_model_itself_notices_a_lost_write() -> None:
    """A disk that forgets is told apart, or the tests above say nothing."""
    with tempfile.TemporaryDirectory(prefix="cachefs-") as folder:
        bench = Bench(Case("memory", SMALL), Path(folder))
        model = Model(bench.content)
        async with bench.open() as stack:
            await run_one(stack.top, Read(0, 100), model)
            bench.chunks[0][50] ^= 1
            with pytest.raises(AssertionError, match="byte 50 is"):
                await run_one(stack.top, Read(0, 100), model)
            with pytest.raises(AssertionError, match=r"byte 50 is .* touched by nobody"):
                await run_overlapping(stack.top, [Read(100, 5)], model)
