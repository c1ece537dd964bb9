"""A hundred disks of one mount, each with 64 requests outstanding, held and let go again and again.

The requests are of one process: `AioFiles`, libaio through ctypes, with a context that holds all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aio_client import Iocb, IoEvent

FAULTY = (str(Path(__file__).with_name("faulty.py")),)
DISKS = 100
DEPTH = 64
WAVES = 5
BLOCK = 4096
SIZE = DEPTH * BLOCK
IO_CMD_PREAD, IO_CMD_PWRITE = 0, 1

# A leak of one request's record (a Request with its reply and scope, 1 KiB at least) would be 6 MiB per wave, of one buffer
# page 25 MiB. What remains without any leak is the allocator's: arenas that one long-lived object keeps.
TOLERANCE = 3 << 20


class Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class AioFiles:
    """*paths*, open for direct I/O, with room for DEPTH requests of BLOCK bytes on each of them."""

    def __init__(self, paths: list[Path]) -> None:
        self.descriptors = [os.open(path, os.O_RDWR | os.O_DIRECT) for path in paths]
        self.slots = len(paths) * DEPTH
        self.memory = mmap.mmap(-1, self.slots * BLOCK)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._iocbs = (Iocb * self.slots)()
        self._context = ctypes.c_void_p()
        self._library = ctypes.CDLL("libaio.so.1")
        self._check(self._library.io_setup(self.slots, ctypes.byref(self._context)))

    def submit(self, file: int, requests: list[tuple[int, int]]) -> None:
        """*requests*: (opcode, block) each; request n uses slot file * DEPTH + n of the memory."""
        pointers = (ctypes.POINTER(Iocb) * len(requests))()
        for n, (opcode, block) in enumerate(requests):
            slot = file * DEPTH + n
            iocb = self._iocbs[slot]
            iocb.data, iocb.opcode, iocb.descriptor = slot, opcode, self.descriptors[file]
            iocb.buffer, iocb.length, iocb.offset = self._address + slot * BLOCK, BLOCK, block * BLOCK
            pointers[n] = ctypes.pointer(iocb)
        submitted = 0
        while submitted < len(requests):
            rest = ctypes.byref(pointers, submitted * ctypes.sizeof(ctypes.c_void_p))
            submitted += self._check(self._library.io_submit(self._context, len(requests) - submitted, rest))

    def reap(self, count: int, timeout_s: float) -> dict[int, int]:
        """Results by slot of *count* requests, or of those that were answered in time."""
        events = (IoEvent * count)()
        found: dict[int, int] = {}
        deadline = time.monotonic() + timeout_s
        while len(found) < count and time.monotonic() < deadline:
            wait = Timespec(1, 0)
            got = self._library.io_getevents(self._context, 1, count, events, ctypes.byref(wait))
            for event in events[: self._check(got)]:
                assert event.data not in found, "answered twice"
                found[event.data] = event.result
        return found

    def close(self) -> None:
        for descriptor in self.descriptors:
            with contextlib.suppress(OSError):  # of a dead mount
                os.close(descriptor)
        self._library.io_destroy(self._context)

    @staticmethod
    def _check(result: int) -> int:
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result


@pytest.fixture
def aio() -> Iterator[Any]:
    """Ask for it before `mount`: to end a context waits for its requests, and those end with the daemon at the latest."""
    opened: list[AioFiles] = []

    def make(paths: list[Path]) -> AioFiles:
        opened.append(AioFiles(paths))
        return opened[-1]

    try:
        ctypes.CDLL("libaio.so.1")
    except OSError as exc:
        pytest.skip(f"no libaio: {exc}")
    yield make
    for files in opened:
        files.close()


def resident(pid: int) -> int:
    """Bytes. Shared memory counts, which is where the request buffers lie."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 10


def content(wave: int, disk: int, block: int) -> bytes:
    """What *wave* writes there."""
    return b"%4d%4d%4d%4d" % (wave, disk, block, wave ^ disk ^ block) * (BLOCK // 16)


@pytest.mark.slow
def test_a_hundred_disks_held_and_let_go_again_and_again_lose_nothing_and_keep_no_memory(
    aio: Any, mount: Any, wait_until: Any
) -> None:
    backend = {"memory": {"size": SIZE}}
    layers = [{"faulty": {"rules": ["read * hang", "write * hang"]}}, {"cow": {}}]
    disks = {f"vm{n}": {"layers": layers, "backend": backend} for n in range(DISKS)}
    mounted = mount({"disks": {**disks, "other": {"layers": [{"cow": {}}], "backend": backend}}}, program=FAULTY)
    files = aio([mounted.path / name for name in disks])

    def daemon() -> Any:
        return mounted.status()["daemon"]

    released = []
    for wave in range(1, WAVES + 1):
        # Each wave writes one half of every disk and reads what the wave before wrote to the other half.
        written = range(DEPTH // 2) if wave % 2 else range(DEPTH // 2, DEPTH)
        for disk in range(DISKS):
            requests = [(IO_CMD_PWRITE if block in written else IO_CMD_PREAD, block) for block in range(DEPTH)]
            for block in range(DEPTH):
                at = (disk * DEPTH + block) * BLOCK
                files.memory[at : at + BLOCK] = content(wave, disk, block) if block in written else b"?" * BLOCK
            files.submit(disk, requests)
        wait_until(lambda: daemon()["waiting_requests"] == DISKS * DEPTH, "all wait")
        held = resident(mounted.pid)
        another_disk_is_served(mounted.path / "other", wave)

        mounted.process.send_signal(signal.SIGUSR1)
        results = files.reap(DISKS * DEPTH, timeout_s=15)
        assert len(results) == DISKS * DEPTH, f"wave {wave}: {DISKS * DEPTH - len(results)} requests are not answered"
        assert set(results.values()) == {BLOCK}
        wait_until(lambda: daemon()["waiting_requests"] == 0, "nothing waits")
        for disk in range(DISKS):
            for block in range(DEPTH):
                at = (disk * DEPTH + block) * BLOCK
                expected = bytes(BLOCK) if wave == 1 else content(wave - 1, disk, block)
                if block not in written:
                    assert files.memory[at : at + BLOCK] == expected, f"wave {wave}, vm{disk}, block {block}"
        released.append(resident(mounted.pid))
        print(f"wave {wave}: resident {held / 2**20:.1f} MiB held, {released[-1] / 2**20:.1f} MiB released")
        mounted.process.send_signal(signal.SIGUSR2)
        daemon()  # it has answered since: the gate is closed for the next wave

    figures = daemon()
    assert figures["refused_requests"] == figures["given_up_requests"] == figures["queued_bytes"] == 0
    assert figures["most_waiting_requests"] == DISKS * DEPTH
    assert max(released[2:]) <= released[1] + TOLERANCE
    mounted.process.send_signal(signal.SIGUSR1)


def another_disk_is_served(path: Path, wave: int) -> None:
    with open(path, "r+b", buffering=0) as other:
        expected = bytes(BLOCK) if wave == 1 else bytes([wave - 1]) * BLOCK
        assert other.read(BLOCK) == expected
        other.seek(0)
        assert other.write(bytes([wave]) * BLOCK) == BLOCK
        os.fsync(other.fileno())
