"""An image of a Ceph cluster, as docs/backends/recipes.md says. Left out unless asked for (`scripts/test -m ceph`): it wants

apt-get install ceph-mon ceph-osd ceph-common qemu-block-extra
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_files import need, pattern, run
from test_recipes import recipe

pytestmark = [pytest.mark.ceph, pytest.mark.slow, pytest.mark.timeout(300)]

MIB = 1 << 20
NODE = Path(__file__).parents[1] / "ceph-node.sh"


@pytest.fixture
def ceph(tmp_path: Path) -> Iterator[Path]:
    """The configuration of a cluster that begins empty, with a pool named "pool"."""
    for program in ("ceph-mon", "ceph-osd", "ceph", "rbd"):
        need(program)
    folder = tmp_path / "ceph"
    folder.mkdir()
    try:
        with (folder / "start.log").open("wb") as log:
            subprocess.run([NODE, folder], stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True, timeout=200)
        yield folder / "ceph.conf"
    finally:
        for pid_file in folder.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid_file.read_text()), signal.SIGKILL)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """1 MiB of data at 0 and at 7 MiB, holes between."""
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
        for offset in (0, 7 * MIB):
            file.seek(offset)
            file.write(pattern(MIB))
    return path


def command_of(ceph: Path, *, writable: bool = False) -> list[str]:
    """The recipe's, with the cluster's configuration named; *writable* as the document says."""
    (backend,) = recipe("RBD", Path("/nowhere"))
    command: list[str] = [
        word.replace("rbd:pool/image", f"rbd:pool/image:conf={ceph}") for word in backend["nbd"]["command"]
    ]
    if writable:
        command[command.index("--read-only")] = "--discard=unmap"
        command.insert(1, "--cache=writeback")
    return command


def test_rbd_below_cow_and_cache_and_written_in_place(mount: Any, ceph: Path, raw: Path, tmp_path: Path) -> None:
    if shutil.which("qemu-nbd") is None or not list(Path("/usr/lib").glob("*/qemu/block-rbd.so")):
        pytest.skip("qemu-nbd cannot speak to Ceph: apt-get install qemu-block-extra")
    run("rbd", "-c", ceph, "import", "--image-format", 2, "--image-feature", "layering", raw, "pool/image")
    content = raw.read_bytes()

    def exported() -> bytes:
        (tmp_path / "exported.raw").unlink(missing_ok=True)
        run("rbd", "-c", ceph, "export", "pool/image", tmp_path / "exported.raw")
        return (tmp_path / "exported.raw").read_bytes()

    mounted = mount(
        {
            "pools": {"node": {"path": str(tmp_path / "pool"), "quota": "64MiB"}},
            "disks": {
                "vm": {
                    "layers": ["cow", {"cache": {"pool": "node"}}],
                    "backend": {"nbd": {"command": command_of(ceph)}},
                }
            },
        }
    )
    assert (mounted.path / "vm").read_bytes() == content
    with (mounted.path / "vm").open("r+b", buffering=0) as disk:
        os.pwrite(disk.fileno(), b"overlay", 7 * MIB)
        os.fsync(disk.fileno())
        assert os.pread(disk.fileno(), 9, 7 * MIB - 1) == b"\0overlay" + content[7 * MIB + 7 :][:1]
    mounted.umount()
    assert exported() == content

    mounted = mount({"disks": {"data": {"backend": {"nbd": {"command": command_of(ceph, writable=True)}}}}})
    with (mounted.path / "data").open("r+b", buffering=0) as disk:
        os.pwrite(disk.fileno(), b"written in place", 3 * MIB + 5)
        os.fsync(disk.fileno())
        run("fallocate", "--punch-hole", "--offset", 7 * MIB, "--length", MIB, mounted.path / "data")
    mounted.umount()
    expected = bytearray(content)
    expected[3 * MIB + 5 : 3 * MIB + 21] = b"written in place"
    expected[7 * MIB : 8 * MIB] = bytes(MIB)
    assert exported() == expected
