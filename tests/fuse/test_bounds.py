"""A disk that hangs: what it may hold of the daemon, and who can be let go."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cachefs.fuse.spill import KEPT_BYTES
from cachefs.limits import BUFFERS_PER_DISK, REQUESTS_PER_DISK

FAULTY = (str(Path(__file__).with_name("faulty.py")),)
SIZE = 64 << 20


def serve(mount: Any, *rules: str, size: int = SIZE) -> Any:
    """vm1 breaks the *rules* (see faulty.py); vm2 does not."""
    backend = {"memory": {"size": size}}
    disks = {"vm1": {"layers": [{"faulty": {"rules": list(rules)}}], "backend": backend}, "vm2": {"backend": backend}}
    return mount({"disks": disks}, program=FAULTY)


def fio(path: Path, *arguments: str) -> subprocess.Popen[bytes]:
    fixed = (
        "--name=hung",
        f"--filename={path}",
        "--rw=randread",
        "--bs=4k",
        f"--size={SIZE}",
        "--direct=1",
        "--thread",
    )
    command = ["fio", *fixed, "--output-format=json", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def daemon(mounted: Any) -> Any:
    return mounted.status()["daemon"]


SYNC_CLIENT = "import os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); os.pread(fd, 4096, 0)"


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("kind", ["synchronous", "libaio"])
def test_a_killed_client_of_a_hung_disk_is_gone_within_a_second_and_a_half(
    mount: Any, wait_until: Any, kind: str
) -> None:
    mounted = serve(mount, "read * hang")
    if kind == "synchronous":
        client = subprocess.Popen([sys.executable, "-c", SYNC_CLIENT, mounted.path / "vm1"])
    else:
        client = fio(mounted.path / "vm1", "--ioengine=libaio", "--iodepth=100")
    wait_until(lambda: daemon(mounted)["waiting_requests"] >= (1 if kind == "synchronous" else 100), "its reads hang")
    looked = daemon(mounted)["uptime_s"] + 1  # who is killed before the first look at them may not be known any more
    wait_until(lambda: daemon(mounted)["uptime_s"] > looked, "the daemon has looked who waits")
    before = time.monotonic()
    client.kill()
    client.communicate(timeout=15)
    assert time.monotonic() - before < 1.5
    wait_until(lambda: daemon(mounted)["waiting_requests"] == 0, "nothing waits")
    assert daemon(mounted)["queued_bytes"] == 0
    assert daemon(mounted)["given_up_requests"] >= 1


@pytest.mark.slow
def test_a_write_of_a_killed_client_that_waits_never_lands(mount: Any, wait_until: Any) -> None:
    mounted = serve(mount, "write * hang")
    writer = "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR); os.pwrite(fd, b'late' * 1024, 0)"
    client = subprocess.Popen([sys.executable, "-c", writer, mounted.path / "vm1"])
    wait_until(lambda: daemon(mounted)["waiting_requests"] == 1, "its write hangs")
    client.kill()
    client.wait(15)
    wait_until(lambda: daemon(mounted)["given_up_requests"] == 1, "it is given up")
    mounted.process.send_signal(signal.SIGUSR1)
    assert (mounted.path / "vm1").read_bytes()[:4096] == bytes(4096)


# Through libc, because os.preadv would try again on EINTR by itself.
ALARMED_CLIENT = """
import ctypes, mmap, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGALRM, lambda *_: None)
signal.siginterrupt(signal.SIGALRM, True)
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
page = (ctypes.c_char * 4096).from_buffer(mmap.mmap(-1, 4096))
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
got = libc.pread(fd, page, 4096, 0)
signal.setitimer(signal.ITIMER_REAL, 0)
assert got == 4096, os.strerror(ctypes.get_errno())
"""


@pytest.mark.slow
def test_a_client_that_gets_signals_while_it_waits_sees_no_error(mount: Any, wait_until: Any) -> None:
    mounted = serve(mount, "read * hang")
    client = subprocess.Popen([sys.executable, "-c", ALARMED_CLIENT, mounted.path / "vm1"])
    wait_until(lambda: daemon(mounted)["requests"].get("INTERRUPT", 0) >= 1, "it is interrupted")
    looked = daemon(mounted)["uptime_s"] + 1
    wait_until(lambda: daemon(mounted)["uptime_s"] > looked, "a few looks at who waits")
    assert client.poll() is None
    mounted.process.send_signal(signal.SIGUSR1)
    assert client.wait(15) == 0


@pytest.mark.slow
def test_io_uring_workers_and_threads_that_ended_are_no_dead_clients(mount: Any, wait_until: Any) -> None:
    mounted = serve(mount, "read * hang")
    client = fio(mounted.path / "vm1", "--ioengine=io_uring", "--force_async=1", "--iodepth=16", "--io_size=256k")
    wait_until(lambda: daemon(mounted)["waiting_requests"] == 16 or client.poll() is not None, "its reads hang")
    if client.poll() is not None:
        pytest.skip("this kernel allows no io_uring")
    looked = daemon(mounted)["uptime_s"] + 20
    wait_until(lambda: daemon(mounted)["uptime_s"] > looked, "20 s of looks", timeout=30)
    assert daemon(mounted)["given_up_requests"] == 0
    mounted.process.send_signal(signal.SIGUSR1)
    output, _ = client.communicate(timeout=15)
    assert client.returncode == 0
    assert json.loads(output)["jobs"][0]["error"] == 0


@pytest.mark.slow
def test_a_hung_disk_keeps_few_buffers_and_the_others_are_served(mount: Any, wait_until: Any) -> None:
    mounted = serve(mount, "read * hang")
    client = fio(mounted.path / "vm1", "--ioengine=libaio", "--iodepth=512", "--io_size=2m")
    wait_until(lambda: daemon(mounted)["waiting_requests"] == 512, "512 reads wait")
    assert mounted.layer("vm1")["hanging"] == BUFFERS_PER_DISK
    with open(mounted.path / "vm2", "r+b", buffering=0) as other:
        assert other.write(b"x" * 4096) == 4096
        other.seek(0)
        assert other.read(4096) == b"x" * 4096
    mounted.process.send_signal(signal.SIGUSR1)
    client.communicate(timeout=15)
    assert client.returncode == 0


@pytest.mark.slow
@pytest.mark.logs("refused with EIO: too many requests of this disk wait")
def test_requests_beyond_the_limit_are_answered_eio_and_counted(mount: Any, wait_until: Any) -> None:
    mounted = serve(mount, "read * hang")
    jobs = ("--numjobs=5", "--iodepth=1000", "--io_size=4000k", "--ioengine=libaio", "--continue_on_error=read")
    client = fio(mounted.path / "vm1", *jobs)
    wait_until(lambda: daemon(mounted)["refused_requests"] >= 1, "some are refused")
    assert daemon(mounted)["waiting_requests"] <= REQUESTS_PER_DISK
    mounted.process.send_signal(signal.SIGUSR1)
    client.communicate(timeout=30)
    assert daemon(mounted)["most_waiting_requests"] == REQUESTS_PER_DISK
    assert len(re.findall("refused with EIO", mounted.log())) == 1


@pytest.mark.slow
def test_queued_writes_land_with_their_own_data(mount: Any, wait_until: Any) -> None:
    mounted = serve(mount, "write * hang")
    count = 3 * BUFFERS_PER_DISK
    descriptor = os.open(mounted.path / "vm1", os.O_RDWR)
    with ThreadPoolExecutor(count) as threads:
        writes = [threads.submit(os.pwrite, descriptor, bytes([n % 251 + 1]) * 4096, n * 8192) for n in range(count)]
        wait_until(lambda: daemon(mounted)["waiting_requests"] == count, "all wait")
        assert daemon(mounted)["queued_bytes"] >= 2 * BUFFERS_PER_DISK * 4096
        mounted.process.send_signal(signal.SIGUSR1)
        assert [write.result() for write in writes] == [4096] * count
    for n in range(count):
        assert os.pread(descriptor, 8192, n * 8192) == bytes([n % 251 + 1]) * 4096 + bytes(4096)
    os.close(descriptor)


@pytest.mark.slow
def test_large_writes_that_wait_leave_memory_and_land_with_their_own_data(mount: Any, wait_until: Any) -> None:
    length, count = 1 << 20, 2 * BUFFERS_PER_DISK + 40
    mounted = serve(mount, "write * hang", size=count * length)
    descriptor = os.open(mounted.path / "vm1", os.O_RDWR)
    with ThreadPoolExecutor(count) as threads:
        writes = [threads.submit(os.pwrite, descriptor, bytes([n + 1]) * length, n * length) for n in range(count)]
        try:
            wait_until(lambda: daemon(mounted)["waiting_requests"] == count, "all wait")
            wait_until(lambda: daemon(mounted)["queued_memory_bytes"] <= KEPT_BYTES, "what is too much is in the file")
            assert daemon(mounted)["spilled_bytes"] > 30 * length  # of 104 MiB in the queue
        finally:
            mounted.process.send_signal(signal.SIGUSR1)
        assert [write.result() for write in writes] == [length] * count
    for n in range(count):
        assert os.pread(descriptor, length, n * length) == bytes([n + 1]) * length
    os.close(descriptor)
    assert daemon(mounted)["queued_memory_bytes"] == 0
