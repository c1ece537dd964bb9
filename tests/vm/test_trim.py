"""What a guest deletes and trims is gone from the overlay, and from what is copied of the disk."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cachefs.testing.guest import MIB, Guest, make_image

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(400)]


def overlay_bytes(tmp_path: Path) -> int:
    return (tmp_path / "state" / "overlays" / "vm" / "data").stat().st_blocks * 512


def data_bytes(path: Path) -> int:
    """What `qemu-img map` calls data."""
    command = ["qemu-img", "map", "--output=json", "-f", "raw", str(path)]
    found = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    return sum(one["length"] for one in found if one["data"])


def test_overlay_is_as_large_as_before_200_mib_that_the_guest_wrote_deleted_and_trimmed(
    mount: Callable[..., Any], guest: Guest, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    base = tmp_path / "base.raw"
    make_image(base, size=512 * MIB)
    stack = {"layers": ["cow"], "backend": {"file": {"path": str(base)}}}
    mounted = mount({"state_dir": str(tmp_path / "state"), "disks": {"vm": stack}})
    disk = mounted.path / "vm"
    guest.boot(disk, "fill", timeout_s=150)
    before, data_before = overlay_bytes(tmp_path), data_bytes(disk)
    assert before >= 32 * MIB

    messages = guest.boot(disk, "churn", timeout_s=250)
    assert "wrote 200 MiB" in messages
    # what is trimmed is punched behind the answer, while the disk is in use
    wait_until(lambda: overlay_bytes(tmp_path) <= before * 1.05, "the space of what was trimmed")
    assert overlay_bytes(tmp_path) >= before * 0.95
    assert data_bytes(disk) <= data_before * 1.05

    copy = tmp_path / "copy.raw"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", str(disk), str(copy)], check=True, timeout=100)
    assert copy.stat().st_blocks * 512 <= data_bytes(disk) + MIB
    compare = ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(disk), str(copy)]
    subprocess.run(compare, check=True, timeout=100, stdout=subprocess.DEVNULL)
    mounted.umount()
