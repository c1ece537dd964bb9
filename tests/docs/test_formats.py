"""The byte tables in docs/formats say what the code reads and writes."""

from __future__ import annotations

import hashlib
import itertools
import re
import struct
import uuid
import zlib
from pathlib import Path

import pytest
import xxhash

from cachefs import mountstate, survivor
from cachefs.extent import Extent, ExtentKind
from cachefs.layers import coalesce
from cachefs.nbd import unflushed
from cachefs.pool import holes, pool, summap
from cachefs.pool.pool import POOL_IMAGE
from cachefs.store import blockmap, clusters, files, sectors
from cachefs.store.identity import Identity

FORMATS = Path(__file__).parents[2] / "docs" / "formats"


def table(document: str, heading: str) -> list[tuple[int, int, str]]:
    """Offset, length and text of the numbered rows of the first table below *heading*."""
    section = (FORMATS / document).read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    (first, *_) = (part for part in section.split("\n\n") if part.startswith("| Offset"))
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (.*) \|$", first, re.MULTILINE)
    return [(int(offset), int(length), text) for offset, length, text in rows]


def fields(layout: struct.Struct) -> list[tuple[int, int]]:
    """Offset and length of each field of *layout*, padding included."""
    found, offset = [], 0
    for count, code in re.findall(r"(\d*)([a-zA-Z])", layout.format):
        length = struct.calcsize("<" + count + code)
        pieces = 1 if code in "sx" or not count else int(count)
        for _ in range(pieces):
            found.append((offset, length // pieces))
            offset += length // pieces
    return found


def follows(rows: list[tuple[int, int, str]]) -> bool:
    return all(row[0] + row[1] == following[0] for row, following in itertools.pairwise(rows))


def test_header_of_an_overlay_is_as_described() -> None:
    rows = table("overlay.md", "Header")
    assert [(offset, length) for offset, length, _ in rows] == fields(files._HEAD)
    assert follows(rows)
    assert f"| {files._HEAD.size} | | Identity of the base" in (FORMATS / "overlay.md").read_text()
    assert f"Format version: {files.OVERLAY.version}" in [row[2] for row in rows]
    assert repr(files.OVERLAY.magic.decode())[1:-1] in rows[0][2]
    assert f"{files.OVERLAY.checksum} is crc32" in next(row[2] for row in rows if row[0] == 44)


def test_fields_of_a_header_lie_where_the_table_says() -> None:
    header = files.Header(0x1122334455667788, 65536, Identity("file", {"size": "1"}), True, uuid.UUID(int=7))
    content = header.encode()
    where = {
        text.split(":")[0].split(",")[0]: (offset, length) for offset, length, text in table("overlay.md", "Header")
    }

    def number(name: str) -> int:
        offset, length = where[name]
        return int.from_bytes(content[offset : offset + length], "little")

    assert number("Format version") == 1
    assert number("Size of the disk") == 0x1122334455667788
    assert number("Block size") == 65536
    assert number("Flags") == 1
    assert number("Length of the base's identity") == content[56:].rstrip(b"\0").__len__()
    assert content[16:32] == uuid.UUID(int=7).bytes
    assert len(content) == files.HEADER_SIZE == 4096


def test_map_sector_is_as_described() -> None:
    rows = table("overlay.md", "Map sector")
    assert follows(rows)
    head = [row for row in rows if row[0] < sectors.SECTOR_HEAD.size]
    assert [(offset, length) for offset, length, _ in head] == fields(sectors.SECTOR_HEAD)
    assert [(offset, length) for offset, length, _ in rows[len(head) :]] == [
        (sectors.SECTOR_HEAD.size, blockmap.PLANE_SIZE),
        (sectors.SECTOR_HEAD.size + blockmap.PLANE_SIZE, blockmap.PLANE_SIZE),
    ]
    assert rows[-1][0] + rows[-1][1] == blockmap.SECTOR_SIZE
    assert f"`{blockmap.SECTOR_MAGIC.decode()}`" in rows[0][2]
    assert str(blockmap.BLOCKS_PER_SECTOR) in (FORMATS / "overlay.md").read_text()


def test_bits_of_a_map_sector_lie_where_the_table_says() -> None:
    states = blockmap.BlockMap(memoryview(bytearray(blockmap.working_size(5000))), 5000, 4096)
    states.set_data(1920 + 11, 1920 + 12)
    states.set_zero(1920 + 8, 1920 + 9)
    ((number, content),) = states.begin_round()
    assert number == 1 == int.from_bytes(content[16:24], "little")
    assert content[32:272] == bytes([0, 0b1000]) + bytes(238)
    assert content[272:] == bytes([0, 0b1]) + bytes(238)


def test_head_of_survivor_memory_is_as_described() -> None:
    rows = table("survivor.md", "Head")
    assert follows(rows)
    assert [(offset, length) for offset, length, _ in rows] == fields(survivor.HEAD)
    assert survivor.HEAD_SIZE == 4096
    assert repr(survivor.MAGIC.decode())[1:-1].replace("\\x00", "\\0") in rows[0][2]
    memory = survivor.SurvivorMemory("map", 1, uuid.UUID(int=9), 5, 100)
    head = memory._map[: survivor.HEAD.size]
    assert head[8:16] == b"map".ljust(8, b"\0")
    assert head[24:40] == uuid.UUID(int=9).bytes
    assert head[40:56] == survivor.boot_id()
    assert struct.unpack_from("<QQ", head, 56) == (5, 100)
    memory.close()


def test_working_map_is_as_described() -> None:
    for blocks in (1, 1920, 1921, 1920 * 64, 1920 * 64 + 1):
        count = -(-blocks // 1920)
        assert blockmap.working_size(blocks) == 480 * count + 2 * (-(-count // 64) * 8) + 16
    body = bytearray(blockmap.working_size(5000))
    states = blockmap.BlockMap(memoryview(body), 5000, 4096)
    states.set_data(1920, 1921)
    states.set_zero(3840, 3841)
    assert (body[240], body[720 + 480], body[1440], body[1448]) == (1, 1, 0b110, 0)
    states.begin_round()
    assert (body[1440], body[1448]) == (0, 0b110)
    states.sync = sectors.SyncState.UNDER_WAY
    assert struct.unpack_from("<QQ", body, 1456) == (1, 1)


def test_header_of_a_pool_image_is_as_described() -> None:
    rows = table("pool.md", "Header")
    assert [(offset, length) for offset, length, _ in rows] == fields(files._HEAD)
    assert follows(rows)
    assert f"| {files._HEAD.size} | | Identity of the base" in (FORMATS / "pool.md").read_text()
    assert f"Format version: {POOL_IMAGE.version}" in [row[2] for row in rows]
    assert repr(POOL_IMAGE.magic.decode())[1:-1] in rows[0][2]
    assert f"{POOL_IMAGE.checksum} is crc32 as in zlib over header and map sectors, xxh3-64" in rows[6][2]
    header = files.Header(5 << 40, 1 << 20, Identity("file", {"size": "1"}), uuid=uuid.UUID(int=7), format=POOL_IMAGE)
    content = header.encode()
    values = {offset: int.from_bytes(content[offset : offset + length], "little") for offset, length, _ in rows}
    assert [values[offset] for offset in (12, 32, 40, 44, 48)] == [1, 5 << 40, 1 << 20, 2, 0]
    assert content[16:32] == uuid.UUID(int=7).bytes
    assert content[56 : 56 + values[52]] == b'{"facts": {"size": "1"}, "kind": "file"}'


def test_pool_is_told_by_its_text() -> None:
    assert "| `pool` | The text `cachefs pool 1` and a newline" in (FORMATS / "pool.md").read_text()
    assert pool.POOL_TEXT == b"cachefs pool 1\n"


def test_digest_of_an_image_is_as_described() -> None:
    text = (FORMATS / "pool.md").read_text()
    assert "the first 32 hexadecimal digits of the SHA-256" in text
    form = """{"block_size": 65536, "facts": {"inode": "12"}, "kind": "file", "size": 1048576}"""
    assert form.replace("}, ", ", ...}, ", 1) in text
    found = pool.digest_of(Identity("file", {"inode": "12"}), 1048576, 65536)
    assert found == hashlib.sha256(form.encode()).hexdigest()[:32]
    with_owner = form.replace('"size"', '"owner": "vm1", "size"')
    found = pool.digest_of(Identity("file", {"inode": "12"}), 1048576, 65536, "vm1")
    assert found == hashlib.sha256(with_owner.encode()).hexdigest()[:32]


def test_map_sector_of_a_pool_is_as_described() -> None:
    rows = table("pool.md", "Map sector")
    assert follows(rows)
    *head, entries = rows
    assert [(offset, length) for offset, length, _ in head] == fields(sectors.SECTOR_HEAD)
    assert entries[:2] == (sectors.SECTOR_HEAD.size, summap.BLOCKS_PER_SECTOR * summap.ENTRY_SIZE)
    assert entries[0] + entries[1] == sectors.SECTOR_SIZE
    assert f"`{summap.SECTOR_MAGIC.decode()}`" in head[0][2]
    assert entries[2].startswith(f"Entries: {summap.BLOCKS_PER_SECTOR} numbers of {summap.ENTRY_SIZE} bytes")
    assert f"for every {summap.BLOCKS_PER_SECTOR} blocks" in (FORMATS / "pool.md").read_text()


def test_entries_of_a_pool_mean_what_the_table_says() -> None:
    text = (FORMATS / "pool.md").read_text()
    rows = re.findall(r"^\| (\d)(?: and more)? \| ([a-z]+) \|", text, re.MULTILINE)
    assert {int(number): state.upper() for number, state in rows} == {state: state.name for state in summap.State}


def test_entries_of_a_pool_lie_where_the_table_says() -> None:
    states = summap.SumMap(memoryview(bytearray(summap.working_size(200))), 200)
    content = b"contents of a block" * 100
    states.set_data(61, summap.checksum(61, content))
    states.set_zero(62)
    states.set_evicting(63)
    states.set_spoiled(119)
    ((number, sector),) = states.begin_round()
    assert number == 1 == int.from_bytes(sector[16:24], "little")
    entries = struct.unpack("<60Q", sector[32:])
    assert entries == (0, xxhash.xxh3_64_intdigest(content, seed=61), 1, 2, *[0] * 55, 3)
    assert int.from_bytes(sector[4:8], "little") == zlib.crc32(sector[8:])


def test_checksums_that_would_be_states_are_moved_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, entry in ((0, 4), (3, 7), (4, 4), (2**64 - 1, 2**64 - 1)):
        monkeypatch.setattr(summap.xxhash, "xxh3_64_intdigest", lambda content, seed, found=found: found)
        assert summap.checksum(5, b"x") == entry


def test_working_sums_are_as_described() -> None:
    for blocks in (1, 60, 61, 60 * 64, 60 * 64 + 1):
        count = -(-blocks // 60)
        assert summap.working_size(blocks) == 480 * count + 2 * (-(-count // 64) * 8) + 24
    body = bytearray(summap.working_size(200))
    states = summap.SumMap(memoryview(body), 200)
    states.set_data(60, 0x1122334455667788)
    states.set_zero(120)
    assert body[480:488] == (0x1122334455667788).to_bytes(8, "little")
    assert (body[960], body[1920], body[1928]) == (1, 0b110, 0)
    states.begin_round()
    assert (body[1920], body[1928]) == (0, 0b110)
    states.sync = sectors.SyncState.ASKING
    states.settle()
    assert struct.unpack_from("<QQQ", body, 1936) == (1, 2, 1)
    text = (FORMATS / "survivor.md").read_text()
    assert f"## Body of `sums`, layout {summap.LAYOUT}\n" in text


def test_slot_of_an_unflushed_change_is_as_described() -> None:
    text = (FORMATS / "survivor.md").read_text().split("A slot:\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (.*) \|$", text, re.MULTILINE)
    found = [(int(offset), int(length)) for offset, length, _ in rows]
    padding = (3, 5)
    assert [row for row in found if row != padding] == [
        row for row in fields(unflushed._SLOT) if row[1] == 8 or row[0] < 3
    ]
    assert "40 *S*" in (FORMATS / "survivor.md").read_text()
    assert unflushed._SLOT.size == 40


def test_file_of_extents_is_as_described() -> None:
    rows = table("pool.md", "Extents")
    assert follows(rows)
    assert [(offset, length) for offset, length, _ in rows] == fields(holes.HEAD)
    assert f"| {holes.HEAD.size} | | Identity of the base" in (FORMATS / "pool.md").read_text()
    assert f"Format version: {holes.VERSION}" in [row[2] for row in rows]
    assert repr(holes.MAGIC.decode())[1:-1] in rows[0][2]
    assert fields(holes.RUN) == [(0, 8), (8, 8)]
    assert holes.RUN.size == 16


def test_runs_of_a_file_of_extents_lie_where_the_table_says() -> None:
    base = Identity("file", {"inode": "7"})
    runs = [(0, 4096, ExtentKind.DATA), (1 << 36, 5, ExtentKind.ZERO), (1 << 37, 6, ExtentKind.HOLE)]
    content = holes.encode(base, 1 << 40, [Extent(*run) for run in runs])
    count, length = struct.unpack_from("<II", content, 24)
    assert (count, content[32 : 32 + length]) == (3, b'{"facts": {"inode": "7"}, "kind": "file"}')
    assert content[32 + length :] == struct.pack("<6Q", 0, 4096 << 2, 1 << 36, 5 << 2 | 1, 1 << 37, 6 << 2 | 2)
    assert int.from_bytes(content[8:12], "little") == zlib.crc32(content[12:])


def test_memory_of_a_mount_is_as_described() -> None:
    text = (FORMATS / "survivor.md").read_text()
    assert f"## Body of a `mount`, layout {mountstate.LAYOUT}\n" in text
    part = text.partition("## Body of a `mount`")[2]
    rows = [(int(a), int(b), c) for a, b, c in re.findall(r"^\| (\d+) \| (\d+) \| (.*) \|$", part, re.MULTILINE)]
    words = [offset // 8 for offset, length, _ in rows[:12]]
    assert words == list(range(12))
    named = {
        mountstate._NEXT_INODE: "next inode",
        mountstate._HANDLING: "being handled",
        mountstate._CONFIGS: "configuration was set",
        mountstate._SUCCESSIONS: "took over",
        mountstate._DRAINING: "drains",
        mountstate._STOPPED_NS: "CLOCK_MONOTONIC",
        mountstate._COUNTED_UNIQUE: "`unique`",
        mountstate._COUNTED_INODE: "Its inode",
        mountstate._COUNTED: "open count",
        mountstate._CRASH_COUNT: "crashes",
        mountstate._AGREED: "INIT is agreed",
        mountstate._ROWS: "Rows",
    }
    for word, phrase in named.items():
        assert phrase in rows[word][2]
    sizes = [(offset, length) for offset, length, _ in rows[12:18]]
    assert sizes == [
        (mountstate._CRASHES_AT, mountstate.CRASHES * mountstate._CRASH.size),
        (mountstate._INIT_AT, mountstate._INIT_SIZE),
        (mountstate._INIT_AT + mountstate._INIT_SIZE, mountstate._INIT_SIZE),
        (mountstate._CONFIG_AT, mountstate._CONFIG_SIZE),
        (mountstate._CONFIG_AT + mountstate._CONFIG_SIZE, mountstate._CONFIG_SIZE),
        (mountstate._DISKS_AT, mountstate.DISKS * mountstate._DISK_SIZE),
    ]
    assert mountstate._INIT_AT + 2 * mountstate._INIT_SIZE <= mountstate._CONFIG_AT
    columns = {offset // 8: what for offset, _, what in rows[18:]}
    assert "Inode" in columns[mountstate._INODE]
    assert "Open count" in columns[mountstate._OPENS]
    assert "Size" in columns[mountstate._BYTES]
    assert "being opened" in columns[mountstate._OPENING]
    assert "in tasks" in columns[mountstate._WAITING]
    assert rows[-1][:2] == (mountstate._NAME_AT, mountstate._NAME_SIZE)


def test_memory_of_a_coalescer_is_as_described() -> None:
    text = (FORMATS / "survivor.md").read_text()
    section = text.split(f"## Body of `coalesce`, layout {coalesce.LAYOUT}\n", 1)[1].split("\n## ", 1)[0]
    size, slots = 64 << 10, 130  # more than a page of slots
    body = bytearray(clusters.body_size(size, slots))
    these = clusters.Clusters(memoryview(body), 1 << 40, size, slots)
    these.put(7 * size + 9, b"\x11" * 3)
    assert struct.unpack_from("<QQ", body) == (size, slots)
    bits_at = 4096 + -(-32 * slots // 4096) * 4096
    assert "*B* is 4096 + 32 *S* in whole pages" in section
    data_at = bits_at + slots * size // 8
    assert len(body) == data_at + slots * size
    assert struct.unpack_from("<B7xQQQ", body, 4096) == (1, 1, 7, 0)
    assert body[bits_at : bits_at + 3] == bytes((0, 0b1110, 0))
    assert body[data_at + 8 : data_at + 13] == b"\0\x11\x11\x11\0"
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (.*) \|$", section.split("A slot:\n", 1)[1], re.MULTILINE)
    assert [(int(offset), int(length)) for offset, length, _ in rows] == [(0, 1), (1, 7), (8, 8), (16, 8), (24, 8)]
    these.complete(these.freeze(7) or pytest.fail("nothing is there"))
    assert body[4096] == 0
