"""The map of a mounted disk: the reference sequences, the race that the kernel leaves open, a raw file beside every stack."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from loopmounts import loop_device
from nbdservers import Servers
from test_files import KEEP_SIZE, PUNCH_HOLE, fallocate, need, pattern, run

pytestmark = pytest.mark.slow

MIB = 1 << 20
FAULTY = ("tests/fuse/faulty.py",)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Four extents of 1 MiB: data, hole, data, hole."""
    path = tmp_path / "four.raw"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
        for offset in (0, 2 * MIB):
            file.seek(offset)
            file.write(pattern(MIB))
    return path


def qemu_map(path: Path | str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", path).stdout)
    return found


def qemu_io(path: Path | str, *commands: str) -> None:
    """*commands* one after the other; each must work."""
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-d", "unmap", str(path)],
        input="".join(f"{command}\n" for command in commands),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "rror" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert "failed" not in done.stdout, done.stdout


def questions(log: Path) -> int:
    """Block status calls that an nbdkit's log filter has seen."""
    return sum(" Extents id=" in line and line.endswith("...\n") for line in log.read_text().splitlines(True))


# ---- the reference sequences


@pytest.mark.parametrize(
    ("between", "further", "length"),
    [
        ((), 0, 0),
        (("read 0 1M", "read 1M 512"), 0, 0),
        (("discard 0 1M",), 1, MIB),
        (("write -P 0x22 1M 4k",), 1, 4096),
        (("write -z 2M 64k",), 1, 65536),
    ],
    ids=["nothing", "read", "discard", "write", "zero"],
)
def test_second_map_asks_only_for_what_was_changed(
    mount: Any, servers: Servers, image: Path, tmp_path: Path, between: tuple[str, ...], further: int, length: int
) -> None:
    need("qemu-io")
    log = tmp_path / "calls.log"
    uri, _ = servers.nbdkit("--filter=log", "file", image, f"logfile={log}")
    mounted = mount({"disks": {"vm": {"layers": ["extents"], "backend": {"nbd": {"uri": uri}}}}})
    disk = mounted.path / "vm"
    assert qemu_map(disk) == qemu_map(image)
    assert questions(log) == 1
    if between:
        qemu_io(disk, *between)
    for _ in range(2):
        assert qemu_map(disk) == qemu_map(image)
    assert questions(log) == 1 + further
    if further:
        *_, last = (line for line in log.read_text().splitlines() if " Extents id=" in line and line.endswith("..."))
        assert f"count={length:#x} " in last
    mounted.umount()


# ---- asynchronous direct writes: the kernel holds the inode's lock only while they are submitted


def test_map_beside_an_asynchronous_direct_write_is_forgotten_when_that_is_done(
    mount: Any, image: Path, wait_until: Callable[..., Any]
) -> None:
    need("qemu-io")
    rules = [f"write {MIB} hang", "extents * hang once"]
    layers = ["extents", {"faulty": {"rules": rules[:1]}}]
    mounted = mount(
        {"disks": {"vm": {"layers": layers, "backend": {"file": {"path": str(image)}}}}},
        program=(str(ROOT / FAULTY[0]),),
    )
    disk = mounted.path / "vm"
    truth = qemu_map(image)
    assert qemu_map(disk) == truth
    writer = subprocess.Popen(
        ["qemu-io", "-n", "-i", "native", "-f", "raw", str(disk)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert writer.stdin is not None
    try:
        writer.stdin.write(f"aio_write -P 0x22 {MIB} 64k\n")
        writer.stdin.flush()
        wait_until(lambda: mounted.layer("vm", 1)["hanging"] == 1, "the write is held")
        assert qemu_map(disk) == truth  # learnt, or known, while it is under way
        mounted.process.send_signal(signal.SIGUSR1)
        output, _ = writer.communicate("aio_flush\nquit\n", timeout=20)
        assert "wrote 65536/65536" in output
    finally:
        writer.kill()
        writer.wait()
    assert qemu_map(disk) == qemu_map(image) != truth
    with disk.open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 65536, MIB) == b"\x22" * 65536
    mounted.umount()


# ---- a raw file beside every stack


def stack_of(kind: str, image: Path, tmp_path: Path, servers: Servers) -> dict[str, Any]:
    file: dict[str, Any] = {"file": {"path": str(image)}}
    pools = {"node": {"path": str(tmp_path / "pool"), "quota": "64MiB"}}
    if kind == "file":
        return {"disks": {"vm": {"layers": ["extents"], "backend": file}}}
    if kind == "plain":
        return {"disks": {"vm": {"backend": file}}}
    if kind == "nbd":
        uri, _ = servers.nbdkit("file", image)
        return {"disks": {"vm": {"layers": ["extents"], "backend": {"nbd": {"uri": uri}}}}}
    if kind == "overlaid":
        return {"disks": {"vm": {"layers": ["cow", "extents"], "backend": file}}}
    if kind == "cached-overlay":
        layers = [{"cache": {"pool": "node"}}, "extents"]
        images = {"i": {"layers": layers, "backend": file}}
        return {"pools": pools, "images": images, "disks": {"vm": {"layers": ["cow"], "image": "i"}}}
    layers = [{"cache": {"pool": "node", "mode": "write-through"}}, "extents"]
    return {"pools": pools, "disks": {"vm": {"layers": layers, "backend": file}}}


def random_command(draw: random.Random, size: int) -> str:
    """Writes anywhere in sectors, discards and zeros in blocks, as a guest's file system sends them.

    No reads: ext4 calls an unwritten extent data as soon as somebody has read it, and whoever knows that it is zeros does not.
    """
    kind = draw.choice(("write -q -P 0x21", "write -q -P 0x22", "discard -q", "write -q -z", "write -q -z -u"))
    if "-P" in kind:
        start, length = draw.randrange(size // 512) * 512, draw.choice((512, 4096, 7 * 512, 65536, 300 * 512))
    else:
        start, length = draw.randrange(size // 4096) * 4096, draw.choice((4096, 8192, 65536, 500 * 1024, 2 * MIB))
    return f"{kind} {start} {min(length, size - start)}"


@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", ["plain", "file", "nbd", "overlaid", "cached-overlay", "cached-through"])
def test_map_is_that_of_a_raw_file_after_a_thousand_changes(
    mount: Any, servers: Servers, tmp_path: Path, kind: str
) -> None:
    need("qemu-io")
    size, draw = 32 * MIB, random.Random(8)
    image, raw = tmp_path / "image.raw", tmp_path / "raw"
    for path in (image, raw):
        with path.open("wb") as file:
            file.truncate(size)
            for offset in range(0, size, 8 * MIB):
                file.seek(offset)
                file.write(pattern(3 * MIB))
    mounted = mount(stack_of(kind, image, tmp_path, servers))
    disk = mounted.path / "vm"
    for _ in range(10):
        commands = [random_command(draw, size) for _ in range(100)]
        qemu_io(raw, *commands)
        qemu_io(disk, *commands)
        assert qemu_map(disk) == qemu_map(raw)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, disk)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", disk, tmp_path / "converted")
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, tmp_path / "converted")
    assert (tmp_path / "converted").stat().st_blocks <= raw.stat().st_blocks + 8
    mounted.umount()


# ---- a slow store


@pytest.mark.timeout(120)
def test_map_over_a_slow_server_asks_as_often_as_it_must_and_never_again(
    mount: Any, servers: Servers, tmp_path: Path
) -> None:
    need("qemu-io")
    image, log = tmp_path / "image.raw", tmp_path / "calls.log"
    draw = random.Random(1)
    with image.open("wb") as file:
        file.truncate(16 << 30)
        for _ in range(200):
            file.seek(draw.randrange(16 << 14) << 16)
            file.write(pattern(65536))
    truth = qemu_map(image)
    uri, _ = servers.nbdkit(
        "-r", "--filter=log", "--filter=delay", "file", image, f"logfile={log}", "delay-extents=100ms"
    )
    config = {
        "pools": {"node": {"path": str(tmp_path / "pool"), "quota": "64MiB"}},
        "images": {"i": {"layers": [{"cache": {"pool": "node"}}, "extents"], "backend": {"nbd": {"uri": uri}}}},
        "disks": {"vm": {"layers": ["cow"], "image": "i"}},
    }
    mounted = mount(config)
    assert qemu_map(mounted.path / "vm") == truth
    # The length of a question has 32 bits: no client can do with less than 5, nbdkit's own filter needs 8.
    assert questions(log) <= 5
    before = questions(log)
    assert qemu_map(mounted.path / "vm") == truth
    mounted.umount()
    mounted = mount(config)
    assert qemu_map(mounted.path / "vm") == truth
    assert questions(log) == before
    mounted.umount()


# ---- everything at once


@contextmanager
def threads(*bodies: Callable[[], None]) -> Iterator[None]:
    """Run *bodies* beside the block; what one of them raises is raised at its end."""
    problems: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as exc:
            problems.append(exc)

    started = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in started:
        thread.start()
    try:
        yield
    finally:
        for thread in started:
            thread.join()
    for problem in problems:
        raise problem


@pytest.mark.parametrize("kind", ["file", "overlaid", "cached-through"])
def test_what_the_mounted_file_calls_a_hole_is_zeros_beside_writers(
    mount: Any, servers: Servers, image: Path, tmp_path: Path, kind: str
) -> None:
    """Unless somebody began to write there before it was asked, or before it was read."""
    mounted = mount(stack_of(kind, image, tmp_path, servers))
    disk = str(mounted.path / "vm")
    blocks = 4 * MIB // 4096
    begun, ended = [0] * blocks, [0] * blocks
    is_over = threading.Event()

    def change(seed: int) -> None:
        draw = random.Random(seed)
        descriptor = os.open(disk, os.O_RDWR)
        data = b"\x21" * 4096
        mine = range(seed, blocks, 3)  # each block has one writer
        try:
            for _ in range(1500):
                block = draw.choice(mine)
                begun[block] += 1
                if draw.random() < 0.5:
                    os.pwrite(descriptor, data, block * 4096)
                else:
                    fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, block * 4096, 4096)
                ended[block] += 1
        finally:
            os.close(descriptor)

    checked = 0

    def look() -> None:
        nonlocal checked
        draw = random.Random(9)
        descriptor = os.open(disk, os.O_RDONLY)
        try:
            while not is_over.is_set():
                at = draw.randrange(blocks)
                before, quiet = begun[:], [begun[block] == ended[block] for block in range(blocks)]
                hole = os.lseek(descriptor, at * 4096, os.SEEK_HOLE) // 4096
                if hole >= blocks:
                    continue
                try:
                    end = os.lseek(descriptor, hole * 4096, os.SEEK_DATA) // 4096
                except OSError:
                    end = blocks
                content = os.pread(descriptor, (end - hole) * 4096, hole * 4096)
                for block in range(hole, end):
                    if quiet[block] and begun[block] == before[block]:
                        piece = content[(block - hole) * 4096 :][:4096]
                        assert piece.count(0) == 4096, f"block {block} was called a hole"
                        checked += 1
        finally:
            os.close(descriptor)

    with threads(look):
        try:
            with threads(*[lambda seed=seed: change(seed) for seed in range(3)]):
                pass
        finally:
            is_over.set()
    assert checked
    mounted.umount()


# ---- discards from the host


@pytest.mark.parametrize("kind", ["plain", "overlaid", "nbd", "cached-through"])
@pytest.mark.parametrize("how", [(), ("-z",)], ids=["discard", "zeroout"])
def test_blkdiscard_of_a_loop_device_gives_the_space_back(
    mount: Any, servers: Servers, tmp_path: Path, kind: str, how: tuple[str, ...], wait_until: Callable[..., Any]
) -> None:
    need("blkdiscard")
    image = tmp_path / "image.raw"
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    mounted = mount(stack_of(kind, image, tmp_path, servers))
    disk = mounted.path / "vm"
    with disk.open("r+b", buffering=0) as file:
        for at in range(0, 32 * MIB, MIB):
            os.pwrite(file.fileno(), pattern(MIB), at)
    store = tmp_path / "state" / "overlays" / "vm" / "data" if kind == "overlaid" else image
    assert store.stat().st_blocks * 512 >= 32 * MIB
    with loop_device(disk) as device:
        run("blkdiscard", *how, "-o", "8M", "-l", "16M", device)
    assert [(one["start"], one["length"]) for one in qemu_map(disk) if one["zero"]] == [(8 * MIB, 16 * MIB)]
    with disk.open("rb", buffering=0) as file:  # after the map: ext4 calls zeros data that somebody has read
        content = file.read()
    assert content == pattern(MIB) * 8 + bytes(16 * MIB) + pattern(MIB) * 8
    if not how or kind == "overlaid":
        wait_until(lambda: store.stat().st_blocks * 512 <= 16 * MIB + 65536, "the space of what was discarded")
    mounted.umount()
