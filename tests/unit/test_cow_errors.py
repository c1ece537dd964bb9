"""The overlay when what it lies on fails: the base, the data file, the sync of a flush."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cachefs.errors import CachefsError, PermanentError, ReadOnlyError
from cachefs.layers.base import Layer
from cachefs.testing.faults import Faults, sweep
from cachefs.testing.model import (
    Model,
    Read,
    Trim,
    Write,
    Zero,
    check_all,
    check_possible,
    perform,
    read,
    read_all,
    run_one,
    write,
)
from cachefs.testing.rules import Rule
from cachefs.testing.stacks import Bench, Case, cow_layer
from cachefs.testing.strategies import patterns

SIZE, BLOCK = 130000, 4096
MakeBench = Callable[..., Bench]


@pytest.fixture
def make(folder: Path) -> MakeBench:
    return lambda: Bench(Case("cow", SIZE, cow_layer()), folder / "bench")


async def test_error_of_the_base_fails_the_request_and_changes_nothing(make: MakeBench) -> None:
    bench = make()
    async with bench.open(Faults) as stack:
        faults = stack.gate.child
        assert isinstance(faults, Faults)
        model = Model(await read_all(stack.top))
        for op in (Write(10, b"x"), Write(10, b"x" * 9000), Zero(10, 100), Read(0, 10)):
            faults.add("read_into", PermanentError("base", "gone"))
            with pytest.raises(PermanentError, match="base: gone"):
                await run_one(stack.top, op, model)
        await check_all(stack.top, model)
        assert stack.cow is not None
        assert not stack.cow.store.locks.held
        await run_one(stack.top, Write(10, b"x" * 9000), model)
        await check_all(stack.top, model)


async def test_every_failing_read_of_the_base_leaves_what_some_order_leaves(folder: Path) -> None:
    ops = [
        Write(10, patterns(1, 9000)),
        Trim(5000, 9000),
        Zero(3, 4),
        Write(SIZE - 3, b"abc"),
        Write(20000, b"x" * 30000),
    ]
    runs = 0

    async def scenario(wrap: Callable[[Layer], Faults]) -> None:
        nonlocal runs
        runs += 1
        bench = Bench(Case("cow", SIZE, cow_layer()), folder / str(runs))
        content = bench.content
        async with bench.open(wrap) as stack:
            for op in ops:
                failed = False
                try:
                    await perform(stack.top, op)
                except CachefsError:
                    failed = True
                await stack.top.flush()
                after = stack.outside()
                assert after is not None
                check_possible(after, 0, [op], content, old_allowed=failed)
                content = after

    assert await sweep("read_into", scenario) >= 6


async def test_error_of_the_data_file_is_told_with_what_was_tried(make: MakeBench) -> None:
    async with make().open() as stack:
        assert stack.file is not None
        model = Model(await read_all(stack.top))
        stack.file.faults.append((Rule("write"), OSError(errno.EIO, "made to fail")))
        with pytest.raises(PermanentError, match=r"disk/cow: pwrite 8192\+4096: Input/output error"):
            await write(stack.top, 2 * BLOCK, b"x" * BLOCK)
        await check_all(stack.top, model)
        await run_one(stack.top, Write(2 * BLOCK, b"x" * BLOCK), model)
        stack.file.faults.append((Rule("read"), OSError(errno.EIO, "made to fail")))
        with pytest.raises(PermanentError, match=r"disk/cow: pread 8192\+10: Input/output error"):
            await read(stack.top, 2 * BLOCK, 10)


@pytest.mark.logs("the last flush failed")
async def test_failed_store_is_read_only_and_still_read(make: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    async with make().open() as stack:
        model = Model(await read_all(stack.top))
        await run_one(stack.top, Write(0, b"x" * 10), model)

        def fail(descriptor: int) -> None:
            raise OSError(errno.EIO, "made to fail")

        monkeypatch.setattr(os, "fdatasync", fail)
        with pytest.raises(CachefsError, match="what was written since the last flush may be lost"):
            await stack.top.flush()
        monkeypatch.undo()
        for refused in (write(stack.top, 0, b"y" * BLOCK), stack.top.trim(0, BLOCK), stack.top.zero(0, 10)):
            with pytest.raises(ReadOnlyError):
                await refused
        with pytest.raises(CachefsError, match="may be lost"):
            await stack.top.flush()
        assert stack.top.pending_error() is not None
        await check_all(stack.top, model)


async def test_opened_and_closed_it_leaves_no_descriptor(make: MakeBench) -> None:
    bench = make()

    def ours() -> int:
        links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        return sum(str(bench.folder) in link for link in links)

    async with bench.open() as stack:
        await write(stack.top, 0, b"x")
        assert ours() >= 3  # data, map, lock
    assert ours() == 0
