"""What every layer and backend promises, as tests: see `cachefs.layers.base`.

    @pytest.mark.parametrize("case", cases(...), ids=str)
    class TestLayers(LayerContract): ...

What was written is looked for outside the layer: in the child, the file, the overlay on disk. A test is skipped only where
the stack lacks a capability; nobody overrides one (a test of the tests checks that).
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.errors import CachefsError, ReadOnlyError, RequestError
from cachefs.layers.base import MAX_IO, Caps, Layer
from cachefs.testing.cancel import cancel_everywhere
from cachefs.testing.model import (
    Extents,
    Flush,
    Model,
    Op,
    Read,
    Trim,
    Write,
    Zero,
    assert_same,
    check_all,
    check_extents,
    check_possible,
    perform,
    read,
    read_all,
    run_one,
    run_overlapping,
    write,
)
from cachefs.testing.stacks import Bench, Case, Stack, layers_of
from cachefs.testing.strategies import patterns
from cachefs.testing.wrapper import OPERATIONS, Yielding

SECTOR = 512
BLOCK = 64 << 10  # a multiple of the block of every case


def _require(stack: Stack, caps: Caps) -> None:
    if caps not in stack.top.caps:
        pytest.skip(f"{stack.top.name} cannot {caps.name}")


async def _check_outside(stack: Stack, model: Model) -> None:
    """What the model says is there, past all layers."""
    await stack.top.flush()
    outside = stack.outside()
    if outside is not None:
        assert_same(outside, model.content, 0)


def _mixture(size: int) -> list[Op]:
    """Changes and looks at all sorts of offsets."""
    return [
        Write(0, patterns(1, 512)),
        Write(5000, patterns(2, 3)),
        Trim(4096, 8192),
        Write(6000, patterns(3, 10000)),
        Zero(8191, 2),
        Write(65536 - 100, patterns(4, 200)),
        Trim(70000, 30000),
        Write(size - 1, b"\x11"),
        Write(40960, bytes(8192)),
        Read(4000, 70000),
        Zero(size - 5000, 5000),
        Write(size - 4097, patterns(5, 4097)),
        Extents(0, size),
        Extents(4097, 90000, limit=1),
        Flush(),
    ]


class LayerContract:
    """Parametrize a subclass with "case" (a `Case`)."""

    @pytest.fixture
    def bench(self, case: Case, tmp_path: Path) -> Iterator[Bench]:
        if case.on_disk or not Path("/dev/shm").is_dir():
            yield Bench(case, tmp_path / "bench")
            return
        with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as folder:
            yield Bench(case, Path(folder) / "bench")

    # ---- looking

    async def test_fresh_disk_reads_as_what_lies_below(self, bench: Bench) -> None:
        async with bench.open() as stack:
            assert stack.top.geometry.size == len(bench.content)
            await check_all(stack.top, Model(bench.content))

    async def test_reads_of_any_offset_and_length(self, bench: Bench) -> None:
        model = Model(bench.content)
        async with bench.open() as stack:
            for offset, length in ((0, 1), (511, 2), (4095, 4098), (15000, 70000), (len(bench.content) - 1, 1)):
                await run_one(stack.top, Read(offset, length), model)

    async def test_empty_requests_do_nothing(self, bench: Bench) -> None:
        nothing = memoryview(bytearray())
        async with bench.open() as stack:
            for offset in (0, 1, stack.top.geometry.size):
                await stack.top.read_into(offset, nothing)
                await stack.top.prefetch(offset, 0)
                if Caps.WRITE in stack.top.caps:
                    await stack.top.write(offset, nothing)
                    await stack.top.trim(offset, 0)
                    await stack.top.zero(offset, 0)
            await check_all(stack.top, Model(bench.content))

    async def test_requests_past_the_end_are_refused(self, bench: Bench) -> None:
        async with bench.open() as stack:
            size = stack.top.geometry.size
            for offset, length in ((size - 1, 2), (size, 1), (size + 4096, 1), (-1, 1)):
                buffer = memoryview(bytearray(length))
                assert not stack.top.try_read_into(offset, buffer)
                assert not stack.top.try_write(offset, buffer)
                with pytest.raises(RequestError):
                    await stack.top.read_into(offset, buffer)
                with pytest.raises(RequestError):
                    await stack.top.extents(offset, length)
                for refused in (stack.top.trim(offset, length), stack.top.write(offset, buffer)):
                    with pytest.raises(CachefsError):
                        await refused
            await check_all(stack.top, Model(bench.content))

    async def test_extents_may_be_asked_for_one_by_one(self, bench: Bench) -> None:
        async with bench.open() as stack:
            size, model = stack.top.geometry.size, Model(bench.content)
            for offset, length in ((0, size), (1, 1), (4097, 20000), (size - 1, 1)):
                for limit in (1, 3):
                    await run_one(stack.top, Extents(offset, length, limit), model)
                    await check_extents(stack.top, offset, length, model, limit)
            with pytest.raises(RequestError):
                await stack.top.extents(0, 0)

    async def test_a_hint_to_prefetch_changes_nothing(self, bench: Bench) -> None:
        async with bench.open() as stack:
            await stack.top.prefetch(0, stack.top.geometry.size)
            await stack.top.prefetch(4097, 1)
            await check_all(stack.top, Model(bench.content))

    # ---- changing

    async def test_read_only_stack_refuses_every_change(self, bench: Bench) -> None:
        async with bench.open() as stack:
            if Caps.WRITE in stack.top.caps:
                pytest.skip(f"{stack.top.name} can write")
            assert not stack.top.try_write(0, memoryview(b"x"))
            for refused in (stack.top.write(0, memoryview(b"x")), stack.top.trim(0, 1), stack.top.zero(0, 1)):
                with pytest.raises(ReadOnlyError):
                    await refused
            await _check_outside(stack, Model(bench.content))

    async def test_what_was_written_is_read_and_lies_in_the_store(self, bench: Bench) -> None:
        model = Model(bench.content)
        async with bench.open() as stack:
            _require(stack, Caps.WRITE)
            for seed, (offset, length) in enumerate(((0, 4096), (4097, 1), (8191, 4098), (131, 20000), (65530, 12)), 1):
                await run_one(stack.top, Write(offset, patterns(seed, length)), model)
            await check_all(stack.top, model)
            await _check_outside(stack, model)

    async def test_longest_request_and_the_whole_disk_at_once(self, bench: Bench) -> None:
        model = Model(bench.content)
        async with bench.open() as stack:
            _require(stack, Caps.WRITE)
            size = stack.top.geometry.size
            longest = min(size, MAX_IO)
            await run_one(stack.top, Write(size - longest, patterns(1, longest)), model)
            await check_all(stack.top, model)
            await run_one(stack.top, Write(0, patterns(2, size)), model)
            await check_all(stack.top, model)
            await _check_outside(stack, model)

    @pytest.mark.parametrize("clear", [Trim, Zero])
    async def test_what_was_cleared_reads_as_zeros(self, bench: Bench, clear: type[Trim | Zero]) -> None:
        model = Model(bench.content)
        async with bench.open() as stack:
            _require(stack, Caps.WRITE)
            size = stack.top.geometry.size
            await run_one(stack.top, Write(8192, patterns(1, 9000)), model)
            for offset, length in ((100000, size - 100000), (0, 4096), (9000, 1), (4095, 8195), (size - 1, 1)):
                await run_one(stack.top, clear(offset, length), model)
                await check_all(stack.top, model)
            await run_one(stack.top, Write(100100, patterns(2, 10)), model)
            await check_all(stack.top, model)
            await _check_outside(stack, model)

    async def test_any_mixture_agrees_with_the_model(self, bench: Bench) -> None:
        model = Model(bench.content)
        async with bench.open() as stack:
            _require(stack, Caps.WRITE)
            for op in _mixture(stack.top.geometry.size):
                await run_one(stack.top, op, model)
            await check_all(stack.top, model)
            await _check_outside(stack, model)

    async def test_what_was_flushed_is_there_when_opened_again(self, bench: Bench) -> None:
        model = Model(bench.content)
        async with bench.open() as stack:
            _require(stack, Caps.WRITE)
            for op in _mixture(stack.top.geometry.size):
                await run_one(stack.top, op, model)
            await stack.top.flush()
        async with bench.open() as stack:
            await check_all(stack.top, model if bench.case.keeps else Model(bench.content))

    async def test_what_was_written_is_flushed_by_closing(self, bench: Bench) -> None:
        model = Model(bench.content)
        async with bench.open() as stack:
            _require(stack, Caps.WRITE)
            await run_one(stack.top, Write(4000, patterns(1, 5000)), model)
        async with bench.open() as stack:
            await check_all(stack.top, model if bench.case.keeps else Model(bench.content))

    # ---- at the same time

    async def test_disjoint_writes_in_one_block_are_all_kept(self, bench: Bench) -> None:
        ops: list[Op] = [Write(at, patterns(1 + at // SECTOR, SECTOR)) for at in range(BLOCK, BLOCK + 8192, SECTOR)]
        async with bench.open() as stack:
            _require(stack, Caps.WRITE)
            await run_overlapping(stack.top, ops, Model(bench.content))

    async def test_write_survives_a_read_of_its_block_that_was_under_way(self, bench: Bench) -> None:
        model = Model(bench.content)
        async with bench.open() as stack:
            _require(stack, Caps.WRITE)
            held = stack.gate.hold("read_into")
            got = b""

            async def look() -> None:
                nonlocal got
                got = await read(stack.top, 0, 16384)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(look)
                await held.wait_until_held()
                nursery.start_soon(write, stack.top, 8192, patterns(1, SECTOR))
                await wait_all_tasks_blocked()  # it is done, or waits for what the read brings
                held.open()
            model.apply(Write(8192, patterns(1, SECTOR)))
            check_possible(got, 0, [Write(8192, patterns(1, SECTOR))], bench.content, old_allowed=True)
            await check_all(stack.top, model)

    async def test_overlapping_changes_leave_what_one_of_them_leaves(self, bench: Bench) -> None:
        ops: list[Op] = [
            Write(100, patterns(1, 9000)),
            Trim(4000, 3000),
            Write(4096, patterns(2, 4096)),
            Read(0, 12000),
            Zero(8000, 500),
            Flush(),
            Write(4608, patterns(3, 512)),
            Read(4096, 512),
            Extents(0, 12000),
            Trim(4096, 512),
        ]
        model = Model(bench.content)
        async with bench.open(Yielding) as stack:
            _require(stack, Caps.WRITE)
            for order in (ops, ops[::-1], ops[1::2] + ops[::2]):
                await run_overlapping(stack.top, order, model)
            await _check_outside(stack, model)

    @pytest.mark.parametrize(
        "op",
        [
            Write(4000, patterns(9, 5000)),
            Write(8192, patterns(9, 4096)),
            Trim(3000, 70000),
            Zero(100, 5000),
            Read(1, 20000),
            Extents(1, 20000),
            Flush(),
        ],
        ids=lambda op: type(op).__name__ + str(op.offset),
    )
    async def test_cancelled_anywhere_nothing_outside_the_range_is_touched(self, bench: Bench, op: Op) -> None:
        model = Model(bench.content)
        changes = [op] if isinstance(op, (Write, Trim, Zero)) else []
        async with bench.open(Yielding) as stack:
            if changes:
                _require(stack, Caps.WRITE)
                await run_one(stack.top, Write(4096, patterns(1, 600)), model)
            before = bytes(model.content)
            async for _ in cancel_everywhere(_by_force(stack.top, op)):
                # read all takes every lock's blocks: one that was left behind would hang here
                check_possible(await read_all(stack.top), 0, changes, before, old_allowed=True)
                if changes:
                    await write(stack.top, op.offset, before[op.offset : op.offset + op.length])
                    await stack.top.write(op.offset, memoryview(before)[op.offset : op.offset + op.length])
            assert_same(await read_all(stack.top), _after(before, op), 0)
            if stack.cow is not None:
                await stack.cow.store.wait_punched()
            assert _locks(stack.top) == 0

    # ---- fast and slow path

    async def test_fast_path_gives_the_bytes_of_the_slow_one(self, bench: Bench) -> None:
        async with bench.open() as stack:
            for offset, length in ((0, 4096), (100, 5000), (16000, 1000), (65535, 2), (len(bench.content) - 7, 7)):
                fast, slow = bytearray(length), bytearray(length)
                await stack.top.read_into(offset, memoryview(slow))
                if stack.top.try_read_into(offset, memoryview(fast)):
                    assert fast == slow
                assert slow == bench.content[offset : offset + length]

    async def test_fast_write_is_all_there_or_has_changed_nothing(self, bench: Bench) -> None:
        model = Model(bench.content)
        async with bench.open() as stack:
            _require(stack, Caps.WRITE)
            for seed, (offset, length) in enumerate(((0, 4096), (100, 50), (8000, 9000), (65536, 60000)), 1):
                op = Write(offset, patterns(seed, length))
                if stack.top.try_write(offset, memoryview(op.data)):
                    model.apply(op)
                after = bytearray(stack.top.geometry.size)
                await stack.top.read_into(0, memoryview(after))
                assert_same(after, model.content, 0)
                await stack.top.write(offset, memoryview(op.data))
                model.apply(op)
                await check_all(stack.top, model)

    # ---- shape

    async def test_statistics_are_a_frozen_snapshot_for_json(self, bench: Bench) -> None:
        async with bench.open() as stack:
            first = stack.top.statistics()
            before = [(one.layer, dict(one.values)) for one in first.chain()]
            json.dumps(before)
            await read_all(stack.top)
            await stack.top.read_into(0, memoryview(bytearray(10)))
            assert [(one.layer, dict(one.values)) for one in first.chain()] == before
            assert [one.layer for one in first.chain()] == [one.layer for one in stack.top.statistics().chain()]
            with pytest.raises(dataclasses.FrozenInstanceError):
                first.layer = "another"  # type: ignore[misc]
            assert stack.top.pending_error() is None
            assert stack.top.allocated_bytes() >= 0

    async def test_every_operation_is_declared(self, bench: Bench) -> None:
        async with bench.open() as stack:
            for layer in layers_of(stack.top):
                passed: frozenset[str] = getattr(layer, "passes_through", frozenset())
                missing = [op for op in OPERATIONS if not callable(getattr(layer, op, None)) and op not in passed]
                assert not missing, f"{type(layer).__name__} says nothing about {missing}"

    async def test_geometry_is_what_a_disk_needs(self, bench: Bench) -> None:
        async with bench.open() as stack:
            geometry = stack.top.geometry
            assert geometry.alignment == 1
            assert geometry.preferred_io & (geometry.preferred_io - 1) == 0
            assert geometry.max_io >= MAX_IO


def _by_force(layer: Layer, op: Op) -> Callable[[], Awaitable[object]]:
    """*op* by its async operation, for the fast path has no await to be cancelled at."""
    if isinstance(op, Write):
        return partial(layer.write, op.offset, memoryview(op.data))
    if isinstance(op, Flush):
        return layer.flush
    if isinstance(op, Read):
        return partial(layer.read_into, op.offset, memoryview(bytearray(op.length)))
    return partial(perform, layer, op)


def _after(before: bytes, op: Op) -> bytes:
    model = Model(before)
    model.apply(op)
    return bytes(model.content)


def _locks(top: Layer) -> int:
    """Locks, waiters and pins that somebody left in the stack."""
    names = ("locks_held", "locks_waiting", "pins")
    return sum(int(one.values.get(name, 0)) for one in top.statistics().chain() for name in names)


__all__ = ["LayerContract"]
