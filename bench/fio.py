#!/usr/bin/env python3
"""cachefs beside its peers under fio. What is measured, why so, and how to read it: docs/benchmarks.md."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

from report import SUBJECT, JobInfo, ParseError, Run, Sample, TargetInfo, parse_fio, print_tables, write_markdown
from targets import (
    PEERS,
    ROOT,
    TARGETS,
    Cachefs,
    Place,
    Target,
    TargetError,
    create_base,
    file_system_of,
    workspace,
)

RAMP_S = 0.2
FRESH_SLICE = 128 << 20  # of a disk, for one round of a job on fresh blocks: 2048 clusters of qcow2
FRESH_STEP = 64 << 10  # qcow2's cluster: each write is the first one into its own
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class Job:
    """One fio job. `where` is a part of the disk: all of it, the written half, the middle (half written), or what lies
    behind it for this job alone and is fresh in every round.
    """

    name: str
    title: str
    rw: str
    block: str = "4k"
    depth: int = 1
    where: str = "all"
    workers: int = 1
    buffered: bool = False
    syncs: bool = False
    unit: str = "IOPS"
    goal: float | None = None

    def info(self) -> JobInfo:
        return JobInfo(self.name, self.title, self.unit, self.syncs, self.goal)

    def arguments(self, path: Path, size: int, runtime_s: float, seed: int) -> list[str]:
        """*size*: of the disk without the fresh part behind it. *seed*: the round's number, from 1."""
        offset, length = {
            "all": (0, size),
            "written": (0, size // 2),
            "middle": (size // 4, size // 2),
            "fresh": (size + (seed - 1) * FRESH_SLICE, FRESH_SLICE),
        }[self.where]
        share = length // self.workers
        options = {
            "name": self.name,
            "filename": str(path).replace(":", "\\:"),
            "rw": self.rw,
            "bs": self.block,
            "ioengine": "psync" if self.buffered else "libaio",
            "direct": int(not self.buffered),
            "iodepth": self.depth,
            "offset": offset,
            "size": share,
            "offset_increment": share,
            "numjobs": self.workers,
            "fdatasync": int(self.syncs),
            "time_based": 1,
            "runtime": f"{runtime_s * 1000:.0f}ms",
            "ramp_time": f"{RAMP_S * 1000:.0f}ms",
            "randrepeat": 0,
            "randseed": seed,
            "fallocate": "none",
            "allow_file_create": 0,
            "thread": 1,
            "group_reporting": 1,
            "output-format": "json",
        }
        if self.where == "fresh":  # once through its slice, if there is time
            del options["time_based"], options["ramp_time"]
        return ["fio", *(f"--{name}={value}" for name, value in options.items())]


def all_jobs() -> list[Job]:
    jobs = []
    for rw, name, where in (
        ("randread", "read", "all"),
        ("randwrite", "write", "written"),
        ("randrw", "mixed", "written"),
    ):
        for depth in (1, 4, 16, 64):
            goal = {1: 1.5, 16: 2.0 if rw == "randrw" else 1.4}.get(depth)
            jobs.append(Job(f"{rw}-qd{depth}", f"4 KiB {name}, qd {depth}", rw, depth=depth, where=where, goal=goal))
    jobs += [
        Job("seqread", "1 MiB sequential read", "read", "1m", 4, "middle", unit="MB/s", goal=2.5),
        Job("seqwrite", "1 MiB sequential write", "write", "1m", 4, "written", unit="MB/s", goal=1.1),
        Job("fdatasync", "4 KiB write + fdatasync", "randwrite", where="written", syncs=True),
        Job(
            "fdatasync-fresh",
            "4 KiB write + fdatasync, fresh",
            f"write:{FRESH_STEP - 4096}",
            where="fresh",
            syncs=True,
            goal=0.8,
        ),
        Job("qemu-read", "QEMU default: 4 KiB read", "randread", workers=4, buffered=True),
        Job("qemu-write", "QEMU default: 4 KiB write", "randwrite", where="written", workers=4, buffered=True),
    ]
    return jobs


class Bench:
    """Runs the jobs on the targets and appends what it finds to `run`, so that an interrupted run keeps its part."""

    def __init__(self, options: argparse.Namespace, jobs: Sequence[Job]) -> None:
        self.options = options
        self.jobs = jobs
        self.run = Run(
            machine=machine(),
            settings={
                "rounds": options.rounds,
                "runtime": options.runtime,
                "size": options.size,
                "client_cpu": options.client_cpu,
                "server_cpu": options.server_cpu,
            },
            jobs={job.name: job.info() for job in jobs},
            targets={},
        )

    def measure(self, directories: dict[str, Path]) -> None:
        """All storages, one after the other; at the end the idle check on the last one."""
        names = self._installed()
        steps = len(directories) * self.options.rounds * len(self.jobs) * len(names)
        with progress(steps) as self.tick:
            for storage, parent in directories.items():
                with ExitStack() as stack:
                    root = stack.enter_context(workspace(parent))
                    self.run.file_systems[storage] = file_system_of(root)
                    targets = self._start_all(stack, names, root)
                    for number in range(1, self.options.rounds + 1):
                        for job in self.jobs:
                            for target in in_turn(targets, number):
                                self._measure_one(storage, job, number, target)
                    if storage == list(directories)[-1]:
                        self._look_at_the_idle(targets)

    def _installed(self) -> list[str]:
        names = []
        for name in self.options.targets:
            if missing := TARGETS[name].missing_packages():
                self.run.notes.append(f"skipped {name}, not installed: apt install {' '.join(missing)}")
                print(self.run.notes[-1], file=sys.stderr)
            else:
                names.append(name)
        return names

    def _start_all(self, stack: ExitStack, names: Sequence[str], root: Path) -> list[Target]:
        fresh = FRESH_SLICE * self.options.rounds if any(job.where == "fresh" for job in self.jobs) else 0
        size = self.options.size_bytes + fresh
        needed = size * 2 + (self.options.size_bytes // 2 + fresh) * len(names)
        if (free := shutil.disk_usage(root).free) < needed * 1.05:
            raise TargetError(f"{root.parent} has {free >> 20} MiB free, this run needs {needed >> 20}: try --size")
        self.tick(f"{root.parent}: creating the base image", 0)
        place = Place(root, root / "base.raw", size, self.options.server_cpu, self.options.cachefs_command)
        create_base(place.base, size)
        started = []
        for name in names:
            target = TARGETS[name](name, place)
            self.tick(f"{root.parent}: starting and filling {name}", 0)
            stack.callback(target.stop)
            try:
                target.start()
                target.check_content()
                self._fill(target)
            except (TargetError, ParseError, OSError, subprocess.SubprocessError) as error:
                if name not in PEERS:
                    raise TargetError(str(error)) from error
                self.run.notes.append(f"skipped {name} in {root.parent}: {error}")
                target.stop()
                continue
            started.append(target)
            info = TargetInfo(target.title, name in PEERS, target.flushes, shlex.join(target.command()))
            self.run.targets.setdefault(name, info)
        settle(root)
        return started

    def _fill(self, target: Target) -> None:
        fill(target.path, self.options.size_bytes, self.options.client_cpu)

    def _measure_one(self, storage: str, job: Job, number: int, target: Target) -> None:
        self.tick(f"{storage}, round {number}: {job.title}, {target.name}", 1)
        arguments = job.arguments(target.path, self.options.size_bytes, self.options.runtime, seed=number)
        before = target.cpu_seconds()
        value, error, details = None, None, {}
        try:
            details = parse_fio(self._fio(arguments, timeout_s=self.options.runtime + 60))
        except ParseError as failure:
            error = str(failure)
        else:
            value = details["mb_s" if job.unit == "MB/s" else "iops"]
            during = details["ios"] if job.where == "fresh" else details["iops"] * (self.options.runtime + RAMP_S)
            details["server_us_per_io"] = (target.cpu_seconds() - before) / during * 1e6
        self.run.samples.append(Sample(storage, job.name, number, target.name, value, details, error))
        if "read" not in job.rw.replace("randrw", "write"):
            settle(target.directory)

    def _fio(self, arguments: Sequence[str], timeout_s: float) -> str:
        return run_fio(arguments, self.options.client_cpu, timeout_s)

    def _look_at_the_idle(self, targets: Sequence[Target]) -> None:
        for target in targets:
            if isinstance(target, Cachefs) and target.name == SUBJECT:
                self.run.status = target.status()
        if not self.options.idle:
            return
        self.tick(f"idle for {self.options.idle:g} s", 0)
        time.sleep(1)
        before = {target.name: target.cpu_seconds() for target in targets if target.server}
        time.sleep(self.options.idle)
        for target in targets:
            if target.server:
                used = target.cpu_seconds() - before[target.name]
                self.run.idle_percent[target.name] = used / self.options.idle * 100


def pinned(arguments: Sequence[str], cpu: int) -> list[str]:
    """The command line that runs *arguments* on *cpu* and ends them when we die."""
    return ["setpriv", "--pdeathsig", "KILL", "taskset", "-c", str(cpu), *arguments]


def run_fio(arguments: Sequence[str], cpu: int, timeout_s: float) -> str:
    """What fio said, for `parse_fio`. Raises: ParseError."""
    process = subprocess.Popen(
        pinned(arguments, cpu),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise ParseError(f"fio did not end within {timeout_s:.0f} s") from None
    finally:
        process.kill()
        process.wait()
    text = output.decode(errors="replace")
    if process.returncode and "{\n" not in text:
        raise ParseError(text.strip()[-300:])
    return text


def fill(path: Path, size: int, cpu: int) -> None:
    """Write the lower half once, so that every later write is an overwrite; then read all of it, and warm up both halves."""
    for rw, length in (("read", size), ("write", size // 2)):
        job = Job("fill", "", rw, "1m", buffered=True).arguments(path, length, 0, 1)
        once = [argument for argument in job if not argument.startswith(("--time_based", "--runtime", "--ramp_time"))]
        parse_fio(run_fio(once, cpu, timeout_s=600))
    for warm in (Job("warm-up", "", "randread", depth=16), Job("warm-up", "", "randrw", depth=16, where="written")):
        parse_fio(run_fio(warm.arguments(path, size, 0.3, 1), cpu, timeout_s=60))


T = TypeVar("T")


def in_turn(targets: Sequence[T], number: int) -> list[T]:
    """Another one first in every round, and every second round backwards: no target always follows the same one."""
    shift = number % len(targets)
    order = [*targets[shift:], *targets[:shift]]
    return order[::-1] if number % 2 else order


def settle(directory: Path) -> None:
    """Write back what a job left dirty, so that the next one does not pay for it."""
    subprocess.run(["sync", "-f", directory], check=False)


def machine() -> dict[str, str]:
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "CPU": f"{os.cpu_count()} x {cpu[1] if cpu else platform.machine()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "cachefs": _first_line(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
    }
    for program in ("fio", "qemu-storage-daemon", "nbdfuse", "nbdkit"):
        if shutil.which(program):
            version = re.search(r"\d[\w.]*", _first_line([program, "--version"]))
            facts[program] = version[0] if version else "unknown"
    return facts


def _first_line(command: Sequence[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return (done.stdout.splitlines() or ["unknown"])[0]


class Tick:
    """Told what runs next; `steps` of the whole have begun with it."""

    def __call__(self, what: str, steps: int) -> None:
        print(what, file=sys.stderr)


@contextmanager
def progress(total: int) -> Iterator[Tick]:
    """A progress bar on a terminal, a line per step elsewhere."""
    if not sys.stderr.isatty():
        yield Tick()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shown = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*shown, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task("", total=total)

        class BarTick(Tick):
            def __call__(self, what: str, steps: int) -> None:
                bar.update(task, description=what, advance=steps, refresh=True)  # never during a measurement

        yield BarTick()


def interrupt_once(signum: int, frame: FrameType | None) -> None:
    """The first signal ends the measurement; the clean-up that follows is bounded and not to be interrupted."""
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


def size_of(parser: argparse.ArgumentParser, text: str) -> int:
    """Bytes of a disk's size such as 1GiB."""
    number, unit = text[:-3], text[-3:]
    if unit not in UNITS or not number.isdigit():
        parser.error(f"--size {text}: write it as 512MiB or 1GiB")
    size = int(number) * UNITS[unit]
    if size % (16 << 20) or not size:
        parser.error("--size: a multiple of 16MiB")
    return size


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    cpus = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a look in two minutes: tmpfs, 3 rounds, 0.5 s, 256MiB, qd 1 and 16")
    add("--rounds", type=int, default=5)
    add("--runtime", type=float, default=2.0, metavar="SECONDS", help="of each job on each target in each round")
    add("--size", default="1GiB", help="of the disk")
    add(
        "--storage",
        default="tmpfs,disk",
        help="where the data lies: tmpfs, disk, or a directory such as a mounted ext4; comma separated",
    )
    add("--tmpfs-dir", type=Path, default=Path("/dev/shm"))
    add("--disk-dir", type=Path, default=ROOT / ".build/bench")
    add("--targets", default=",".join(TARGETS), help="comma separated")
    add("--jobs", default="", metavar="PATTERN", help="regular expression for names such as randread-qd16; see --list")
    add("--list", action="store_true", help="list the jobs and exit")
    add("--idle", type=float, default=10.0, metavar="SECONDS", help="length of the idle check at the end; 0: none")
    add("--client-cpu", type=int, default=cpus[0])
    add("--server-cpu", type=int, default=cpus[1 % len(cpus)])
    add("--cachefs-command", default=f"{sys.executable} -m cachefs", help="another build of cachefs")
    add("--json", type=Path, metavar="OUT", help="write everything, every round")
    add("--plot", type=Path, metavar="OUT.svg", help="or .png; needs matplotlib")
    add("--markdown", type=Path, metavar="FILE.md", help="replace the results between the markers in this file")
    add("--load", type=Path, metavar="IN.json", help="measure nothing: show, plot and write an earlier run")
    if "--quick" in arguments:
        parser.set_defaults(rounds=3, runtime=0.5, size="256MiB", storage="tmpfs", jobs="qd1$|qd16|seq|sync|qemu")
    options = parser.parse_args(arguments)
    options.size_bytes = size_of(parser, options.size)
    options.targets = options.targets.split(",")
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"--targets: {', '.join(sorted(unknown))} unknown, choose from {', '.join(TARGETS)}")
    options.storage = options.storage.split(",")
    if unknown := {name for name in options.storage if name not in ("tmpfs", "disk") and not Path(name).is_dir()}:
        parser.error(f"--storage: {', '.join(sorted(unknown))} is neither tmpfs nor disk nor a directory")
    options.cachefs_command = tuple(shlex.split(options.cachefs_command))
    return options


def publish(run: Run, options: argparse.Namespace) -> None:
    if options.json:
        options.json.write_text(run.to_json())
    if options.plot:
        from plot import write_plot

        write_plot(run, options.plot)
    if options.markdown:
        write_markdown(run, options.markdown, options.plot)
    print_tables(run)  # last: the terminal may be gone


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    jobs = [job for job in all_jobs() if re.search(options.jobs, job.name)]
    if options.list or not jobs:
        print("\n".join(f"{job.name:14} {job.title}" for job in all_jobs()))
        return 0 if options.list else 2
    if options.load:
        publish(Run.from_json(options.load.read_text()), options)
        return 0
    if shutil.which("fio") is None:
        print("fio is not installed: apt install fio", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt_once)
    bench = Bench(options, jobs)
    places = {"tmpfs": options.tmpfs_dir, "disk": options.disk_dir}
    directories = {name: places.get(name, Path(name)).resolve() for name in options.storage}
    status = 0
    try:
        bench.measure(directories)
    except KeyboardInterrupt:
        bench.run.notes.append("interrupted: the results are partial")
        status = 130
    except TargetError as error:
        bench.run.notes.append(f"ended early: {error}")
        status = 1
    publish(bench.run, options)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
