"""The mount outlives its daemon: killed and upgraded under load, below a supervisor and below a stand-in for PID 1."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from served import KEEPERS, ROOT, Served, is_gone, wait_for

from cachefs import mounts
from cachefs.store.localfile import KEEP_SIZE, PUNCH_HOLE, fallocate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

MIB = 1 << 20
IMAGE = 48 * MIB
SIZE = 24 * MIB


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "base.raw"
    path.write_bytes(random.Random(1).randbytes(IMAGE))
    return path


def disks(image: Path, folder: Path) -> dict[str, Any]:
    """vm1: an overlay; vm2: one over a cache that is too small, both past the page cache; vm3: written over NBD; vm4: gathered,
    then past the page cache; golden: what vm2 is over, to be read.
    """
    empty, remote, direct = folder / "empty.raw", folder / "remote.raw", folder / "direct.raw"
    for path in (empty, remote, direct):
        with path.open("wb") as file:
            file.truncate(SIZE)
    return {
        "pools": {"node": {"path": str(folder / "pool"), "quota": "16MiB", "direct": True}},
        "images": {"base": {"layers": [{"cache": {"pool": "node"}}], "backend": {"file": {"path": str(image)}}}},
        "disks": {
            "vm1": {"layers": [{"cow": {}}], "backend": {"file": {"path": str(empty)}}},
            "vm2": {"layers": [{"cow": {"direct": True}}], "image": "base"},
            "vm3": {"backend": {"nbd": {"command": ["nbdkit", "file", str(remote)], "on_failure": "hold"}}},
            "vm4": {
                "layers": [{"coalesce": {"cluster": "256KiB", "buffer": "8MiB"}}],
                "backend": {"file": {"path": str(direct), "direct": True}},
            },
            "golden": {"image": "base"},
        },
    }


def simple(folder: Path, *names: str) -> dict[str, Any]:
    found = {}
    for name in names or ("vm1",):
        path = folder / f"{name}.raw"
        path.write_bytes(b"base" * (MIB // 4))
        found[name] = {"layers": [{"cow": {}}], "backend": {"file": {"path": str(path)}}}
    return {"disks": found}


# ---- load


class Fio:
    """Writes of 512 bytes to 16 KiB, 16 at a time, never a sync; then everything is read and compared."""

    def __init__(self, disk: Path, folder: Path, seconds: float) -> None:
        if shutil.which("fio") is None:
            pytest.skip("fio is not installed")
        self._report = folder / f"fio-{disk.name}.json"
        command = [
            *("fio", "--name=v", f"--filename={disk}", "--rw=randwrite", "--bsrange=512-16k", "--blockalign=512"),
            *("--iodepth=16", "--direct=1", "--ioengine=libaio", f"--size={SIZE}", "--verify=crc32c", "--do_verify=1"),
            *("--verify_fatal=1", f"--rate={int(SIZE / seconds)}", "--output-format=json", f"--output={self._report}"),
        ]
        self.process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def check(self) -> None:
        _, said = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, said.decode()
        (job,) = json.loads(self._report.read_text())["jobs"]
        assert job["error"] == 0
        assert job["write"]["io_bytes"] >= SIZE


class Reader(threading.Thread):
    """Reads *disk* at random places, compares it with *image*, and notes the longest wait."""

    def __init__(self, disk: Path, image: Path, size: int = IMAGE) -> None:
        super().__init__(daemon=True)
        self._disk, self._image, self._blocks = disk, image, size // 4096
        self.over = threading.Event()
        self.longest_s = 0.0
        self.reads = 0
        self.problem = ""

    def run(self) -> None:
        dice = random.Random(2)
        with self._image.open("rb") as image, self._disk.open("rb", buffering=0) as disk:
            while not self.over.is_set() and not self.problem:
                offset, length = dice.randrange(self._blocks) * 4096, 4096 << dice.randrange(6)
                began = time.monotonic()
                try:
                    got = os.pread(disk.fileno(), length, offset)
                except OSError as exc:
                    self.problem = f"read at {offset}: {exc}"
                    return
                self.longest_s = max(self.longest_s, time.monotonic() - began)
                self.reads += 1
                if got != os.pread(image.fileno(), length, offset):
                    self.problem = f"wrong bytes at {offset}"


@contextmanager
def load(mounted: Served, image: Path, seconds: float) -> Iterator[Reader]:
    jobs = [Fio(mounted.path / name, mounted.folder, seconds) for name in ("vm1", "vm2", "vm3", "vm4")]
    reader = Reader(mounted.path / "golden", image)
    reader.start()
    yield reader
    for job in jobs:
        job.check()
    reader.over.set()
    reader.join(30)
    assert not reader.problem
    assert reader.reads > 100
    print(f"longest wait {reader.longest_s:.2f} s in {reader.reads} reads")


@pytest.mark.parametrize("keeper", KEEPERS)
def test_three_kills_under_load_lose_nothing(
    served: Callable[..., Served], image: Path, keeper: str, tmp_path: Path
) -> None:
    mounted = served(disks(image, tmp_path), keeper)
    with load(mounted, image, 9):
        for _ in range(3):
            time.sleep(2)
            mounted.kill()
    daemon = mounted.status()["daemon"]
    assert daemon["survives"]["successions"] == 3
    assert daemon["internal_errors"] == 0
    assert mounted.status("golden")["disk"]["layers"][0]["evicted_blocks"] > 0
    pool = sum(path.lstat().st_blocks * 512 for path in (tmp_path / "pool").rglob("*"))
    assert pool <= 16 * MIB
    mounted.umount()


@pytest.mark.parametrize("keeper", KEEPERS)
def test_upgrades_and_a_kill_under_load_lose_nothing(
    served: Callable[..., Served], image: Path, keeper: str, tmp_path: Path
) -> None:
    mounted = served(disks(image, tmp_path), keeper)
    with load(mounted, image, 8):
        pauses = [mounted.upgrade()]
        time.sleep(1)
        mounted.kill()
        time.sleep(1)
        pauses.append(mounted.upgrade())
    print(f"pauses {pauses} ms")
    survives = mounted.status()["daemon"]["survives"]
    assert survives["successions"] == 3
    assert survives["predecessor"] == "handed over"
    assert survives["keeper"] == "alive"
    mounted.umount()


# ---- what is there afterwards


@pytest.mark.parametrize("keeper", KEEPERS)
def test_what_was_written_before_a_kill_is_durable_after_an_unmount(
    served: Callable[..., Served], keeper: str, tmp_path: Path
) -> None:
    config = simple(tmp_path)
    config["disks"]["vm1"]["layers"][0]["cow"] = {"path": str(tmp_path / "overlay")}
    config["disks"]["scratch"] = {
        "layers": [{"cow": {"ephemeral": True}}],
        "backend": {"file": {"path": str(tmp_path / "vm1.raw")}},
    }
    mounted = served(config, keeper)
    inodes = {path.name: path.stat().st_ino for path in mounted.path.iterdir()}
    for name in ("vm1", "scratch"):
        with (mounted.path / name).open("r+b", buffering=0) as file:
            file.seek(5000)
            file.write(b"acknowledged")  # and not flushed
    mounted.kill()
    assert {path.name: path.stat().st_ino for path in mounted.path.iterdir()} == inodes
    for name in ("vm1", "scratch"):
        assert (mounted.path / name).read_bytes()[4998:5014] == b"se" + b"acknowledged" + b"ba"
    mounted.umount()
    again = served(config, keeper)
    assert (again.path / "vm1").read_bytes()[5000:5012] == b"acknowledged"
    assert (again.path / "scratch").read_bytes() == b"base" * (MIB // 4)
    again.umount()


def test_the_supervisor_may_die_and_the_mount_goes_on(served: Callable[..., Any], tmp_path: Path) -> None:
    mounted = served(simple(tmp_path))
    os.kill(mounted.supervisor, signal.SIGKILL)
    wait_for(lambda: mounted.status()["daemon"]["survives"]["keeper"] == "dead", "it is noticed")
    assert "has died: the mount will not outlive the daemon" in mounted.log()
    assert (mounted.path / "vm1").read_bytes()[:4] == b"base"
    pid = mounted.pid
    assert mounted.run("umount", mounted.path).returncode == 0
    assert is_gone(pid)


def test_umount_by_force_leaves_nobody_who_would_start_another(served: Callable[..., Any], tmp_path: Path) -> None:
    mounted = served(simple(tmp_path))
    pid = mounted.pid
    os.kill(pid, signal.SIGSTOP)
    done = mounted.run("umount", "--force", mounted.path)
    assert done.returncode == 0, done.stderr
    assert is_gone(pid)
    mounted.wait_ended()
    assert not mounts.find_mount(mounted.path)


# ---- upgrades


def edit(mounted: Served, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads(mounted.config.read_text())
    change(config)
    mounted.config.write_text(json.dumps(config))


def test_an_upgrade_adds_and_drops_disks_unless_they_are_open(served: Callable[..., Served], tmp_path: Path) -> None:
    mounted = served(simple(tmp_path, "vm1", "vm2"))
    more = simple(tmp_path, "vm3")["disks"]

    def change(config: dict[str, Any]) -> None:
        del config["disks"]["vm2"]
        config["disks"] |= more

    edit(mounted, change)
    pid, inode = mounted.pid, (mounted.path / "vm2").stat().st_ino
    with (mounted.path / "vm2").open("r+b", buffering=0) as file:
        file.write(b"written")
        mounted.kill()  # the open counts survive that
        done = mounted.run("upgrade", mounted.path)
        assert done.returncode == 1
        assert "vm2: is open, and the new configuration does not have it" in done.stderr
        assert file.read(4) == b"eba" + b"s"
    pid = mounted.pid
    mounted.upgrade()
    assert sorted(path.name for path in mounted.path.iterdir()) == ["vm1", "vm3"]
    assert mounted.pid != pid
    edit(mounted, lambda config: config["disks"].update(simple(tmp_path, "vm4")["disks"], vm2=before_of(mounted)))
    mounted.upgrade()
    assert (mounted.path / "vm2").read_bytes()[:8] == b"writtenb"[:7] + b"e"
    assert (mounted.path / "vm2").stat().st_ino > inode
    mounted.umount()


def before_of(mounted: Served) -> dict[str, Any]:
    disk: dict[str, Any] = json.loads(json.dumps(json.loads(mounted.config.read_text())["disks"]["vm1"]))
    disk["backend"]["file"]["path"] = disk["backend"]["file"]["path"].replace("vm1", "vm2")
    return disk


def test_an_upgrade_refuses_another_stack_below_an_open_disk(served: Callable[..., Served], tmp_path: Path) -> None:
    mounted = served(simple(tmp_path))
    edit(mounted, lambda config: config["disks"]["vm1"]["layers"][0].update(cow={"path": str(tmp_path / "other")}))
    with (mounted.path / "vm1").open("rb"):
        done = mounted.run("upgrade", mounted.path)
        assert done.returncode == 1
        assert "vm1: is open, and the new configuration stacks it differently" in done.stderr
    mounted.upgrade()
    mounted.umount()


@pytest.mark.parametrize("keeper", KEEPERS)
def test_broken_yaml_stops_an_upgrade_and_no_successor_of_a_crash(
    served: Callable[..., Served], keeper: str, tmp_path: Path
) -> None:
    mounted = served(simple(tmp_path), keeper)
    good = mounted.config.read_text()
    mounted.config.write_text("disks: {vm1: [}")
    pid = mounted.pid
    done = mounted.run("upgrade", mounted.path)
    assert done.returncode == 1
    assert f"{mounted.config}:1:" in done.stderr
    assert mounted.pid == pid
    with (mounted.path / "vm1").open("r+b", buffering=0) as file:
        file.write(b"still served")
        mounted.kill()
        file.seek(0)
        assert file.read(12) == b"still served"
    mounted.config.write_text(good)
    mounted.upgrade()
    mounted.umount()


def test_an_upgrade_runs_what_is_installed_by_then(served: Callable[..., Served], tmp_path: Path) -> None:
    package = copy_of_package(tmp_path)
    mounted = served(simple(tmp_path), package=package)
    pool = package / "cachefs" / "pool"
    pool.rename(tmp_path / "pool-module")
    pid = mounted.pid
    done = mounted.run("upgrade", mounted.path)  # the command itself needs no pool
    assert done.returncode == 1
    assert "the successor ended with exit code 1; the log has its last words" in done.stderr
    assert "No module named 'cachefs.pool'" in mounted.log()
    assert mounted.pid == pid
    (tmp_path / "pool-module").rename(pool)
    init = package / "cachefs" / "__init__.py"
    init.write_text(init.read_text().replace("0.1.0", "0.9.9"))
    mounted.upgrade()
    assert mounted.status()["daemon"]["version"] == "0.9.9"
    mounted.umount()


# ---- with what hangs


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """An NBD server at tmp_path/nbd.sock, which a test may stop."""
    if shutil.which("nbdkit") is None:
        pytest.skip("nbdkit is not installed")
    image, path = tmp_path / "export.raw", tmp_path / "nbd.sock"
    image.write_bytes(b"nbd!" * (MIB // 4))
    process = subprocess.Popen(
        ["nbdkit", "--foreground", "--exit-with-parent", "--unix", str(path), "file", str(image)]
    )
    wait_for(path.exists, "the server")
    yield process
    process.kill()
    process.wait()


def with_remote(folder: Path) -> dict[str, Any]:
    config = simple(folder)
    backend = {"nbd": {"uri": f"nbd+unix:///?socket={folder / 'nbd.sock'}", "timeout": "2s", "deadline": "60s"}}
    config["disks"]["remote"] = {"layers": [{"cow": {}}], "backend": backend}
    return config


class Read(threading.Thread):
    """A read of the first bytes of a disk that is open already."""

    def __init__(self, descriptor: int, length: int = 512) -> None:
        super().__init__(daemon=True)
        self._descriptor, self._length = descriptor, length
        self.got: bytes | None = None
        self.errno = 0
        self.start()

    def run(self) -> None:
        try:
            self.got = os.pread(self._descriptor, self._length, 0)
        except OSError as exc:
            self.errno = exc.errno or 0


@contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)  # until then it may answer yet
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        yield descriptor
    finally:
        with contextlib.suppress(OSError):  # close tells what a write-out met
            os.close(descriptor)


def test_a_disk_whose_server_hangs_keeps_no_other_one_waiting(
    served: Callable[..., Served], tmp_path: Path, server: subprocess.Popen[bytes]
) -> None:
    mounted = served(with_remote(tmp_path))
    with opened(mounted.path / "remote") as remote:
        with stopped(server):
            read = Read(remote)
            wait_for(lambda: mounted.status()["daemon"]["waiting_requests"], "the read waits")
            mounted.kill()
            began = time.monotonic()
            assert (mounted.path / "vm1").read_bytes()[:4] == b"base"
            print(f"the other disk answered {time.monotonic() - began:.2f} s after the kill")
            assert mounted.status("remote")["disk"]["state"] == "opening"
            assert read.is_alive()
        read.join(30)
        assert read.got == b"nbd!" * 128
    assert mounted.status("remote")["disk"]["state"] == "serving"
    mounted.umount()


def test_an_upgrade_waits_for_no_flush_of_a_store_that_hangs(
    served: Callable[..., Served], tmp_path: Path, server: subprocess.Popen[bytes]
) -> None:
    """What was acknowledged is in survivor memory: the successor has it when the store is there again."""
    config = simple(tmp_path)
    uri = f"nbd+unix:///?socket={tmp_path / 'nbd.sock'}"
    config["disks"]["remote"] = {
        "backend": {"nbd": {"uri": uri, "timeout": "60s", "fence": "1s", "on_failure": "hold"}}
    }
    mounted = served(config)
    reader = Reader(mounted.path / "vm1", tmp_path / "vm1.raw", MIB)
    with (mounted.path / "remote").open("r+b", buffering=0) as remote:
        assert remote.write(b"acknowledged") == 12
        with stopped(server):
            read = Read(remote.fileno())
            wait_for(lambda: mounted.status()["daemon"]["waiting_requests"], "the read waits")
            reader.start()
            done = mounted.run("upgrade", mounted.path)
            assert "not all disks are served again yet" in done.stderr
            assert read.is_alive()
            assert mounted.status()["daemon"]["survives"]["predecessor"] == "handed over"
            assert mounted.status("remote")["disk"]["state"] == "opening"
            assert "without the flush of remote" in mounted.log()
        read.join(30)
        assert read.got is not None
        assert read.got.startswith(b"acknowledgednbd!")
    reader.over.set()
    reader.join(30)
    assert not reader.problem
    print(f"longest wait of the other disk {reader.longest_s:.3f} s in {reader.reads} reads")
    mounted.umount()


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Callable[[bool], Path]]:
    """A file system that can be frozen: `frozen(True)`; where it is mounted."""
    if os.getuid() != 0 or not all(map(shutil.which, ("mkfs.ext4", "fsfreeze"))):
        pytest.skip("needs root, mkfs.ext4 and fsfreeze")
    image, root = tmp_path / "ext4", tmp_path / "root"
    root.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, root], capture_output=True).returncode != 0:
        pytest.skip("this machine mounts no loop device")
    is_frozen = False

    def freeze(wanted: bool) -> Path:
        nonlocal is_frozen
        if wanted != is_frozen:
            subprocess.run(["fsfreeze", "-f" if wanted else "-u", root], check=True)
            is_frozen = wanted
        return root

    yield freeze
    freeze(False)
    subprocess.run(["umount", "-l", root], check=True)


def test_an_upgrade_is_refused_while_a_thread_is_stuck_in_the_kernel(
    served: Callable[..., Served], tmp_path: Path, frozen: Callable[[bool], Path]
) -> None:
    """The process could not end, and nobody would serve any disk until it has."""
    config = simple(tmp_path, "vm1", "vm2")
    config["disks"]["vm2"]["layers"][0]["cow"] = {"path": str(frozen(False) / "overlay")}
    mounted = served(config)
    pid = mounted.pid
    with (mounted.path / "vm2").open("r+b", buffering=0) as vm2:
        vm2.write(b"x" * 8192)
        os.fsync(vm2.fileno())
        frozen(True)
        fallocate(vm2.fileno(), PUNCH_HOLE | KEEP_SIZE, 0, 4096)  # the program would sync
        done = mounted.run("upgrade", mounted.path)
        assert done.returncode == 1
        assert "hangs in the kernel" in done.stderr
        assert mounted.pid == pid
        assert (mounted.path / "vm1").read_bytes()[:4] == b"base"
        frozen(False)
        mounted.upgrade()
        assert os.pread(vm2.fileno(), 8192, 0) == bytes(4096) + b"x" * 4096
    mounted.umount()


@pytest.mark.parametrize("keeper", KEEPERS)
def test_without_resend_what_is_in_flight_fails_and_the_mount_goes_on(
    served: Callable[..., Served], keeper: str, tmp_path: Path, server: subprocess.Popen[bytes]
) -> None:
    mounted = served(with_remote(tmp_path), keeper, "--no-resend")
    assert mounted.status()["daemon"]["survives"]["requests_in_flight"] == "fail"
    assert "this kernel cannot send requests again" in mounted.log()
    with opened(mounted.path / "remote") as remote, (mounted.path / "vm1").open("r+b", buffering=0) as vm1:
        with stopped(server):
            read = Read(remote)
            wait_for(lambda: mounted.status()["daemon"]["waiting_requests"], "the read waits")
            vm1.write(b"acknowledged")
            mounted.kill()
            read.join(30)
            assert read.errno == errno.ECONNABORTED
        assert os.pread(vm1.fileno(), 12, 0) == b"acknowledged"
        assert Read(remote).join(30) is None
        assert os.pread(vm1.fileno(), 4, 12) == b"base"
    mounted.upgrade()
    assert (mounted.path / "remote").read_bytes()[:4] == b"nbd!"
    mounted.umount()


def test_an_upgrade_without_resend_waits_for_what_is_in_flight_or_gives_up(
    served: Callable[..., Served], tmp_path: Path, server: subprocess.Popen[bytes]
) -> None:
    mounted = served(with_remote(tmp_path), "supervisor", "--no-resend")
    pid = mounted.pid
    with opened(mounted.path / "remote") as remote:
        with stopped(server):
            read = Read(remote)
            wait_for(lambda: mounted.status()["daemon"]["waiting_requests"], "the read waits")
            done = mounted.run("upgrade", mounted.path)
            assert done.returncode == 1
            assert "some requests do not end" in done.stderr
            assert mounted.pid == pid
            assert read.is_alive()
        read.join(30)
        assert read.got == b"nbd!" * 128
    mounted.umount()


# ---- crash loops


def test_a_daemon_that_dies_again_and_again_answers_with_errors_and_does_not_hang(
    served: Callable[..., Served], tmp_path: Path
) -> None:
    mounted = served(simple(tmp_path))
    with (mounted.path / "vm1").open("r+b", buffering=0) as vm1:
        vm1.write(b"acknowledged")
        for _ in range(5):
            mounted.kill()
        with pytest.raises(OSError) as caught:
            os.pread(vm1.fileno(), 12, 0)
        assert caught.value.errno == errno.EIO
        with pytest.raises(OSError, match="Input/output"):
            os.fsync(vm1.fileno())
        disk = mounted.status("vm1")["disk"]
        assert disk["state"] == "refused"
        assert "the daemon died 5 times within 60 s" in disk["error"]
        assert "the daemon died 5 times within 60 s" in mounted.log()
        mounted.upgrade()
        assert os.pread(vm1.fileno(), 12, 0) == b"acknowledged"
    mounted.umount()


def copy_of_package(folder: Path) -> Path:
    package = folder / "package"
    shutil.copytree(ROOT / "cachefs", package / "cachefs", ignore=shutil.ignore_patterns("__pycache__"))
    return package


def broken_package(folder: Path, module: str, *functions: str, fault: str) -> tuple[Path, Callable[[], None]]:
    """A copy of cachefs whose *functions*, given by their first lines, begin with *fault*; and a call that heals it."""
    package = copy_of_package(folder)
    path = package / "cachefs" / module
    good = bad = path.read_text()
    for line in functions:
        assert good.count(line) == 1
        bad = bad.replace(line, f"{line}        {fault}\n")
    path.write_text(bad)
    return package, lambda: (path.write_text(good), None)[1]


def test_only_the_disk_that_the_daemon_dies_of_is_refused(served: Callable[..., Served], tmp_path: Path) -> None:
    package, heal = broken_package(
        tmp_path,
        "layers/cow.py",
        "    def try_read_into(self, offset: int, buffer: memoryview) -> bool:\n",
        "    async def read_into(self, offset: int, buffer: memoryview) -> None:\n",
        fault="_ = self.name == 'vm2/cow' and __import__('os')._exit(9)",
    )
    mounted = served(simple(tmp_path, "vm1", "vm2"), package=package)
    with opened(mounted.path / "vm2") as vm2:
        read = Read(vm2)
        read.join(60)
        assert read.errno == errno.EIO
    assert (mounted.path / "vm1").read_bytes()[:4] == b"base"
    assert "each time at work for vm2" in mounted.status("vm2")["disk"]["error"]
    heal()
    mounted.upgrade()
    assert (mounted.path / "vm2").read_bytes()[:4] == b"base"
    mounted.umount()


def test_a_bug_in_the_background_of_a_disk_ends_the_daemon_and_then_that_disk_alone(
    served: Callable[..., Served], tmp_path: Path
) -> None:
    package, heal = broken_package(
        tmp_path,
        "store/blockstore.py",
        "    async def _puncher(self) -> None:\n",
        fault="await self._punch_due.wait(); 1 / (self.name != 'vm2/cow')",
    )
    mounted = served(simple(tmp_path, "vm1", "vm2"), package=package)
    with (mounted.path / "vm2").open("r+b", buffering=0) as vm2:
        vm2.write(b"x" * 8192)
        assert subprocess.run(["fallocate", "-p", "-o", "0", "-l", "4096", mounted.path / "vm2"]).returncode == 0
        wait_for(lambda: mounted.status("vm2")["disk"]["state"] == "refused", "the end of the loop", 60)
        assert (mounted.path / "vm1").read_bytes()[:4] == b"base"
        assert "each time at work for vm2" in mounted.status("vm2")["disk"]["error"]
        assert "vm2 failed on a bug in cachefs" in mounted.log()
        assert "ZeroDivisionError" in mounted.log()
        heal()
        mounted.upgrade()
        assert os.pread(vm2.fileno(), 8192, 0) == bytes(4096) + b"x" * 4096
    mounted.umount()


@pytest.mark.parametrize("fault", ["sys.exit(5)", "os.kill(os.getpid(), signal.SIGSTOP)"], ids=["dies", "hangs"])
def test_a_successor_that_fails_at_the_last_moment_leaves_the_daemon_serving(
    served: Callable[..., Served], tmp_path: Path, fault: str
) -> None:
    line = "    def wait_go(self) -> tuple[list[tuple[str, int]], set[str]]:\n"
    package, heal = broken_package(tmp_path, "handover.py", line, fault=f"import signal; {fault}")
    mounted = served(simple(tmp_path), package=package)
    pid = mounted.pid
    with (mounted.path / "vm1").open("r+b", buffering=0) as vm1:
        vm1.write(b"acknowledged")
        done = mounted.run("upgrade", mounted.path)
        assert done.returncode == 1
        assert "the successor" in done.stderr
        assert mounted.pid == pid
        assert os.pread(vm1.fileno(), 12, 0) == b"acknowledged"
        heal()
        mounted.upgrade()
        assert os.pread(vm1.fileno(), 12, 0) == b"acknowledged"
    mounted.umount()


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("        self._answer(ACCEPT_TIMEOUT_S)\n", "        self._answer(ACCEPT_TIMEOUT_S)\n        os._exit(9)\n"),
        ('            _send(self._end, {"leaving": True})\n', "            os._exit(9)\n"),
    ],
    ids=["before its keeper knows", "before it says that it leaves"],
)
@pytest.mark.parametrize("keeper", KEEPERS)
def test_a_daemon_that_dies_while_it_hands_over_is_followed_by_one_daemon_that_its_keeper_knows(
    served: Callable[..., Served], tmp_path: Path, keeper: str, line: str, instead: str
) -> None:
    """Not by the one that was to take over: nobody would keep for it what it has to leave to the next one."""
    package = copy_of_package(tmp_path)
    path = package / "cachefs" / "handover.py"
    good = path.read_text()
    assert good.count(line) == 1
    path.write_text(good.replace(line, instead))
    mounted = served(simple(tmp_path), keeper, package=package)
    path.write_text(good)
    with (mounted.path / "vm1").open("r+b", buffering=0) as vm1:
        vm1.write(b"acknowledged")
        assert mounted.run("upgrade", mounted.path).returncode == 1
        for _ in range(2):
            assert os.pread(vm1.fileno(), 12, 0) == b"acknowledged"
            parent = int(Path(f"/proc/{mounted.pid}/stat").read_text().rpartition(")")[2].split()[1])
            assert parent == mounted.keeper_pid
            mounted.kill()
        assert os.pread(vm1.fileno(), 12, 0) == b"acknowledged"
    mounted.umount()
