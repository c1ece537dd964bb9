"""The cache opened again: after a close in order, a kill, a power cut, and damage to any of its files."""

from __future__ import annotations

import errno
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.errors import FormatError, LockedError, StoreError
from cachefs.pool.image import PoolImage
from cachefs.pool.summap import State
from cachefs.store.identity import Identity
from cachefs.testing.caches import CacheBench, Opened, disk_bytes
from cachefs.testing.model import assert_same, read, read_all
from cachefs.testing.rules import Rule
from cachefs.testing.strategies import patterns

BLOCK = 4096
SIZE = 130 * BLOCK + 1000  # three sectors of the map
CONTENT = patterns(7, SIZE)
MAP_AT = 4096  # where the sectors begin


@pytest.fixture
def bench(folder: Path) -> CacheBench:
    return CacheBench(folder, CONTENT, block_size=BLOCK)


async def warm(bench: CacheBench) -> None:
    async with bench.open() as opened:
        await read_all(opened.top)
        await opened.settled()


async def look(bench: CacheBench) -> dict[str, int]:
    """Opened, every byte is right, also the second time; what the cache counted, and what was read below the first time."""
    async with bench.open() as opened:
        await opened.image.wait_settled()
        assert_same(await read_all(opened.top), CONTENT, 0)
        below = opened.read_below
        await opened.settled()
        assert_same(await read_all(opened.top), CONTENT, 0)
        assert opened.read_below - below <= below
        opened.pool.policy.check()
        assert len(opened.pool.policy) == opened.image.map.held
        assert disk_bytes(bench.pool_path) <= opened.pool.account.used <= bench.quota
        values = opened.disk.cache.statistics().values
        return {"below": below, **{name: int(values[name]) for name in ("corrupt_blocks", "forgotten_blocks")}}


