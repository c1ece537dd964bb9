"""A sync of the store's own files fails once: the disk has failed for good, and nothing of that round counts."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from powercut import FAULTS, Recorded, cut_everywhere, make, overlays, request
from scenarios import FAST, ONE, TWO

from cachefs.errors import BackendError, NoSpaceError, ReadOnlyError
from cachefs.layers.base import Layer
from cachefs.store.failedflag import FailedFlag
from cachefs.testing.model import Flush, Op, Trim, Write, flush, read, write
from cachefs.testing.rules import Rule
from cachefs.testing.stacks import read_overlay
from cachefs.testing.strategies import patterns
from cachefs.testing.writelog import Change, SyncEnded, WriteLog, everything, power_cut

FILES = pytest.mark.parametrize("which", ["data", "map"])
CHANGES: list[Op] = [Write(0, patterns(9, 512)), Write(100, b"x"), Trim(0, 4096), Trim(5, 9)]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as name:
        yield Path(name)


async def fail_a_sync(folder: Path, which: str) -> Recorded:
    """ONE is flushed; then TWO is written, and the sync of *which* fails in its round."""
    disk = await make(FAST, folder)
    log = disk.log
    with log.recording():
        async with disk.bench().open() as stack:
            await request(stack.top, ONE, log)
            await request(stack.top, Flush(), log)
            await request(stack.top, TWO, log)
            log.faults.append((Rule(f"sync {which}"), FAULTS[f"sync {which}"]))
            for _ in range(3):  # the device would say yes again from the second on
                with pytest.raises(BackendError, match=r"fdatasync of .* failed .*read-only"):
                    await request(stack.top, Flush(), log)
            await nothing_can_be_changed(stack.top, log)
            assert await read(stack.top, 0, 8192) == ONE.data + TWO.data
            assert stack.top.pending_error() is not None
    return disk


async def nothing_can_be_changed(layer: Layer, log: WriteLog | None = None) -> None:
    for op in CHANGES:
        with pytest.raises(ReadOnlyError, match="clear-failed"):
            await request(layer, op, log or WriteLog(Path("/nowhere")))


@FILES
async def test_after_a_failed_sync_every_flush_and_change_fails_and_a_power_cut_shows_nothing_of_that_round(
    folder: Path, which: str
) -> None:
    disk = await fail_a_sync(folder, which)
    failed = next(i for i, entry in enumerate(disk.log.entries) if isinstance(entry, SyncEnded) and entry.failed)
    assert not any(isinstance(entry, (Change, SyncEnded)) for entry in disk.log.entries[failed + 1 :])
    await cut_everywhere(disk, random.Random(1))
    if which == "data":  # a map on disk would vouch for data that is lost
        changed = [entry.file for entry in disk.log.entries if isinstance(entry, Change)]
        assert changed.count("disk/map") == 1
        files = power_cut(disk.log, len(disk.log.entries) - 1, everything)
        (folder / "map").write_bytes(files["disk/map"])
        (folder / "data").write_bytes(files["disk/data"])
        assert read_overlay(folder, disk.content)[4096:8192] == disk.content[4096:8192]


@FILES
async def test_the_next_daemon_finds_the_disk_failed_until_the_flag_is_cleared(folder: Path, which: str) -> None:
    disk = await fail_a_sync(folder, which)
    for _ in range(2):
        async with disk.bench().open() as stack:
            with pytest.raises(BackendError, match=r"fdatasync of .* failed"):
                await flush(stack.top)
            await nothing_can_be_changed(stack.top)
            assert await read(stack.top, 0, 4096) == ONE.data
    FailedFlag(folder / "state", "disk").clear()
    async with disk.bench().open() as stack:
        await write(stack.top, 0, b"again")
        await flush(stack.top)
    assert read_overlay(overlays(folder) / "disk", disk.content)[:5] == b"again"


async def test_a_map_without_room_is_an_error_of_one_flush(folder: Path) -> None:
    disk = await make(FAST, folder)
    log = disk.log
    with log.recording():
        async with disk.bench().open() as stack:
            await request(stack.top, ONE, log)
            log.faults.append((Rule("write map"), FAULTS["write map"]))
            with pytest.raises(NoSpaceError):
                await request(stack.top, Flush(), log)
            await request(stack.top, TWO, log)
            await request(stack.top, Flush(), log)
    await cut_everywhere(disk, random.Random(1))


async def test_a_cut_after_a_failed_sync_may_drop_what_the_sync_was_to_cover(folder: Path) -> None:
    """The checker itself: the kernel says yes to the next sync, and the pages are gone all the same."""
    log = WriteLog(folder)
    log.initial = {"a": bytes(1024)}
    log.entries += [Change("a", 0, b"1" * 512), SyncEnded("a", 1, failed=True), Change("a", 512, b"2" * 512)]
    log.entries.append(SyncEnded("a", 3))
    assert power_cut(log, 3, lambda file, versions: 0)["a"] == bytes(512) + b"2" * 512
