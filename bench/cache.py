#!/usr/bin/env python3
"""What the cache costs when it is warm, and what it brings when it is cold. What is compared with what: docs/benchmarks.md.

bench/cache.py                  both parts, two minutes
bench/cache.py --syscalls       what the daemon asks of the kernel for 20000 warm reads (strace -c -f)
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fio import RAMP_S, Job, in_turn, interrupt_once, machine, run_fio
from report import Spread, compare, comparison_lines, number, parse_fio, spread
from targets import Cachefs, CachefsCache, NbdFuse, Place, Target, TargetError, create_base, workspace

MIB = 1 << 20
DELAY_S = 0.001
COLD_BLOCK = 1 << 20
SYSCALL_READS = 20000
Three = tuple[float, float, float]


class Delayed(Cachefs):
    """The store itself: it takes DELAY_S for each read."""

    title = "the store, 1 ms for each read"

    def lower_layers(self) -> list[Any]:
        return [{"delayed": {"seconds": DELAY_S}}]

    def disks(self) -> dict[str, Any]:
        return {"vm1": {"image": "base"}}

    def command(self) -> list[str]:
        mount = ["mount", "-f", str(self.directory / "config.yaml"), str(self.mountpoint)]
        return [sys.executable, str(Path(__file__).with_name("delayed.py")), *mount]


class CachedDelayed(Delayed):
    title = "the store through the cache, cold"

    def lower_layers(self) -> list[Any]:
        return [{"cache": {"pool": "node"}}, *super().lower_layers()]


class NbdDelayed(NbdFuse):
    title = "nbdkit's delay filter"
    filters: tuple[str, ...] = ("--filter=delay",)
    options: tuple[str, ...] = ()

    def command(self) -> list[str]:
        nbdkit = [
            "nbdkit",
            *self.filters,
            "file",
            str(self.place.base),
            f"rdelay={DELAY_S * 1000:.0f}ms",
            *self.options,
        ]
        return ["nbdfuse", "-r", str(self.path), "[", *nbdkit, "]"]


class NbdCached(NbdDelayed):
    title = "nbdkit's cache filter, cache-on-read, over it"
    filters = ("--filter=cache", "--filter=delay")
    options = ("cache-on-read=true",)


COLD: dict[str, type[Target]] = {
    "store": Delayed,
    "store again": Delayed,
    "cache": CachedDelayed,
    "nbdkit store": NbdDelayed,
    "nbdkit cache": NbdCached,
}


class Bench:
    def __init__(self, options: argparse.Namespace, root: Path) -> None:
        self.options = options
        self.root = root
        self.place = Place(
            root, root / "base.raw", options.mib * MIB, options.server_cpu, (sys.executable, "-m", "cachefs")
        )
        create_base(self.place.base, self.place.size)

    # ---- warm

    def warm(self) -> list[str]:
        """The table of warm random reads: all of them of blocks that nobody wrote."""
        with ExitStack() as stack:
            targets = []
            for name, kind in (("file", Cachefs), ("again", Cachefs), ("cache", CachefsCache)):
                target = kind(name, self.place)
                stack.callback(target.stop)
                target.start()
                target.check_content()
                targets.append(target)
                read_in_order(target, self.options.client_cpu)  # page cache and pool are warm then
            self.refuse_cold(targets[2])
            comparisons = []
            for depth in (1, 16):
                job = Job(f"warm-qd{depth}", f"4 KiB random read, qd {depth}", "randread", depth=depth)
                rounds = [self.warm_round(job, targets, number) for number in range(1, self.options.rounds + 1)]
                for index, (figure, unit) in enumerate(((job.title, "IOPS"), (f"{job.title}: the daemon's CPU", "us"))):
                    comparisons.append(compare(figure, unit, [found[index] for found in rounds]))
        return comparison_lines(comparisons, "with the cache")

    def refuse_cold(self, target: Target) -> None:
        assert isinstance(target, Cachefs)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            found = layer(target, "cache")
            if int(found["held_blocks"]) << 16 >= self.place.size:
                return
            time.sleep(0.1)
        raise TargetError(f"the cache is not warm: {found}")

    def warm_round(self, job: Job, targets: Sequence[Target], number: int) -> tuple[Three, Three]:
        """IOPS and CPU time per read, of the two controls and the cache."""
        iops, cpu_us = {}, {}
        for target in in_turn(targets, number):
            arguments = job.arguments(target.path, self.place.size, self.options.runtime, seed=number)
            before = target.cpu_seconds()
            iops[target.name] = parse_fio(run_fio(arguments, self.options.client_cpu, 60))["iops"]
            reads = iops[target.name] * (self.options.runtime + RAMP_S)
            cpu_us[target.name] = (target.cpu_seconds() - before) / reads * 1e6
        print(f"{job.title}, round {number}: {iops}, {cpu_us}", file=sys.stderr)
        first, second = ((found["file"], found["again"], found["cache"]) for found in (iops, cpu_us))
        return first, second

    # ---- cold

    def cold(self) -> list[str]:
        """The table of cold sequential reads; each target starts anew in every round."""
        names = [name for name, kind in COLD.items() if not kind.missing_packages()]
        rounds: list[dict[str, float]] = []
        for round_number in range(1, self.options.rounds + 1):
            rounds.append({})
            for name in in_turn(names, round_number):
                target = COLD[name](f"{name.replace(' ', '-')}-{round_number}", self.place)
                try:
                    target.start()
                    rounds[-1][name] = read_in_order(target, self.options.client_cpu)
                    if name == "cache":
                        fetched = int(layer(target, "cache")["fetched_bytes"])
                        if fetched != self.place.size:
                            raise TargetError(f"{fetched} bytes were fetched of {self.place.size}")
                finally:
                    target.stop()
                    shutil.rmtree(target.directory)
            print(f"cold, round {round_number}: {rounds[-1]}", file=sys.stderr)
        lines = ["| target | what it is | MB/s | to the store |", "|---|---|--:|--:|"]
        for name in names:
            found = spread(one[name] for one in rounds)
            ratio = spread(one[name] / one["store"] for one in rounds)
            assert found is not None
            assert ratio is not None
            lines.append(f"| {name} | {COLD[name].title} | {text(found)} | {ratio_text(ratio)} |")
        if "nbdkit cache" in names:
            beside = spread(one["cache"] / one["nbdkit cache"] for one in rounds)
            assert beside is not None
            lines.append(f"\nThe cache to nbdkit's, in the same rounds: {ratio_text(beside)}.")
        return lines

    # ---- system calls

    def syscalls(self) -> list[str]:
        """What strace counts while SYSCALL_READS warm reads are served."""
        target = CachefsCache("traced", self.place)
        try:
            target.start()
            read_in_order(target, self.options.client_cpu)
            self.refuse_cold(target)
            assert target.server is not None
            report = self.root / "strace"
            strace = subprocess.Popen(
                ["strace", "-c", "-f", "-o", report, "-p", str(target.server.pid)], stderr=subprocess.DEVNULL
            )
            time.sleep(2)
            before = layer(target, "cache")["hits"]
            read_at_random(target.path, SYSCALL_READS)
            served = int(layer(target, "cache")["hits"]) - int(before)
            strace.send_signal(signal.SIGINT)
            strace.wait(20)
            return [f"{served} reads of 4 KiB were hits", *report.read_text().splitlines()]
        finally:
            target.stop()


def layer(target: Target, name: str) -> dict[str, Any]:
    assert isinstance(target, Cachefs)
    status = target.status()
    assert status is not None
    return next(one for one in status["disk"]["layers"] if one["layer"].endswith(f"/{name}"))


def read_in_order(target: Target, cpu: int) -> float:
    """MB/s of one pass over the whole disk, one request of a MiB after the other."""
    command = [
        "fio", "--name=cold", f"--filename={target.path}", "--rw=read", f"--bs={COLD_BLOCK}", "--ioengine=psync", "--direct=1",
        "--thread", "--allow_file_create=0", "--output-format=json",
    ]  # fmt: skip
    return parse_fio(run_fio(command, cpu, 120))["mb_s"]


def read_at_random(path: Path, count: int) -> None:
    command = [
        "fio", "--name=warm", f"--filename={path}", "--rw=randread", "--bs=4k", "--ioengine=psync", "--direct=1", "--thread",
        "--norandommap", f"--number_ios={count}", "--allow_file_create=0", "--output-format=json",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def text(found: Spread) -> str:
    return f"{number(found.median)} ({number(found.low)}-{number(found.high)})"


def ratio_text(found: Spread) -> str:
    return f"{found.median:.2f}x ({found.low:.2f}-{found.high:.2f})"


def main() -> int:
    cpus = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--syscalls", action="store_true", help="only count system calls; needs strace")
    add("--part", choices=("warm", "cold"), help="only this one")
    add("--rounds", type=int, default=5)
    add("--runtime", type=float, default=2.0, metavar="SECONDS", help="of each warm job on each target in each round")
    add("--mib", type=int, default=256, help="size of the disk")
    add("--directory", type=Path, default=Path("/dev/shm"), help="where the data lies")
    add("--client-cpu", type=int, default=cpus[0])
    add("--server-cpu", type=int, default=cpus[1 % len(cpus)])
    options = parser.parse_args()
    for program, package in (("fio", "fio"), *((("strace", "strace"),) if options.syscalls else ())):
        if shutil.which(program) is None:
            parser.error(f"{program} is not installed: apt install {package}")
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, interrupt_once)
    try:
        with workspace(options.directory) as root:
            bench = Bench(options, root)
            print(" · ".join(f"{name}: {value}" for name, value in machine().items()))
            parts: list[Callable[[], list[str]]] = [bench.warm, bench.cold]
            if options.syscalls:
                parts = [bench.syscalls]
            elif options.part:
                parts = [getattr(bench, options.part)]
            for part in parts:
                print("\n" + "\n".join(part()), flush=True)
    except TargetError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
