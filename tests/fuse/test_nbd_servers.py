"""Disks over servers that know less than nbdkit and qemu-nbd do by default, or take longer; what is in the image is right."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from nbdservers import Servers
from test_files import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate, need, run

pytestmark = pytest.mark.slow

MIB = 1 << 20
KINDS = ("nbd-server", "nbd-server-bare", "nofua", "rate", "log")
STACKS: dict[str, list[Any]] = {"bare": [], "cached": [{"cache": {"pool": "node", "mode": "write-through"}}]}


def serve(servers: Servers, kind: str, image: Path) -> str:
    """The URI of a server of *image*; nbdkit's log goes to requests.log."""
    log = f"logfile={servers.folder}/requests.log"
    if kind == "nbd-server":
        return servers.nbd_server(image, flush="true", fua="true", trim="true")
    if kind == "nbd-server-bare":  # no flush, no FUA, no trim, no zeroes: fsync has to be its own affair
        return servers.nbd_server(image, sync="true")
    filters = {
        "nofua": ["--filter=log", "--filter=fua", "file", image, log],
        "rate": ["--filter=log", "--filter=rate", "file", image, "rate=400M", log],
        "log": ["--filter=log", "file", image, log],
    }
    return servers.nbdkit(*filters[kind])[0]


def config(tmp_path: Path, uri: str, layers: list[Any], **keys: Any) -> dict[str, Any]:
    return {
        "pools": {"node": {"path": str(tmp_path / "pool"), "quota": "64MiB"}},
        "disks": {"vm": {"layers": layers, "backend": {"nbd": {"uri": uri}}, **keys}},
    }


@pytest.mark.logs("the server offers no flush")
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_flushed_and_trimmed_is_in_the_image(
    mount: Any, servers: Servers, holed_image: Path, tmp_path: Path, kind: str, stack: str
) -> None:
    need("fio")
    uri = serve(servers, kind, holed_image)
    mounted = mount(config(tmp_path, uri, STACKS[stack]))
    content = bytearray(holed_image.read_bytes())
    disk = os.open(mounted.path / "vm", os.O_RDWR)
    for offset, data in ((5, b"unaligned"), (MIB - 3, b"into a hole"), (8 * MIB + 4096, os.urandom(MIB))):
        os.pwrite(disk, data, offset)
        content[offset : offset + len(data)] = data
    for mode, offset, length in ((PUNCH_HOLE | KEEP_SIZE, 4096, 70000), (ZERO_RANGE | KEEP_SIZE, 8 * MIB + 10000, 99)):
        fallocate(disk, mode, offset, length)
        content[offset : offset + length] = bytes(length)
    os.fsync(disk)
    assert holed_image.read_bytes() == content
    if (log := tmp_path / "requests.log").exists():
        assert " Flush " in log.read_text()
        assert " Trim " not in log.read_text()
    os.close(disk)
    assert (mounted.path / "vm").read_bytes() == content
    sizes = ("--offset=2M", "--size=4M", "--bsrange=512-64k", "--rw=randwrite", "--iodepth=16", "--fsync=20")
    verify = ("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--ioengine=libaio", "--direct=1")
    assert "err= 0" in run("fio", "--name=v", f"--filename={mounted.path / 'vm'}", *sizes, *verify).stdout
    said = (mounted.path / "vm").read_bytes()
    mounted.umount()
    assert holed_image.read_bytes() == said

    mounted = mount(config(tmp_path, uri, STACKS[stack]))
    assert (mounted.path / "vm").read_bytes() == said
    mounted.umount()


def test_synchronous_write_is_flushed_where_the_server_knows_no_fua(
    mount: Any, servers: Servers, holed_image: Path, tmp_path: Path
) -> None:
    uri = serve(servers, "nofua", holed_image)
    mounted = mount(config(tmp_path, uri, []))
    disk = os.open(mounted.path / "vm", os.O_RDWR | os.O_DSYNC)
    os.pwrite(disk, b"x" * 4096, 4096)
    said = re.findall(r" (Write|Flush) id=", (tmp_path / "requests.log").read_text())
    assert said == ["Write", "Flush"]
    os.close(disk)
    mounted.umount()


@pytest.mark.parametrize("kind", ["nbd-server", "log"])
def test_cached_image_is_read_from_the_server_once(
    mount: Any, servers: Servers, holed_image: Path, tmp_path: Path, kind: str
) -> None:
    uri = serve(servers, kind, holed_image)
    layers = ["cow", {"cache": {"pool": "node"}}]
    content = holed_image.read_bytes()
    mounted = mount(config(tmp_path, uri, layers))
    assert (mounted.path / "vm").read_bytes() == content
    disk = os.open(mounted.path / "vm", os.O_RDWR)
    os.pwrite(disk, b"overlay", 8 * MIB)
    os.fsync(disk)
    os.close(disk)
    mounted.umount()
    if kind == "log":
        (tmp_path / "requests.log").write_text("")

    mounted = mount(config(tmp_path, uri, layers))
    assert (mounted.path / "vm").read_bytes() == content[: 8 * MIB] + b"overlay" + content[8 * MIB + 7 :]
    mounted.umount()
    assert holed_image.read_bytes() == content
    if kind == "log":
        reads = re.findall(
            r" Read id=\S+ offset=0x([0-9a-f]+) count=0x([0-9a-f]+)", (tmp_path / "requests.log").read_text()
        )
        assert len(reads) == 16, "what the holed_image is known by, and nothing else"


def test_read_only_export_is_refused_for_writing(
    mount: Any, servers: Servers, holed_image: Path, tmp_path: Path, cachefs: Any
) -> None:
    uri = servers.nbd_server(holed_image, readonly="true")
    (tmp_path / "mnt").mkdir()
    done = cachefs("mount", "--foreground", mount.write(config(tmp_path, uri, [])), tmp_path / "mnt")
    assert done.returncode == 3
    assert "put a cow layer above it, or say read_only: true" in done.stderr
    mounted = mount(config(tmp_path, uri, [], read_only=True))
    assert (mounted.path / "vm").read_bytes() == holed_image.read_bytes()
    mounted.umount()