def change(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


# ---- in order


async def test_cache_is_warm_after_a_close_in_order(bench: CacheBench) -> None:
    await warm(bench)
    assert await look(bench) == {"below": 0, "corrupt_blocks": 0, "forgotten_blocks": 0}


async def test_cache_installs_what_was_fetched_before_it_closes(bench: CacheBench) -> None:
    async with bench.open() as opened:
        held = bench.gate.hold("write")
        for at in range(0, SIZE, 20000):
            await read(opened.top, at, min(20000, SIZE - at))
        await held.wait_until_held()
        held.open()  # one is in its thread, the others wait for their turn
    assert (await look(bench))["below"] == 0


async def test_cache_verifies_a_block_on_its_first_use_only(bench: CacheBench) -> None:
    await warm(bench)
    bench.gate.calls.clear()
    async with bench.open() as opened:
        for _ in range(3):
            assert await read(opened.top, 10 * BLOCK + 5, 100) == CONTENT[10 * BLOCK + 5 :][:100]
        assert bench.gate.calls["read"] == 1
        assert opened.top.try_read_into(10 * BLOCK, memoryview(bytearray(BLOCK)))
        assert not opened.top.try_read_into(11 * BLOCK, memoryview(bytearray(BLOCK)))


async def test_cache_goes_without_a_scan_after_a_close_in_order(bench: CacheBench) -> None:
    await warm(bench)
    bench.gate.calls.clear()
    async with bench.open() as opened:
        assert opened.image.settled
        assert bench.gate.calls["extents"] == bench.gate.calls["punch"] == 0


# ---- kill -9


async def test_cache_is_warm_after_a_kill_as_far_as_its_map_was_written(bench: CacheBench) -> None:
    async with bench.open() as opened:
        await read(opened.top, 0, 64 * BLOCK)
        await opened.settled()
        await opened.image.sync()
        before = {block for block in range(opened.image.count) if opened.image.map.state(block) is State.DATA}
        await read_all(opened.top)
        await opened.settled()
        crashed = bench.crash()
    found = await look(crashed)
    assert found["corrupt_blocks"] == 0
    assert found["below"] <= SIZE - (len(before) - 1) * BLOCK


async def test_cache_frees_what_no_map_knows_after_a_kill(bench: CacheBench) -> None:
    async with bench.open() as opened:
        await read_all(opened.top)
        await opened.settled()
        crashed = bench.crash()  # the map on disk knows nothing yet
    assert disk_bytes(crashed.pool_path) > SIZE
    async with crashed.open() as opened:
        assert opened.pool.account.used >= disk_bytes(crashed.pool_path)
        await opened.image.wait_settled()
        assert opened.image.data.allocated_bytes() == 0
        assert opened.pool.account.used <= 128 << 10


async def test_cache_installs_nothing_before_it_knows_what_a_kill_left(bench: CacheBench) -> None:
    await warm(bench)
    (bench.pool_path / "clean").unlink()
    held = bench.gate.hold("extents")
    async with bench.open() as opened:
        await held.wait_until_held()
        opened.image.map.set_absent(3)  # as if the map on disk were older
        assert_same(await read_all(opened.top), CONTENT, 0)
        await wait_all_tasks_blocked()
        assert not opened.image.settled
        assert opened.image.map.state(3) is State.ABSENT
        assert bench.gate.calls["write"] <= 3  # those of the first opening
        opened.image.map.set_spoiled(3)
        held.open()
        await opened.image.wait_settled()


async def test_cache_forgets_blocks_that_were_evicted_after_the_last_map(bench: CacheBench) -> None:
    async with bench.open() as opened:
        await read_all(opened.top)
        await opened.settled()
        await opened.image.sync()
        opened.image.data.punch_now(10 * BLOCK, 20 * BLOCK)
        crashed = bench.crash()
    found = await look(crashed)
    assert found == {"below": found["below"], "corrupt_blocks": 0, "forgotten_blocks": 20}
    assert 20 * BLOCK <= found["below"] <= 20 * BLOCK * 2


async def test_cache_counts_what_lies_in_the_file_until_all_of_it_was_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map knows the first half, of which nothing is there; the second half is there, and no map knows it."""
    monkeypatch.setattr("cachefs.pool.image.SCAN_STEP", 1)
    bench = CacheBench(folder, CONTENT, block_size=BLOCK)
    async with bench.open() as opened:
        await read(opened.top, 0, 60 * BLOCK)
        await opened.settled()
        await opened.image.sync()
        await read_all(opened.top)
        await opened.settled()
        opened.image.data.punch_now(0, 60 * BLOCK)
        crashed = bench.crash()
    held = crashed.gate.hold("punch")
    async with crashed.open() as opened:
        await held.wait_until_held()
        assert opened.image.forgotten_blocks >= 60
        assert disk_bytes(crashed.pool_path) <= opened.pool.account.used
        held.open()
        await opened.image.wait_settled()
        assert disk_bytes(crashed.pool_path) <= opened.pool.account.used <= 128 << 10


@pytest.mark.parametrize("step", [1, 3])
async def test_cache_looks_at_what_a_kill_left_in_small_steps(
    bench: CacheBench, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr("cachefs.pool.image.SCAN_BLOCKS", step)
    async with bench.open() as opened:
        await read(opened.top, 0, 64 * BLOCK)
        await opened.settled()
        await opened.image.sync()
        await read_all(opened.top)
        await opened.settled()
        opened.image.data.punch_now(10 * BLOCK, 20 * BLOCK)
        crashed = bench.crash()
    async with crashed.open() as opened:
        await opened.image.wait_settled()
        assert opened.image.forgotten_blocks == 20
        assert opened.image.data.allocated_bytes() == opened.image.map.held * BLOCK


@pytest.mark.logs("cannot free what a crash left", "freeing what a crash left failed")
@pytest.mark.parametrize("error", [OSError(errno.EIO, ""), RuntimeError("a bug")], ids=repr)
@pytest.mark.parametrize("op", ["extents", "punch"])
async def test_cache_serves_and_installs_nothing_when_it_cannot_free_what_a_kill_left(
    bench: CacheBench, op: str, error: Exception
) -> None:
    async with bench.open() as opened:
        await read_all(opened.top)
        await opened.settled()
        crashed = bench.crash()
    crashed.gate.faults.append((Rule(op, once=False), error))
    async with crashed.open() as opened:
        await opened.image.wait_settled()
        for _ in range(2):
            assert_same(await read_all(opened.top), CONTENT, 0)
        assert not crashed.gate.calls["write"]
        assert disk_bytes(crashed.pool_path) <= opened.pool.account.used
    assert not (crashed.pool_path / "clean").exists()


@pytest.mark.logs("its map cannot be read: Input/output error; dropped")
async def test_cache_drops_an_image_whose_map_cannot_be_read(
    bench: CacheBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await warm(bench)

    def fail(image: PoolImage) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(PoolImage, "load", fail)
    assert (await look(bench))["below"] >= SIZE
    monkeypatch.undo()
    assert (await look(bench))["below"] == 0


# ---- power cuts and damage


@pytest.mark.logs("damaged", "disagrees")
async def test_cache_gives_right_bytes_whatever_a_power_cut_left_of_its_files(bench: CacheBench) -> None:
    """Old, new, zeroed and torn sectors of map and data in any mixture."""
    async with bench.open() as opened:
        await read(opened.top, 0, 50 * BLOCK)
        await opened.settled()
        await opened.image.sync()
        old = bench.crash("old")
        await read_all(opened.top)
        await opened.settled()
        await opened.image.sync()
        new = bench.crash("new")
    for seed in range(20):
        order = random.Random(seed)
        cut = new.crash(f"cut{seed}")
        for name in ("data", "map"):
            before, after = ((one.image_path() / name).read_bytes() for one in (old, new))
            mixed = bytearray(after)
            first = MAP_AT if name == "map" else 0
            for at in range(first, len(after), 512):
                choice = order.choice((before, after, after, after, bytes(len(after))))
                mixed[at : at + 512] = choice[at : at + 512]
            (cut.image_path() / name).write_bytes(mixed)
        await look(cut)


@pytest.mark.logs("disagrees with its checksum")
async def test_cache_serves_heals_and_counts_a_flipped_byte_of_its_data(bench: CacheBench) -> None:
    await warm(bench)
    change(bench.image_path() / "data", 10 * BLOCK + 77, b"\0")
    found = await look(bench)
    assert found["corrupt_blocks"] == 1
    assert found["below"] <= SIZE  # the request met it; not more than once
    assert await look(bench) == {"below": 0, "corrupt_blocks": 0, "forgotten_blocks": 0}


@pytest.mark.logs("disagrees with its checksum")
async def test_cache_believes_no_block_that_lies_in_the_place_of_another(bench: CacheBench) -> None:
    bench.content = CONTENT
    await warm(bench)
    data, entries = bench.image_path() / "data", bench.image_path() / "map"
    change(data, 10 * BLOCK, CONTENT[20 * BLOCK : 21 * BLOCK])
    sector = bytearray(entries.read_bytes()[MAP_AT : MAP_AT + 512])
    sector[32 + 80 : 32 + 88] = sector[32 + 160 : 32 + 168]  # block 10 has block 20's checksum as well
    sector[4:8] = zlib.crc32(sector[8:]).to_bytes(4, "little")
    change(entries, MAP_AT, sector)
    assert (await look(bench))["corrupt_blocks"] == 1


@pytest.mark.logs("sector 1 of the block map is damaged")
@pytest.mark.parametrize("is_clean", [True, False])
async def test_cache_fetches_anew_what_a_damaged_sector_of_its_map_described(bench: CacheBench, is_clean: bool) -> None:
    await warm(bench)
    change(bench.image_path() / "map", MAP_AT + 512 + 100, b"\xff\0\xff")
    if not is_clean:
        (bench.pool_path / "clean").unlink()
    async with bench.open() as opened:
        await opened.image.wait_settled()
        assert_same(await read_all(opened.top), CONTENT, 0)
        assert 60 * BLOCK <= opened.read_below < SIZE
        await opened.settled()
        assert opened.pool.account.used <= SIZE + (128 << 10)  # and it takes no room twice
    assert (await look(bench))["below"] == 0


async def test_cache_takes_any_label_for_what_it_is(bench: CacheBench) -> None:
    await warm(bench)
    (bench.image_path() / "label").write_bytes(b"\xff\xfe")
    assert (await look(bench))["below"] == 0
    (bench.image_path() / "label").unlink()
    assert (await look(bench))["below"] == 0


def lose(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def shorten(name: str) -> Callable[[Path], None]:
    return lambda path: change_size(path / name)


def change_size(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(5000)


def flip_header(path: Path) -> None:
    change(path / "map", 100, b"\x55")


@pytest.mark.logs("dropped")
@pytest.mark.parametrize(
    "damage",
    [lose("map"), lose("data"), shorten("map"), shorten("data"), flip_header],
    ids=["no map", "no data", "short map", "short data", "header"],
)
async def test_cache_drops_an_image_whose_files_are_damaged_and_fills_it_again(
    bench: CacheBench, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    await warm(bench)
    damage(bench.image_path())
    assert (await look(bench))["below"] >= SIZE
    assert sum("; dropped" in record.getMessage() for record in caplog.records) == 1
    assert (await look(bench))["below"] == 0


async def test_cache_does_without_its_epoch(bench: CacheBench) -> None:
    await warm(bench)
    (bench.image_path() / "epoch").unlink()
    assert (await look(bench))["below"] == 0


async def test_pool_refuses_an_image_of_another_version_and_leaves_it_alone(bench: CacheBench) -> None:
    await warm(bench)
    path = bench.image_path() / "map"
    header = bytearray(path.read_bytes()[:4096])
    struct.pack_into("<I", header, 12, 2)
    header[8:12] = zlib.crc32(header[12:]).to_bytes(4, "little")
    change(path, 0, header)
    before = path.read_bytes()
    with pytest.raises(BaseException) as caught:
        async with bench.open():
            pass
    assert caught.group_contains(FormatError, match="version 2, .* open it with the cachefs that made it") or (
        "version 2" in str(caught.value)
    )
    assert path.read_bytes() == before


async def test_pool_of_another_version_is_refused_and_left_alone(bench: CacheBench) -> None:
    await warm(bench)
    (bench.pool_path / "pool").write_bytes(b"cachefs pool 2\n")
    with pytest.raises(FormatError, match="another version"):
        async with bench.open_pool():
            pass
    assert bench.image_path().exists()


# ---- identity


@pytest.mark.logs("the base of image has changed: what the pool held of the old one is dropped")
async def test_cache_of_a_base_that_changed_is_dropped(bench: CacheBench) -> None:
    await warm(bench)
    old = bench.image_path()
    changed = CacheBench(bench.folder, patterns(9, SIZE), block_size=BLOCK, identity=Identity("file", {"inode": "8"}))
    async with changed.open() as opened:
        assert await read_all(opened.top) == patterns(9, SIZE)
        assert not old.exists()
        assert opened.pool.account.used <= SIZE + BLOCK + (256 << 10)


async def test_cache_of_a_base_that_cannot_be_reached_is_kept(bench: CacheBench) -> None:
    await warm(bench)
    async with bench.open_pool():  # nobody can open the disk
        pass
    assert (await look(bench))["below"] == 0


# ---- one owner


async def test_pool_has_one_owner_at_a_time(bench: CacheBench) -> None:
    async with bench.open_pool():
        with pytest.raises(LockedError, match="is in use by pool node of cachefs, pid"):
            async with bench.open_pool():
                pass
    async with bench.open_pool():
        pass


async def test_directory_that_is_no_pool_is_refused_and_left_alone(bench: CacheBench) -> None:
    bench.pool_path.mkdir(parents=True)
    (bench.pool_path / "precious").write_text("mine")
    with pytest.raises(StoreError, match="is no pool, and not empty"):
        async with bench.open_pool():
            pass
    assert [path.name for path in bench.pool_path.iterdir()] == ["precious"]


async def test_pool_may_be_the_root_of_a_file_system_of_its_own(bench: CacheBench) -> None:
    (bench.pool_path / "lost+found").mkdir(parents=True)
    assert (await look(bench))["below"] >= SIZE


async def test_pool_whose_making_was_interrupted_is_made(bench: CacheBench) -> None:
    bench.pool_path.mkdir(parents=True)
    (bench.pool_path / "pool").touch()
    assert (await look(bench))["below"] >= SIZE


@pytest.mark.logs("failed")
async def test_pool_is_not_given_to_another_while_a_thread_of_the_old_owner_may_still_punch(
    bench: CacheBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachefs.pool.pool.CLOSE_PATIENCE_S", 0.01)
    held = None
    async with bench.open() as opened:
        await read_all(opened.top)
        await opened.settled()
        held = bench.gate.hold("punch")
        key = opened.image.blocks.base
        opened.pool.policy.forget(key)
        opened.image.map.set_evicting(0)
        opened.pool._nursery.start_soon(opened.image.punch_out, [0])
        await held.wait_until_held()
    with pytest.raises(LockedError):
        async with bench.open_pool():
            pass
    held.open()


async def test_pool_makes_one_image_for_two_disks_that_are_opened_at_the_same_time(bench: CacheBench) -> None:
    async with bench.open_pool() as pool:
        opened: list[Opened] = []
        done = trio.Event()

        async def attach() -> None:
            async with bench.open_disk(pool) as disk:
                opened.append(Opened(pool, bench.gate, [disk]))
                await done.wait()

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(attach)
            with trio.fail_after(10):
                while len(opened) < 3:
                    await trio.lowlevel.checkpoint()
            assert len({id(one.image) for one in opened}) == 1
            assert len(pool.images) == 1
            done.set()
