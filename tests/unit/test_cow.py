"""The overlay: what it holds, what it frees, and what it says when there is no room."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from cachefs.errors import NoSpaceError
from cachefs.store import blockstore
from cachefs.store.blockmap import State
from cachefs.testing.faults import Faults
from cachefs.testing.model import (
    Model,
    Op,
    Read,
    Trim,
    Write,
    Zero,
    check_all,
    read,
    read_all,
    run_one,
    write,
)
from cachefs.testing.rules import Rule
from cachefs.testing.stacks import Bench, Case, Stack, cow_layer, read_overlay
from cachefs.testing.strategies import patterns
from cachefs.testing.wrapper import Wrapper

SIZE, BLOCK, GIB = 130000, 4096, 1 << 30
MakeBench = Callable[..., Bench]


@pytest.fixture
def make(folder: Path) -> MakeBench:
    """`make(block_size=...)`: a bench of an overlay with these options over a memory base."""

    def made(size: int = SIZE, content: bytes = b"", backend: str = "memory", **options: object) -> Bench:
        return Bench(Case("cow", size, cow_layer(**options), backend), folder / "bench", content=content)

    return made


def held_bytes(stack: Stack) -> int:
    """What the file system says that the data file takes."""
    assert stack.cow is not None
    return (stack.cow.store.path / "data").stat().st_blocks * 512


@contextmanager
def small_tmpfs(path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "cachefs-test", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


async def fill_up(stack: Stack, model: Model) -> int:
    """Write block after block until there is no more room; the offset of the first one that had none."""
    for at in range(0, stack.top.geometry.size, BLOCK):
        try:
            await run_one(stack.top, Write(at, patterns(at >> 12, BLOCK)), model)
        except NoSpaceError:
            return at
    raise AssertionError("it never filled up")


# ---- contents


async def test_last_partial_block_of_an_odd_disk_round_trips(make: MakeBench) -> None:
    bench = make()
    model = Model(bench.content)
    last = SIZE // BLOCK * BLOCK
    ops: list[Op] = [Write(last + 10, b"x" * 50), Trim(last, SIZE - last), Write(SIZE - 1, b"y"), Zero(SIZE - 9, 5)]
    ops += [Trim(last + 1, SIZE - last - 1), Write(last, patterns(1, SIZE - last)), Write(last - 100, patterns(2, 300))]
    for op in ops:
        async with bench.open() as stack:
            await run_one(stack.top, op, model)
            await check_all(stack.top, model)
        async with bench.open() as stack:
            await check_all(stack.top, model)
            assert stack.outside() == model.content


@pytest.mark.parametrize("size", [SIZE, 32 * BLOCK])
async def test_trim_of_the_rest_reads_zeros_to_the_very_end(make: MakeBench, size: int) -> None:
    bench = make(size, b"\x21" * size)
    async with bench.open() as stack:
        await stack.top.trim(100000, size - 100000)
        assert await read_all(stack.top) == b"\x21" * 100000 + bytes(size - 100000)
        assert (await stack.top.extents(size - 1, 1))[0].kind.value == "zero"


async def test_base_is_the_same_after_any_operations(make: MakeBench) -> None:
    bench = make(backend="file")
    before = bench.image.stat(), hashlib.sha256(bench.content).digest()
    async with bench.open() as stack:
        for op in (
            Write(5, b"x" * 9000),
            Trim(0, 50000),
            Zero(60001, 10),
            Write(SIZE - 1, b"z"),
            Read(0, SIZE),
            Trim(0, SIZE),
        ):
            await run_one(stack.top, op, Model(await read_all(stack.top)))
        await stack.top.flush()
    after = bench.image.stat()
    assert (after.st_mtime_ns, after.st_size, after.st_blocks) == (before[0].st_mtime_ns, SIZE, before[0].st_blocks)
    assert hashlib.sha256(bench.image.read_bytes()).digest() == before[1]


async def test_blocks_beyond_4_and_8_gib_lie_at_their_own_offsets(folder: Path) -> None:
    size = 9 * GIB + 1000
    case = Case("cow", size, cow_layer(), "file")
    bench = Bench(case, folder, content=b"base")
    os.truncate(bench.image, size)
    writes = [
        Write(at, patterns(seed, 5000)) for seed, at in enumerate((0, 4 * GIB - 2500, 8 * GIB - 2500, size - 5000), 1)
    ]
    async with bench.open() as stack:
        for op in writes:
            await write(stack.top, op.offset, op.data)
        await stack.top.trim(4 * GIB + BLOCK, BLOCK)
    async with bench.open() as stack:
        assert stack.cow is not None
        for op in writes:
            assert await read(stack.top, op.offset, 5000) == op.data
        assert await read(stack.top, 4, 4) == writes[0].data[4:8]
        assert await read(stack.top, 4 * GIB + BLOCK, BLOCK) == bytes(BLOCK)
        with (stack.cow.store.path / "data").open("rb") as data, (stack.cow.store.path / "map").open("rb") as block_map:
            data.seek(8 * GIB - 2500)
            assert data.read(5000) == writes[2].data
            sector, block = divmod(8 * GIB // BLOCK, 1920)
            block_map.seek(4096 + sector * 512)
            content = block_map.read(512)
            assert struct.unpack_from("<Q", content, 16) == (sector,)
            assert content[32 + block // 8] >> block % 8 & 1
        extents = await stack.top.extents(4 * GIB, GIB)
        assert [(one.offset - 4 * GIB, one.length) for one in extents[:2]] == [(0, BLOCK), (BLOCK, BLOCK)]
        assert stack.cow.store.map.data_blocks == 4 * 2


async def test_overlay_is_described_by_its_files_alone(make: MakeBench) -> None:
    bench = make()
    model = Model(bench.content)
    async with bench.open() as stack:
        await run_one(stack.top, Write(100, patterns(1, 9000)), model)
        await run_one(stack.top, Trim(50000, 20000), model)
    assert read_overlay(bench.folder / "state/overlays/disk", bench.content) == model.content


async def test_aligned_write_does_not_read_the_base(make: MakeBench) -> None:
    bench = make()
    async with bench.open(Faults) as stack:
        faults = stack.gate.child
        assert isinstance(faults, Faults)
        await write(stack.top, BLOCK, bytes(3 * BLOCK))
        await write(stack.top, SIZE // BLOCK * BLOCK, b"x" * (SIZE % BLOCK))
        assert faults.calls == {}
        await write(stack.top, 10 * BLOCK + 1, b"x")
        await write(stack.top, 10 * BLOCK + 7, b"x")
        assert faults.calls == {"read_into": 2}  # what is before and what is behind, once


async def test_absent_run_goes_down_as_one_request(make: MakeBench) -> None:
    bench = make()
    async with bench.open(Faults) as stack:
        faults = stack.gate.child
        assert isinstance(faults, Faults)
        await write(stack.top, 10 * BLOCK, bytes(BLOCK))
        await read(stack.top, 100, 20 * BLOCK)
        assert faults.calls == {"read_into": 2}


class Later(Wrapper):
    """Takes every read that needs no task, and never comes to its end."""

    def try_read_later(self, offset: int, buffer: memoryview, done: Any) -> bool:
        buffer[:] = b"B" * len(buffer)
        return True


async def test_only_reads_of_what_is_all_the_bases_are_done_without_a_task(make: MakeBench) -> None:
    bench = make()
    async with bench.open(Later) as stack:
        await write(stack.top, BLOCK, b"x" * BLOCK)
        await stack.top.trim(3 * BLOCK, BLOCK)
        for offset, length, taken in (
            (0, BLOCK, True),
            (2 * BLOCK, BLOCK, True),
            (0, BLOCK + 1, False),
            (BLOCK, 1, False),
            (3 * BLOCK, BLOCK, False),
            (2 * BLOCK + 1, BLOCK, False),
        ):
            buffer = bytearray(length)
            assert stack.top.try_read_later(offset, memoryview(buffer), lambda until: None) is taken
            assert buffer == (b"B" if taken else b"\0") * length


async def test_sequences_of_zeros_are_stored_as_zero_blocks_when_asked_for(make: MakeBench) -> None:
    bench = make(detect_zeroes=True)
    model = Model(bench.content)
    async with bench.open() as stack:
        assert stack.cow is not None
        await run_one(stack.top, Write(0, b"x" * 4 * BLOCK), model)
        await run_one(stack.top, Write(BLOCK - 10, bytes(2 * BLOCK + 20)), model)
        await run_one(stack.top, Write(10 * BLOCK, bytes(BLOCK)), model)
        await run_one(stack.top, Write(SIZE - SIZE % BLOCK, bytes(SIZE % BLOCK)), model)
        states = [stack.cow.store.map.state(block) for block in (0, 1, 2, 3, 10, SIZE // BLOCK)]
        assert states == [State.DATA, State.ZERO, State.ZERO, State.DATA, State.ZERO, State.ZERO]
        await check_all(stack.top, model)


async def test_zeros_are_data_when_nobody_asked_for_more(make: MakeBench) -> None:
    async with make().open() as stack:
        assert stack.cow is not None
        await write(stack.top, 0, bytes(BLOCK))
        assert stack.cow.store.map.state(0) is State.DATA


# ---- space


async def test_trimmed_space_is_given_back_soon(make: MakeBench) -> None:
    async with make(4 << 20, backend="file").open() as stack:
        assert stack.cow is not None
        await write(stack.top, 0, b"x" * (1 << 20))
        assert held_bytes(stack) == 1 << 20
        await stack.top.trim(4096, (1 << 20) - 8192)
        await stack.cow.store.wait_punched()
        assert held_bytes(stack) == 8192
        assert stack.top.statistics().values["data_bytes"] == 8192
        await stack.top.trim(0, 4 << 20)
        await stack.cow.store.wait_punched()
        assert held_bytes(stack) == 0


async def test_trims_all_over_the_disk_free_their_space_however_little_one_look_finds(
    make: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("PUNCH_PIECE", 4 * BLOCK), ("LOOK_PIECES", 8), ("LOOK_EXTENTS", 4)):
        monkeypatch.setattr(blockstore, name, value)
    async with make(4 << 20, backend="file").open() as stack:
        assert stack.cow is not None
        blocks = list(range((4 << 20) // BLOCK))
        random.Random(1).shuffle(blocks)
        for block in blocks[:600]:
            await write(stack.top, block * BLOCK, b"x" * BLOCK)
        for number, block in enumerate(blocks[:400]):
            await stack.top.trim(block * BLOCK, BLOCK)
            if number % 50 == 0:
                await trio.lowlevel.checkpoint()  # the puncher begins with what there is
        await stack.cow.store.wait_punched()
        assert held_bytes(stack) == stack.top.statistics().values["data_bytes"] == 200 * BLOCK


async def test_space_that_no_block_owns_is_freed_when_the_overlay_is_opened(make: MakeBench) -> None:
    """What a killed daemon left: blocks that are written and not in the map."""
    bench = make()
    model = Model(bench.content)
    async with bench.open() as stack:
        await run_one(stack.top, Write(0, patterns(1, BLOCK)), model)
    data = bench.folder / "state/overlays/disk/data"
    with data.open("r+b") as file:
        file.seek(8 * BLOCK)
        file.write(b"old" * 5000)
    async with bench.open() as stack:
        assert stack.cow is not None
        assert stack.file is not None
        held = stack.file.hold("punch")  # before the background task had a chance to run
        await held.wait_until_held()
        await check_all(stack.top, model)
        held.open()
        await stack.cow.store.wait_punched()
        assert held_bytes(stack) == BLOCK
        await check_all(stack.top, model)


async def test_file_system_that_cannot_punch_costs_space_and_nothing_else(make: MakeBench) -> None:
    async with make().open() as stack:
        assert stack.cow is not None
        assert stack.file is not None
        model = Model(await read_all(stack.top))
        stack.file.faults.append((Rule("punch"), OSError(errno.EOPNOTSUPP, "made to fail")))
        await run_one(stack.top, Write(0, patterns(1, 8 * BLOCK)), model)
        for op in (Trim(0, 4 * BLOCK), Trim(5 * BLOCK, BLOCK), Write(10, b"x"), Write(5 * BLOCK + 10, b"y")):
            await run_one(stack.top, op, model)
            await stack.cow.store.wait_punched()
        await check_all(stack.top, model)
        assert held_bytes(stack) >= 8 * BLOCK


async def test_limit_is_enospc_leaves_the_block_as_it_was_and_clears_by_trim(make: MakeBench) -> None:
    bench = make(limit=4 * BLOCK)
    model = Model(bench.content)
    async with bench.open() as stack:
        for block in range(4):
            await run_one(stack.top, Write(block * BLOCK, patterns(block, BLOCK)), model)
        for offset, length in ((4 * BLOCK, BLOCK), (4 * BLOCK + 5, 10), (3 * BLOCK, 2 * BLOCK), (50000, 3)):
            with pytest.raises(NoSpaceError, match=r"limit of 16384 bytes is reached; raise cow\.limit or trim"):
                await write(stack.top, offset, b"x" * length)
        await check_all(stack.top, model)
        await run_one(stack.top, Write(BLOCK + 3, b"y" * BLOCK), model)  # blocks that it holds take no more room
        await run_one(stack.top, Trim(0, BLOCK), model)
        await run_one(stack.top, Write(4 * BLOCK + 5, b"x"), model)
        with pytest.raises(NoSpaceError):
            await write(stack.top, 0, b"x")  # a zero block takes room again
        await check_all(stack.top, model)
        assert stack.top.statistics().values["no_space_errors"] == 5
        assert stack.top.statistics().values["limit_bytes"] == 4 * BLOCK


async def test_full_file_system_is_enospc_leaves_the_block_as_it_was_and_clears_by_itself(make: MakeBench) -> None:
    async with make().open() as stack:
        assert stack.file is not None
        model = Model(await read_all(stack.top))
        for op in (Write(0, b"x" * BLOCK), Write(10, b"x"), Write(8 * BLOCK, b"x" * 9000)):
            stack.file.faults.append((Rule("write"), OSError(errno.ENOSPC, "made to fail")))
            with pytest.raises(NoSpaceError, match=r"the file system of .*overlays/disk is full; make room there"):
                await write(stack.top, op.offset, op.data)
            await check_all(stack.top, model)
            stack.file.faults.clear()
            await run_one(stack.top, op, model)
        await check_all(stack.top, model)
        assert stack.top.statistics().values["no_space_errors"] == 3


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a tmpfs needs root")
async def test_full_tmpfs_is_enospc_and_the_guest_goes_on_when_there_is_room(tmp_path: Path) -> None:
    size = 2 << 20
    with small_tmpfs(tmp_path / "small") as small:
        bench = Bench(Case("cow", size, cow_layer(path=str(small / "overlay"))), tmp_path / "bench")
        model = Model(bench.content)
        async with bench.open() as stack:
            assert stack.cow is not None
            full = await fill_up(stack, model)
            with pytest.raises(NoSpaceError, match=r"the file system of .*small/overlay is full"):
                await write(stack.top, full, b"x" * BLOCK)
            with pytest.raises(NoSpaceError):
                await write(stack.top, size - 10, b"x" * 10)
            await check_all(stack.top, model)
            await run_one(stack.top, Trim(0, 5 * BLOCK), model)
            await stack.cow.store.wait_punched()
            await run_one(stack.top, Write(full, patterns(99, BLOCK)), model)
            await run_one(stack.top, Write(size - 10, b"x" * 10), model)
            await check_all(stack.top, model)
            await stack.top.flush()
            assert stack.outside() == model.content
