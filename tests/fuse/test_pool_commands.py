"""`cachefs pool` and `cachefs warm`: over pools that a real mount has filled, or will use."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cachefs.units import parse_size

pytestmark = pytest.mark.slow  # each starts a daemon, or some commands

ROOT = Path(__file__).parents[2]
FAULTY = (str(Path(__file__).with_name("faulty.py")),)
MIB = 1 << 20
BLOCK = 64 << 10
SIZE = 8 * MIB + 1000  # the last block is a short one
COUNTS = re.compile(r"(\w+) of \w+: (\w+) fetched, (\w+) skipped \(were there\)(?:, (\w+) zeros)?(?:, (\w+) FAILED)?$")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Random bytes, but for a hole in the second MiB."""
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.write(os.urandom(MIB))
        file.seek(2 * MIB)
        file.write(os.urandom(SIZE - 2 * MIB))
    return path


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return tmp_path / "pool"


@pytest.fixture
def config(image: Path, pool: Path, mount: Any) -> Path:
    return configuration(mount, image, pool)


def configuration(mount: Any, image: Path, pool: Path, *below: Any, **keys: Any) -> Path:
    layers = [{"cache": {"pool": "node"}}, *below]
    pools = {"node": {"path": str(pool), "quota": "64MiB", **keys}}
    images = {"img": {"layers": layers, "backend": {"file": {"path": str(image)}}}}
    disks = {"golden": {"image": "img"}, "vm1": {"layers": ["cow"], "image": "img"}}
    found: Path = mount.write({"pools": pools, "images": images, "disks": disks})
    return found


def data_of(pool: Path) -> Path:
    (found,) = pool.glob("images/*/data")
    return found


def fill(mount: Any, config: Path, image: Path) -> None:
    mounted = mount(config)
    assert (mounted.path / "golden").read_bytes() == image.read_bytes()
    mounted.umount()


def counts(done: Any) -> dict[str, int]:
    """What `warm` said that it did, in bytes."""
    match = COUNTS.search(done.stdout.strip())
    assert match is not None, done
    names = ("done", "fetched", "skipped", "zeros", "failed")
    return {name: parse_size(text or 0) for name, text in zip(names, match.groups(), strict=True)}


def one_sentence(done: Any) -> str:
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    return str(done.stderr)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


# ---- pool


def test_what_a_mount_has_read_is_listed_and_verified(
    mount: Any, cachefs: Any, config: Path, image: Path, pool: Path
) -> None:
    assert "is not there yet" in cachefs("pool", "ls", config).stdout
    fill(mount, config, image)
    done = cachefs("pool", "ls", config, "node")
    assert (done.returncode, done.stderr) == (0, "")
    first, titles, line = done.stdout.splitlines()
    assert re.fullmatch(rf"node: {pool}: [67]\.?\d* MiB of 64MiB on disk \(1\d\.\d %\), 1 image", first)
    assert titles.split() == ["image", "id", "size", "held", "of", "it", "on", "disk"]
    digest = data_of(pool).parent.name[:12]
    assert re.match(rf"img +{digest} +{SIZE} +7 MiB +100\.0 % +7\.0\d MiB", line)
    done = cachefs("pool", "verify", config, "node")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "node: 113 blocks (7 MiB) read; 0 wrong\n"


def test_a_flipped_byte_is_found_and_forgotten(mount: Any, cachefs: Any, config: Path, image: Path, pool: Path) -> None:
    fill(mount, config, image)
    flip(data_of(pool), 3 * MIB + 5)
    flip(data_of(pool), SIZE - 1)
    before = (data_of(pool).read_bytes(), (data_of(pool).parent / "map").read_bytes())
    done = cachefs("pool", "verify", "--dry-run", config, "node", "img")
    assert done.returncode == 1
    assert done.stdout == "node: 113 blocks (7 MiB) read; 2 wrong, as they were\n"
    said = done.stderr.splitlines()
    assert [re.sub(r"\(\w+\)", "(id)", line) for line in said] == [
        f"img (id): the block at {offset} disagrees with its checksum" for offset in (3 * MIB, 8 * MIB)
    ]
    assert before == (data_of(pool).read_bytes(), (data_of(pool).parent / "map").read_bytes())
    done = cachefs("pool", "verify", config, "node")
    assert (done.returncode, done.stderr.splitlines()) == (1, said)
    assert "2 wrong, forgotten" in done.stdout
    assert (pool / "clean").exists()
    done = cachefs("pool", "verify", config, "node")
    assert (done.returncode, done.stdout) == (0, "node: 111 blocks (6.94 MiB) read; 0 wrong\n")
    mounted = mount(config)  # nothing alarming in its log: it knows of no damage any more
    assert (mounted.path / "golden").read_bytes() == image.read_bytes()
    assert mounted.layer("golden")["fetched_bytes"] == BLOCK + 1000
    assert mounted.layer("golden")["corrupt_blocks"] == 0
    mounted.umount()
    assert cachefs("pool", "verify", config, "node").stdout == "node: 113 blocks (7 MiB) read; 0 wrong\n"


