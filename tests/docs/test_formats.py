"""The byte tables in docs/formats say what the code reads and writes."""

from __future__ import annotations

import itertools
import re
import struct
import uuid
from pathlib import Path

from cachefs import survivor
from cachefs.store import blockmap, files, sectors
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
        sectors = -(-blocks // 1920)
        assert blockmap.working_size(blocks) == 480 * sectors + 2 * (-(-sectors // 64) * 8)
    body = bytearray(blockmap.working_size(5000))
    states = blockmap.BlockMap(memoryview(body), 5000, 4096)
    states.set_data(1920, 1921)
    states.set_zero(3840, 3841)
    assert (body[240], body[720 + 480], body[1440], body[1448]) == (1, 1, 0b110, 0)
    states.begin_round()
    assert (body[1440], body[1448]) == (0, 0b110)
