"""Disks that are written over servers which the daemon started, and which are killed or hang under the writes."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_files import need, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.logs("connection lost, making a new one", "are to be sent again", "starting it again", "killed"),
]

MIB = 1 << 20
SIZE = 32 * MIB


@pytest.fixture(params=["raw", "qcow2"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A backend that is written in place, and its image. qemu-nbd keeps tables of a qcow2 image in memory."""
    need("qemu-img")
    image = tmp_path / f"image.{request.param}"
    run("qemu-img", "create", "-q", "-f", request.param, image, f"{SIZE}")
    if request.param == "raw":
        return {"nbd": {"command": ["nbdkit", "file", str(image)], "timeout": "1s", "on_failure": "hold"}}, image
    return {"qcow2": {"path": str(image), "timeout": "1s", "on_failure": "hold"}}, image


def verified(disk: Path, *arguments: str) -> subprocess.Popen[str]:
    """fio, which writes the whole disk once in random order, never flushes, and reads everything back."""
    command = [
        *("fio", "--name=v", f"--filename={disk}", "--ioengine=libaio", "--iodepth=16", "--direct=1", f"--size={SIZE}"),
        *("--rw=randwrite", "--bs=4k", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", *arguments),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_server_that_goes_under_writes_without_flush_loses_nothing(
    mount: Any, written: tuple[dict[str, Any], Path], wait_until: Callable[..., Any], number: signal.Signals
) -> None:
    need("fio")
    backend, image = written
    mounted = mount({"disks": {"vm": {"backend": backend}}})
    fio = verified(mounted.path / "vm", "--rate_iops=3000")
    rest: list[str] = []
    reader = threading.Thread(target=lambda: rest.append(fio.communicate()[0]))
    reader.start()
    wait_until(lambda: mounted.layer("vm", -1)["unflushed_bytes"] > MIB, "writes")
    os.kill(mounted.layer("vm", -1)["server_pid"], number)
    wait_until(lambda: mounted.layer("vm", -1)["server_starts"] > 1, "another server", timeout=30)
    reader.join(60)
    assert fio.returncode == 0, rest
    assert mounted.status("vm")["disk"]["state"] == "serving"
    assert mounted.layer("vm", -1)["resent"] > 0
    with open(mounted.path / "vm", "rb") as disk:
        content = disk.read()
    mounted.umount()
    run("qemu-img", "convert", "-O", "raw", image, image.with_suffix(".converted"))
    assert image.with_suffix(".converted").read_bytes() == content
