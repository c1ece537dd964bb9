#!/usr/bin/env python3
"""Does one disk's trim stall another? On one ext4, 2 GiB are punched through disk A's file while 700 MiB of A are dirty; disk B
is read and written meanwhile by clients that note their longest gap. Twice as control nothing is punched. docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fio import in_turn, interrupt_once, machine, pinned
from report import compare, comparison_lines
from targets import ROOT, Cachefs, Place, StorageDaemon, Target, TargetError, remove, workspace

MIB = 1 << 20
PUNCHED, DIRTY = 2048 * MIB, 700 * MIB
SIZE = 4096 * MIB
ACTIVE = 256 * MIB  # of B: written before, then read and written at random
FILE_SYSTEM = 12 << 30  # sparse; 6 GiB of it are used per server
NEEDED = 8 << 30
LEAD_S = 0.5  # the clients run this long before the punch
CONDITIONS = ("control", "again", "punched")
KINDS = ("read", "write")
PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01


class Pair(Target):
    """One server of two disks; `path` is B, which is measured."""

    @property
    @abstractmethod
    def other(self) -> Path:
        """A, which is punched."""

    def lag_ms(self) -> float | None:
        """The longest that the server's loop was late since it started, where it says so."""
        return None


class CachefsPair(Cachefs, Pair):
    @property
    def other(self) -> Path:
        return self.mountpoint / "a"

    def disks(self) -> dict[str, Any]:
        overlay = {"layers": [{"cow": {}}], "image": "base"}
        return {**super().disks(), "a": overlay}

    def lag_ms(self) -> float | None:
        done = subprocess.run(
            [*self.place.cachefs_command, "status", "--json", str(self.mountpoint)],
            env=self.environment(),
            capture_output=True,
            check=True,
        )
        return float(json.loads(done.stdout)["daemon"]["longest_loop_lag_ms"])


class StorageDaemonPair(StorageDaemon, Pair):
    @property
    def other(self) -> Path:
        return self.directory / "a"

    def prepare(self) -> None:
        for disk in (self.path, self.other):
            disk.touch()
            create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(self.place.base)]
            subprocess.run([*create, f"{disk}.qcow2"], check=True)

    def command(self) -> list[str]:
        options = ["--blockdev", f"driver=file,node-name=file,read-only=on,filename={self.place.base}"]
        options += ["--blockdev", "driver=raw,node-name=base,read-only=on,file=file"]
        for disk in (self.path, self.other):
            name = disk.name
            options += ["--blockdev", f"driver=file,node-name={name}-file,discard=unmap,filename={disk}.qcow2"]
            options += ["--blockdev", f"driver=qcow2,node-name={name},discard=unmap,file={name}-file,backing=base"]
            export = f"type=fuse,id={name},node-name={name},mountpoint={disk},writable=on,growable=off,allow-other=auto"
            options += ["--export", export]
        return ["qemu-storage-daemon", *options]


class BarePair(Pair):
    """Two raw files on the file system itself: what it does to those who use it without a server."""

    title = "two raw files, no server"

    @property
    def path(self) -> Path:
        return self.directory / "b.raw"

    @property
    def other(self) -> Path:
        return self.directory / "a.raw"

    def prepare(self) -> None:
        for disk in (self.path, self.other):
            disk.touch()
            os.truncate(disk, self.place.size)

    def command(self) -> list[str]:
        return []


SERVERS: dict[str, type[Pair]] = {"cachefs": CachefsPair, "qsd": StorageDaemonPair, "bare": BarePair}


# ---- the file system


@contextmanager
def loop_mounted(directory: Path) -> Iterator[Path]:
    """An ext4 in a sparse file of *directory*, mounted below it; `targets.remove` of the directory unmounts it, too."""
    image, at = directory / "ext4.img", directory / "ext4"
    with open(image, "wb") as file:
        file.truncate(FILE_SYSTEM)
    at.mkdir()
    options = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"  # no background work in the measurement
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", options, image], check=True)
    subprocess.run(["mount", "-o", "loop,discard", image, at], check=True)  # the loop device goes with the mount
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=False, capture_output=True)


# ---- one measurement


