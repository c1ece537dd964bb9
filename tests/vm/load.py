"""Load on the disks of a mount while its store fails: a guest, fio, and a reader of what is cached."""

from __future__ import annotations

import bisect
import os
import random
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cachefs.testing.guest import Guest

PAUSE_S = 0.005  # between two cached reads
WINDOW = 500  # of them


class Load:
    """What a guest said so far: (seconds of the monotonic clock, message)."""

    def __init__(self, scenario: str, wait_until: Callable[..., Any]) -> None:
        self.scenario = scenario
        self.messages: list[tuple[float, str]] = []
        self.running: Future[list[str]] | None = None
        self._wait_until = wait_until

    def hear(self, message: str) -> None:
        self.messages.append((time.monotonic(), message))

    def said(self, pattern: str, since: float = 0.0) -> list[tuple[float, re.Match[str]]]:
        """Asked again and again while reads are timed: it looks only at what is new."""
        first = bisect.bisect_left(self.messages, (since, ""))
        found = [(at, re.fullmatch(pattern, message)) for at, message in self.messages[first:]]
        return [(at, match) for at, match in found if match is not None]

    def wait_for(self, pattern: str, workers: int, *, since: float, timeout: float) -> float:
        """When each of *workers* had said *pattern*, whose first group tells them apart: seconds of the monotonic clock."""

        def first() -> dict[str, float]:
            assert self.running is not None
            if self.running.done():
                self.running.result()
            return {match[1]: at for at, match in reversed(self.said(pattern, since))}

        self._wait_until(lambda: len(first()) >= workers, f"{workers} of {pattern}", timeout=timeout)
        return max(first().values())


@contextmanager
def guest_load(
    guest: Guest, scenario: str, disk: Path, second: Path, cache: str, wait_until: Callable[..., Any], timeout_s: float
) -> Iterator[Load]:
    """A guest under load; at the end it is told to stop, and must have found everything right."""
    load = Load(scenario, wait_until)
    theirs, ours = os.pipe()
    with ThreadPoolExecutor() as threads:
        load.running = threads.submit(
            guest.boot, disk, scenario, second=second, cache=cache, console_input=theirs, timeout_s=timeout_s,
            report=load.hear,
        )  # fmt: skip
        try:
            yield load
        finally:
            os.write(ours, b"stop\n")
            try:
                assert load.running.result()[-1] == "done"
            finally:
                os.close(ours)
                os.close(theirs)


@contextmanager
def fio_load(files: list[Path], size: int) -> Iterator[list[int]]:
    """fio writes and verifies *files* again and again, each with 16 requests at once; yields the seed of each round."""
    seeds: list[int] = []
    failed: list[str] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            seeds.append(random.randrange(1 << 31))
            done = subprocess.run(fio(files, size, seeds[-1]), capture_output=True, text=True, check=False)
            if done.returncode:
                failed.append(done.stdout + done.stderr)
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield seeds
    finally:
        stop.set()
        thread.join()
    assert failed == []


def fio(files: list[Path], size: int, seed: int, *arguments: str) -> list[str]:
    shared = [
        "--ioengine=libaio",
        "--direct=1",
        "--iodepth=16",
        "--rw=randwrite",
        "--bsrange=512-64k",
        f"--size={size}",
    ]
    shared += ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--fsync=16", f"--randseed={seed}"]
    jobs = [word for file in files for word in (f"--name={file.name}", f"--filename={file}", *shared, *arguments)]
    return ["fio", *jobs]


class CachedReads:
    """Reads of 4 KiB from the beginning of *path*, one after the other, by a process of its own: what the test does meanwhile
    must not show in them. When it has ended: latencies of each phase, in seconds and in order; failed: messages.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.latencies: dict[str, list[float]] = {}
        self.failed: list[str] = []
        self._path, self._size = path, size
        self._phases: list[tuple[str, float, float]] = []

    @contextmanager
    def running(self) -> Iterator[CachedReads]:
        self._path.read_bytes()[: self._size]  # warm it
        command = [sys.executable, __file__, str(self._path), str(self._size)]
        with tempfile.TemporaryFile("w+") as said:
            reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said)
            try:
                yield self
            finally:
                reader.communicate()
                said.seek(0)
                for line in said:
                    self._note(*line.rstrip("\n").split(" ", 2))
        assert reader.returncode == 0

    def _note(self, began: str, took: str, error: str) -> None:
        for name, start, end in self._phases:
            if start <= float(began) < end:
                self.latencies.setdefault(name, []).append(float(took))
        if error:
            self.failed.append(error)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._phases.append((name, began, time.monotonic()))

    def figures(self, name: str) -> str:
        """The percentiles of all, and the 99th of each WINDOW of them: their spread is what others of them have to be in."""
        taken = self.latencies[name]
        windows = [taken[at : at + WINDOW] for at in range(0, len(taken) - WINDOW + 1, WINDOW)] or [taken]
        p99s = sorted(percentile(window, 99) for window in windows)
        return (
            f"{name}: {len(taken)} reads, p50 {percentile(taken, 50):.2f} ms, p99 {percentile(taken, 99):.2f} ms, max "
            f"{1000 * max(taken):.1f} ms, p99 of {len(p99s)} windows {p99s[0]:.2f} to {p99s[-1]:.2f} ms, their median "
            f"{p99s[len(p99s) // 2]:.2f} ms"
        )


def percentile(taken: list[float], share: int) -> float:
    """In ms."""
    return sorted(taken)[len(taken) * share // 100] * 1000


def read_until_told(path: str, size: int) -> None:
    """Print of each read when it began (monotonic), how long it took, both in seconds, and its error."""
    disk = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
        began, error = time.monotonic(), ""
        try:
            os.pread(disk, 4096, 4096 * random.randrange(size // 4096))
        except OSError as exc:
            error = str(exc)
        print(began, time.monotonic() - began, error)


if __name__ == "__main__":
    read_until_told(sys.argv[1], int(sys.argv[2]))
