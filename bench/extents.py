#!/usr/bin/env python3
"""How long a map of a sparse disk takes over a server that needs 100 ms for a question: `qemu-img map` of a mounted disk with
the extent cache, beside nbdkit's cacheextents filter over the same plugin, in turn. docs/benchmarks.md.

    python bench/extents.py                   # 16 GiB with 2000 runs of data, three rounds, a minute
    python bench/extents.py --runs 100000     # a fragmented one

The server's own log says how often it was asked. All maps must be the one of the image itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
GIB = 1 << 30
Map = list[tuple[int, int, bool, bool]]


class BenchError(Exception):
    pass


def make_image(path: Path, size: int, runs: int) -> None:
    """*runs* times 64 KiB of data at random places."""
    draw = random.Random(1)
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(runs):
            file.seek(draw.randrange(size >> 16) << 16)
            file.write(b"\x21" * 65536)


@contextmanager
def served(folder: Path, image: Path, delay_ms: int, *filters: str) -> Iterator[tuple[str, Path]]:
    """The URI of an nbdkit over *image*, and the log of what its plugin is asked."""
    socket, log = folder / "nbd.sock", folder / "nbd.log"
    for path in (socket, log):
        path.unlink(missing_ok=True)
    command = [
        "nbdkit",
        "-f",
        "--exit-with-parent",
        "-r",
        "-U",
        str(socket),
        *filters,
        "--filter=log",
        "--filter=delay",
    ]
    server = subprocess.Popen([*command, "file", str(image), f"delay-extents={delay_ms}ms", f"logfile={log}"])
    try:
        deadline = time.monotonic() + 10
        while not socket.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                raise BenchError("nbdkit did not start")
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={socket}", log
    finally:
        server.kill()
        server.wait()


def asked(log: Path) -> int:
    """How many block status calls the plugin got."""
    return sum(" Extents id=" in line and line.endswith("...\n") for line in log.open())


def qemu_map(target: str | Path) -> tuple[float, Map]:
    """Seconds, and the map."""
    before = time.perf_counter()
    done = subprocess.run(
        ["qemu-img", "map", "--output=json", "-f", "raw", str(target)], capture_output=True, text=True, timeout=600
    )
    took = time.perf_counter() - before
    if done.returncode:
        raise BenchError(done.stderr.strip())
    return took, [(one["start"], one["length"], one["data"], one["zero"]) for one in json.loads(done.stdout)]


@contextmanager
def mounted(folder: Path, uri: str) -> Iterator[Path]:
    """The disk `vm`, whose image is kept in a pool and has an extent cache."""
    config, mountpoint = folder / "config.yaml", folder / "mnt"
    mountpoint.mkdir(exist_ok=True)
    stack: dict[str, Any] = {"layers": [{"cache": {"pool": "node"}}, "extents"], "backend": {"nbd": {"uri": uri}}}
    content = {
        "state_dir": str(folder / "state"),
        "pools": {"node": {"path": str(folder / "pool"), "quota": "64MiB"}},
        "images": {"image": stack},
        "disks": {"vm": {"layers": ["cow"], "image": "image"}},
    }
    config.write_text(yaml.safe_dump(content))
    cachefs(["mount", str(config), str(mountpoint)])
    try:
        yield mountpoint / "vm"
    finally:
        cachefs(["umount", str(mountpoint)])


def cachefs(arguments: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "cachefs", *arguments], env=environment, capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        raise BenchError(f"cachefs {arguments[0]}: {done.stderr.strip()}")


def run_round(folder: Path, image: Path, delay_ms: int, truth: Map) -> dict[str, tuple[float, int]]:
    """Seconds and calls of each way."""
    found: dict[str, tuple[float, int]] = {}

    def note(name: str, took: float, got: Map, log: Path, before: int) -> None:
        if got != truth:
            raise BenchError(f"{name}: the map is not that of the image")
        found[name] = took, asked(log) - before

    with served(folder, image, delay_ms, "--filter=cacheextents") as (uri, log):
        note("nbdkit cacheextents", *qemu_map(uri), log, 0)
    shutil.rmtree(folder / "state", ignore_errors=True)
    shutil.rmtree(folder / "pool", ignore_errors=True)
    with served(folder, image, delay_ms) as (uri, log):
        for name in ("cachefs", "cachefs after a restart"):
            with mounted(folder, uri) as disk:
                before = asked(log)
                note(name, *qemu_map(disk), log, before)
                if name == "cachefs":
                    before = asked(log)
                    note("cachefs, second map", *qemu_map(disk), log, before)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=16, help="GiB (default %(default)s)")
    parser.add_argument("--runs", type=int, default=2000, help="of data (default %(default)s)")
    parser.add_argument("--delay", type=int, default=100, help="ms for each question (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the image lies; its file system must have holes")
    options = parser.parse_args()
    missing = [program for program in ("nbdkit", "qemu-img") if shutil.which(program) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}; apt install nbdkit qemu-utils", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="cachefs-bench-", dir=options.folder) as name:
        folder, results = Path(name), dict[str, list[tuple[float, int]]]()
        image = folder / "image.raw"
        make_image(image, options.size * GIB, options.runs)
        _, truth = qemu_map(image)
        try:
            for _ in range(options.rounds):
                for way, result in run_round(folder, image, options.delay, truth).items():
                    results.setdefault(way, []).append(result)
        except BenchError as exc:
            print(exc, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted; what there is so far:", file=sys.stderr)
        print(
            f"{options.size} GiB, {len(truth)} extents, {options.delay} ms for each question, {options.rounds} rounds\n"
        )
        print("| way | calls | seconds, median | times as fast |\n|---|---|---|---|")
        peer = statistics.median(took for took, _ in results["nbdkit cacheextents"])
        for way, rounds in results.items():
            took = statistics.median(took for took, _ in rounds)
            print(f"| {way} | {max(calls for _, calls in rounds)} | {took:.2f} | {peer / took:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