def test_zeros_in_place_of_a_block_are_wrong_only_in_a_pool_that_was_closed(
    mount: Any, cachefs: Any, config: Path, image: Path, pool: Path
) -> None:
    fill(mount, config, image)
    with data_of(pool).open("r+b") as file:
        file.seek(4 * MIB)
        file.write(bytes(BLOCK))
    done = cachefs("pool", "verify", "--dry-run", config, "node")
    assert done.returncode == 1
    assert f"the block at {4 * MIB} is gone: there are only zeros in its place" in done.stderr
    (pool / "clean").unlink()  # as after a crash: a block that never reached the disk is nobody's fault
    assert "it was not closed in order" in cachefs("pool", "ls", config).stdout
    done = cachefs("pool", "verify", config, "node")
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 wrong; 1 that a crash kept from the disk, forgotten too" in done.stdout
    assert not (pool / "clean").exists()
    assert "112 blocks" in cachefs("pool", "verify", config, "node").stdout


@pytest.mark.parametrize(("offset", "left"), [(4096 + 100, 69), (100, 0)], ids=["sector", "header"])
def test_a_damaged_map_costs_what_it_describes(
    mount: Any, cachefs: Any, config: Path, image: Path, pool: Path, offset: int, left: int
) -> None:
    fill(mount, config, image)
    flip(data_of(pool).parent / "map", offset)
    done = cachefs("pool", "verify", config, "node")
    assert done.returncode == 1
    assert "is damaged" in one_line(done.stderr)
    assert "1 wrong, forgotten" in done.stdout
    assert (pool / "clean").exists() is (
        left == 0
    )  # what a lost sector described is still in the file, and to be found
    done = cachefs("pool", "verify", config, "node")
    assert done.returncode == 0
    assert done.stdout.startswith(f"node: {left} blocks")
    fill(mount, config, image)
    assert "113 blocks" in cachefs("pool", "verify", config, "node").stdout


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text


def test_drop_asks_and_deletes(mount: Any, cachefs: Any, config: Path, image: Path, pool: Path) -> None:
    fill(mount, config, image)
    done = cachefs("pool", "drop", config, "node", "img", input="n\n")
    assert done.returncode == 1
    assert re.match(r"img \(\w{12}\), 7\.0\d MiB\nDelete it\?", done.stdout)
    assert data_of(pool).exists()
    done = cachefs("pool", "drop", config, "node", data_of(pool).parent.name[:4], input="y\n")
    assert done.returncode == 0
    assert done.stdout.endswith("node: 1 image deleted\n")
    assert list(pool.glob("images/*")) == []
    fill(mount, config, image)
    done = cachefs("pool", "drop", "--yes", config, "node")
    assert done.stdout.endswith("node: 1 image deleted\n")
    assert cachefs("pool", "drop", config, "node").stdout == "node: 0 images deleted\n"
    assert cachefs("pool", "ls", config).stdout.count("\n") == 1


def test_names_that_there_are_not(mount: Any, cachefs: Any, config: Path, image: Path) -> None:
    done = cachefs("pool", "verify", config, "node")
    assert (done.returncode, "there is no pool node yet" in one_sentence(done)) == (3, True)
    fill(mount, config, image)
    done = cachefs("pool", "ls", config, "nod")
    assert (done.returncode, "has no pool 'nod'; it has node" in one_sentence(done)) == (1, True)
    done = cachefs("pool", "drop", config, "node", "imag")
    assert (done.returncode, "has no image 'imag'; there is img" in one_sentence(done)) == (1, True)
    done = cachefs("warm", config, "imag")
    assert (done.returncode, "has no image 'imag'; there is img" in one_sentence(done)) == (1, True)


@pytest.mark.parametrize(
    "command", [("pool", "ls"), ("pool", "verify", "node"), ("pool", "drop", "--yes", "node"), ("warm", "img")]
)
def test_a_pool_in_use_is_left_alone(mount: Any, cachefs: Any, config: Path, command: tuple[str, ...]) -> None:
    mounted = mount(config)
    words, name = command[: 1 if command[0] == "warm" else 2], command[-1]
    options = [word for word in command if word.startswith("-")]
    done = cachefs(*words, *options, config, *([name] if name != "ls" else []))
    assert done.returncode == 3
    said = one_sentence(done)
    assert f"is in use by pool node of cachefs, pid {mounted.pid}; " in said
    assert ("dd if=MOUNTPOINT/golden" if command[0] == "warm" else "`cachefs umount`") in said
    assert mounted.layer("golden")["bypass"] == "no"


