"""What a layer finds that a successor opens, without a mount: stale memory, a sync that was cut off, an image in a pool."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from unittest import mock

import pytest
from succession_mutants import applied

from cachefs.backends.file import File, FileConfig
from cachefs.backends.memory import Memory
from cachefs.errors import BackendError, LockedError
from cachefs.graph import edge
from cachefs.layers.base import Environment
from cachefs.layers.cow import Cow, CowConfig
from cachefs.pool.summap import State
from cachefs.store.blockmap import working_size
from cachefs.store.sectors import SyncState
from cachefs.survivor import HEAD_SIZE, Survivors
from cachefs.testing.caches import CacheBench
from cachefs.testing.model import read_all
from cachefs.testing.strategies import patterns

BLOCK = 4096
SIZE = 8 * BLOCK
MAP = "cachefs.store.mapfile"


class Killed(Exception):
    """Stands for SIGKILL: nothing is flushed, and nothing is let go."""


def left_by(survivors: Survivors) -> Survivors:
    """What a keeper would hand to a successor now."""
    return Survivors([(name, os.dup(descriptor)) for name, descriptor in survivors.kept()])


def open_cow(folder: Path, survivors: Survivors, **keys: bool) -> AbstractAsyncContextManager[Cow]:
    env = Environment("vm1", folder, survivors=survivors)
    return Cow.open(CowConfig(**keys), edge(Memory("vm1/memory", SIZE)), env)


@contextmanager
def unlocked() -> Iterator[None]:
    """As if nobody held the store's lock or its memory: what a test needs that has all its daemons in one process."""
    with mock.patch(f"{MAP}.refuse_held"), mock.patch("fcntl.flock"):
        yield


async def leave_stale_memory(folder: Path) -> bytes:
    """A successor's view of a store that was opened, and changed, by somebody who did not have its memory."""
    first = Survivors()
    with unlocked():
        async with open_cow(folder, first) as cow:
            await cow.write(0, memoryview(patterns(1, 2 * BLOCK)))
            stale = left_by(first)
        async with open_cow(folder, Survivors()) as cow:
            await cow.write(5 * BLOCK, memoryview(patterns(2, BLOCK)))
            await cow.flush()
        async with open_cow(folder, stale) as cow:
            return (await read_all(cow))[5 * BLOCK : 6 * BLOCK]


@pytest.mark.logs("memory of an earlier opening is void")
async def test_a_memory_whose_epoch_is_old_is_not_used(tmp_path: Path) -> None:
    assert await leave_stale_memory(tmp_path) == patterns(2, BLOCK)


async def test_a_memory_that_is_used_though_its_epoch_is_old_is_noticed(tmp_path: Path) -> None:
    with applied("epoch-not-looked-at"):
        assert await leave_stale_memory(tmp_path) != patterns(2, BLOCK)


async def test_a_store_whose_memory_is_held_is_refused_to_everybody_else(tmp_path: Path) -> None:
    first = Survivors()
    with mock.patch("cachefs.layers.cow.StoreLock"):  # the lock of a daemon that is dead
        async with open_cow(tmp_path, first) as cow:
            kept = left_by(first)
            with pytest.raises(LockedError, match="kept for its daemon"):
                async with open_cow(tmp_path, Survivors()):
                    pass
            assert cow.store.failed is None
        for _, descriptor in kept.kept():
            os.close(descriptor)
        async with open_cow(tmp_path, Survivors()):
            pass


