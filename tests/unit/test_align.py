"""align: any byte range over a child that takes whole units; races with its read-modify-write, scripted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.testing.model import Model, Op, Trim, Write, Zero, check_possible, perform, read_all, run_one, write
from cachefs.testing.stacks import Bench, Case, Stack
from cachefs.testing.strategies import patterns

SIZE, UNIT = 130000, 4096


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with Bench(Case("align", SIZE, alignment=UNIT), tmp_path).open() as opened:
        yield opened


@pytest.mark.parametrize("op", ["read_into", "write"])
@pytest.mark.parametrize(
    "then",
    [
        (Write(2048, patterns(2, 100)),),
        (Write(0, patterns(2, UNIT)),),
        (Write(0, patterns(2, 2 * UNIT)), Trim(0, UNIT)),
        (Trim(0, UNIT),),
        (Zero(200, 100), Write(3000, patterns(3, 5000))),
    ],
    ids=lambda ops: "+".join(type(op).__name__ + str(op.length) for op in ops),
)
async def test_align_keeps_what_is_written_beside_its_read_modify_write(
    stack: Stack, op: str, then: tuple[Op, ...]
) -> None:
    before = await read_all(stack.top)
    first = Write(10, patterns(1, 100))
    held = stack.gate.hold(op, end=UNIT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(perform, stack.top, first)
        await held.wait_until_held()
        for other in then:
            nursery.start_soon(perform, stack.top, other)
            await wait_all_tasks_blocked()
        held.open()
    changes = [one for one in (first, *then) if isinstance(one, (Write, Trim, Zero))]
    check_possible(await read_all(stack.top), 0, changes, before, old_allowed=False)


async def test_align_writes_of_other_units_do_not_wait(stack: Stack) -> None:
    held = stack.gate.hold("read_into", end=UNIT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, stack.top, 10, b"x")
        await held.wait_until_held()
        with trio.fail_after(5):
            await write(stack.top, UNIT + 10, b"y")
        held.open()


@pytest.mark.parametrize(
    ("offset", "length", "reads"),
    [
        (0, UNIT, 0),
        (0, 10, 1),
        (10, 10, 1),
        (UNIT - 1, 2, 2),
        (UNIT, UNIT + 1, 1),
        (SIZE - 10, 10, 1),
        (SIZE // UNIT * UNIT, SIZE % UNIT, 0),
    ],
)
async def test_align_reads_each_unit_that_is_changed_in_part_once(
    stack: Stack, offset: int, length: int, reads: int
) -> None:
    model = Model(await read_all(stack.top))
    held = stack.gate.hold("read_into", once=False)
    held.open()
    await run_one(stack.top, Write(offset, patterns(1, length)), model)
    assert held.rule.hits == reads
    assert await read_all(stack.top) == model.content
