"""QEMU's image locks, against QEMU's own tools."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cachefs.errors import LockedError
from cachefs.store.imagelock import lock_image

needs_qemu = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="qemu-utils is not installed"
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.truncate(1 << 20)
    return path


@contextmanager
def held(path: Path, *, writable: bool) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    try:
        lock_image(descriptor, "disk", writable=writable)
        yield
    finally:
        os.close(descriptor)


def qemu_io(path: Path, command: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["qemu-io", "-f", "raw", *options, "-c", command, str(path)], capture_output=True, text=True, check=False
    )


@contextmanager
def held_by_qemu(path: Path, *options: str) -> Iterator[None]:
    """qemu-io has the image open from when it answers until the end."""
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", *options, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        while "1 MiB" not in process.stdout.readline():
            assert process.poll() is None
        try:
            yield
        finally:
            process.stdin.write("quit\n")
            process.stdin.close()
            process.stdout.read()
            process.wait(10)


@needs_qemu
@pytest.mark.parametrize("writable", [False, True])
def test_qemu_does_not_write_what_we_hold(image: Path, writable: bool) -> None:
    assert qemu_io(image, "write 0 4096").returncode == 0
    with held(image, writable=writable):
        refused = qemu_io(image, "write 0 4096")
        assert refused.returncode != 0
        assert "lock" in refused.stderr
        assert subprocess.run(["qemu-img", "resize", "-f", "raw", image, "2M"], capture_output=True).returncode != 0
    assert qemu_io(image, "write 0 4096").returncode == 0


@needs_qemu
@pytest.mark.parametrize("writable", [False, True])
def test_qemu_reads_a_raw_image_beside_us(image: Path, writable: bool) -> None:
    """It shares a raw image that it only reads with writers; so do we."""
    with held(image, writable=writable):
        assert qemu_io(image, "read 0 4096", "-r").returncode == 0


@needs_qemu
@pytest.mark.parametrize("writable", [False, True])
def test_what_qemu_writes_is_refused(image: Path, writable: bool) -> None:
    with (
        held_by_qemu(image),
        pytest.raises(LockedError, match=r"in use by another program .*stop the VM"),
        held(image, writable=writable),
    ):
        pass
    with held(image, writable=writable):
        pass


@needs_qemu
def test_what_qemu_reads_is_not_refused_to_readers(image: Path) -> None:
    with held_by_qemu(image, "-r"), held(image, writable=False):
        pass


def test_readers_share_an_image_and_a_writer_shares_it_with_nobody(image: Path) -> None:
    with (
        held(image, writable=False),
        held(image, writable=False),
        pytest.raises(LockedError),
        held(image, writable=True),
    ):
        pass
    for second in (False, True):
        with held(image, writable=True), pytest.raises(LockedError), held(image, writable=second):
            pass


def test_locks_end_with_the_descriptor(image: Path) -> None:
    for _ in range(2):
        with held(image, writable=True):
            pass
