"""`cachefs map`: of a mount it agrees with qemu-img, of stores with the mount, and it changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_files import KEEP_SIZE, PUNCH_HOLE, fallocate, need, pattern, run

from cachefs import diskmap, statusview

pytestmark = pytest.mark.slow

MIB = 1 << 20
SIZE = 32 * MIB


@pytest.fixture
def config(mount: Any, tmp_path: Path) -> Path:
    """vm: an overlay over a cache over an extent cache over a file with data at 0 and at 16 MiB."""
    image = tmp_path / "image.raw"
    with image.open("wb") as file:
        file.truncate(SIZE)
        for offset in (0, 16 * MIB):
            file.seek(offset)
            file.write(pattern(4 * MIB))
    stack = {"layers": [{"cache": {"pool": "node"}}, "extents"], "backend": {"file": {"path": str(image)}}}
    pools = {"node": {"path": str(tmp_path / "pool"), "quota": "64MiB"}}
    disks = {"vm": {"layers": ["cow"], "image": "i"}, "plain": {"backend": {"memory": {"size": MIB}}}}
    path: Path = mount.write({"pools": pools, "images": {"i": stack}, "disks": disks})
    return path


def change(disk: Path) -> None:
    """1 MiB of new data in a hole, 2 MiB of zeros over data; the first 2 MiB are read, so that they are cached."""
    descriptor = os.open(disk, os.O_RDWR)
    try:
        os.pread(descriptor, 2 * MIB, 0)
        os.pwrite(descriptor, pattern(MIB), 8 * MIB)
        fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, 17 * MIB, 2 * MIB)
    finally:
        os.close(descriptor)


def kinds(entries: list[dict[str, Any]]) -> list[tuple[int, int, bool, bool]]:
    """Start, end, data and zero, without the depths: neighbours that agree are one."""
    found: list[tuple[int, int, bool, bool]] = []
    for one in entries:
        start, end = one["start"], one["start"] + one["length"]
        if found and found[-1][2:] == (one["data"], one["zero"]):
            found[-1] = (found[-1][0], end, *found[-1][2:])
        else:
            found.append((start, end, one["data"], one["zero"]))
    return found


def depths(entries: list[dict[str, Any]], offset: int) -> int:
    return next(one["depth"] for one in entries if one["start"] <= offset < one["start"] + one["length"])


def test_map_of_a_mount_is_that_of_qemu_img_with_the_layer_that_answers(
    mount: Any, config: Path, cachefs: Any, wait_until: Callable[..., Any]
) -> None:
    need("qemu-img")
    mounted = mount(config)
    change(mounted.path / "vm")
    wait_until(lambda: mounted.layer("vm", 1)["held_blocks"] >= 32, "2 MiB are in the pool")
    found = json.loads(cachefs("map", "--json", mounted.path, "vm").stdout)
    qemu = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", mounted.path / "vm").stdout)
    assert kinds(found) == kinds(qemu)
    places = (MIB, 3 * MIB, 8 * MIB, 10 * MIB, 16 * MIB, 18 * MIB, 31 * MIB)
    assert [depths(found, at) for at in places] == [1, 2, 0, 2, 2, 0, 2]
    assert all(("offset" in one) is one["data"] and one.get("offset", one["start"]) == one["start"] for one in found)
    assert set(found[0]) == set(qemu[0])

    shown = cachefs("map", mounted.path, "vm").stdout
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert "7 MiB" in shown  # of data, all layers together
    assert {"vm", "vm/cow", "i/cache", "i/extents", "i/file"} <= set(lines)
    mounted.umount()

    stored = json.loads(cachefs("map", "--json", config, "vm").stdout)
    assert stored == found


def test_map_of_stores_makes_and_changes_nothing(mount: Any, config: Path, cachefs: Any, tmp_path: Path) -> None:
    done = cachefs("map", "--json", config, "vm")
    assert done.returncode == 0, done.stderr
    assert kinds(json.loads(done.stdout)) == [
        (0, 4 * MIB, True, False),
        (4 * MIB, 16 * MIB, False, True),
        (16 * MIB, 20 * MIB, True, False),
        (20 * MIB, SIZE, False, True),
    ]
    assert not (tmp_path / "state").exists()
    assert not (tmp_path / "pool").exists()
    mounted = mount(config)
    change(mounted.path / "vm")
    mounted.umount()
    before = digests(tmp_path / "state" / "overlays")
    assert cachefs("map", config, "vm").returncode == 0
    assert digests(tmp_path / "state" / "overlays") == before


def digests(folder: Path) -> dict[str, str]:
    """Of all files but the lock, whose text names who has looked last."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_map_says_what_is_wrong_and_what_to_do(mount: Any, config: Path, cachefs: Any, tmp_path: Path) -> None:
    mounted = mount(config)
    for arguments, sentence in (
        ((mounted.path, "nope"), "there is no such disk; `cachefs status` lists them"),
        ((config, "nope"), "has no disk 'nope'; it has plain, vm"),
        ((config, "vm"), "name the mountpoint instead of the configuration"),
        ((tmp_path, "vm"), "nothing is mounted there; `findmnt -t fuse.cachefs` lists"),
        ((tmp_path / "missing.yaml", "vm"), "missing.yaml"),
    ):
        done = cachefs("map", *arguments)
        assert done.returncode != 0
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr
    assert cachefs("map", "--json", mounted.path, "plain").returncode == 0
    mounted.umount()
    assert json.loads(cachefs("map", "--json", config, "plain").stdout)[0]["zero"]


