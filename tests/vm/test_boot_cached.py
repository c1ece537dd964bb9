"""Guests boot over one cache: the first boot warms it, and later ones leave the backing store alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cachefs.testing.guest import MIB, Guest, make_image

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(300)]

Mount = Callable[..., Any]

BLOCK = 64 << 10
WATCHED = (str(Path(__file__).parents[1] / "fuse" / "watched.py"),)
FILES = 600  # of which a guest reads every second, all of it


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """8 GiB with 120 MiB of files, in the first 256 MiB."""
    path = tmp_path / "image.raw"
    make_image(path, 256 * MIB, FILES, contents_size=120 * MIB, unread=True)
    os.truncate(path, 8 << 30)
    path.chmod(0o444)
    return path


def config(tmp_path: Path, image: Path, name: str) -> dict[str, Any]:
    """Three disks over one cache in a pool of its own; reads from above (r) and below (f) it are in the log *name*."""
    log = str(tmp_path / name)
    layers = [{"watched": {"log": log}}, {"cache": {"pool": "node"}}, {"watched": {"log": log, "word": "f"}}]
    return {
        "state_dir": str(tmp_path / f"state-{name}"),
        "pools": {"node": {"path": str(tmp_path / f"pool-{name}"), "quota": "1GiB"}},
        "images": {"img": {"layers": layers, "backend": {"file": {"path": str(image)}}}},
        "disks": {disk: {"layers": ["cow"], "image": "img"} for disk in ("vm1", "vm2", "vm3")},
    }


def requests(log: Path, word: str) -> list[tuple[int, int]]:
    lines = [line.split() for line in log.read_text().splitlines()]
    return [(int(offset), int(length)) for found, offset, length in lines if found == word]


def fetched(log: Path) -> int:
    return sum(length for _, length in requests(log, "f"))


def test_guests_that_boot_at_once_cost_one_boot_and_the_next_costs_nothing(
    mount: Mount, guest: Guest, image: Path, tmp_path: Path
) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    mounted = mount(config(tmp_path, image, "alone"), program=WATCHED)
    assert f"digests ok {FILES // 2} files" in guest.boot(mounted.path / "vm1", "check")
    mounted.umount()

    mounted = mount(config(tmp_path, image, "both"), program=WATCHED)
    with ThreadPoolExecutor() as threads:
        disks = [mounted.path / name for name in ("vm1", "vm2")]
        said = list(threads.map(lambda disk: guest.boot(disk, "check"), disks))
    assert all(f"digests ok {FILES // 2} files" in messages for messages in said)
    mounted.umount()

    wanted = requests(both, "r")
    distinct = {block for at, length in wanted for block in range(at // BLOCK, -(-(at + length) // BLOCK))}
    print(
        f"read {sum(length for _, length in wanted) / MIB:.1f} MiB in {len(wanted)} requests, "
        f"{len(distinct) * BLOCK / MIB:.1f} MiB of distinct blocks; fetched {fetched(both) / MIB:.1f} MiB in "
        f"{len(requests(both, 'f'))} requests, for one guest alone {fetched(alone) / MIB:.1f} MiB in "
        f"{len(requests(alone, 'f'))}"
    )
    assert len(distinct) * BLOCK > 40 * MIB
    assert fetched(both) <= 1.02 * fetched(alone)
    assert fetched(both) <= 1.15 * len(distinct) * BLOCK

    so_far = fetched(both)
    mounted = mount(config(tmp_path, image, "both"), program=WATCHED)
    assert f"digests ok {FILES // 2} files" in guest.boot(mounted.path / "vm3", "check")
    assert fetched(both) == so_far
    mounted.umount()
