"""Disks over real NBD servers, nbdkit and qemu-nbd: what is read and written, what survives, and what fails in which way."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nbdservers import Servers, certificates
from readers import reading
from test_files import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate, need, pattern, run

MIB = 1 << 20


def over(uri: str, *layers: str, **options: Any) -> dict[str, Any]:
    return {"layers": list(layers), "backend": {"nbd": {"uri": uri, **options}}}


def opened(path: Path, flags: int = os.O_RDWR) -> int:
    return os.open(path, flags | os.O_CLOEXEC)


# ---- what is read and written


@pytest.mark.parametrize("kind", ["nbdkit", "nbdkit-4096", "qemu-nbd", "qemu-nbd-qcow2"])
def test_overlay_over_a_server_reads_as_the_image_and_leaves_it_alone(
    mount: Any, servers: Servers, holed_image: Path, tmp_path: Path, kind: str
) -> None:
    need("qemu-img")
    if kind == "nbdkit":
        uri, _ = servers.nbdkit("-r", "file", holed_image)
    elif kind == "nbdkit-4096":
        policy = ("blocksize-minimum=4096", "blocksize-preferred=64K", "blocksize-maximum=256K")
        uri, _ = servers.nbdkit(
            "-r", "--filter=blocksize-policy", "file", holed_image, "blocksize-error-policy=error", *policy
        )
    elif kind == "qemu-nbd":
        uri, _ = servers.qemu_nbd(holed_image, "raw", "-r")
    else:
        run("qemu-img", "convert", "-c", "-O", "qcow2", holed_image, tmp_path / "image.qcow2")
        uri, _ = servers.qemu_nbd(tmp_path / "image.qcow2", "qcow2", "-r")
    before = holed_image.read_bytes()
    mounted = mount({"disks": {"vm": over(uri, "cow"), "golden": {**over(uri), "read_only": True}}})
    for name in ("vm", "golden"):
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", holed_image, mounted.path / name)
    disk = opened(mounted.path / "vm")
    os.pwrite(disk, b"overlay", 8 * MIB + 5)
    os.fsync(disk)
    assert os.pread(disk, 10, 8 * MIB + 3) == before[8 * MIB + 3 :][:2] + b"overlay" + before[8 * MIB + 12 :][:1]
    os.close(disk)
    golden = opened(mounted.path / "golden", os.O_RDONLY)
    assert os.lseek(golden, MIB, os.SEEK_DATA) == 8 * MIB  # the server's map of holes
    assert os.lseek(golden, 0, os.SEEK_HOLE) == MIB
    os.close(golden)
    mounted.umount()
    assert holed_image.read_bytes() == before


def test_disk_on_a_server_keeps_what_was_written(mount: Any, servers: Servers, holed_image: Path) -> None:
    need("mkfs.ext4")
    need("fio")
    uri, _ = servers.nbdkit("file", holed_image)
    mounted = mount({"disks": {"vm": over(uri)}})
    disk = mounted.path / "vm"
    verify = (
        "--rw=randwrite",
        "--bsrange=512-64k",
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
    )
    done = run(
        "fio", "--name=v", f"--filename={disk}", "--ioengine=libaio", "--direct=1", "--size=8M", *verify, "--fsync=20"
    )
    assert "err= 0" in done.stdout
    run("mkfs.ext4", "-q", "-F", disk)
    run("fsck.ext4", "-f", "-n", disk)
    assert mounted.layer("vm", -1)["connections"] == 4
    mounted.umount()
    run("fsck.ext4", "-f", "-n", holed_image)


@pytest.mark.slow
@pytest.mark.parametrize("lacks", ["nothing", "zeroes", "extents"])
def test_trims_read_as_zeros_and_no_trim_is_sent(
    mount: Any, servers: Servers, holed_image: Path, tmp_path: Path, lacks: str
) -> None:
    log = tmp_path / "requests.log"
    filters = {"zeroes": ["--filter=nozero"], "extents": ["--filter=noextents"]}.get(lacks, [])
    uri, _ = servers.nbdkit("--filter=log", *filters, "file", holed_image, f"logfile={log}")
    mounted = mount({"disks": {"vm": over(uri)}})
    disk = opened(mounted.path / "vm")
    fallocate(disk, PUNCH_HOLE | KEEP_SIZE, 4096, 10000)
    fallocate(disk, ZERO_RANGE | KEEP_SIZE, 100000, 100)
    os.fsync(disk)
    os.close(disk)
    expected = bytearray(pattern(MIB))
    for start, length in ((4096, 10000), (100000, 100)):
        expected[start : start + length] = bytes(length)
    assert (mounted.path / "vm").read_bytes()[:MIB] == expected
    assert holed_image.read_bytes()[:MIB] == expected
    mounted.umount()
    said = log.read_text()
    assert " Trim " not in said
    assert " Flush " in said
    assert (" Zero " in said) == (lacks != "zeroes")


def test_trim_reads_as_zeros_over_a_server_whose_trim_does_nothing(
    mount: Any, servers: Servers, holed_image: Path
) -> None:
    name = f"{holed_image}"
    uri, _ = servers.nbdkit(
        "eval",
        f"get_size=stat -c %s {name}",
        f"pread=dd if={name} skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none",
        f"pwrite=dd of={name} seek=$4 conv=notrunc oflag=seek_bytes status=none",
        "can_write=exit 0",
        "can_trim=exit 0",
        "trim=exit 0",
        "can_flush=exit 0",
        f"flush=sync {name}",
    )
    mounted = mount({"disks": {"vm": over(uri)}})
    run("qemu-io", "-f", "raw", "-c", "discard 4k 64k", "-c", "read -P 0 4k 64k", mounted.path / "vm")
    mounted.umount()
    expected = bytearray(pattern(MIB))
    expected[4096 : 17 * 4096] = bytes(16 * 4096)
    assert holed_image.read_bytes()[:MIB] == expected


@pytest.mark.slow
@pytest.mark.logs("READ .* of vm failed: vm/nbd: read 0.4096: the server says: input/output error")
def test_error_of_the_server_fails_the_read_and_nothing_else(
    mount: Any, servers: Servers, holed_image: Path, tmp_path: Path
) -> None:
    uri, _ = servers.nbdkit(
        "--filter=error",
        "file",
        holed_image,
        "error-pread=EIO",
        "error-pread-rate=100%",
        f"error-pread-file={tmp_path}/on",
    )
    mounted = mount({"disks": {"vm": over(uri)}})
    disk = opened(mounted.path / "vm")
    (tmp_path / "on").touch()
    with pytest.raises(OSError, match="Input/output") as caught:
        os.pread(disk, 4096, 0)
    assert caught.value.errno == errno.EIO
    (tmp_path / "on").unlink()
    assert os.pread(disk, 4096, 0) == pattern(4096)
    assert mounted.status("vm")["disk"]["state"] == "serving"
    os.close(disk)
    mounted.umount()


# ---- servers that go


@pytest.mark.slow
@pytest.mark.logs("connection lost, making a new one")
def test_server_that_is_killed_and_started_again_under_reads_costs_no_error(
    mount: Any, servers: Servers, holed_image: Path, wait_until: Callable[..., Any]
) -> None:
    uri, server = servers.nbdkit("-r", "--filter=delay", "file", holed_image, "rdelay=10ms")
    mounted = mount({"disks": {"vm": over(uri, "cow", deadline="30s")}})
    with reading(mounted.path / "vm", holed_image.read_bytes(), wait_until) as readers:
        for _ in range(3):
            readers.wait_for_reads()
            server.kill()
            wait_until(lambda: mounted.layer("vm", -1)["connections"] == 0, "the loss")
            servers.restart(server)
    assert mounted.status("vm")["disk"]["state"] == "serving"
    mounted.umount()


@pytest.mark.slow
@pytest.mark.logs("connection lost, making a new one", "are to be sent again")
def test_write_in_flight_on_a_killed_server_is_carried_out_when_it_is_back(
    mount: Any, servers: Servers, holed_image: Path, wait_until: Callable[..., Any]
) -> None:
    uri, server = servers.nbdkit("--filter=delay", "file", holed_image, "wdelay=1")
    mounted = mount({"disks": {"vm": over(uri, fence="500ms")}})
    disk = opened(mounted.path / "vm")
    raised: list[int | None] = []

    def change() -> None:
        try:
            os.pwrite(disk, b"x" * 4096, 0)
        except OSError as exc:
            raised.append(exc.errno)

    thread = threading.Thread(target=change)
    thread.start()
    wait_until(lambda: mounted.layer("vm", -1)["in_flight"] == 1, "the write")
    server.kill()
    servers.restart(server)
    thread.join(30)
    assert raised == []
    assert os.pread(disk, 4096, 0) == b"x" * 4096
    os.fsync(disk)
    assert mounted.status("vm")["disk"]["state"] == "serving"
    os.close(disk)
    mounted.umount()
    assert holed_image.read_bytes()[:4096] == b"x" * 4096


@pytest.mark.slow
@pytest.mark.logs("forced stop", "still serving")
def test_forced_stop_answers_reads_that_a_silent_server_holds(
    mount: Any, servers: Servers, holed_image: Path, cachefs: Any, wait_until: Any
) -> None:
    uri, server = servers.nbdkit("file", holed_image)
    mounted = mount({"disks": {"vm": over(uri)}})
    assert server.process is not None
    disk = opened(mounted.path / "vm", os.O_RDONLY)
    server.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, server.process.pid, os.WSTOPPED | os.WNOWAIT)  # until then it may answer yet
    raised: list[OSError] = []

    def read() -> None:
        try:
            os.pread(disk, 4096, 4096)
        except OSError as exc:
            raised.append(exc)

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: mounted.status()["daemon"]["waiting_requests"] == 1, "the read to wait")
    assert mounted.layer("vm", -1)["later_reads"]
    cachefs("umount", "--force", mounted.path)
    mounted.process.wait(10)
    reader.join(10)
    with pytest.raises(OSError):
        os.close(disk)
    assert [exc.errno for exc in raised] == [errno.EIO]


@pytest.mark.slow
def test_server_that_is_not_there_is_named_when_the_mount_fails(
    cachefs: Callable[..., Any], tmp_path: Path, servers: Servers, holed_image: Path
) -> None:
    config = tmp_path / "config.yaml"
    (tmp_path / "mnt").mkdir()
    uri, _ = servers.nbdkit("-r", "file", holed_image, name="there")
    gone = f"nbd+unix:///disk?socket={tmp_path}/gone.sock"
    for disk, sentence in ((gone, "No such file or directory"), (uri, "put a cow layer above it")):
        config.write_text(
            f'state_dir: {tmp_path}/state\ndisks: {{vm: {{backend: {{nbd: {{uri: "{disk}", deadline: 300ms}}}}}}}}\n'
        )
        done = cachefs("mount", "--foreground", config, tmp_path / "mnt")
        assert done.returncode == 3, done.stderr
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


# ---- TLS


@pytest.mark.slow
def test_tls_is_spoken_and_nobody_else_is_believed(
    mount: Any, servers: Servers, holed_image: Path, tmp_path: Path, cachefs: Callable[..., Any]
) -> None:
    ours, theirs = certificates(tmp_path / "ours"), certificates(tmp_path / "theirs")
    uri, _ = servers.nbdkit_tls(ours, "file", holed_image)
    port = uri.rpartition(":")[2].rstrip("/")
    client = {"cert": str(ours / "client-cert.pem"), "key": str(ours / "client-key.pem")}
    good = {"ca": str(ours / "ca-cert.pem"), **client}
    mounted = mount({"disks": {"vm": over(uri, tls=good)}})
    disk = opened(mounted.path / "vm")
    assert os.pread(disk, 2 * MIB, 0) == pattern(MIB) + bytes(MIB)
    os.pwrite(disk, b"\x11" * (3 * MIB), MIB)
    os.fsync(disk)
    os.close(disk)
    mounted.umount()
    assert holed_image.read_bytes()[MIB : 4 * MIB] == b"\x11" * (3 * MIB)

    wrong = {"ca": str(theirs / "ca-cert.pem"), **client}
    (tmp_path / "mnt").mkdir()
    for asked, given, sentence in (
        (uri, wrong, "the server's certificate: unable to get local issuer certificate"),
        (f"nbds://127.0.0.1:{port}/", good, "the server's certificate: IP address mismatch"),
        (f"nbd://localhost:{port}/", None, "wants TLS"),
    ):
        config = mount.write({"disks": {"vm": over(asked, deadline="2s", **({"tls": given} if given else {}))}})
        done = cachefs("mount", "--foreground", config, tmp_path / "mnt")
        assert done.returncode == 3, done.stderr
        assert sentence in done.stderr
