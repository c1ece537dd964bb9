"""File systems of a test's own, each in a file over a loop device: what they can do is known, and they can be broken."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MIB = 1 << 20
FILE_SYSTEMS = {
    # name: (make, check, bytes of the disk); xfs wants at least 300 MiB
    "ext4": (("mkfs.ext4", "-q", "-F"), ("e2fsck", "-fn"), 96 * MIB),
    "xfs": (("mkfs.xfs", "-q", "-f"), ("xfs_repair", "-n"), 320 * MIB),
}


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def run(*command: object, **options: Any) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100, check=False, **options)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def loop_device(path: Path) -> Iterator[str]:
    if os.getuid() != 0:
        pytest.skip("only root can set up a loop device")
    need("losetup")
    try:
        device = run("losetup", "--find", "--show", "--direct-io=on", path).strip()
    except AssertionError as exc:
        pytest.skip(f"no loop device: {exc}")
    try:
        yield device
    finally:
        run("losetup", "-d", device)


@contextlib.contextmanager
def mounted_at(device: str, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    run("mount", device, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


@contextlib.contextmanager
def fresh_file_system(kind: str, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Where it is mounted, and its device; both are gone afterwards. kind: ext4 or xfs. folder: is made."""
    make, _, size = FILE_SYSTEMS[kind]
    need(make[0])
    folder.mkdir()
    image = folder / "image"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(size)
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(loop_device(image))
        run(*make, device)
        try:
            root = stack.enter_context(mounted_at(device, folder / "root"))
        except AssertionError as exc:
            pytest.skip(f"this kernel does not mount {kind}: {exc}")
        yield root, Path(device)