def test_status_shows_the_pool(mount: Any, cachefs: Any, config: Path) -> None:
    mounted = mount(config)
    for _ in range(4):
        (mounted.path / "golden").read_bytes()
    lines = cachefs("status", mounted.path).stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("pool "))
    assert lines[at].split() == ["pool", "used", "quota", "full", "images", "hits"]
    assert re.fullmatch(r"node +7\.\d+ MiB +64MiB +11\.\d % +1 +\d\d\.\d %", lines[at + 1].rstrip())
    assert any(re.match(r"golden +cache +serving", line) for line in lines)
    pool = mounted.status()["daemon"]["pools"]["node"]
    text = (ROOT / "docs" / "layers" / "cache.md").read_text()
    every_layer = mounted.layer("golden", 1)
    keys = [*pool, *(key for key in mounted.layer("golden") if key not in every_layer)]
    assert [key for key in keys if f"`{key}`" not in text] == []


# ---- warm


def test_what_was_warmed_is_not_fetched_by_a_mount(
    mount: Any, cachefs: Any, config: Path, image: Path, pool: Path
) -> None:
    done = cachefs("warm", config, "img")
    assert (done.returncode, done.stderr) == (0, "")
    assert counts(done) == {"done": SIZE, "fetched": SIZE - MIB, "skipped": 0, "zeros": MIB, "failed": 0}
    assert cachefs("pool", "verify", config, "node").stdout == "node: 113 blocks (7 MiB) read; 0 wrong\n"
    mounted = mount(config)
    assert (mounted.path / "vm1").read_bytes() == image.read_bytes()
    assert mounted.layer("golden")["fetched_bytes"] == 0
    mounted.umount()
    again = counts(cachefs("warm", config, "vm1"))  # a disk stands for the image below it
    assert (again["fetched"], again["skipped"], again["done"]) == (0, SIZE, SIZE)


@pytest.mark.parametrize(
    ("text", "fetched"),
    [("2MiB-3MiB", MIB), ("3MiB+64KiB", BLOCK), ("8MiB-", 1000), ("-64KiB", BLOCK), ("3000001-3000002", BLOCK)],
)
def test_a_range_is_warmed_in_whole_blocks(cachefs: Any, config: Path, text: str, fetched: int) -> None:
    done = cachefs("warm", f"--range={text}", config, "img")
    assert (done.returncode, done.stderr) == (0, "")
    assert (counts(done)["fetched"], counts(done)["done"]) == (fetched, fetched)


