#!/usr/bin/env python3
"""An NBD store across a network: cachefs beside nbdfuse and QEMU, over the same nbdkit. What is compared: docs/benchmarks.md.

bench/remote.py                      all stores, both parts
bench/remote.py --store unix --part warm --jobs randread-qd16
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fio import RAMP_S, Job, in_turn, interrupt_once, machine, pinned, run_fio
from report import Run, Sample, TargetInfo, number, parse_fio, print_tables, spread
from targets import Cachefs, NbdFuse, Place, Target, TargetError, create_base, workspace

PROGRAMS = {"fio": "fio", "nbdkit": "nbdkit", "nbdfuse": "libnbd-bin", "qemu-img": "qemu-utils"}
MIB = 1 << 20
AHEAD_BLOCKS = ("1m", "128k")
PEER = "nbdfuse"


@dataclass(frozen=True)
class Store:
    """An nbdkit that serves the base, each read delayed by *delay_ms*."""

    name: str
    delay_ms: int = 0

    @property
    def options(self) -> list[str]:
        return [f"rdelay={self.delay_ms}ms"] if self.delay_ms else []

    @property
    def filters(self) -> list[str]:
        return ["--filter=delay"] if self.delay_ms else []


STORES = {store.name: store for store in (Store("unix"), Store("tcp, 1 ms", 1), Store("tcp, 5 ms", 5))}

JOBS = [
    Job("seqread", "1 MiB sequential read", "read", "1m", unit="MB/s", goal=1.0),
    Job("seqread-qd4", "1 MiB sequential read, qd 4", "read", "1m", 4, unit="MB/s", goal=1.0),
    Job("randread64k-qd16", "64 KiB random read, qd 16", "randread", "64k", 16),
    Job("randread-qd1", "4 KiB random read, qd 1", "randread"),
    Job("randread-qd16", "4 KiB random read, qd 16", "randread", depth=16),
]


@dataclass(frozen=True)
class RemotePlace(Place):
    store: Store
    socket: Path
    port: int

    @property
    def uri(self) -> str:
        if self.store.delay_ms:
            return f"nbd://127.0.0.1:{self.port}"
        return f"nbd+unix:///?socket={self.socket}"


# ---- what is measured


def remote(target: Target) -> RemotePlace:
    assert isinstance(target.place, RemotePlace)
    return target.place


class CachefsNbd(Cachefs):
    title = "cachefs: the nbd backend alone"

    def configuration(self) -> dict[str, Any]:
        changed = super().configuration()
        changed["images"]["base"]["backend"] = {"nbd": {"uri": remote(self).uri}}
        return changed

    def disks(self) -> dict[str, Any]:
        return {"vm1": {"image": "base"}}


class CachefsAhead(CachefsNbd):
    title = "cachefs: cow over cache over nbd, the pool empty"

    def disks(self) -> dict[str, Any]:
        return Cachefs.disks(self)

    def lower_layers(self) -> list[Any]:
        return [{"cache": {"pool": "node"}}]


class NbdFuseRemote(NbdFuse):
    title = "nbdfuse, four connections as by default"

    def command(self) -> list[str]:
        return ["nbdfuse", "-r", str(self.path), remote(self).uri]


class QemuRemote(Target):
    title = "qemu-storage-daemon: FUSE export over its nbd driver"
    packages = {"qemu-storage-daemon": "qemu-system-common"}  # noqa: RUF012

    @property
    def path(self) -> Path:
        return self.directory / "disk"

    def prepare(self) -> None:
        self.path.touch()

    def command(self) -> list[str]:
        place = remote(self)
        server = (
            f"server.type=inet,server.host=127.0.0.1,server.port={place.port}"
            if place.store.delay_ms
            else f"server.type=unix,server.path={place.socket}"
        )
        export = f"type=fuse,id=disk,node-name=disk,mountpoint={self.path},writable=off,allow-other=auto"
        return [
            "qemu-storage-daemon",
            "--blockdev",
            f"driver=nbd,node-name=disk,read-only=on,{server}",
            "--export",
            export,
        ]


class NbdAhead(NbdFuse):
    """As the manual of nbdkit-readahead-filter has it: the cache filter right below; the delay below that.

    In one nbdkit, without a second hop: the shortest way that this chain can have.
    """

    title = "nbdfuse + nbdkit --filter=readahead --filter=cache --filter=delay file"
    filters = ("--filter=readahead", "--filter=cache")
    options: tuple[str, ...] = ()

    def command(self) -> list[str]:
        store = remote(self).store
        nbdkit = ["nbdkit", *self.filters, *store.filters, "file", str(self.place.base), *store.options, *self.options]
        return ["nbdfuse", "-r", str(self.path), "[", *nbdkit, "]"]


class NbdAheadKept(NbdAhead):
    title = "the same with cache-on-read=true"
    options = ("cache-on-read=true",)


class NbdAheadHop(NbdAhead):
    """The same chain over nbdkit's nbd plugin: the store in a process of its own, as ours is."""

    title = "nbdfuse + nbdkit --filter=readahead --filter=cache nbd"

    def command(self) -> list[str]:
        nbdkit = ["nbdkit", *self.filters, "nbd", f"uri={remote(self).uri}", *self.options]
        return ["nbdfuse", "-r", str(self.path), "[", *nbdkit, "]"]


