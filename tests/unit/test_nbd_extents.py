"""How the nbd backend asks a real server for its map: as few questions as the server's answers allow."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cachefs.backends.nbd import Nbd
from cachefs.backends.nbdoptions import NbdConfig
from cachefs.extent import Extent, ExtentKind, merge_extents
from cachefs.layers.base import Environment
from cachefs.nbd import protocol
from cachefs.nbd.protocol import MAX_STATUS_LENGTH, Command, ReplyParser, Request
from cachefs.store.localfile import LocalFile

pytestmark = pytest.mark.slow

GIB = 1 << 30
_START = 'LISTEN_PID=$$ LISTEN_FDS=1 exec nbdkit --foreground --exit-with-parent "$@" 3<&0 </dev/null'


@contextmanager
def served(folder: Path, *arguments: str) -> Iterator[tuple[NbdConfig, Path]]:
    """A server, and the log of what its plugin is asked."""
    if shutil.which("nbdkit") is None:
        pytest.skip("nbdkit is not installed")
    path, log = folder / "sock", folder / "log"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(16)
        command = ["sh", "-c", _START, "nbdkit", "-r", "--filter=log", *arguments, f"logfile={log}"]
        server = subprocess.Popen(command, stdin=listening.fileno())
    try:
        yield NbdConfig(uri=f"nbd+unix:///?socket={path}"), log
    finally:
        server.kill()
        server.wait()


def questions(log: Path) -> list[tuple[int, int]]:
    """Offset and length of each."""
    lines = [line.split() for line in log.read_text().splitlines() if " Extents id=" in line and line.endswith("...")]
    fields = [dict(word.split("=", 1) for word in line if "=" in word) for line in lines]
    return [(int(one["offset"], 16), int(one["count"], 16)) for one in fields]


async def mapped(backend: Nbd, limit: int) -> list[Extent]:
    found: list[Extent] = []
    size = backend.geometry.size
    while not found or found[-1].end < size:
        at = found[-1].end if found else 0
        answer = await backend.extents(at, size - at, limit)
        assert 0 < len(answer) <= limit
        found += answer
    return merge_extents(found)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """16 GiB with 300 runs of data."""
    path, draw = tmp_path / "image.raw", random.Random(3)
    with path.open("wb") as file:
        file.truncate(16 * GIB)
        for _ in range(300):
            file.seek(draw.randrange(16 * GIB >> 16) << 16)
            file.write(b"\x21" * 65536)
    return path


async def test_map_of_a_sparse_export_takes_five_questions(image: Path, tmp_path: Path) -> None:
    with served(tmp_path, "file", str(image)) as (config, log):
        async with Nbd.open(config, Environment("disk", tmp_path, writable=False)) as backend:
            found = await mapped(backend, 8192)
        asked = questions(log)
        assert len(asked) == 5
        assert max(length for _, length in asked) <= MAX_STATUS_LENGTH
        assert found == _truth(image)


async def test_small_limit_asks_for_less_at_once_and_gets_the_same(image: Path, tmp_path: Path) -> None:
    with served(tmp_path, "file", str(image)) as (config, log):
        async with Nbd.open(config, Environment("disk", tmp_path, writable=False)) as backend:
            assert await mapped(backend, 16) == _truth(image)
        assert questions(log)[0][1] <= 1 << 27


async def test_server_that_tells_little_at_once_is_asked_once_for_each_answer(tmp_path: Path) -> None:
    """Nothing is asked ahead of an answer that ended early: half of that would be in vain."""
    script = 'echo "$4 256M hole,zero"'  # 256 MiB from the offset on, whatever was asked
    pread = "pread=head -c $3 /dev/zero"
    with served(tmp_path, "eval", f"get_size=echo {16 * GIB}", pread, f"extents={script}") as (config, log):
        async with Nbd.open(config, Environment("disk", tmp_path, writable=False)) as backend:
            assert await mapped(backend, 8192) == [Extent(0, 16 * GIB, ExtentKind.HOLE)]
        assert len(questions(log)) == 64


def _truth(image: Path) -> list[Extent]:
    with image.open("rb") as opened:
        file = LocalFile(opened.fileno(), 16 * GIB)
        return merge_extents(file.extents_now(0, 16 * GIB, 100_000))


def test_long_status_is_looked_at_in_part() -> None:
    """A million descriptors must not hold up the loop; what was not looked at is asked for again."""
    parser = ReplyParser(structured=True, context=7)
    request = Request(Command.BLOCK_STATUS, 0, MAX_STATUS_LENGTH)
    request.cookie = 1
    parser.expect(request)
    count = 100_000
    body = (7).to_bytes(4, "big") + b"".join(
        (4096).to_bytes(4, "big") + (3 * (number % 2)).to_bytes(4, "big") for number in range(count)
    )
    head = protocol.STRUCTURED_REPLY_MAGIC.to_bytes(4, "big") + protocol._CHUNK.pack(1, 5, 1, len(body))
    assert list(parser.feed(memoryview(head + body))) == [request]
    assert request.extents is not None
    assert len(request.extents) == 16384
    assert request.extents[-1].end == 16384 * 4096
