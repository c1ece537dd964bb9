"""Direct files: what reaches the descriptor is aligned in offset, length and address, whatever the stack above is asked for."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.backends.file import File, FileConfig
from cachefs.errors import StoreError
from cachefs.layers.base import Environment
from cachefs.store import directfile, transfers
from cachefs.store.directfile import Alignment, CompletedFile, DirectFile, ask_alignment
from cachefs.testing.model import Extents, Flush, Model, Read, Trim, Write, Zero, assert_same, read_all, run_one
from cachefs.testing.stacks import EVEN_SIZE, ODD_SIZE, Bench, Case, coalesce_layer, cow_layer, layers_of
from cachefs.testing.strategies import patterns

UNALIGNED = [
    Write(3000, patterns(1, 3000)),
    Write(100000, patterns(2, 20000)),
    Read(1, 70000),
    Trim(5000, 9000),
    Zero(90000, 20001),
    Write(ODD_SIZE - 3, patterns(3, 3)),
    Read(ODD_SIZE - 600, 600),
    Extents(1000, 100000),
    Flush(),
    Trim(ODD_SIZE - 5000, 5000),
    Write(65536, patterns(4, 32768)),
    Read(0, ODD_SIZE),
]


@contextmanager
def only_aligned(file: DirectFile) -> Iterator[list[str]]:
    """Fails every call on the descriptor that is not aligned; what was called is listed."""
    called: list[str] = []

    def check(name: str, real: Callable[..., int], descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if descriptor == file.descriptor:
            called.append(name)
            for buffer in buffers:
                assert not buffer.readonly, "from memory whose address nobody knows"
                address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
                wrong = [one for one in (offset, len(buffer), address) if one % file.alignment]
                assert not wrong, f"{name} at {offset}+{len(buffer)}, address {address:#x}"
        return real(descriptor, buffers, offset, flags)

    def check_together(real: Callable[..., None], ring: Any, together: Sequence[transfers.Transfer]) -> None:
        for one in together:
            if one.file is file:
                called.append("pwritev" if one.command == transfers.WRITE else "preadv")
                assert one.address == ctypes.addressof(ctypes.c_char.from_buffer(one.buffer))
                assert not (one.offset | len(one.buffer) | one.address) % file.alignment
        real(ring, together)

    with ExitStack() as stack:
        together = partial(check_together, transfers.carry_out)
        stack.enter_context(mock.patch.object(transfers, "carry_out", together))
        for name in ("preadv", "pwritev"):
            real = getattr(os, name)
            instead = lambda *arguments, name=name, real=real: check(name, real, *arguments)  # noqa: E731
            stack.enter_context(mock.patch.object(os, name, instead))
        yield called


@pytest.mark.parametrize("layers", [(), coalesce_layer(cluster="64KiB", buffer="360KiB")], ids=["align", "coalesce"])
@pytest.mark.parametrize("size", [ODD_SIZE, EVEN_SIZE])
async def test_everything_that_reaches_the_descriptor_is_aligned(tmp_path: Path, layers: Any, size: int) -> None:
    bench = Bench(Case("direct", size, layers, backend="file", direct=True), tmp_path / "bench")
    model = Model(bench.content)
    async with bench.open() as stack:
        file = next(layer for layer in layers_of(stack.backend) if isinstance(layer, File))._file
        assert isinstance(file, DirectFile)
        with only_aligned(file) as called:
            for op in UNALIGNED:
                await run_one(stack.top, op, model)
            assert_same(await read_all(stack.top), model.content, 0)
            await stack.top.flush()
        assert {"preadv", "pwritev"} <= set(called)
        assert stack.outside() == model.content
    assert bench.image.stat().st_size == size


@pytest.mark.parametrize("size", [ODD_SIZE, EVEN_SIZE])
async def test_everything_that_an_overlay_asks_of_its_file_reaches_it_aligned(tmp_path: Path, size: int) -> None:
    bench = Bench(Case("cow-direct", size, cow_layer(direct=True), on_disk=True), tmp_path / "bench")
    model = Model(bench.content)
    async with bench.open() as stack:
        assert stack.cow is not None
        file = stack.cow.store.data
        assert isinstance(file, DirectFile)
        with only_aligned(file) as called:
            for op in UNALIGNED:
                await run_one(stack.top, op, model)
            assert_same(await read_all(stack.top), model.content, 0)
            await stack.top.flush()
        assert {"preadv", "pwritev"} <= set(called)
        assert stack.outside() == model.content


async def test_the_watch_itself_notices_what_is_not_aligned(tmp_path: Path) -> None:
    bench = Bench(Case("direct", EVEN_SIZE, backend="file", direct=True), tmp_path / "bench")
    async with bench.open() as stack:
        file = next(layer for layer in layers_of(stack.backend) if isinstance(layer, File))._file
        assert isinstance(file, DirectFile)
        with only_aligned(file), mock.patch.object(DirectFile, "_is_aligned", return_value=True):
            memory = memoryview(mmap.mmap(-1, 8192))[1:4097]
            with pytest.raises(AssertionError, match="address"):
                file.write_now(0, [memory])


async def test_a_file_whose_transfers_hang_holds_up_no_other_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one is being punched io_submit waits, and with it the rest of the batch."""
    files = []
    for name in ("hangs", "other"):
        path = tmp_path / name
        path.write_bytes(bytes(1 << 16))
        files.append(
            DirectFile(os.open(path, os.O_RDWR | os.O_DIRECT), os.open(path, os.O_RDWR), 1 << 16, Alignment(512, 512))
        )
    hangs, other = files
    go_on, real = threading.Event(), transfers.carry_out

    def hang(ring: Any, together: Sequence[transfers.Transfer]) -> None:
        if any(one.file is hangs for one in together):
            assert go_on.wait(20)
        real(ring, together)

    monkeypatch.setattr(transfers, "carry_out", hang)
    async with trio.open_nursery() as nursery:
        for _ in range(32):
            nursery.start_soon(hangs.read, 0, memoryview(mmap.mmap(-1, 4096)))
        await wait_all_tasks_blocked()
        with trio.fail_after(10):
            for _ in range(3):
                await other.read(0, memoryview(mmap.mmap(-1, 4096)))
                await other.write(0, [memoryview(mmap.mmap(-1, 4096))])
        go_on.set()
    for file in files:
        file.close()


