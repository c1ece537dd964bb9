"""The cache through real mounts: what it fetches, what it keeps, what it uses of a disk, and that its faults cost no read."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checked_reader import contents
from loopmounts import fresh_file_system
from test_faults import Opened
from test_io import run
from test_lost_file_system import shut_down

from cachefs.pool.account import FIXED_BYTES, Account
from cachefs.pool.evict import Sieve
from cachefs.pool.image import WINDOW_SHARE
from cachefs.pool.pool import POOL_IMAGE
from cachefs.pool.readahead import ReadAhead
from cachefs.pool.summap import State, SumMap, working_size
from cachefs.store.localfile import LocalFile
from cachefs.store.mapfile import load_sectors, read_header

pytestmark = pytest.mark.slow  # each starts a daemon of its own

MIB = 1 << 20
BLOCK = 64 << 10
PAGE = 4096
WATCHED = (str(Path(__file__).with_name("watched.py")),)
READER = Path(__file__).with_name("checked_reader.py")
SERVED_FROM_BELOW = "(reading|writing) the cache failed: .*; served from below"


def make_image(path: Path, size: int) -> Path:
    """Each 4 KiB holds its number."""
    with path.open("wb") as file:
        for offset in range(0, size, MIB):
            file.write(contents(offset // PAGE, MIB // PAGE))
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "image.raw", 32 * MIB)


def cached(
    image: Path, pool: Path, *, disks: int = 1, quota: str = "64MiB", below: dict[str, Any] | None = None, **keys: Any
) -> dict[str, Any]:
    """Disks vm1, vm2, ... over *image* and one cache; what comes and goes is written into a log beside the image.

    No stall of a busy test machine counts as a fault. below: options of what is `watched` below the cache.
    """
    log = str(image.with_suffix(".log"))
    layers = [
        {"watched": {"log": log}},
        {"cache": {"pool": "node"}},
        {"watched": {"log": log, "word": "f", **(below or {})}},
    ]
    return {
        "pools": {"node": {"path": str(pool), "quota": quota, "cache_timeout": "10s", **keys}},
        "images": {"img": {"layers": layers, "backend": {"file": {"path": str(image)}}}},
        "disks": {f"vm{number + 1}": {"layers": ["cow"], "image": "img"} for number in range(disks)},
    }


def layer(mounted: Any, name: str, disk: str = "vm1") -> Any:
    """Statistics of the cache, or of another layer of the disk: file is what the cache has asked for."""
    return next(one for one in mounted.status(disk)["disk"]["layers"] if one["layer"].endswith(f"/{name}"))


def fetched(mounted: Any) -> int:
    """Bytes that were read from the backing store since the mount."""
    return int(layer(mounted, "file")["read_bytes"])


def check(path: Path, start: int, end: int, step: int = 128 << 10) -> None:
    """Read the range in order, and compare."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for offset in range(start, end, step):
            length = min(step, end - offset)
            assert os.pread(descriptor, length, offset) == contents(offset // PAGE, length // PAGE), offset
    finally:
        os.close(descriptor)


def all_installed(mounted: Any, wait_until: Callable[..., Any]) -> None:
    wait_until(lambda: mounted.status()["daemon"]["pools"]["node"]["backlog_bytes"] == 0, "nothing waits to be kept")


def used_on_disk(folder: Path) -> int:
    """As `du` counts."""
    found = 0
    for parent, _, names in os.walk(folder):
        for path in (parent, *(os.path.join(parent, name) for name in names)):
            with contextlib.suppress(FileNotFoundError):
                found += os.lstat(path).st_blocks * 512
    return found


# ---- the quota, and what is kept below it


@contextlib.contextmanager
def watching_use_of(folder: Path) -> Iterator[list[int]]:
    """What the folder uses, asked every 50 ms."""
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            seen.append(used_on_disk(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


class Simulation:
    """A cache that needs no time, under cachefs' own eviction, read-ahead and accounts. kept: blocks it begins with."""

    def __init__(self, size: int, quota: int, kept: list[int]) -> None:
        self.account = Account(quota)
        self.policy = Sieve(self.account.limit // BLOCK)
        self.blocks = self.policy.add_image(size // BLOCK)
        self.ahead = ReadAhead(size, BLOCK, max_window=self.account.limit // WINDOW_SHARE)
        self.blocks.on_used = self.ahead.used
        self.account.add(FIXED_BYTES + size // BLOCK * 512 // 60)  # all pages of the map
        for block in kept:
            self.policy.adopt(self.blocks, block, block + 1)
            self.account.add(BLOCK)

    def read(self, offset: int, length: int) -> int:
        """How many blocks are fetched for it."""
        asked = range(offset // BLOCK, -(-(offset + length) // BLOCK))
        missing = [block for block in asked if not self._has(block)]
        if not missing and self.blocks.is_settled(asked.start, asked.stop):
            return 0
        plan = self.ahead.read(offset, length, missed=bool(missing))
        for block in asked:
            if self._has(block):
                self.blocks.touch(block, block + 1, plan.run)
        until = -(-(offset + length + plan.ahead) // BLOCK)
        more = [block for block in range(asked.stop, until) if not self._has(block)]
        self.ahead.fetched(plan.run, len(missing) * BLOCK, len(more) * BLOCK)
        for block in (*missing, *more):
            assert self.account.take(BLOCK)
            if self.account.wants_room:
                self._evict()
            self.policy.insert(self.blocks.base | block, plan.run, sequential=plan.sequential, prefetched=block in more)
        return len(missing) + len(more)

    def _has(self, block: int) -> bool:
        return self.policy.is_cached(self.blocks.base | block)

    def _evict(self) -> None:
        while not self.account.has_enough:
            wanted = -(-(self.account.enough_free - self.account.free) // BLOCK)
            for victim in self.policy.victims(min(64, wanted), lambda key: False):
                self.policy.forget(victim)
                self.account.give_back(BLOCK)


def kept_blocks(pool: Path, size: int) -> list[int]:
    """What a mount finds after a kill: blocks of which map and data file both know. None, where there is no pool yet."""
    for folder in (pool / "images").glob("*"):
        header = read_header(folder, POOL_IMAGE)
        count = size // BLOCK
        known = SumMap(memoryview(bytearray(working_size(count))), count)
        with open(folder / "map", "rb") as map_file, open(folder / "data", "rb") as data:
            load_sectors(
                LocalFile(map_file.fileno(), os.fstat(map_file.fileno()).st_size),
                header,
                partial(known.load, where=""),
            )
            extents = LocalFile(data.fileno(), size).extents_now(0, size, count)
        there = {
            block
            for extent in extents
            if extent.kind.name == "DATA"
            for block in range(extent.offset // BLOCK, extent.end // BLOCK)
        }
        return [block for block in sorted(there) if known.state(block) is State.DATA]
    return []


QUOTA = 64 * MIB
LARGE = 512 * MIB
KILLS = 3
READERS = ("skewed", "skewed", "skewed", "random")
STORE_S = 0.008  # a store that is as fast as memory outruns the installs, and what waits in memory is a cache too
READS = 1000  # of each reader in the last round; it is killed after that many of each in the others


@pytest.fixture(scope="module")
def large_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("large") / "image.raw", LARGE)


@pytest.fixture(params=["here", "ext4"])
def pool_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where a pool may be, on a file system of its own or not. Named before `mount`."""
    if request.param == "here":
        yield tmp_path / "pool"
    else:
        with fresh_file_system("ext4", tmp_path / "own") as (root, _):
            yield root / "pool"


def test_a_full_cache_stays_below_its_quota_and_hits_as_often_as_its_simulation(
    pool_folder: Path, mount: Any, large_image: Path, tmp_path: Path, wait_until: Any
) -> None:
    """The requests that reached the cache, in the order in which they did, are in the log, and the fetches as well. The
    simulation is fed with the same requests; where the daemon was killed it begins anew, with the blocks that the dead one
    left in its map and its file. Compared is the share of the looked up blocks that was not fetched.
    """
    log = large_image.with_suffix(".log")
    log.write_bytes(b"")
    config = cached(large_image, pool_folder, quota="64MiB", below={"delay_s": STORE_S})
    kept: list[list[int]] = []
    ends: list[int] = []  # of the rounds, in the log
    with watching_use_of(pool_folder) as used:
        for number in range(KILLS + 1):
            kept.append(kept_blocks(pool_folder, LARGE))
            mounted = mount(config, program=WATCHED)
            is_last = number == KILLS
            most = READS if is_last else 1 << 30
            readers = [
                subprocess.Popen(
                    [sys.executable, READER, mounted.path / "vm1", kind, str(100 * number + seed), str(most)],
                    stdout=subprocess.PIPE,
                )
                for seed, kind in enumerate(READERS)
            ]
            if not is_last:
                enough = log.read_bytes().count(b"r") + READS * len(READERS)
                wait_until(lambda enough=enough: log.read_bytes().count(b"r") >= enough, "a load", timeout=60)
                mounted.kill()
            right = [int(reader.communicate(timeout=60)[0]) for reader in readers]
            assert [reader.returncode for reader in readers] == [0] * len(readers)
            assert min(right) > READS // 4
            ends.append(len(log.read_bytes().splitlines()))
        assert layer(mounted, "cache")["bypass"] == "no"
        assert layer(mounted, "cache")["evicted_blocks"] > 500
        assert layer(mounted, "cache")["corrupt_blocks"] == 0
        mounted.umount()
    assert len(used) > 50
    assert QUOTA * 0.9 < max(used) <= QUOTA
    assert used_on_disk(pool_folder) <= QUOTA

    touched = really = simulated = 0
    lines = log.read_text().splitlines()
    for start, end, there in zip([0, *ends], ends, kept, strict=False):
        simulation = Simulation(LARGE, QUOTA, there)
        for line in lines[start:end]:
            word, offset, length = line.split()
            if word == "f":
                really += int(length) // BLOCK
            else:
                touched += -(-(int(offset) + int(length)) // BLOCK) - int(offset) // BLOCK
                simulated += simulation.read(int(offset), int(length))
    hits, hits_then = 1 - really / touched, 1 - simulated / touched
    print(f"{touched} blocks looked up; hit ratio {hits:.4f}, of the simulation {hits_then:.4f}")
    assert hits_then > 0.3
    assert abs(hits - hits_then) <= 0.05 * hits_then


def test_the_boot_set_survives_a_scan_of_ten_times_the_quota(
    mount: Any, large_image: Path, tmp_path: Path, wait_until: Any
) -> None:
    mounted = mount(cached(large_image, tmp_path / "pool", quota="16MiB"), program=WATCHED)
    disk = mounted.path / "vm1"
    boot = (0, 8 * MIB)
    check(disk, *boot)
    all_installed(mounted, wait_until)
    check(disk, 64 * MIB, 224 * MIB)
    all_installed(mounted, wait_until)
    assert layer(mounted, "cache")["evicted_blocks"] > 1000
    before = fetched(mounted)
    assert before <= 1.05 * 168 * MIB  # what was read ahead was there when the reader came
    check(disk, *boot)
    assert fetched(mounted) - before <= 0.1 * 8 * MIB


def test_evict_never_keeps_what_came_first_and_serves_the_rest_from_below(
    mount: Any, image: Path, tmp_path: Path, wait_until: Any
) -> None:
    mounted = mount(cached(image, tmp_path / "pool", quota="16MiB", evict="never"), program=WATCHED)
    with watching_use_of(tmp_path / "pool") as used:
        check(mounted.path / "vm1", 0, 32 * MIB)
        all_installed(mounted, wait_until)
        first = layer(mounted, "cache")
        assert 14 * MIB <= first["held_blocks"] * BLOCK <= 16 * MIB
        before = fetched(mounted)
        check(mounted.path / "vm1", 0, 32 * MIB, step=PAGE)  # no whole blocks are fetched that cannot be kept
    last = layer(mounted, "cache")
    assert max(used) <= 16 * MIB
    assert last["evicted_blocks"] == 0
    assert last["held_blocks"] == first["held_blocks"]
    assert fetched(mounted) - before == 32 * MIB - first["held_blocks"] * BLOCK


# ---- one fetch for all


@pytest.mark.parametrize("shared", ["one-cache", "two-caches"])
def test_two_disks_that_wait_for_the_same_cold_block_cost_one_fetch(
    threads: ThreadPoolExecutor, mount: Any, opened: Opened, image: Path, tmp_path: Path, wait_until: Any, shared: str
) -> None:
    config = cached(image, tmp_path / "pool", disks=2, below={"held": True})
    if shared == "two-caches":
        lower = config.pop("images")["img"]
        config["disks"] = {
            name: {"layers": ["cow", *lower["layers"]], "backend": lower["backend"]} for name in ("vm1", "vm2")
        }
    mounted = mount(config, program=WATCHED)
    disks = [opened(mounted.path / name) for name in ("vm1", "vm2")]
    reads = [threads.submit(os.pread, disk, 2 * PAGE, 3 * BLOCK + PAGE) for disk in disks]
    wait_until(lambda: mounted.status()["daemon"]["waiting_requests"] == 2, "both wait")
    log = image.with_suffix(".log")
    wait_until(lambda: log.read_bytes().count(b"r") == 2, "both have reached the cache")
    assert not any(read.done() for read in reads)
    mounted.process.send_signal(signal.SIGUSR1)
    assert [read.result(15) for read in reads] == [contents(3 * BLOCK // PAGE + 1, 2)] * 2
    fetches = [line for line in log.read_text().splitlines() if line.startswith("f")]
    # what was read ahead may be part of it
    assert len([line for line in fetches if line.startswith(f"f {3 * BLOCK} ")]) == 1
    assert len(fetches) == len(set(fetches))


def test_eight_disks_that_read_a_whole_image_at_once_fetch_it_once(
    mount: Any, image: Path, tmp_path: Path, wait_until: Any
) -> None:
    mounted = mount(cached(image, tmp_path / "pool", disks=8), program=WATCHED)
    with ThreadPoolExecutor(8) as threads:
        reads = [threads.submit(check, mounted.path / f"vm{number}", 0, 32 * MIB) for number in range(1, 9)]
        for read in reads:
            read.result(60)
    assert fetched(mounted) == 32 * MIB
    wait_until(lambda: layer(mounted, "cache")["installed_blocks"] == 32 * MIB // BLOCK, "all of it is kept")


# ---- mounted again


def test_a_cache_is_warm_at_the_next_mount(mount: Any, image: Path, tmp_path: Path, wait_until: Any) -> None:
    config = cached(image, tmp_path / "pool")
    mounted = mount(config, program=WATCHED)
    check(mounted.path / "vm1", 0, 32 * MIB)
    all_installed(mounted, wait_until)
    mounted.umount()
    mounted = mount(config, program=WATCHED)
    check(mounted.path / "vm1", 0, 32 * MIB)
    assert fetched(mounted) == 0
    assert layer(mounted, "cache")["corrupt_blocks"] == 0


def test_after_a_kill_only_what_came_last_is_fetched_again(
    mount: Any, image: Path, tmp_path: Path, wait_until: Any
) -> None:
    pool = tmp_path / "pool"
    config = cached(image, pool)
    mounted = mount(config, program=WATCHED)
    check(mounted.path / "vm1", 0, 24 * MIB)
    all_installed(mounted, wait_until)
    read = set(range(24 * MIB // BLOCK))
    wait_until(lambda: read <= set(kept_blocks(pool, 32 * MIB)), "the map is written, which takes 5 s")
    check(mounted.path / "vm1", 24 * MIB, 28 * MIB)
    mounted.kill()
    mounted = mount(config, program=WATCHED)
    check(mounted.path / "vm1", 0, 24 * MIB)
    assert fetched(mounted) == 0
    check(mounted.path / "vm1", 24 * MIB, 32 * MIB)
    assert fetched(mounted) <= 8 * MIB
    assert layer(mounted, "cache")["corrupt_blocks"] == 0
    assert used_on_disk(pool) <= QUOTA


@pytest.mark.logs("the block at 1310720 disagrees with its checksum; it is fetched anew")
def test_a_flipped_byte_is_served_right_and_counted_and_healed(
    mount: Any, image: Path, tmp_path: Path, wait_until: Any
) -> None:
    config = cached(image, tmp_path / "pool")
    mounted = mount(config, program=WATCHED)
    check(mounted.path / "vm1", 0, 32 * MIB)
    all_installed(mounted, wait_until)
    mounted.umount()
    (data,) = (tmp_path / "pool" / "images").glob("*/data")
    with data.open("r+b") as file:
        file.seek(20 * BLOCK + 12345)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))

    mounted = mount(config, program=WATCHED)
    check(mounted.path / "vm1", 0, 32 * MIB)
    all_installed(mounted, wait_until)
    assert layer(mounted, "cache")["corrupt_blocks"] == 1
    assert layer(mounted, "cache")["installed_blocks"] == 1
    assert layer(mounted, "cache")["bypass"] == "no"
    mounted.umount()

    mounted = mount(config, program=WATCHED)
    check(mounted.path / "vm1", 0, 32 * MIB)
    assert layer(mounted, "cache")["corrupt_blocks"] == 0
    assert fetched(mounted) == 0


# ---- faults of the pool's file system


@dataclass(frozen=True)
class Small:
    """A file system without room. more: makes room."""

    root: Path
    more: Callable[[], Any]


@pytest.fixture(params=["tmpfs", "ext4"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Small]:
    """A file system with room for less than 8 MiB. Named before `mount`."""
    if os.getuid() != 0:
        pytest.skip("only root can mount a file system")
    if request.param == "ext4":
        with fresh_file_system("ext4", tmp_path / "own") as (root, _):
            filler = root / "filler"
            status = os.statvfs(root)
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - 8 * MIB)
            yield Small(root, filler.unlink)
    else:
        root = tmp_path / "small"
        root.mkdir()
        run("mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", root)
        try:
            yield Small(root, lambda: run("mount", "-o", "remount,size=100M", root))
        finally:
            run("umount", root)


@pytest.mark.logs(SERVED_FROM_BELOW)
def test_a_full_file_system_below_the_pool_costs_no_read_and_heals(
    small: Small, mount: Any, image: Path, tmp_path: Path, wait_until: Any
) -> None:
    mounted = mount(cached(image, small.root / "pool"), program=WATCHED)
    disk = mounted.path / "vm1"
    check(disk, 0, 32 * MIB)
    wait_until(lambda: layer(mounted, "cache")["bypass"] == "writing: No space left on device", "it says so")
    assert layer(mounted, "cache")["failures"] >= 1
    check(disk, 0, 32 * MIB)
    assert mounted.log().count("served from below for now") == 1

    small.more()

    def is_warm() -> bool:
        check(disk, 0, 32 * MIB)
        return bool(layer(mounted, "cache")["held_blocks"] == 32 * MIB // BLOCK)

    wait_until(is_warm, "it is tried again, and filled", timeout=30)
    all_installed(mounted, wait_until)
    assert layer(mounted, "cache")["bypass"] == "no"

    def is_all_there() -> bool:  # what has room may still lack its bytes, from the time when it could not be written
        before = fetched(mounted)
        check(disk, 0, 32 * MIB)
        return fetched(mounted) == before

    wait_until(is_all_there, "nothing is fetched any more", timeout=30)
    assert "writing the cache works again" in mounted.log()
    assert mounted.status()["daemon"]["request_errors"] == 0
    mounted.umount()


@pytest.fixture
def doomed(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    with fresh_file_system("ext4", tmp_path / "doomed") as (root, device):
        yield root, device


@pytest.mark.logs(SERVED_FROM_BELOW)
def test_a_pool_whose_file_system_fails_costs_no_read(
    doomed: tuple[Path, Path], mount: Any, image: Path, tmp_path: Path, wait_until: Any
) -> None:
    root, device = doomed
    config = cached(image, root / "pool")
    mounted = mount(config, program=WATCHED)
    disk = mounted.path / "vm1"
    check(disk, 0, 16 * MIB)
    all_installed(mounted, wait_until)
    mounted.umount()
    mounted = mount(config, program=WATCHED)
    check(disk := mounted.path / "vm1", 0, 8 * MIB)  # verified; what follows is not

    shut_down(root, device)
    check(disk, 0, 32 * MIB)
    wait_until(lambda: "reading: Input/output error" in layer(mounted, "cache")["bypass"], "it says so")
    for _ in range(3):
        check(disk, 0, 32 * MIB)
    assert mounted.status()["daemon"]["request_errors"] == 0
    mounted.umount()

    run("umount", root)
    run("mount", device, root)
    mounted = mount(config, program=WATCHED)
    check(mounted.path / "vm1", 0, 32 * MIB)
    assert layer(mounted, "cache")["bypass"] == "no"
    assert layer(mounted, "cache")["corrupt_blocks"] == 0
    all_installed(mounted, wait_until)
    mounted.umount()


@pytest.mark.logs(SERVED_FROM_BELOW)
def test_a_pool_that_hangs_costs_no_read_and_heals_when_it_goes_on(
    mount: Any, image: Path, tmp_path: Path, wait_until: Any
) -> None:
    mounted = mount(cached(image, tmp_path / "pool", cache_timeout="0.2s"), program=WATCHED)
    disk = mounted.path / "vm1"
    check(disk, 0, 8 * MIB)
    all_installed(mounted, wait_until)

    mounted.process.send_signal(signal.SIGUSR2)
    check(disk, 8 * MIB, 16 * MIB)  # nothing of it can be written
    wait_until(lambda: "writing: no answer in 0.2 s" in layer(mounted, "cache")["bypass"], "it says so")
    check(disk, 0, 32 * MIB)  # some of it cannot be read
    assert "reading: no answer in 0.2 s" in layer(mounted, "cache")["bypass"]
    hits = layer(mounted, "cache")["hits"]
    check(disk, 0, 32 * MIB)
    assert layer(mounted, "cache")["hits"] == hits
    assert mounted.status()["daemon"]["waiting_requests"] == 0

    mounted.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: "reading" not in layer(mounted, "cache")["bypass"], "reading is tried again", timeout=30)

    def is_warm() -> bool:
        check(disk, 0, 32 * MIB)
        return bool(layer(mounted, "cache")["held_blocks"] == 32 * MIB // BLOCK)

    wait_until(is_warm, "writing is tried again", timeout=30)
    all_installed(mounted, wait_until)
    assert layer(mounted, "cache")["bypass"] == "no"
    before = fetched(mounted)
    check(disk, 0, 32 * MIB)
    assert fetched(mounted) == before
    mounted.umount()


@pytest.mark.logs(SERVED_FROM_BELOW)
def test_a_pool_that_hangs_keeps_no_unmount_waiting(mount: Any, image: Path, tmp_path: Path, wait_until: Any) -> None:
    mounted = mount(cached(image, tmp_path / "pool", cache_timeout="0.2s"), program=WATCHED)
    mounted.process.send_signal(signal.SIGUSR2)
    check(mounted.path / "vm1", 0, 8 * MIB)
    wait_until(lambda: "writing: no answer" in layer(mounted, "cache")["bypass"], "it says so")
    mounted.umount()