@pytest.mark.logs("fdatasync of .* failed|the last flush failed|cannot be opened")
@pytest.mark.parametrize("told", [True, False], ids=["and the predecessor was told", "and nobody was told"])
async def test_the_failure_of_a_sync_that_was_cut_off_is_found_out(tmp_path: Path, told: bool) -> None:
    """The predecessor was killed in an fdatasync that failed: the error is gone from the description that it used."""
    first = Survivors()
    with unlocked():
        async with open_cow(tmp_path, first) as cow:
            await cow.write(0, memoryview(patterns(1, BLOCK)))
            left = left_by(first)
        memory = next(descriptor for name, descriptor in left.kept() if name.startswith("map."))
        os.pwrite(memory, SyncState.UNDER_WAY.to_bytes(8, "little"), HEAD_SIZE + working_size(SIZE // BLOCK) - 8)
        witness = next(descriptor for name, descriptor in left.kept() if name.startswith("data-witness"))
        real = os.fdatasync

        def fail(descriptor: int) -> None:
            if descriptor == witness and told:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(descriptor)

        os_fdatasync = mock.patch("os.fdatasync", fail)
        async with open_cow(tmp_path, left) as cow:
            with os_fdatasync:
                if told:
                    with pytest.raises(BackendError, match="read-only"):
                        await cow.flush()
                    assert cow.pending_error() is not None
                else:
                    await cow.flush()
                    assert cow.store.map.sync is SyncState.IDLE


async def test_a_writable_file_is_synced_through_the_description_of_its_predecessor(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    first = Survivors()
    synced: list[int] = []
    async with File.open(FileConfig(path=path), Environment("vm1", tmp_path, survivors=first)) as disk:
        await disk.write(0, memoryview(b"x" * 512))
        left = left_by(first)
        inherited = {descriptor for _, descriptor in left.kept()}
        async with File.open(FileConfig(path=path), Environment("vm1", tmp_path, survivors=left)) as after:
            with mock.patch("os.fdatasync", synced.append):
                await after.flush()
            assert set(synced) == inherited  # the witness, once, and the one that is used
            synced.clear()
            with mock.patch("os.fdatasync", synced.append):
                await after.flush()
            assert len(synced) == 1


async def test_what_was_being_evicted_is_punched_before_anything_is_installed(tmp_path: Path) -> None:
    content = patterns(7, 40 * BLOCK)
    bench = CacheBench(tmp_path, content, survivors=Survivors())
    async with bench.open() as opened:
        await read_all(opened.top)
        await opened.settled()
        await opened.image.sync()
        image = opened.image
        for block in range(10, 15):
            image.map.set_evicting(block)
        left = left_by(bench.survivors)
        before = image.data.allocated_bytes()
        again = CacheBench(tmp_path, content, survivors=left)
        with unlocked():
            async with again.open() as successor:
                assert [successor.image.map.state(block) for block in range(10, 15)] == [State.ABSENT] * 5
                assert before - successor.image.data.allocated_bytes() == 5 * BLOCK
                assert successor.image.map.held == 35
                assert successor.image.settled
                assert await read_all(successor.top) == content
                assert successor.read_below == 5 * BLOCK  # the rest is warm
        opened.pool.images.clear()


async def test_a_store_that_is_closed_unflushed_gives_its_memory_to_the_next_one(tmp_path: Path) -> None:
    survivors = Survivors()

    async def fail() -> None:
        async with open_cow(tmp_path, survivors, ephemeral=True) as cow:
            await cow.write(0, memoryview(patterns(1, BLOCK)))
            raise Killed

    with pytest.raises(ExceptionGroup):
        await fail()
    async with open_cow(tmp_path, survivors, ephemeral=True) as cow:
        assert (await read_all(cow))[:BLOCK] == patterns(1, BLOCK)
    assert survivors.kept() == []


async def test_what_a_predecessor_was_killed_before_it_kept_is_kept_by_its_successor(tmp_path: Path) -> None:
    """Else the third one would open the store's files anew, without the error that the kernel has for the first two."""
    first = Survivors()
    with unlocked():
        async with open_cow(tmp_path, first) as cow:
            await cow.write(0, memoryview(patterns(1, BLOCK)))
            kept = first.kept()
            second = Survivors(
                [(name, os.dup(descriptor)) for name, descriptor in kept[:2]]
            )  # the memory, and one file
            async with open_cow(tmp_path, second) as cow:
                assert (await read_all(cow))[:BLOCK] == patterns(1, BLOCK)
                assert sorted(name for name, _ in second.kept()) == sorted(name for name, _ in kept)
