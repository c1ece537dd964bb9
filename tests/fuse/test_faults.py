"""What goes wrong in one request stays in that request: the layer `faulty` (faulty.py) raises and hangs on demand."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # each starts a daemon of its own

SIZE = 1 << 20
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10
FAULTY = (str(Path(__file__).with_name("faulty.py")),)
ON_DEMAND = ("on demand", "Traceback", "bug in cachefs", "inside")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch(descriptor: int, offset: int, length: int, mode: int = PUNCH_HOLE | KEEP_SIZE) -> None:
    if _libc.fallocate(descriptor, mode, offset, length) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def overlay() -> dict[str, Any]:
    return {"layers": [{"cow": {}}], "backend": {"memory": {"size": SIZE}}}


def disk(*rules: str, **keys: Any) -> dict[str, Any]:
    return {**overlay(), "layers": [{"faulty": {"rules": list(rules)}}, {"cow": {}}], **keys}


def serve(mount: Any, *rules: str, **keys: Any) -> Any:
    return mount({"disks": {"vm1": disk(*rules, **keys), "vm2": disk()}}, program=FAULTY)


class Opened:
    """`opened(path)` -> a descriptor that is closed at the end of the test, or by `close`."""

    def __init__(self) -> None:
        self.descriptors: list[int] = []

    def __call__(self, path: Path, flags: int = os.O_RDWR) -> int:
        self.descriptors.append(os.open(path, flags))
        return self.descriptors[-1]

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())


@pytest.fixture
def opened() -> Iterator[Opened]:
    found = Opened()
    yield found
    for descriptor in found.descriptors:
        with contextlib.suppress(OSError):  # a dead mount says so at close, too
            os.close(descriptor)


# operation of the layer -> the request that meets it, at offset 8192
REQUESTS: dict[str, Callable[[int], Any]] = {
    "try_read": lambda fd: os.pread(fd, 4096, 8192),
    "read": lambda fd: os.pread(fd, 4096, 8192),
    "try_write": lambda fd: os.pwrite(fd, b"x" * 4096, 8192),
    "write": lambda fd: os.pwrite(fd, b"x" * 4096, 8192),
    "try_flush": lambda fd: os.fsync(fd),
    "flush": lambda fd: os.fsync(fd),
    "trim": lambda fd: punch(fd, 8192, 4096),
    "zero": lambda fd: punch(fd, 8192, 4096, ZERO_RANGE),
    "extents": lambda fd: os.lseek(fd, 8192, os.SEEK_HOLE),
    "pending_error": lambda fd: os.close(os.dup(fd)),
    "statistics": lambda fd: os.getxattr(fd, "user.cachefs.status"),
}


def all_requests_work(descriptor: int) -> None:
    for request in REQUESTS.values():
        request(descriptor)
    os.pwrite(descriptor, b"y" * 5000, 100)
    assert os.pread(descriptor, 5000, 100) == b"y" * 5000


@pytest.mark.logs(*ON_DEMAND)
@pytest.mark.parametrize("operation", REQUESTS)
def test_a_bug_costs_one_request_and_is_told(mount: Any, opened: Any, operation: str) -> None:
    rules = [f"{operation} * {error} once" for error in ("RuntimeError", "OSError", "ExceptionGroup")]
    mounted = serve(mount, *rules)
    descriptor = opened(mounted.path / "vm1")
    for number in (1, 2, 3):
        assert fails(lambda: REQUESTS[operation](descriptor)) == errno.EIO
        assert mounted.status()["daemon"]["internal_errors"] == number
    all_requests_work(descriptor)
    all_requests_work(opened(mounted.path / "vm2"))
    assert mounted.status()["daemon"]["internal_errors"] == 3
    log = mounted.log()
    assert log.count("Please report this") == 3
    assert "RuntimeError: on demand" in log
    assert "faulty.py" in log  # the place is in the traceback


def fails(call: Callable[[], Any]) -> int:
    """The errno that *call* raises; 0 for none."""
    try:
        call()
    except OSError as exc:
        return exc.errno or -1
    return 0


@pytest.mark.logs("on demand")
def test_an_error_of_a_layer_reaches_the_client_as_its_errno(mount: Any, opened: Any) -> None:
    mounted = serve(mount, "write 0 ENOSPC once", "read 0 CachefsError once", "flush * ENOSPC once")
    descriptor = opened(mounted.path / "vm1")
    assert fails(lambda: os.pwrite(descriptor, b"x", 0)) == errno.ENOSPC
    assert fails(lambda: os.pread(descriptor, 1, 0)) == errno.EIO
    assert fails(lambda: os.fsync(descriptor)) == errno.ENOSPC
    all_requests_work(descriptor)
    assert mounted.status()["daemon"]["request_errors"] == 3
    assert mounted.status()["daemon"]["internal_errors"] == 0
    found = re.findall(r"^ERROR: (.*)$", mounted.log(), re.MULTILINE)
    assert found == [
        "WRITE 0+1 of vm1 failed: faulty: on demand",
        "READ 0+1 of vm1 failed: faulty: on demand",
        "FSYNC of vm1 failed: faulty: on demand",
    ]


@pytest.mark.logs("on demand")
@pytest.mark.parametrize("operation", ["flush", "trim", "zero", "extents"])
def test_enosys_is_never_answered_so_that_the_kernel_goes_on_asking(
    mount: Any, opened: Any, operation: str, wait_until: Any
) -> None:
    mounted = serve(mount, f"{operation} * ENOSYS once")
    descriptor = opened(mounted.path / "vm1")
    os.pwrite(descriptor, b"x" * 16384, 0)
    assert fails(lambda: REQUESTS[operation](descriptor)) == errno.EIO
    before = mounted.status()["daemon"]["requests"]
    opcode = {"flush": "FSYNC", "extents": "LSEEK"}.get(operation, "FALLOCATE")
    REQUESTS[operation](descriptor)
    assert mounted.status()["daemon"]["requests"][opcode] == before[opcode] + 1
    if operation in ("trim", "zero"):
        assert os.pread(descriptor, 4096, 8192) == bytes(4096)
    if operation == "flush":
        wait_until(lambda: mounted.layer("vm1", 1)["flush_rounds"] == 1, "the round is counted")


@pytest.mark.logs("on demand")
def test_a_failed_synchronous_write_says_so(mount: Any, opened: Any) -> None:
    mounted = serve(mount, "flush * CachefsError once")
    descriptor = opened(mounted.path / "vm1", os.O_RDWR | os.O_DSYNC)
    assert fails(lambda: os.pwrite(descriptor, b"x", 0)) == errno.EIO
    assert os.pwrite(descriptor, b"x", 0) == 1


@pytest.mark.logs("on demand")
def test_a_layer_that_fails_to_close_keeps_the_others_from_nothing(mount: Any, opened: Any) -> None:
    mounted = serve(mount, "close * CachefsError")
    os.pwrite(opened(mounted.path / "vm2"), b"kept", 0)
    os.pwrite(opened(mounted.path / "vm1"), b"kept", 0)
    opened.close()
    mounted.process.send_signal(signal.SIGTERM)
    assert mounted.process.wait(15) == 1
    assert mounted.log().splitlines()[-1] == "faulty: on demand"
    again = mount({"disks": {"vm1": overlay(), "vm2": overlay()}})
    for name in ("vm1", "vm2"):
        assert (again.path / name).read_bytes()[:4] == b"kept"
        assert again.layer(name)["data_bytes"] == 4096


# ---- hanging


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """Named before `mount`, so that a mount that hangs is gone before its threads are waited for."""
    with ThreadPoolExecutor(64) as pool:
        yield pool


def test_a_disk_that_hangs_keeps_no_other_from_being_served(
    threads: ThreadPoolExecutor, mount: Any, opened: Any, wait_until: Any
) -> None:
    mounted = serve(mount, "read 0 hang", "write 4096 hang", "flush * hang")
    hanging = opened(mounted.path / "vm1")
    other = opened(mounted.path / "vm2")
    reads = [threads.submit(os.pread, hanging, 512, 0) for _ in range(40)]
    write = threads.submit(os.pwrite, hanging, b"held", 4096)
    wait_until(lambda: mounted.layer("vm1")["hanging"] == 41, "reads and write hang")
    fsync = threads.submit(os.fsync, hanging)  # the kernel may keep it from us until the write is done

    all_requests_work(other)
    assert os.listdir(mounted.path) == ["vm1", "vm2"]
    assert os.pread(hanging, 512, 512) == bytes(512)  # another place of the same disk
    assert mounted.status()["daemon"]["waiting_requests"] >= 41
    assert not any(future.done() for future in (*reads, write, fsync))

    mounted.process.send_signal(signal.SIGUSR1)
    assert [future.result() for future in reads] == [bytes(512)] * 40
    assert write.result() == 4
    assert fsync.result() is None
    assert os.pread(hanging, 4, 4096) == b"held"
    assert mounted.status()["daemon"]["waiting_requests"] == 0


def test_read_ahead_that_hangs_keeps_no_other_disk_from_being_served(
    threads: ThreadPoolExecutor, mount: Any, opened: Any, wait_until: Any
) -> None:
    # Background requests of all disks share the kernel's max_background; its default of 12 would be used up.
    mounted = serve(mount, "read * hang", page_cache=True, backend={"memory": {"size": 16 * SIZE}})
    hanging = [opened(mounted.path / "vm1", os.O_RDONLY) for _ in range(40)]
    other = opened(mounted.path / "vm2")
    reads = [threads.submit(os.pread, fd, 1, number * 256 * 1024) for number, fd in enumerate(hanging)]
    wait_until(lambda: mounted.layer("vm1")["hanging"] >= 13, "reads hang")
    all_requests_work(other)
    mounted.process.send_signal(signal.SIGUSR1)
    assert {future.result() for future in reads} == {b"\0"}


def test_an_lseek_that_hangs_is_answered_data(mount: Any, opened: Any) -> None:
    mounted = serve(mount, "extents * hang")
    descriptor = opened(mounted.path / "vm1")
    assert os.lseek(descriptor, 5000, os.SEEK_DATA) == 5000
    assert os.lseek(descriptor, 5000, os.SEEK_HOLE) == SIZE


@pytest.mark.parametrize("engine", ["psync", "libaio", "mmap"])
def test_a_client_that_is_killed_while_it_waits_ends(mount: Any, opened: Any, wait_until: Any, engine: str) -> None:
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    mounted = serve(mount, "read 0 hang", page_cache=engine == "mmap")
    other, same = opened(mounted.path / "vm2"), opened(mounted.path / "vm1")
    command = [
        "fio",
        "--name=j",
        f"--filename={mounted.path / 'vm1'}",
        "--readonly",
        "--rw=read",
        "--bs=4k",
        "--size=64k",
    ]
    command += [f"--ioengine={engine}", "--iodepth=4", "--thread", f"--direct={int(engine != 'mmap')}"]
    client = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=mounted.path.parent)
    try:
        wait_until(lambda: mounted.layer("vm1")["hanging"] >= 1, "the read hangs")
        hung = time.monotonic()
        wait_until(lambda: time.monotonic() > hung + 0.6, "the daemon has looked whose request it is")
        client.kill()
        wait_until(lambda: client.poll() is not None, "the client's end", timeout=5)
        assert client.returncode == -signal.SIGKILL
        all_requests_work(other)
        if engine != "mmap":  # read-ahead has no client
            wait_until(lambda: mounted.status()["daemon"]["waiting_requests"] == 0, "nothing waits", timeout=5)
            assert mounted.status()["daemon"]["given_up_requests"] >= 1
    finally:
        mounted.process.send_signal(signal.SIGUSR1)
        client.kill()
        client.wait(15)
    all_requests_work(same)


def test_a_signal_that_does_not_kill_fails_no_request(mount: Any, opened: Any, wait_until: Any) -> None:
    mounted = serve(mount, "read 0 hang")
    script = (
        "import os,signal,sys; signal.signal(signal.SIGALRM, lambda *_: None); print(os.pread(0, 4, 0), flush=True)"
    )
    with (
        (mounted.path / "vm1").open("rb") as file,
        subprocess.Popen([sys.executable, "-c", script], stdin=file, stdout=subprocess.PIPE) as client,
    ):
        try:
            wait_until(lambda: mounted.layer("vm1")["hanging"] == 1, "the read hangs")
            client.send_signal(signal.SIGALRM)
            wait_until(
                lambda: mounted.status()["daemon"]["requests"].get("INTERRUPT"), "the kernel tells of the signal"
            )
            all_requests_work(opened(mounted.path / "vm2"))
            assert client.poll() is None
        finally:
            mounted.process.send_signal(signal.SIGUSR1)
        assert client.stdout is not None
        assert client.stdout.read() == b"b'\\x00\\x00\\x00\\x00'\n"
    assert mounted.status()["daemon"]["given_up_requests"] == 0
