"""Real guests boot from real mounts. What the guest does and checks by itself is cachefs/testing/guest-init.sh."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cachefs.testing.guest import MIB, Guest

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(300)]

Mount = Callable[..., Any]


def two_disks(base: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "state_dir": str(tmp_path / "state"),
        "images": {"base": {"backend": {"file": {"path": str(base)}}}},
        "disks": {name: {"layers": [{"cow": {}}], "image": "base"} for name in ("vm1", "vm2")},
    }


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def overlay_bytes(tmp_path: Path, disk: str) -> int:
    return (tmp_path / "state" / "overlays" / disk / "data").stat().st_blocks * 512


def test_two_guests_boot_over_one_base_and_keep_their_own_writes(
    mount: Mount, guest: Guest, base: Path, tmp_path: Path
) -> None:
    config = two_disks(base, tmp_path)
    before = digest(base), base.stat().st_mtime_ns

    mounted = mount(config)
    with ThreadPoolExecutor() as threads:
        said = list(threads.map(guest.boot, (mounted.path / "vm1", mounted.path / "vm2")))
    for messages in said:
        assert "digests ok 12 files" in messages
        assert "boot 1, wrote before: nothing" in messages
    # each wrote its own random bytes into the same place
    assert digest(mounted.path / "vm1") != digest(mounted.path / "vm2")
    mounted.umount()

    mounted = mount(config)
    assert "boot 2, wrote before: ok" in guest.boot(mounted.path / "vm1")
    mounted.umount()
    assert (digest(base), base.stat().st_mtime_ns) == before


def test_fstrim_in_the_guest_gives_space_of_the_overlay_back(
    mount: Mount, guest: Guest, base: Path, tmp_path: Path
) -> None:
    mounted = mount(two_disks(base, tmp_path))
    guest.boot(mounted.path / "vm1", "fill")
    filled = overlay_bytes(tmp_path, "vm1")
    assert filled >= 32 * MIB
    guest.boot(mounted.path / "vm1", "boot")
    # space of trimmed blocks is punched after the answer; at the latest, the end of the daemon has it done
    mounted.umount()
    assert overlay_bytes(tmp_path, "vm1") <= filled - 24 * MIB


def test_what_a_guest_synced_survives_the_death_of_the_daemon(
    mount: Mount, guest: Guest, base: Path, tmp_path: Path
) -> None:
    config = two_disks(base, tmp_path)
    mounted = mount(config)
    guest.boot(mounted.path / "vm1", "boot")
    mounted.kill()

    mounted = mount(config)
    assert "boot 2, wrote before: ok" in guest.boot(mounted.path / "vm1")
    mounted.umount()