def test_map_with_more_runs_than_a_page_is_whole(mount: Any, config: Path, cachefs: Any) -> None:
    need("qemu-img")
    mounted = mount(config)
    descriptor = os.open(mounted.path / "vm", os.O_RDWR)
    for block in range(0, SIZE // 4096, 2):
        os.pwrite(descriptor, b"\x21" * 4096, block * 4096)
    os.close(descriptor)
    found = json.loads(cachefs("map", "--json", mounted.path, "vm").stdout)
    qemu = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", mounted.path / "vm").stdout)
    assert kinds(found) == kinds(qemu)
    assert len(found) > 8000
    mounted.umount()


@pytest.mark.alone
def test_map_of_a_daemon_that_hangs_says_so(mount: Any, config: Path, cachefs: Any) -> None:
    mounted = mount(config)
    mounted.process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    done = cachefs("map", mounted.path, "vm")
    took = time.monotonic() - started
    mounted.process.send_signal(signal.SIGCONT)
    assert done.returncode == 1
    assert (
        done.stderr.strip() == f"{mounted.path}: its daemon did not answer within 5 s; its log says what it waits for"
    )
    assert took < 10


def test_map_waits_for_a_store_that_takes_its_time(mount: Any, cachefs: Any, wait_until: Callable[..., Any]) -> None:
    layers = [{"faulty": {"rules": ["extents * hang"]}}]
    program = (str(Path(__file__).with_name("faulty.py")),)
    mounted = mount({"disks": {"vm": {"layers": layers, "backend": {"memory": {"size": MIB}}}}}, program=program)
    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(cachefs, "map", "--json", mounted.path, "vm")
        wait_until(lambda: mounted.layer("vm")["hanging"], "it is asked")
        asked = time.monotonic() + diskmap.PATIENCE_S + statusview.TIMEOUT_S + 1
        wait_until(lambda: time.monotonic() > asked, "longer than a daemon may be silent")
        mounted.process.send_signal(signal.SIGUSR1)
        done = asking.result(timeout=20)
    assert done.returncode == 0, done.stderr
    assert kinds(json.loads(done.stdout)) == [(0, MIB, False, True)]


def test_map_of_a_daemon_that_hangs_can_be_interrupted(
    mount: Any, config: Path, wait_until: Callable[..., Any]
) -> None:
    mounted = mount(config)
    mounted.process.send_signal(signal.SIGSTOP)
    command = [sys.executable, "-m", "cachefs", "map", str(mounted.path), "vm"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    asking = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: len(os.listdir(f"/proc/{asking.pid}/task")) > 1, "its thread asks the daemon")
        asking.send_signal(signal.SIGINT)
        _, stderr = asking.communicate(timeout=10)
    finally:
        mounted.process.send_signal(signal.SIGCONT)
        asking.kill()
        asking.wait()
    assert asking.returncode == 1
    assert "Aborted" in stderr
    assert "Traceback" not in stderr
