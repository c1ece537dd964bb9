"""Load on the disks of a mount while its store fails: a guest, fio, and a reader of what is cached."""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cachefs.testing.guest import Guest

PAUSE_S = 0.005  # between two cached reads


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
        found = [(at, re.fullmatch(pattern, message)) for at, message in self.messages]
        return [(at, match) for at, match in found if match is not None and at >= since]

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
    """Reads of 4 KiB from the beginning of *path*, one after the other. latencies: of each phase, in seconds."""

    def __init__(self, path: Path, size: int) -> None:
        self.latencies: dict[str, list[float]] = {}
        self.failed: list[OSError] = []
        self._phase = ""
        self._path, self._size = path, size
        self._stop = threading.Event()

    def run(self) -> None:
        disk = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        while not self._stop.wait(PAUSE_S):
            phase, began = self._phase, time.monotonic()
            try:
                os.pread(disk, 4096, 4096 * random.randrange(self._size // 4096))
            except OSError as exc:
                self.failed.append(exc)
            self.latencies.setdefault(phase, []).append(time.monotonic() - began)
        os.close(disk)

    @contextmanager
    def running(self) -> Iterator[CachedReads]:
        self._path.read_bytes()[: self._size]  # warm it
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phase = name
        yield
        self._phase = ""

    def figures(self, name: str) -> str:
        taken = sorted(self.latencies[name])
        p50, p99 = (taken[len(taken) * share // 100] * 1000 for share in (50, 99))
        return f"{name}: {len(taken)} reads, p50 {p50:.2f} ms, p99 {p99:.2f} ms, max {taken[-1] * 1000:.1f} ms"
