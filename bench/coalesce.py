#!/usr/bin/env python3
"""Writes through the coalescer and without it, to a file past the page cache and to an NBD server that takes 1 ms.

bench/coalesce.py                       both stores
bench/coalesce.py --store file --jobs 4k-64MiB --rounds 5

Each job writes and ends with an fsync, which counts; so figures are whole times. The disk is a file that was written before.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache import ratio_text
from fio import in_turn, interrupt_once, machine
from report import Spread, spread
from targets import Cachefs, Place, TargetError, create_base, workspace

KIB, MIB = 1 << 10, 1 << 20
DELAY = "1ms"
SUBJECT, WITHOUT, CONTROL = "coalesce", "without", "control"
Writes = list[list[tuple[int, int]]]
"""Of each client, one after the other: offset, length."""


@dataclass(frozen=True)
class Job:
    """streams: clients that each write *count* times *length* bytes in order; at_random: anywhere instead, aligned."""

    name: str
    length: int
    count: int
    streams: int = 1
    interleaved: bool = False
    at_random: bool = False
    only: str = ""

    def writes(self, size: int, seed: int) -> Writes:
        if self.at_random:
            dice = random.Random(seed)
            places = range(size // self.length)
            return [
                [(dice.choice(places) * self.length, self.length) for _ in range(self.count)]
                for _ in range(self.streams)
            ]
        far = size // self.streams // MIB * MIB
        found = [
            [(stream * far + n * self.length, self.length) for n in range(self.count)] for stream in range(self.streams)
        ]
        return [[one for step in zip(*found, strict=True) for one in step]] if self.interleaved else found


JOBS = [
    Job("512-sequential", 512, 2048),
    Job("4k-sequential", 4096, 2048),
    Job("3000-sequential", 3000, 2048),
    Job("4k-four-streams", 4096, 512, 4, interleaved=True),
    Job("4k-64MiB", 4096, 16384, only="file"),
    Job("4k-random-qd1", 4096, 2048, at_random=True),
    Job("4k-random-qd16", 4096, 512, 16, at_random=True),
]


class Disk(Cachefs):
    """A disk of one layer or none over a store."""

    def __init__(self, name: str, place: Place, layers: list[Any], backend: dict[str, Any]) -> None:
        super().__init__(name, place)
        self.title = name
        self._layers = layers
        self._backend = backend

    def configuration(self) -> dict[str, Any]:
        return {
            "state_dir": str(self.directory / "state"),
            "disks": {"vm1": {"layers": self._layers, "backend": self._backend}},
        }

    def measure(self, job: Job, seed: int) -> float:
        """Seconds until everything is written and synced."""
        writes = job.writes(self.place.size, seed)
        data = memoryview(os.urandom(job.length))
        descriptor = os.open(self.path, os.O_RDWR)

        def client(own: list[tuple[int, int]]) -> None:
            for offset, length in own:
                os.pwrite(descriptor, data[:length], offset)

        try:
            with ThreadPoolExecutor(len(writes)) as threads:
                began = time.perf_counter()
                for _ in threads.map(client, writes):
                    pass
                os.fsync(descriptor)
                return time.perf_counter() - began
        finally:
            os.close(descriptor)


@contextmanager
def file_disks(place: Place) -> Iterator[list[Disk]]:
    def disk(name: str, layers: list[Any], *, direct: bool) -> Disk:
        image = place.directory / f"{name}.raw"
        shutil.copy(place.base, image)
        return Disk(name, place, layers, {"file": {"path": str(image), "direct": direct}})

    yield [
        disk(SUBJECT, [{"coalesce": {}}], direct=True),
        disk(WITHOUT, [], direct=True),
        disk(CONTROL, [], direct=True),
        disk("buffered", [], direct=False),
    ]


@contextmanager
def nbd_disks(place: Place) -> Iterator[list[Disk]]:
    servers = []

    def disk(name: str, layers: list[Any]) -> Disk:
        image, socket = place.directory / f"{name}.raw", place.directory / f"{name}.sock"
        shutil.copy(place.base, image)
        delay = ["--filter=delay", "file", str(image), f"rdelay={DELAY}", f"wdelay={DELAY}"]
        command = ["setpriv", "--pdeathsig", "TERM", "nbdkit", "-f", "--exit-with-parent", "-U", str(socket), *delay]
        servers.append(subprocess.Popen(command))  # beside the client: cachefs has a CPU for itself
        while not socket.exists():
            time.sleep(0.01)
        return Disk(name, place, layers, {"nbd": {"uri": f"nbd+unix:///?socket={socket}"}})

    try:
        yield [disk(SUBJECT, [{"coalesce": {}}]), disk(WITHOUT, []), disk(CONTROL, [])]
    finally:
        for server in servers:
            server.terminate()
            server.wait()


STORES = {"file": file_disks, "nbd": nbd_disks}


def seconds(found: Spread) -> str:
    return f"{found.median:.3f} s ({found.low:.3f}-{found.high:.3f})"


def quotient(times: dict[str, list[float]], one: str, other: str) -> str:
    """Of the same rounds."""
    found = spread(mine / yours for mine, yours in zip(times[one], times[other], strict=True))
    assert found is not None
    return ratio_text(found)


def measure_all(store: str, place: Place, jobs: list[Job], rounds: int) -> None:
    with STORES[store](place) as disks:
        try:
            for disk in disks:
                disk.start()
            for job in (one for one in jobs if one.only in ("", store)):
                times: dict[str, list[float]] = {disk.name: [] for disk in disks}
                for number in range(rounds):
                    for disk in in_turn(disks, number):
                        times[disk.name].append(disk.measure(job, number))
                print(f"\n{store}: {job.name}, {len(job.writes(place.size, 0))} clients")
                for name, taken in times.items():
                    found = spread(taken)
                    assert found is not None
                    print(
                        f"  {name:10} {seconds(found)}   coalesce takes {quotient(times, SUBJECT, name)} of it",
                        flush=True,
                    )
                print(f"  noise: {CONTROL} takes {quotient(times, CONTROL, WITHOUT)} of {WITHOUT}", flush=True)
        finally:
            for disk in disks:
                disk.stop()


def main() -> int:
    cpus = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--store", choices=sorted(STORES), help="only this one")
    add("--jobs", nargs="*", choices=[job.name for job in JOBS], default=[job.name for job in JOBS])
    add("--rounds", type=int, default=5)
    add("--mib", type=int, default=256, help="size of the disk")
    add("--directory", type=Path, default=Path("/var/tmp"), help="where the data lies: a file system with O_DIRECT")
    options = parser.parse_args()
    if shutil.which("nbdkit") is None and options.store != "file":
        parser.error("nbdkit is not installed: apt install nbdkit")
    os.sched_setaffinity(0, {cpus[0]})
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, interrupt_once)
    try:
        with workspace(options.directory) as root:
            print(" · ".join(f"{name}: {value}" for name, value in machine().items()))
            for store in [options.store] if options.store else STORES:
                directory = root / store
                directory.mkdir()
                size = options.mib * MIB
                place = Place(directory, directory / "base", size, cpus[-1], (sys.executable, "-m", "cachefs"))
                create_base(place.base, size)
                measure_all(store, place, [job for job in JOBS if job.name in options.jobs], options.rounds)
    except TargetError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
