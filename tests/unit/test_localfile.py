"""Files on the loop and in threads, on a real disk and on tmpfs."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.extent import ExtentKind
from cachefs.store import localfile
from cachefs.store.localfile import FileSystem, LocalFile, fallocate

SIZE = 1 << 20
MIB = memoryview(bytearray(b"\xa5" * SIZE))


def make(path: Path, size: int, flags: int = os.O_RDWR) -> int:
    """The descriptor of a new file of zeros."""
    path.write_bytes(b"")
    os.truncate(path, size)
    return os.open(path, flags)


def content(path: Path) -> bytes:
    return path.read_bytes()


@pytest.fixture(params=["disk", "tmpfs"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path / "file"
    else:
        with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as folder:
            yield Path(folder) / "file"


@pytest.fixture
def file(path: Path) -> Iterator[LocalFile]:
    opened = LocalFile(make(path, SIZE), SIZE)
    yield opened
    opened.close()


async def test_what_was_written_is_read(file: LocalFile, path: Path) -> None:
    await file.write(1000, (b"one", b"", memoryview(b"two")))
    assert content(path)[999:1008] == b"\0onetwo\0\0"
    buffer = bytearray(6)
    await file.read(1000, memoryview(buffer))
    assert buffer == b"onetwo"
    buffer[:] = bytes(6)
    if file.try_read(1000, memoryview(buffer)):
        assert buffer == b"onetwo"
    if file.try_write(2000, memoryview(b"three")):
        assert content(path)[2000:2005] == b"three"


async def test_cached_pages_are_read_on_the_loop(file: LocalFile) -> None:
    await file.write(0, (MIB,))
    buffer = bytearray(SIZE)
    assert file.try_read(0, memoryview(buffer))
    assert buffer == MIB


async def test_read_beyond_the_end_is_zeros_and_never_on_the_loop(file: LocalFile) -> None:
    os.ftruncate(file.descriptor, 1000)
    await file.write(990, (b"x" * 10,))
    buffer = bytearray(b"\xa5" * 20)
    assert not file.try_read(990, memoryview(buffer))
    buffer = bytearray(b"\xa5" * 20)
    await file.read(990, memoryview(buffer))
    assert buffer == b"x" * 10 + bytes(10)


async def test_write_on_the_loop_waits_for_nothing_that_is_slow(file: LocalFile) -> None:
    """While a sync, punch or slow write of the file system is under way, the loop does not write; tmpfs has no such."""
    assert file.try_write(0, memoryview(b"x"))
    with file.file_system.busy():
        if file._write_flags or file.file_system.is_tmpfs:
            assert file.try_write(0, memoryview(b"x"))
        else:
            assert not file.try_write(0, memoryview(b"y"))
    assert file.try_write(0, memoryview(b"x"))
    assert file.file_system.slow == 0


async def test_slow_write_sends_the_file_system_to_threads_for_a_while(
    file: LocalFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    if file.file_system.is_tmpfs:
        pytest.skip("tmpfs is memory")
    file._write_flags = 0
    now = 1000.0

    def clock() -> float:
        nonlocal now
        now += 0.001
        return now

    monkeypatch.setattr(file.file_system, "slow_until", 0.0)
    monkeypatch.setattr(localfile.time, "monotonic", clock)
    monkeypatch.setattr(localfile, "SLOW_WRITE_S", 0.0005)
    assert file.try_write(0, memoryview(b"x"))
    assert not file.try_write(0, memoryview(b"x"))
    now += localfile.SLOW_PERIOD_S
    assert file.try_write(0, memoryview(b"x"))


async def test_files_of_a_pool_are_never_written_on_the_loop(path: Path) -> None:
    file = LocalFile(make(path, SIZE), SIZE, inline_writes=False)
    assert not file.try_write(0, memoryview(b"x"))
    assert content(path)[0] == 0
    file.close()


async def test_punched_range_reads_as_zeros_and_gives_its_space_back(file: LocalFile, path: Path) -> None:
    await file.write(0, (MIB,))
    os.fsync(file.descriptor)
    before = file.allocated_bytes()
    await file.punch(65536, SIZE - 65536)
    await file.punch(100, 50)
    assert content(path) == b"\xa5" * 100 + bytes(50) + b"\xa5" * (65536 - 150) + bytes(SIZE - 65536)
    assert file.allocated_bytes() <= before - (SIZE - 65536)
    assert file.file_system.slow == 0


async def test_zero_range_reads_as_zeros_or_says_that_it_cannot(file: LocalFile, path: Path) -> None:
    await file.write(0, (MIB,))
    if file.file_system.is_tmpfs:
        with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
            await file.zero_range(4000, 10000)
    else:
        await file.zero_range(4000, 10000)
        assert content(path)[3999:14001] == b"\xa5" + bytes(10000) + b"\xa5"
    assert file.file_system.slow == 0


async def test_extents_cover_the_range_and_find_the_data(file: LocalFile) -> None:
    await file.write(131072, (b"x" * 65536,))
    found = await file.extents(1000, SIZE - 1000, 100)
    assert [(one.offset, one.length, one.kind) for one in found] == [
        (1000, 131072 - 1000, ExtentKind.HOLE),
        (131072, 65536, ExtentKind.DATA),
        (196608, SIZE - 196608, ExtentKind.HOLE),
    ]
    assert await file.extents(1000, SIZE - 1000, 2) == found[:2]
    (inside,) = await file.extents(131073, 10, 5)
    assert (inside.offset, inside.length, inside.kind) == (131073, 10, ExtentKind.DATA)


async def test_errors_are_those_of_the_system(path: Path) -> None:
    file = LocalFile(make(path, 4096, os.O_RDONLY), 4096)
    assert not file.try_write(0, memoryview(b"x"))
    with pytest.raises(OSError, match="Bad file descriptor"):
        await file.write(0, (b"x",))
    with pytest.raises(OSError, match="Bad file descriptor"):
        fallocate(file.descriptor, localfile.PUNCH_HOLE | localfile.KEEP_SIZE, 0, 4096)
    assert file.file_system.slow == 0
    file.close()


def test_files_of_one_file_system_share_it(tmp_path: Path) -> None:
    opened = []
    for number in range(2):
        (tmp_path / str(number)).write_bytes(b"x")
        opened.append(LocalFile(os.open(tmp_path / str(number), os.O_RDWR), 1))
    assert opened[0].file_system is opened[1].file_system
    assert not FileSystem.of(opened[0].descriptor).may_hang
    for file in opened:
        file.close()


async def test_long_list_of_pieces_is_written_whole(
    file: LocalFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may write less than it was given."""
    real = os.pwritev

    def short(descriptor: int, views: list[memoryview], offset: int, *flags: int) -> int:
        view = views[0][: max(1, len(views[0]) // 2)]
        return real(descriptor, [view], offset, *flags)

    monkeypatch.setattr(os, "pwritev", short)
    pieces = [bytes([number]) * (number + 1) for number in range(40)]
    file.write_now(10, pieces)
    assert content(path)[10 : 10 + 820] == b"".join(pieces)


async def test_call_that_a_thread_has_runs_to_its_end_when_cancelled(file: LocalFile) -> None:
    begun, go_on, ended = trio.Event(), threading.Event(), []
    token = trio.lowlevel.current_trio_token()

    def call() -> None:
        token.run_sync_soon(begun.set)
        assert go_on.wait(10)
        ended.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(file.run, call)
        await begun.wait()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await wait_all_tasks_blocked()
            assert ended == []
            go_on.set()
    assert ended == [True]


async def test_slow_file_system_takes_no_threads_from_another(file: LocalFile) -> None:
    assert file.file_system.limiter is not trio.to_thread.current_default_thread_limiter()
    assert FileSystem(0).limiter is not file.file_system.limiter