WARM: dict[str, type[Target]] = {
    "cachefs": CachefsNbd,
    "control": CachefsNbd,
    PEER: NbdFuseRemote,
    "qsd": QemuRemote,
}
COLD: dict[str, type[Target]] = {
    "cachefs": CachefsAhead,
    "control": CachefsAhead,
    "readahead": NbdAhead,
    "readahead kept": NbdAheadKept,
    "readahead hop": NbdAheadHop,
    PEER: NbdFuseRemote,
}


class Bench:
    def __init__(self, options: argparse.Namespace, root: Path) -> None:
        self.options = options
        self.root = root
        self.base = root / "base.raw"
        create_base(self.base, options.mib * MIB)
        settings = {"rounds": options.rounds, "runtime": options.runtime, "size": f"{options.mib} MiB"}
        ahead = [
            Job(f"cold-{block}", f"{block} sequential, cold", "read", block, unit="MB/s") for block in AHEAD_BLOCKS
        ]
        jobs = {job.name: job.info() for job in (*options.chosen, *ahead)}
        self.warm_run = Run(machine(), settings, jobs, {})
        self.cold_run = Run(machine(), settings, jobs, {})

    @contextmanager
    def served(self, store: Store) -> Iterator[RemotePlace]:
        """The store, on the CPU of the client: the one that is measured has the other for itself."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        directory = self.root / store.name.replace(", ", "-").replace(" ", "")
        directory.mkdir()
        command = (sys.executable, "-m", "cachefs")
        place = RemotePlace(
            directory, self.base, self.options.mib * MIB, self.options.server_cpu, command, store, directory / "s", port
        )
        where = ["-i", "127.0.0.1", "-p", str(port)] if store.delay_ms else ["-U", str(place.socket)]
        nbdkit = ["nbdkit", "-f", "-r", "-t", "16", *where, *store.filters, "file", str(self.base), *store.options]
        with open(directory / "store.log", "wb") as log:
            server = subprocess.Popen(
                pinned(nbdkit, self.options.client_cpu), stdout=log, stderr=log, start_new_session=True
            )
        try:
            self.wait_until_served(server, place)
            yield place
        finally:
            server.terminate()
            server.wait(20)

    @staticmethod
    def wait_until_served(server: subprocess.Popen[bytes], place: RemotePlace) -> None:
        for _ in range(200):
            with suppress(OSError):
                if not place.store.delay_ms:
                    if place.socket.exists():
                        return
                else:
                    socket.create_connection(("127.0.0.1", place.port)).close()
                    return
            if server.poll() is not None:
                break
            time.sleep(0.05)
        raise TargetError(f"nbdkit does not serve {place.store.name}: {(place.directory / 'store.log').read_text()}")

    # ---- warm: the data path alone

    def warm(self, place: RemotePlace) -> None:
        with ExitStack() as stack:
            targets = []
            for name in self.options.targets:
                if missing := WARM[name].missing_packages():
                    print(f"skipped {name}, not installed: apt install {' '.join(missing)}", file=sys.stderr)
                    continue
                target = WARM[name](name, place)
                self.warm_run.targets.setdefault(name, TargetInfo(target.title, name == PEER))
                stack.callback(target.stop)
                target.start()
                target.check_content()
                targets.append(target)
            if place.store.delay_ms:
                self.warm_run.targets.setdefault("ideal", TargetInfo("queue depth / delay"))
                self.warm_run.targets.setdefault("bare", TargetInfo("qemu-img bench: QEMU's nbd driver alone, no FUSE"))
            self.warm_run.targets.setdefault("nbdcopy", TargetInfo("nbdcopy to null:, the whole disk"))
            for number_ in range(1, self.options.rounds + 1):
                for job in self.options.chosen:
                    self.warm_round(job, targets, place, number_)
                seconds = copied_in(place.uri, self.options.server_cpu)
                for job in self.options.chosen:
                    if job.rw == "read":
                        self.note(self.warm_run, place, job.name, number_, "nbdcopy", place.size / seconds / 1e6)

    def warm_round(self, job: Job, targets: Sequence[Target], place: RemotePlace, number_: int) -> None:
        for target in in_turn(targets, number_):
            before = target.cpu_seconds()
            found = parse_fio(
                run_fio(
                    job.arguments(target.path, place.size, self.options.runtime, seed=number_),
                    self.options.client_cpu,
                    60,
                )
            )
            requests = found["iops"] * (self.options.runtime + RAMP_S)
            found["server_us_per_io"] = (target.cpu_seconds() - before) / requests * 1e6
            value = found["mb_s" if job.unit == "MB/s" else "iops"]
            self.note(self.warm_run, place, job.name, number_, target.name, value, found)
        if place.store.delay_ms and job.unit == "IOPS":
            self.note(self.warm_run, place, job.name, number_, "ideal", job.depth * 1000 / place.store.delay_ms)
            asked = bare_reads_per_s(place, job, self.options.runtime, self.options.server_cpu)
            self.note(self.warm_run, place, job.name, number_, "bare", asked)

    # ---- cold: what is read for the first time

    def cold(self, place: RemotePlace) -> None:
        """One pass over the disk with each target; each starts anew in every round."""
        for number_ in range(1, self.options.rounds + 1):
            for block in AHEAD_BLOCKS:
                for name in in_turn(list(COLD), number_):
                    target = COLD[name](f"{name}-{block}-{number_}".replace(" ", "-"), place)
                    self.cold_run.targets.setdefault(name, TargetInfo(target.title, name.startswith("readahead")))
                    try:
                        target.start()
                        before = target.cpu_seconds()
                        value = read_in_order(target, block, self.options.client_cpu)
                        cpu_us = (target.cpu_seconds() - before) / (place.size / MIB) * 1e6
                    finally:
                        target.stop()
                        shutil.rmtree(target.directory)
                    self.note(self.cold_run, place, f"cold-{block}", number_, name, value, {"server_us_per_io": cpu_us})

    def note(
        self, run: Run, place: RemotePlace, job: str, number_: int, name: str, value: float, details: Any = None
    ) -> None:
        found = Sample(place.store.name, job, number_, name, value, details or {})
        run.samples.append(found)
        cpu = f", {found.details['server_us_per_io']:.0f} us" if found.details else ""
        print(f"{found.storage}: {found.job}, round {number_}: {name} {number(value)}{cpu}", file=sys.stderr)


def copied_in(uri: str, cpu: int) -> float:
    """Seconds that nbdcopy takes for all of it."""
    since = time.perf_counter()
    subprocess.run(pinned(["nbdcopy", uri, "null:"], cpu), check=True, timeout=120)
    return time.perf_counter() - since


def bare_reads_per_s(place: RemotePlace, job: Job, runtime_s: float, cpu: int) -> float:
    """What this store really gives at that depth: its delay is a sleep, which ends late, and its threads share a CPU."""
    block = {"4k": 4096, "64k": 65536}[job.block]
    count = int(job.depth * 1000 / place.store.delay_ms * runtime_s)
    bench = ["qemu-img", "bench", "-f", "raw", "-c", str(count), "-d", str(job.depth), "-s", str(block)]
    command = [*bench, "-S", str(block * 11), place.uri]  # no two neighbours
    done = subprocess.run(pinned(command, cpu), check=True, timeout=120, capture_output=True, text=True)
    found = re.search(r"Run completed in ([0-9.]+) seconds", done.stdout)
    if found is None:
        raise TargetError(f"qemu-img bench: {done.stdout}")
    return count / float(found[1])


def read_in_order(target: Target, block: str, cpu: int) -> float:
    """MB/s of one pass over the whole disk, one request after the other."""
    command = [
        "fio", "--name=cold", f"--filename={target.path}", "--rw=read", f"--bs={block}", "--ioengine=psync", "--direct=1",
        "--thread", "--allow_file_create=0", "--output-format=json",
    ]  # fmt: skip
    return parse_fio(run_fio(command, cpu, 120))["mb_s"]


def cpu_lines(run: Run) -> list[str]:
    """The client's CPU time per request, for each job, store and target."""
    names = [name for name in run.targets if any(s.target == name and s.details for s in run.samples)]
    lines = ["| CPU, us per request | store | " + " | ".join(names) + " |", "|---|---|" + "--:|" * len(names)]
    for storage in run.storages():
        for job, info in run.jobs.items():
            cells = []
            for name in names:
                found = spread(
                    s.details["server_us_per_io"]
                    for s in run.samples
                    if (s.storage, s.job, s.target) == (storage, job, name)
                )
                cells.append("-" if found is None else f"{found.median:.0f} ({found.low:.0f}-{found.high:.0f})")
            if any(cell != "-" for cell in cells):
                lines.append(f"| {info.title} | {storage} | " + " | ".join(cells) + " |")
    return lines