@pytest.mark.parametrize("short", [0, 100, 512, 4096, 5000])
@pytest.mark.parametrize("kind", [DirectFile, CompletedFile])
async def test_what_a_short_result_leaves_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[DirectFile], short: int
) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(64 << 10))
    file = kind(os.open(path, os.O_RDWR | os.O_DIRECT), os.open(path, os.O_RDWR), 64 << 10, Alignment(512, 512))

    def stop_early(ring: Any, together: Sequence[transfers.Transfer]) -> None:
        for one in together:
            part = one.buffer[: short - short % 512]
            if part:
                (os.pwritev if one.command == transfers.WRITE else os.preadv)(file.descriptor, (part,), one.offset)
            one.result = min(short, len(one.buffer))

    monkeypatch.setattr(transfers, "carry_out", stop_early)
    data, back = (memoryview(mmap.mmap(-1, 16384)) for _ in range(2))
    data[:] = patterns(9, 16384)
    await file.write(8192, (data,))
    assert path.read_bytes()[8192:24576] == data
    await file.read(8192, back)
    assert back == data
    file.close()


async def test_a_read_without_a_task_is_told_its_end_and_leaves_what_is_wrong_to_the_task(tmp_path: Path) -> None:
    content = patterns(5, EVEN_SIZE)
    path = tmp_path / "image"
    path.write_bytes(content)
    file = DirectFile(os.open(path, os.O_RDWR | os.O_DIRECT), os.open(path, os.O_RDWR), EVEN_SIZE, Alignment(512, 512))
    memory = memoryview(mmap.mmap(-1, 8192))

    async def ended(offset: int) -> float | None:
        told: list[float | None] = []
        over = trio.Event()

        def done(until: float | None) -> None:
            told.append(until)
            over.set()

        assert file.try_read_later(offset, memory[:4096], done)
        assert not told, "before it has returned"
        await over.wait()
        return told[0]

    assert await ended(4096) is None
    assert memory[:4096] == content[4096:8192]
    os.truncate(path, 4096)
    assert await ended(4096) == math.inf
    assert not file.try_read_later(4096 + 100, memory[:4096], lambda until: None)
    assert not file.try_read_later(4096, memory[1:4097], lambda until: None)
    with mock.patch.object(transfers, "DEPTH", 0):
        assert not file.try_read_later(4096, memory[:4096], lambda until: None)
    file.descriptor, descriptor = -1, file.descriptor
    assert await ended(0) == math.inf, "a file that is closed"
    file.descriptor = descriptor
    assert await ended(0) is None, "every place was given back"
    file.close()


def test_what_is_probed_agrees_with_what_the_kernel_says(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        said = ask_alignment(descriptor)
        probed = directfile._probe_alignment(descriptor)
    finally:
        os.close(descriptor)
    assert said is not None
    assert probed is not None
    assert probed.offset == said.offset
    assert probed.memory % said.memory == 0


def test_a_file_without_direct_io_is_probed_in_vain(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(8192))
    descriptor = os.open(tmp_path / "image", os.O_RDONLY)
    try:
        with mock.patch.object(os, "preadv", side_effect=OSError(22, "Invalid argument")):
            assert directfile._probe_alignment(descriptor) is None
    finally:
        os.close(descriptor)


async def test_a_file_system_without_direct_io_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(8192))
    config = FileConfig(path=tmp_path / "image", direct=True)
    nothing = mock.patch("cachefs.store.directfile.ask_alignment", return_value=None)
    with nothing, pytest.raises(StoreError, match="no direct I/O; take `direct: true` out"):
        async with File.open(config, Environment("vm1", tmp_path)):
            pass
    real = os.open

    def open_without_direct(path: Any, flags: int, *arguments: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *arguments)

    with mock.patch.object(os, "open", open_without_direct), pytest.raises(StoreError, match="with O_DIRECT: Invalid"):
        async with File.open(config, Environment("vm1", tmp_path)):
            pass


def test_short_writes_go_on_at_a_unit(tmp_path: Path) -> None:
    """The kernel may stop in the middle of a unit."""
    path = tmp_path / "image"
    path.write_bytes(bytes(16384))
    file = DirectFile(os.open(path, os.O_RDWR | os.O_DIRECT), os.open(path, os.O_RDWR), 16384, Alignment(512, 512))
    real = os.pwritev

    def stop_early(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        real(descriptor, buffers, offset, flags)
        return min(len(buffers[0]), 700)

    data = patterns(7, 8192)
    with mock.patch.object(os, "pwritev", stop_early):
        file.write_now(4096, [data[:100], data[100:]])
    assert path.read_bytes()[4096:12288] == data
    file.close()
