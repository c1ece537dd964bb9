"""Disks that are written over NBD outlive their daemon: nothing acknowledged is lost, whoever started the server."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nbdservers import Servers
from served import Served, wait_for
from test_mounted_succession import SIZE, Fio

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

KILLS = 3
LOAD_S = 8.0


@pytest.fixture
def written(served: Callable[..., Served], servers: Servers, tmp_path: Path) -> tuple[Served, Path, Path]:
    """ "far" over a server that lives on, "own" over a qemu-nbd of the daemon, whose qcow2 has tables in memory."""
    far, own = tmp_path / "far.raw", tmp_path / "own.qcow2"
    for image, form in ((far, "raw"), (own, "qcow2")):
        subprocess.run(["qemu-img", "create", "-q", "-f", form, image, str(SIZE)], check=True)
    uri, _ = servers.nbdkit("file", far)
    config: dict[str, Any] = {
        "disks": {
            "far": {"backend": {"nbd": {"uri": uri, "fence": "500ms", "on_failure": "hold"}}},
            "own": {"backend": {"qcow2": {"path": str(own), "on_failure": "hold"}}},
        }
    }
    return served(config), far, own


def test_disks_over_nbd_are_killed_under_writes_that_nobody_flushes(
    written: tuple[Served, Path, Path], tmp_path: Path
) -> None:
    mounted, far, own = written
    loads = [Fio(mounted.path / name, tmp_path, LOAD_S) for name in ("far", "own")]
    for _ in range(KILLS):
        time.sleep(LOAD_S / (KILLS + 1))  # the load runs on meanwhile; when exactly it is cut off does not matter
        pid = mounted.kill()
        wait_for(lambda pid=pid: mounted.pid != pid, "a successor")  # type: ignore[misc]
    for load in loads:
        load.check()
    layers = {name: mounted.status(name)["disk"]["layers"][-1] for name in ("far", "own")}
    assert all(layer["state"] == "ok" for layer in layers.values())
    contents = {name: (mounted.path / name).read_bytes() for name in ("far", "own")}
    mounted.umount()
    assert far.read_bytes() == contents["far"]
    plain = tmp_path / "own.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", own, plain], check=True)
    assert plain.read_bytes() == contents["own"]


def test_other_disks_go_on_when_a_started_server_hangs_and_the_daemon_dies(
    served: Callable[..., Served], tmp_path: Path
) -> None:
    images = [tmp_path / f"{name}.raw" for name in ("hung", "other")]
    for image in images:
        image.write_bytes(b"base" * (1 << 18))
    disks: dict[str, Any] = {
        image.stem: {"backend": {"nbd": {"command": ["nbdkit", "file", str(image)], "on_failure": "hold"}}}
        for image in images
    }
    disks["plain"] = {"layers": [{"cow": {}}], "backend": {"file": {"path": str(images[1].with_suffix(".plain"))}}}
    images[1].with_suffix(".plain").write_bytes(b"base" * (1 << 18))
    mounted = served({"disks": disks})
    server = mounted.status("hung")["disk"]["layers"][-1]["server_pid"]
    os.kill(server, signal.SIGSTOP)  # a SIGTERM does not reach it
    began = time.monotonic()
    mounted.kill()
    for name in ("plain", "other"):
        assert (mounted.path / name).read_bytes()[:4] == b"base"
    print(f"the others answered {time.monotonic() - began:.2f} s after the kill")
    with (mounted.path / "hung").open("r+b", buffering=0) as disk:  # its server is killed when its time is over
        assert disk.write(b"kept") == 4
        os.fsync(disk.fileno())
    print(f"the hung one {time.monotonic() - began:.2f} s after it")
    assert not Path(f"/proc/{server}").exists()
    mounted.umount()
    assert images[0].read_bytes()[:8] == b"keptbase"