def write_all(path: Path, offset: int, length: int, *, sync: bool) -> None:
    content = memoryview(os.urandom(MIB))
    descriptor = os.open(path, os.O_RDWR)
    try:
        for at in range(offset, offset + length, MIB):
            os.pwrite(descriptor, content, at)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def punch(path: Path, offset: int, length: int) -> float:
    """Seconds that it took."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    before = time.monotonic()
    descriptor = os.open(path, os.O_RDWR)
    try:
        if libc.fallocate(descriptor, PUNCH_HOLE_KEEP_SIZE, offset, length) != 0:
            code = ctypes.get_errno()
            raise TargetError(f"{path}: cannot be punched: {os.strerror(code)}")
    finally:
        os.close(descriptor)
    return time.monotonic() - before


def dirty_mib() -> float:
    """Of the whole machine: that what was written last is dirty still."""
    found = re.search(r"^Dirty:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def be_client(path: Path, kind: str, seconds: float) -> None:
    """4 KiB direct I/O, one after the other; prints the longest time between two completions, and how many there were."""
    descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
    page = mmap.mmap(-1, 4096)
    page.write(os.urandom(4096))
    dice = random.Random(kind)
    longest, count = 0.0, 0
    last = start = time.monotonic()
    while last - start < seconds:
        offset = dice.randrange(ACTIVE // 4096) * 4096
        if kind == "read":
            os.preadv(descriptor, [page], offset)
        else:
            os.pwritev(descriptor, [page], offset)
        now = time.monotonic()
        longest, last, count = max(longest, now - last), now, count + 1
    print(json.dumps({"longest_gap_ms": longest * 1000, "count": count}))


def run_clients(options: argparse.Namespace, target: Pair, *, punched: bool) -> dict[str, dict[str, float]]:
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for kind in KINDS:
            command = [sys.executable, __file__, "--client", kind, str(target.path), str(options.runtime)]
            processes[kind] = subprocess.Popen(pinned(command, options.client_cpu), stdout=subprocess.PIPE)
        time.sleep(LEAD_S)
        dirty = dirty_mib()
        punch_s = punch(target.other, 0, PUNCHED) if punched else 0.0
        found = {
            kind: json.loads(process.communicate(timeout=options.runtime + 60)[0])
            for kind, process in processes.items()
        }
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise TargetError(f"{target.name}: a client did not end well: {error}") from error
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    found["punch"] = {"seconds": punch_s, "dirty_mib": dirty}
    return found


def measure_one(options: argparse.Namespace, target: Pair, condition: str) -> dict[str, dict[str, float]]:
    """The same work before each: A holds PUNCHED bytes that are on the disk and DIRTY bytes that are not."""
    write_all(target.other, 0, PUNCHED, sync=True)
    subprocess.run(["sync", "-f", target.directory], check=True)
    write_all(target.other, PUNCHED, DIRTY, sync=False)
    return run_clients(options, target, punched=condition == "punched")


Rounds = dict[str, list[dict[str, dict[str, dict[str, float]]]]]


def measure(options: argparse.Namespace, root: Path, rounds: Rounds, lags: dict[str, float]) -> None:
    """Server after server, each in an empty file system of its own: what one leaves must not slow the next."""
    for name in options.servers:
        with ExitStack() as stack:
            place_at = root / name
            place_at.mkdir()
            stack.callback(remove, place_at)
            mounted = stack.enter_context(loop_mounted(place_at))
            base = mounted / "base.raw"
            base.touch()
            os.truncate(base, SIZE)
            place = Place(mounted, base, SIZE, options.server_cpu, (sys.executable, "-m", "cachefs"))
            target = SERVERS[name](name, place)
            if missing := target.missing_packages():
                print(f"skipped {name}, not installed: apt install {' '.join(missing)}", file=sys.stderr)
                continue
            stack.callback(target.stop)
            target.start()
            write_all(target.path, 0, ACTIVE, sync=True)
            for number in range(1, options.rounds + 1):
                found = {}
                for condition in in_turn(CONDITIONS, number):
                    print(f"{name}, round {number}: {condition}", file=sys.stderr)
                    found[condition] = measure_one(options, target, condition)
                rounds.setdefault(name, []).append(found)
                if (lag := target.lag_ms()) is not None:
                    lags[name] = lag


# ---- the command


def lines_of(rounds: Rounds, lags: dict[str, float]) -> list[str]:
    comparisons, closing = [], []
    for name, found in rounds.items():
        for kind in KINDS:
            gaps = [tuple(one[condition][kind]["longest_gap_ms"] for condition in CONDITIONS) for one in found]
            comparisons.append(compare(f"{name}: longest gap of a {kind}", "ms", [(a, b, c) for a, b, c in gaps]))
        punches = ", ".join(f"{one['punched']['punch']['seconds'] * 1000:.0f}" for one in found)
        dirty = min(one["punched"]["punch"]["dirty_mib"] for one in found)
        closing.append(
            f"- {name}: fallocate of the punch returned after {punches} ms; at least {dirty:.0f} MiB were dirty"
        )
    closing += [f"- {name}: longest_loop_lag_ms {lag:g} since its start" for name, lag in lags.items()]
    return [*comparison_lines(comparisons, "punched"), "", *closing]


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    cpus = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=5)
    add("--runtime", type=float, default=8.0, metavar="SECONDS", help="of the clients in each measurement")
    add("--servers", default=",".join(SERVERS), help="comma separated")
    add("--dir", type=Path, default=ROOT / ".build/bench", help="where the file with the file system lies")
    add("--client-cpu", type=int, default=cpus[0])
    add("--server-cpu", type=int, default=cpus[1 % len(cpus)])
    add("--json", type=Path, metavar="OUT", help="write every round")
    options = parser.parse_args(arguments)
    options.servers = options.servers.split(",")
    if unknown := set(options.servers) - set(SERVERS):
        parser.error(f"--servers: {', '.join(sorted(unknown))} unknown, choose from {', '.join(SERVERS)}")
    return options


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--client"]:
        be_client(Path(arguments[2]), arguments[1], float(arguments[3]))
        return 0
    options = parse_arguments(arguments)
    options.dir.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(options.dir).free) < NEEDED:
        print(f"{options.dir} has {free >> 20} MiB free, this needs {NEEDED >> 20}", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt_once)
    rounds: Rounds = {}
    lags: dict[str, float] = {}
    status = 0
    try:
        with workspace(options.dir) as root:
            measure(options, root, rounds, lags)
    except KeyboardInterrupt:
        print("interrupted: the results are partial", file=sys.stderr)
        status = 130
    except (TargetError, OSError, subprocess.SubprocessError) as error:
        print(f"ended early: {error}", file=sys.stderr)
        status = 1
    facts = machine()
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "rounds": rounds, "lags": lags}, indent=1) + "\n")
    print(" · ".join(f"{name}: {value}" for name, value in facts.items()))
    print(
        f"\n{PUNCHED >> 20} MiB punched with {DIRTY >> 20} MiB dirty; {options.rounds} rounds. Median (smallest-largest).\n"
    )
    print("\n".join(lines_of(rounds, lags)))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
