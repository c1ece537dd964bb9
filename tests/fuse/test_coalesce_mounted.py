"""A coalesced disk through a real mount: memory under a writer that outruns its store, what is told of it, and its end."""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

MIB = 1 << 20
SIZE = 256 * MIB
BUFFER = 16 * MIB
CLIENTS = 8
ALLOWED = 20 * MIB

pytestmark = pytest.mark.slow


def resident(pid: int, field: str = "VmRSS") -> int:
    """Bytes, shared memory included."""
    found = re.search(rf"^{field}:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


@contextmanager
def slow_store(folder: Path) -> Iterator[str]:
    """The URI of a server that takes 10 ms for each write."""
    if shutil.which("nbdkit") is None:
        pytest.skip("nbdkit is not installed")
    image, path = folder / "image", folder / "sock"
    with image.open("wb") as file:
        file.truncate(SIZE)
    start = 'LISTEN_PID=$$ LISTEN_FDS=1 exec nbdkit -f --exit-with-parent --filter=delay file "$1" wdelay=10ms 3<&0 </dev/null'
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(64)
        server = subprocess.Popen(["sh", "-c", start, "nbdkit", str(image)], stdin=listening.fileno())
    try:
        yield f"nbd+unix:///?socket={path}"
    finally:
        server.kill()
        server.wait()


def overrun(path: Path) -> None:
    """Eight clients that write faster than the store: each in order, and then anywhere."""
    block = random.Random(1).randbytes(4096)
    descriptor = os.open(path, os.O_WRONLY)

    def client(number: int) -> None:
        dice = random.Random(number)
        base, count = number * SIZE // CLIENTS, 4 * BUFFER // 4096 // CLIENTS
        for at in range(count):
            os.pwrite(descriptor, block, base + at * 4096)
        for _ in range(count // 2):
            os.pwrite(descriptor, block, dice.randrange(SIZE // 4096) * 4096)

    with ThreadPoolExecutor(CLIENTS) as clients:
        for _ in clients.map(client, range(CLIENTS)):
            pass
    os.close(descriptor)


def test_memory_stays_within_the_buffer_under_writers_that_outrun_their_store(mount: Any, tmp_path: Path) -> None:
    with slow_store(tmp_path) as uri:
        layers = [{"coalesce": {"cluster": "64KiB", "buffer": f"{BUFFER // MIB}MiB"}}]
        backend = {"nbd": {"uri": uri, "unflushed": "4MiB"}}  # counts too
        mounted = mount({"disks": {"disk": {"layers": layers, "backend": backend}}})
        pid = mounted.process.pid
        before = resident(pid)
        overrun(mounted.path / "disk")
        grown = resident(pid, "VmHWM") - before
        layer = mounted.layer("disk")
        print(f"grown by {grown / MIB:.1f} MiB, buffered {layer['buffered_bytes'] / MIB:.1f} MiB")
        assert layer["waits_for_room"] > 0, "the writers did not outrun the store"
        assert BUFFER // 2 < grown <= BUFFER + ALLOWED
        mounted.umount()


def test_what_was_written_is_there_after_the_unmount_and_is_counted(mount: Any, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 * MIB)
    backend = {"file": {"path": str(image), "direct": True}}
    mounted = mount({"disks": {"disk": {"layers": [{"coalesce": {"max_delay": "1h"}}], "backend": backend}}})
    content = random.Random(1).randbytes(3 * MIB + 777)
    with (mounted.path / "disk").open("r+b", buffering=0) as file:
        for at in range(0, len(content), 3000):
            file.write(content[at : at + 3000])
    layer = mounted.layer("disk")
    assert layer["bytes_in"] == len(content)
    mounted.umount()
    assert image.read_bytes() == content.ljust(8 * MIB, b"\0")
