#!/usr/bin/env python3
"""Does a disk that hangs cost the others anything? 512 AIO reads are held on one disk while another one of the same mount is
measured; twice as control they are not. docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fio import Job, fill, in_turn, interrupt_once, machine, pinned, run_fio, settle, size_of
from report import ParseError, compare, comparison_lines, parse_fio
from targets import ROOT, Cachefs, Place, TargetError, create_base, workspace

HELD = 512
HOLD_TIMEOUT_S = 20.0
CONDITIONS = ("control", "again", "held")


class TwoDisks(Cachefs):
    """vm1 is measured; `hung` hangs when it is told to."""

    def disks(self) -> dict[str, Any]:
        gated = {"layers": [{"gated": {}}, {"cow": {}}], "image": "base"}
        return {**super().disks(), "hung": gated}

    def signal(self, number: signal.Signals) -> None:
        assert self.server is not None
        self.server.send_signal(number)  # taskset and setpriv have become the daemon: the same process

    @contextmanager
    def reads_held(self, cpu: int) -> Iterator[None]:
        """HELD reads of `hung` wait; afterwards every one was answered.

        Raises: TargetError.
        """
        self.signal(signal.SIGUSR2)
        options = {
            "name": "held",
            "filename": self.mountpoint / "hung",
            "rw": "randread",
            "bs": "4k",
            "ioengine": "libaio",
            "direct": 1,
            "iodepth": HELD,
            "size": "64m",
            "io_size": HELD * 4096,
        }
        command = ["fio", *(f"--{name}={value}" for name, value in options.items())]
        client = subprocess.Popen(pinned(command, cpu), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            self._wait_for(HELD)
            yield
            self._wait_for(HELD)  # and all through the measurement
            self.signal(signal.SIGUSR1)
            output, _ = client.communicate(timeout=HOLD_TIMEOUT_S)
            if client.returncode:
                raise TargetError(f"the held reads failed: {output.decode(errors='replace').strip()[-300:]}")
            self._wait_for(0)
        finally:
            self.signal(signal.SIGUSR1)
            client.kill()
            client.communicate()

    def _wait_for(self, count: int) -> None:
        deadline = time.monotonic() + HOLD_TIMEOUT_S
        while (found := self._waiting()) != count:
            if time.monotonic() > deadline:
                raise TargetError(f"{found} requests wait, not {count}\n{self._log_tail()}")
            time.sleep(0.02)

    def _waiting(self) -> int:
        status = self.status()
        return -1 if status is None else int(status["daemon"]["waiting_requests"])


def jobs() -> list[Job]:
    return [
        Job(f"{rw}-qd{depth}", f"4 KiB {name}, qd {depth}", rw, depth=depth, where=where)
        for rw, name, where in (("randread", "read", "all"), ("randwrite", "write", "written"))
        for depth in (1, 16)
    ]


def measure(options: argparse.Namespace, target: TwoDisks, rounds: dict[str, list[tuple[float, float, float]]]) -> None:
    """Appends to *rounds*, per job, what each round found; an interrupted one keeps its whole rounds."""
    for number in range(1, options.rounds + 1):
        for job in jobs():
            found = {}
            for condition in in_turn(CONDITIONS, number):
                print(f"round {number}: {job.title}, {condition}", file=sys.stderr)
                with ExitStack() as stack:
                    if condition == "held":
                        stack.enter_context(target.reads_held(options.client_cpu))
                    arguments = job.arguments(target.path, options.size_bytes, options.runtime, seed=number)
                    found[condition] = parse_fio(run_fio(arguments, options.client_cpu, options.runtime + 60))["iops"]
                settle(target.directory)
            rounds.setdefault(job.title, []).append((found["control"], found["again"], found["held"]))


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    cpus = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=7)
    add("--runtime", type=float, default=1.0, metavar="SECONDS", help="of each measurement")
    add("--size", default="512MiB", help="of the disks")
    add("--dir", type=Path, default=Path("/dev/shm"), help="where the data lies")
    add("--client-cpu", type=int, default=cpus[0])
    add("--server-cpu", type=int, default=cpus[1 % len(cpus)])
    add("--json", type=Path, metavar="OUT", help="write every round")
    options = parser.parse_args(arguments)
    options.size_bytes = size_of(parser, options.size)
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    if shutil.which("fio") is None:
        print("fio is not installed: apt install fio", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt_once)
    rounds: dict[str, list[tuple[float, float, float]]] = {}
    status = 0
    try:
        with workspace(options.dir) as root, ExitStack() as stack:
            place = Place(
                root,
                root / "base.raw",
                options.size_bytes,
                options.server_cpu,
                (sys.executable, str(ROOT / "bench/gated.py")),
            )
            create_base(place.base, place.size)
            target = TwoDisks("cachefs", place)
            stack.callback(target.stop)
            target.start()
            target.check_content()
            fill(target.path, place.size, options.client_cpu)
            measure(options, target, rounds)
    except KeyboardInterrupt:
        print("interrupted: the results are partial", file=sys.stderr)
        status = 130
    except (TargetError, ParseError) as error:
        print(f"ended early: {error}", file=sys.stderr)
        status = 1
    facts = machine()
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "rounds": rounds}, indent=1) + "\n")
    print(" · ".join(f"{name}: {value}" for name, value in facts.items()))
    print(
        f"\n{options.rounds} rounds of {options.runtime:g} s; {HELD} reads held on another disk. Median (smallest-largest).\n"
    )
    print("\n".join(comparison_lines([compare(title, "IOPS", found) for title, found in rounds.items()], "held")))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
