"""The whole way: clients write through a mount, with fsync and with O_DIRECT and O_DSYNC, and the power is cut afterwards.

Daemon and clients share a clock (`time.monotonic_ns`), which puts what the clients were told into the daemon's log: a request
begins before, and is acknowledged after, everything that the daemon did for it.
"""

from __future__ import annotations

import mmap
import os
import pickle
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from powercut import Recorded, cut_everywhere, overlays

from cachefs.store.localfile import KEEP_SIZE, PUNCH_HOLE, fallocate
from cachefs.testing.model import Flush, Op, Trim, Write
from cachefs.testing.stacks import Case, cow_layer, pattern
from cachefs.testing.strategies import patterns
from cachefs.testing.writelog import Began, Change, Ended, Entry, SyncEnded, WriteLog

BLOCK, SECTOR = 4096, 512
SIZE = 40 * BLOCK
CASE = Case("mounted", SIZE, cow_layer(), on_disk=True)
DRIVER = (str(Path(__file__).with_name("recording.py")),)
STEPS = 30  # of each client


class Told:
    """What the clients were told, with the clock."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, int, Op, bool]] = []  # began, ended, what, synced

    def __call__(self, op: Op, call: Callable[[], object], synced: bool = False) -> None:
        began = time.monotonic_ns()
        call()
        self.requests.append((began, time.monotonic_ns(), op, synced))


def buffered_client(path: Path, told: Told, seed: int) -> None:
    """Writes of any alignment, punches, and an fsync now and then."""
    dice = random.Random(seed)
    descriptor = os.open(path, os.O_RDWR)
    for step in range(STEPS):
        offset = dice.randrange(SIZE - 1)
        length = min(SIZE - offset, dice.choice((1, 100, SECTOR, BLOCK, 3 * BLOCK)))
        if dice.random() < 0.2:
            told(Trim(offset, length), partial(fallocate, descriptor, PUNCH_HOLE | KEEP_SIZE, offset, length))
        else:
            data = patterns((seed * STEPS + step) % 250 + 1, length)
            told(Write(offset, data), partial(os.pwrite, descriptor, data, offset))
        if dice.random() < 0.3:
            told(Flush(), partial(os.fsync, descriptor))
    os.close(descriptor)


def direct_client(path: Path, told: Told, seed: int) -> None:
    """O_DIRECT and O_DSYNC: what was answered is durable."""
    dice = random.Random(seed)
    descriptor = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
    with mmap.mmap(-1, 2 * BLOCK) as memory:
        for step in range(STEPS):
            length = dice.choice((SECTOR, BLOCK, 2 * BLOCK))
            offset = dice.randrange((SIZE - length) // SECTOR) * SECTOR
            data = patterns((seed * STEPS + step) % 250 + 1, length)
            memory[:length] = data
            view = memoryview(memory)[:length]
            told(Write(offset, data), partial(os.pwrite, descriptor, view, offset), synced=True)
            view.release()
    os.close(descriptor)


def merged(log: WriteLog, told: Told) -> list[Entry]:
    """The daemon's entries and the clients' requests in one order."""
    events = [(at, "log", index) for index, at in enumerate(log.times)]
    for number, (began, ended, _, _) in enumerate(told.requests):
        events += [(began, "began", number), (ended, "ended", number)]
    events.sort()
    place = {event[1:]: index for index, event in enumerate(events)}
    found: list[Entry] = []
    for _, what, number in events:
        if what == "began":
            found.append(Began(*told.requests[number][2:]))
        elif what == "ended":
            found.append(Ended(place["began", number]))
        else:
            entry = log.entries[number]
            found.append(replace(entry, began=place["log", entry.began]) if isinstance(entry, SyncEnded) else entry)
    return found


def record(mount: Any, folder: Path, seed: int) -> Recorded:
    """Clients at work on a mounted disk, until it is unmounted."""
    log = WriteLog(overlays(folder))
    disk = {"layers": [{"cow": {}}], "backend": {"memory": {"size": SIZE}}}
    mounted = mount({"disks": {"disk": disk}}, program=DRIVER)
    told = Told()
    clients = (buffered_client, direct_client, buffered_client, direct_client)
    with ThreadPoolExecutor() as threads:
        running = [threads.submit(one, mounted.path / "disk", told, seed + n) for n, one in enumerate(clients)]
        for client in running:
            client.result()
    mounted.umount()
    log.entries, log.times, log.initial = pickle.loads((folder / "log").read_bytes())
    assert sum(isinstance(entry, Change) for entry in log.entries) > 2 * STEPS
    log.entries = merged(log, told)
    return Recorded(CASE, folder / "again", pattern(SIZE), log)


@pytest.fixture
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECORDING_FOLDER", str(overlays(tmp_path)))
    monkeypatch.setenv("RECORDING_LOG", str(tmp_path / "log"))


@pytest.mark.slow
@pytest.mark.usefixtures("recording")
async def test_what_was_acknowledged_as_durable_through_a_mount_survives_a_power_cut(
    mount: Any, tmp_path: Path
) -> None:
    seed = random.randrange(1 << 16)
    print(f"seed {seed}")  # shown when the test fails
    disk = record(mount, tmp_path, seed)
    await cut_everywhere(disk, random.Random(seed), randoms=2, every=3)
    print(disk.counted)


@pytest.mark.slow
@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize("mutant", ["data-not-synced", "map-not-synced"])
async def test_a_mutant_is_noticed_through_a_mount(
    mount: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    monkeypatch.setenv("MUTANT", mutant)
    disk = record(mount, tmp_path, 1)
    with pytest.raises(AssertionError, match="cut after entry"):
        await cut_everywhere(disk, random.Random(1))