def test_warm_that_is_interrupted_goes_on_where_it_stopped(
    cachefs: Any, config: Path, pool: Path, wait_until: Any
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cachefs", "warm", "--rate", "4MiB/s", str(config), "img"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: [p for p in pool.glob("images/*/data") if p.stat().st_blocks > 0], "something is installed")
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1
    assert stderr == "interrupted; the same command goes on from here\n"
    first = counts(subprocess.CompletedProcess([], 1, stdout, stderr))
    assert 0 < first["fetched"] < SIZE - MIB
    assert "0 wrong" in cachefs("pool", "verify", config, "node").stdout
    assert (pool / "clean").exists()
    second = counts(cachefs("warm", config, "img"))
    assert first["fetched"] + second["fetched"] == SIZE - MIB  # nothing twice
    assert second["skipped"] == first["fetched"] + first["zeros"]
    assert counts(cachefs("warm", config, "img"))["fetched"] == 0


def test_warm_reads_no_faster_than_its_rate(cachefs: Any, config: Path) -> None:
    started = time.monotonic()
    done = cachefs("warm", "--range=0+512KiB", "--rate=256KiB/s", config, "img")
    assert counts(done)["fetched"] == 8 * BLOCK
    assert time.monotonic() - started >= 2


def on_a_terminal(*arguments: object) -> str:
    """What a command shows on a terminal of 150 columns while it runs."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "cachefs", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "150", "TERM": "xterm"},
            stdout=subprocess.DEVNULL,
            stderr=theirs,
        )
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while part := os.read(ours, 65536):
                shown += part
        assert process.wait(30) == 0
    finally:
        os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_progress_is_shown_on_a_terminal(cachefs: Any, config: Path) -> None:
    assert cachefs("warm", "--range=0+128KiB", config, "img").returncode == 0
    shown = on_a_terminal("warm", "--rate", "8MiB/s", config, "img")
    assert re.search(
        r"img [^\r\n]+ +\d+ % [\d.]+ [KM]iB of 8 MiB, [\d.]+ [KM]iB fetched at [\d.]+ [KM]iB/s, 128 KiB skipped left \d\d:\d\d",
        shown,
    ), shown
    shown = on_a_terminal("pool", "verify", config, "node")
    assert re.search(r"img [^\r\n]+ 100 % 7\.?\d* MiB of 7\.?\d* MiB, [\d.]+ [KMG]iB/s left", shown), shown


def test_errors_of_a_part_leave_the_rest_to_be_warmed(mount: Any, cachefs: Any, image: Path, pool: Path) -> None:
    bad = configuration(mount, image, pool, {"faulty": {"rules": [f"read {3 * MIB} CachefsError"]}})
    done = cachefs("warm", bad, "img", program=FAULTY)
    assert done.returncode == 1
    assert one_line(done.stderr) == f"img: {3 * MIB}+{MIB}: faulty: on demand\n"
    found = counts(done)
    assert (found["failed"], found["fetched"], found["done"]) == (MIB, SIZE - 2 * MIB, SIZE)
    assert counts(cachefs("warm", configuration(mount, image, pool), "img"))["fetched"] == MIB


@pytest.mark.parametrize("evict", ["sieve", "never"])
def test_warm_ends_when_the_pool_is_too_small(mount: Any, cachefs: Any, image: Path, pool: Path, evict: str) -> None:
    image.write_bytes(os.urandom(40 * MIB))
    config = configuration(mount, image, pool, quota="16MiB", evict=evict)
    done = cachefs("warm", config, "img")
    assert done.returncode == 1
    assert "ended early: the pool node is too small for it (quota 16MiB)" in one_line(done.stderr)
    assert counts(done)["fetched"] < 30 * MIB
    assert sum(path.stat().st_blocks * 512 for path in pool.rglob("*")) <= 16 * MIB


def test_what_is_warmed_takes_the_place_of_what_nobody_asked_for(
    mount: Any, cachefs: Any, image: Path, pool: Path, tmp_path: Path
) -> None:
    """A pool that is full puts newcomers on probation, in a twentieth of it; not those of `warm`."""
    image.write_bytes(os.urandom(20 * MIB))
    assert cachefs("warm", configuration(mount, image, pool, quota="16MiB"), "img").returncode == 1
    other = tmp_path / "other.raw"
    other.write_bytes(os.urandom(8 * MIB))
    pools = {"node": {"path": str(pool), "quota": "16MiB"}}
    images = {"other": {"layers": [{"cache": {"pool": "node"}}], "backend": {"file": {"path": str(other)}}}}
    config = mount.write({"pools": pools, "images": images, "disks": {"golden": {"image": "other"}}})
    done = cachefs("warm", config, "other")
    assert (done.returncode, done.stderr) == (0, "")
    mounted = mount(config)
    assert (mounted.path / "golden").read_bytes() == other.read_bytes()
    assert mounted.layer("golden")["fetched_bytes"] == 0


@pytest.mark.parametrize(
    ("disk", "says"),
    [
        ({"image": "plain"}, "has no cache to warm"),
        ({"layers": [{"cache": {"pool": "node"}}], "backend": {"memory": {"size": MIB}}}, "lies over memory"),
        (
            {"layers": [{"cache": {"pool": "node", "mode": "write-through"}}], "backend": {"memory": {"size": MIB}}},
            "is written through its cache",
        ),
    ],
    ids=["no-cache", "memory", "write-through"],
)
def test_what_cannot_be_warmed_says_so(
    mount: Any, cachefs: Any, image: Path, pool: Path, disk: dict[str, Any], says: str
) -> None:
    pools = {"node": {"path": str(pool), "quota": "16MiB"}}
    images = {"plain": {"backend": {"file": {"path": str(image)}}}}
    done = cachefs("warm", mount.write({"pools": pools, "images": images, "disks": {"d": disk}}), "d")
    assert done.returncode == 1
    assert says in one_sentence(done)


@pytest.mark.parametrize(
    ("option", "code", "says"),
    [
        ("--range=1MiB", 2, "is not a range: write START-END"),
        ("--range=1MB-2MB", 2, "write 1MiB"),
        ("--rate=50MiB", 2, "is not a rate: write a size per second, such as 50MiB/s"),
        ("--rate=0/s", 2, "never end"),
        ("--range=2MiB-1MiB", 1, "is empty"),
        ("--range=0-1GiB", 1, f"the image at {SIZE}"),
    ],
)
def test_options_that_make_no_sense(cachefs: Any, config: Path, option: str, code: int, says: str) -> None:
    done = cachefs("warm", option, config, "img")
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