def parse_arguments() -> argparse.Namespace:
    cpus = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--part", choices=("warm", "cold"), help="only this one")
    add("--store", action="append", choices=list(STORES), help="only this one; may be given several times")
    add("--jobs", nargs="+", choices=[job.name for job in JOBS], default=[job.name for job in JOBS])
    add("--targets", nargs="+", choices=list(WARM), default=list(WARM))
    add("--rounds", type=int, default=5)
    add("--runtime", type=float, default=2.0, metavar="SECONDS", help="of each warm job on each target in each round")
    add("--mib", type=int, default=256, help="size of the disk")
    add("--directory", type=Path, default=Path("/dev/shm"), help="where the data lies")
    add("--client-cpu", type=int, default=cpus[0])
    add("--server-cpu", type=int, default=cpus[1 % len(cpus)])
    options = parser.parse_args()
    options.chosen = [job for job in JOBS if job.name in options.jobs]
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            parser.error(f"{program} is not installed: apt install {package}")
    return options


def main() -> int:
    options = parse_arguments()
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, interrupt_once)
    try:
        with workspace(options.directory) as root:
            bench = Bench(options, root)
            for name in options.store or STORES:
                with bench.served(STORES[name]) as place:
                    if options.part != "cold":
                        bench.warm(place)
                    if options.part != "warm" and place.store.delay_ms:
                        bench.cold(place)
            for run in (bench.warm_run, bench.cold_run):
                if run.samples:
                    print_tables(run)
                    print("\n".join(cpu_lines(run)))
    except TargetError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
