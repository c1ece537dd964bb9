"""Which overlays are opened, and the sentence with which the others are refused."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.errors import BaseChangedError, FormatError, LockedError, StoreError
from cachefs.store.files import HEADER_SIZE, StoreLock, decode_header
from cachefs.testing.model import Model, Trim, Write, check_all, read_all, run_one, write
from cachefs.testing.stacks import Bench, Case, cow_layer
from cachefs.testing.strategies import patterns

SIZE, BLOCK = 130000, 4096
MakeBench = Callable[..., Bench]


@pytest.fixture
def make(folder: Path) -> MakeBench:
    def made(backend: str = "memory", **options: object) -> Bench:
        return Bench(Case("cow", SIZE, cow_layer(**options), backend), folder / "bench")

    return made


def overlay(bench: Bench) -> Path:
    return bench.folder / "state/overlays/disk"


async def fill(bench: Bench) -> Model:
    """The bench has an overlay with data and zeros in it, closed."""
    model = Model(bench.content)
    async with bench.open() as stack:
        await run_one(stack.top, Write(100, patterns(1, 9000)), model)
        await run_one(stack.top, Trim(50000, 20000), model)
    return model


async def refusal(bench: Bench, kind: type[StoreError]) -> str:
    """The message with which the overlay is refused; nothing of it was changed."""
    before = {path.name: path.read_bytes() for path in overlay(bench).iterdir() if path.name in ("data", "map")}
    with pytest.raises(kind) as caught:
        async with bench.open():
            pytest.fail("it was opened")
    assert {path.name: path.read_bytes() for path in overlay(bench).iterdir() if path.name in before} == before
    return str(caught.value)


def patch(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


# ---- another user, another base


async def test_second_open_is_refused_and_names_the_holder(make: MakeBench) -> None:
    bench = make()
    async with bench.open() as stack:
        await write(stack.top, 0, b"x")
        message = await refusal(Bench(bench.case, bench.folder), LockedError)
        assert f"in use by disk disk of cachefs, pid {os.getpid()}; unmount it there" in message
        await write(stack.top, 0, b"y")
    async with bench.open() as stack:
        assert (await read_all(stack.top))[:1] == b"y"


async def test_base_that_was_written_is_refused(make: MakeBench) -> None:
    bench = make("file")
    await fill(bench)
    status = bench.image.stat()
    os.utime(bench.image, ns=(0, 1))
    message = await refusal(bench, BaseChangedError)
    assert f"modification time was {status.st_mtime_ns}, is 1" in message
    assert "Put the old base back, or name another path for a new overlay" in message
    os.utime(bench.image, ns=(0, status.st_mtime_ns))
    async with bench.open():
        pass


async def test_base_of_another_size_is_refused(make: MakeBench) -> None:
    bench = make("file")
    await fill(bench)
    os.truncate(bench.image, SIZE + 1)
    message = await refusal(bench, BaseChangedError)
    assert f"size was {SIZE}, is {SIZE + 1}" in message


async def test_base_that_moved_is_the_same_base(make: MakeBench) -> None:
    bench = make("file")
    model = await fill(bench)
    bench.image.rename(bench.folder / "moved.raw")
    bench.image = bench.folder / "moved.raw"
    async with bench.open() as stack:
        await check_all(stack.top, model)


# ---- damage


@pytest.mark.parametrize(
    ("offset", "says"),
    [(0, "no cachefs store"), (9, "damaged"), (13, "damaged"), (20, "damaged"), (70, "damaged"), (4095, "damaged")],
)
async def test_damaged_header_is_refused(make: MakeBench, offset: int, says: str) -> None:
    bench = make()
    await fill(bench)
    patch(overlay(bench) / "map", offset, b"\xff")
    message = await refusal(bench, FormatError)
    assert says in message
    assert str(overlay(bench) / "map") in message


async def test_damaged_map_sector_is_refused(make: MakeBench) -> None:
    bench = make()
    await fill(bench)
    for offset in (0, 5, 9, 17, 33, 300, 511):
        good = (overlay(bench) / "map").read_bytes()[HEADER_SIZE + offset]
        patch(overlay(bench) / "map", HEADER_SIZE + offset, bytes([good ^ 0x10]))
        message = await refusal(bench, FormatError)
        assert "sector 0 of the block map is damaged" in message
        assert "restore the overlay from a backup" in message
        patch(overlay(bench) / "map", HEADER_SIZE + offset, bytes([good]))
    async with bench.open():
        pass


def with_header(path: Path, offset: int, content: bytes) -> None:
    """Change the header and make its checksum right again."""
    header = bytearray(path.read_bytes()[:HEADER_SIZE])
    header[offset : offset + len(content)] = content
    header[8:12] = zlib.crc32(header[12:]).to_bytes(4, "little")
    patch(path, 0, header)


@pytest.mark.parametrize(
    ("offset", "value", "says"),
    [
        (12, 2, "format version 2, checksum 1"),
        (44, 7, "format version 1, checksum 7"),
        (48, 0x80, "flags 0x80"),
    ],
)
async def test_format_that_is_not_known_is_refused(make: MakeBench, offset: int, value: int, says: str) -> None:
    bench = make()
    await fill(bench)
    with_header(overlay(bench) / "map", offset, struct.pack("<I", value))
    message = await refusal(bench, FormatError)
    assert says in message
    assert "open it with the cachefs that made it, or a later one" in message


@pytest.mark.parametrize("part", ["data", "map"])
@pytest.mark.parametrize("by", [-1, -512, 512])
async def test_file_of_another_length_is_refused(make: MakeBench, part: str, by: int) -> None:
    bench = make()
    await fill(bench)
    size = (overlay(bench) / part).stat().st_size
    os.truncate(overlay(bench) / part, size + by)
    message = await refusal(bench, FormatError)
    assert f"has {size + by} bytes and should have {size}; restore it from a backup" in message


@pytest.mark.parametrize("part", ["data", "map"])
async def test_missing_file_is_refused(make: MakeBench, part: str) -> None:
    bench = make()
    await fill(bench)
    (overlay(bench) / part).unlink()
    assert "No such file" in await refusal(bench, StoreError)


async def test_directory_that_is_no_overlay_is_refused(make: MakeBench) -> None:
    bench = make()
    overlay(bench).mkdir(parents=True)
    (overlay(bench) / "map").write_bytes(b"something else" * 1000)
    assert "this is no cachefs store" in await refusal(bench, FormatError)


async def test_place_where_nothing_can_be_made_is_refused(make: MakeBench) -> None:
    bench = make()
    (bench.folder / "state").write_bytes(b"")
    with pytest.raises(StoreError, match=r"cannot create the store: .*check the path and its rights"):
        async with bench.open():
            pytest.fail("it was opened")


flips = st.lists(
    st.tuples(st.sampled_from(["header", "map", "tail"]), st.integers(0, 4095), st.integers(1, 255)),
    min_size=1,
    max_size=4,
)


@given(flips)
@settings(max_examples=10, deadline=None)
async def test_random_damage_is_refused_or_harmless_never_a_traceback(damage: list[tuple[str, int, int]]) -> None:
    """Whatever bytes of the map are flipped: it is refused with a StoreError, or, where they cancel out, right."""
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as name:
        bench = Bench(Case("cow", SIZE, cow_layer()), Path(name))
        model = await fill(bench)
        path = overlay(bench) / "map"
        content = bytearray(path.read_bytes())
        for where, offset, mask in damage:
            start, length = {"header": (0, HEADER_SIZE), "map": (HEADER_SIZE, 512), "tail": (len(content) - 9, 9)}[
                where
            ]
            content[start + offset % length] ^= mask
        unchanged = bytes(content) == path.read_bytes()
        patch(path, 0, content)
        if unchanged:
            async with bench.open() as stack:
                await check_all(stack.top, model)
        else:
            await refusal(bench, FormatError)


@given(st.integers(12, 400), st.binary(min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_header_that_lies_with_a_right_checksum_gives_no_traceback(offset: int, content: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as name:
        path = Path(name) / "map"
        path.write_bytes((Path(__file__).parents[1] / "crash/data/overlay-v1/map").read_bytes())
        with_header(path, offset, content)
        try:
            header = decode_header(path.read_bytes()[:HEADER_SIZE], "map")
        except FormatError:
            return
        assert header.block_size > 0


# ---- options that belong to an overlay


async def test_block_size_is_that_of_the_overlay_and_cannot_be_changed(make: MakeBench) -> None:
    bench = make()
    model = await fill(bench)
    other = Bench(Case("cow", SIZE, cow_layer(block_size="64KiB")), bench.folder)
    message = await refusal(other, StoreError)
    assert "made with blocks of 4KiB, the configuration says 64KiB; that cannot be changed" in message
    async with bench.open() as stack:
        await check_all(stack.top, model)


async def test_ephemeral_overlay_is_deleted_at_close(make: MakeBench) -> None:
    bench = make(ephemeral=True)
    async with bench.open() as stack:
        await write(stack.top, 0, b"x" * 5000)
        await stack.top.flush()
        assert overlay(bench).exists()
    assert list(overlay(bench).parent.iterdir()) == []


async def test_ephemeral_overlay_that_a_crash_left_is_emptied(make: MakeBench) -> None:
    bench = make(ephemeral=True)
    left = bench.folder / "left"
    async with bench.open() as stack:
        await write(stack.top, 0, b"x" * 5000)
        await stack.top.flush()
        shutil.copytree(overlay(bench), left)  # what a killed daemon leaves: its file, its epoch, no lock
    left.rename(overlay(bench))
    async with bench.open() as stack:
        await check_all(stack.top, Model(bench.content))


@pytest.mark.parametrize("made_ephemeral", [False, True])
async def test_kept_overlay_does_not_become_ephemeral_nor_the_other_way_round(
    make: MakeBench, made_ephemeral: bool
) -> None:
    """A word in the configuration is not to delete what somebody kept."""
    bench = make(ephemeral=made_ephemeral)
    left = bench.folder / "left"
    async with bench.open() as stack:
        await write(stack.top, 0, b"x" * 5000)
        await stack.top.flush()
        shutil.copytree(overlay(bench), left)
    shutil.rmtree(overlay(bench), ignore_errors=True)
    left.rename(overlay(bench))
    other = Bench(Case("cow", SIZE, cow_layer(ephemeral=not made_ephemeral)), bench.folder)
    message = await refusal(other, StoreError)
    assert f"set ephemeral back to {str(made_ephemeral).lower()}, or name another path" in message


async def test_epoch_is_bumped_by_every_open(make: MakeBench) -> None:
    bench = make()
    for wanted in (1, 2, 3):
        async with bench.open():
            assert struct.unpack("<Q", (overlay(bench) / "epoch").read_bytes()) == (wanted,)


def test_lock_is_free_again_when_its_holder_closes_it(folder: Path) -> None:
    for _ in range(2):
        lock = StoreLock(folder, "disk a of cachefs")
        with pytest.raises(LockedError, match=f"in use by disk a of cachefs, pid {os.getpid()}"):
            StoreLock(folder, "disk b of cachefs")
        lock.close()


async def test_half_made_store_of_a_killed_daemon_is_in_nobodys_way(make: MakeBench) -> None:
    bench = make()
    temporary = overlay(bench).with_name(f".disk.new-{os.getpid()}")
    temporary.mkdir(parents=True)
    (temporary / "data").write_bytes(b"half")
    async with bench.open() as stack:
        await check_all(stack.top, Model(bench.content))
    assert not temporary.exists()
