"""The coalescer and direct files against the model: one by one and at the same time, with write-outs held and failing."""

from __future__ import annotations

import contextlib
import random
import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.errors import CachefsError
from cachefs.layers.base import Layer
from cachefs.testing.faults import Faults
from cachefs.testing.gate import open_in_random_order
from cachefs.testing.model import Model, Op, check_all, perform, run_one, run_overlapping
from cachefs.testing.stacks import Bench, Case, coalesce_layer
from cachefs.testing.strategies import changes, operations

CLUSTER = 64 << 10
SIZE = 6 * CLUSTER + 1000
SMALL = 2 * CLUSTER + 1000  # so that requests meet

SMALL_BUFFER = coalesce_layer(cluster="64KiB", buffer="360KiB", max_delay="1ms")
cases = st.sampled_from(
    [
        Case("coalesce", SIZE, SMALL_BUFFER),
        Case("coalesce-512", SIZE, SMALL_BUFFER, alignment=512),
        Case("coalesce-4096-slow", SIZE, SMALL_BUFFER, alignment=4096, slow=True),
        Case("coalesce-large", SIZE, coalesce_layer(cluster="1MiB", buffer="8MiB", max_delay="1h"), alignment=512),
        Case("coalesce-direct", SIZE, SMALL_BUFFER, backend="file", direct=True, on_disk=True),
        Case("direct", SIZE, backend="file", direct=True, on_disk=True),
    ]
)


@given(cases, st.lists(operations(SIZE, CLUSTER), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
async def test_disk_agrees_with_the_model_after_any_operations(case: Case, steps: list[Op]) -> None:
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir=None if case.on_disk else "/dev/shm") as folder:
        bench = Bench(case, Path(folder))
        model = Model(bench.content)
        async with bench.open() as stack:
            for step in steps:
                await run_one(stack.top, step, model)
                if step.length % 3 == 0:
                    await trio.lowlevel.checkpoint()  # write-outs go on
            await check_all(stack.top, model)
            await stack.top.flush()
            assert stack.outside() == model.content


overlapping = st.sampled_from(
    [
        Case("coalesce", SMALL, SMALL_BUFFER),
        Case("coalesce-512", SMALL, SMALL_BUFFER, alignment=512),
        Case("coalesce-4096-slow", SMALL, SMALL_BUFFER, alignment=4096, slow=True),
        Case("coalesce-direct", SMALL, SMALL_BUFFER, backend="file", direct=True, on_disk=True),
        Case("direct", SMALL, backend="file", direct=True, on_disk=True),
    ]
)
rounds = st.lists(
    st.lists(st.one_of(changes(SMALL, 4096), operations(SMALL, CLUSTER)), min_size=2, max_size=8),
    min_size=1,
    max_size=4,
)
HELD = ("read_into", "write", "trim", "zero", "extents", "flush")


@given(overlapping, rounds, st.integers(0, 1 << 32))
@settings(max_examples=80, deadline=None)
async def test_operations_at_the_same_time_leave_what_some_order_leaves(
    case: Case, rounds: list[list[Op]], seed: int
) -> None:
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir=None if case.on_disk else "/dev/shm") as folder:
        bench = Bench(case, Path(folder))
        model = Model(bench.content)
        async with bench.open() as stack:
            order = random.Random(seed)
            for ops in rounds:
                for op in HELD:
                    for nth in range(1, 6):
                        stack.gate.hold(op, nth=nth, after=order.random() < 0.5)
                await run_overlapping(stack.top, ops, model, lambda: open_in_random_order([stack.gate], order))
            await check_all(stack.top, model)
            await stack.top.flush()
            assert stack.outside() == model.content


@pytest.mark.logs("a write-out failed", "the last flush failed")
@given(st.lists(operations(SMALL, 4096), min_size=1, max_size=20), st.lists(st.booleans(), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
async def test_writes_below_that_fail_lose_nothing(steps: list[Op], fails: list[bool]) -> None:
    """Every failed flush or trim may be tried again; in the end all is there."""
    made: list[Faults] = []

    def between(backend: Layer) -> Layer:
        made.append(Faults(backend))
        return made[0]

    with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as folder:
        case = Case("coalesce", SMALL, coalesce_layer(cluster="64KiB", buffer="360KiB", max_delay="1h"), alignment=512)
        bench = Bench(case, Path(folder))
        model = Model(bench.content)
        async with bench.open(between) as stack:
            for nth, fail in enumerate(fails, 1):
                if fail:
                    for op in ("write", "trim", "zero"):
                        made[0].add(op, nth=nth)
            for step in steps:
                with contextlib.suppress(CachefsError):
                    await perform(stack.top, step)
                    model.apply(step)
                    continue
                made[0].rules.clear()
                await run_one(stack.top, step, model)
            made[0].rules.clear()
            await check_all(stack.top, model)
            await stack.top.flush()
            assert stack.outside() == model.content
