"""The file system below an overlay refuses to be written from one moment to the next: its disk fails, and it alone."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from loopmounts import fresh_file_system
from test_faults import Opened, fails, punch
from test_io import make_base, run

pytestmark = pytest.mark.slow

MIB = 1 << 20
BASE_AT, FLUSHED_AT, LATE_AT, NEW_AT = (
    0,
    4 * MIB,
    4 * MIB + 65536,
    4 * MIB + 2 * 65536,
)  # MIB of data each 4 MiB in the base
BLOCK = 4096
SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32) of fs/xfs/xfs_fs.h, which ext4 knows too
NO_LOG_FLUSH = 2
LAST_WORDS = "every disk is closed, and flushed but for vm1, which failed"


def shut_down(root: Path, device: Path) -> None:
    """Nothing works any more, as when the device is gone."""
    descriptor = os.open(root, os.O_RDONLY)
    fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    os.close(descriptor)


def meet_an_error(root: Path, device: Path) -> None:
    """ext4 turns read-only when it finds itself damaged."""
    Path("/sys/fs/ext4", device.name, "trigger_fs_error").write_text("1")


@dataclass(frozen=True)
class Loss:
    kind: str
    happen: Callable[[Path, Path], None]
    code: int
    """What the file system says to a write from then on."""


LOSSES = {
    "ext4-read-only": Loss("ext4", meet_an_error, errno.EROFS),
    "ext4-shut-down": Loss("ext4", shut_down, errno.EIO),
    "xfs-shut-down": Loss("xfs", shut_down, errno.EIO),
}


@dataclass(frozen=True)
class Doomed:
    """A file system and what will happen to it."""

    root: Path
    device: Path
    loss: Loss

    def is_lost(self) -> None:
        self.loss.happen(self.root, self.device)

    def is_repaired(self) -> None:
        run("umount", self.root)
        run("mount", self.device, self.root)


@pytest.fixture(params=LOSSES)
def doomed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Doomed]:
    """Named before `mount`, whose daemon must have let go of it."""
    loss = LOSSES[request.param]
    with fresh_file_system(loss.kind, tmp_path / "doomed") as (root, device):
        if loss.happen is meet_an_error:
            run("mount", "-o", "remount,errors=remount-ro", root)
        yield Doomed(root, device, loss)


def two_disks(doomed: Doomed, folder: Path) -> dict[str, Any]:
    """vm1 has its overlay on the doomed file system, vm2 on another."""
    base = {"file": {"path": str(make_base(folder, 8 * MIB))}}
    paths = {"vm1": doomed.root / "vm1", "vm2": folder / "vm2"}
    return {
        "disks": {name: {"layers": [{"cow": {"path": str(path)}}], "backend": base} for name, path in paths.items()}
    }


@pytest.mark.logs(
    "(WRITE|READ|FSYNC|FALLOCATE) .*of vm1 failed: vm1/cow", "cannot note that the store has failed", LAST_WORDS
)
@pytest.mark.parametrize("state", ["state-elsewhere", "state-lost-too"])
def test_a_lost_file_system_fails_its_disk_and_no_other(
    doomed: Doomed, mount: Any, opened: Opened, tmp_path: Path, cachefs: Any, state: str
) -> None:
    state_dir = tmp_path / "state" if state == "state-elsewhere" else doomed.root / "state"
    config = {**two_disks(doomed, tmp_path), "state_dir": str(state_dir)}
    base = (tmp_path / "base.raw").read_bytes()
    mounted = mount(config)
    lost, other = opened(mounted.path / "vm1"), opened(mounted.path / "vm2")
    for descriptor in (lost, other):
        os.pwrite(descriptor, b"f" * BLOCK, FLUSHED_AT)
        os.fsync(descriptor)
        os.pwrite(descriptor, b"l" * BLOCK, LATE_AT)

    doomed.is_lost()
    for offset in (FLUSHED_AT, LATE_AT + 1, NEW_AT, NEW_AT + 1):  # on the fast path, and on the slow one
        assert fails(partial(os.pwrite, lost, b"n" * BLOCK, offset)) == doomed.loss.code
    assert fails(lambda: os.fsync(lost)) == errno.EIO
    assert mounted.layer("vm1")["state"] == "failed"
    assert "failed" in cachefs("status", mounted.path).stdout

    for _ in range(2):
        assert fails(lambda: os.fsync(lost)) == errno.EIO
        assert fails(lambda: os.pwrite(lost, b"n" * BLOCK, FLUSHED_AT)) == errno.EROFS
        assert fails(lambda: punch(lost, FLUSHED_AT, BLOCK)) == errno.EROFS
    assert os.pread(lost, MIB, BASE_AT) == base[:MIB]
    assert os.pread(lost, BLOCK, NEW_AT) == base[NEW_AT : NEW_AT + BLOCK]
    if doomed.loss.code == errno.EROFS:
        assert os.pread(lost, BLOCK, FLUSHED_AT) == b"f" * BLOCK
    else:
        assert fails(lambda: os.pread(lost, BLOCK, FLUSHED_AT)) == errno.EIO

    os.pwrite(other, b"n" * BLOCK, NEW_AT)
    os.fsync(other)
    assert os.pread(other, BLOCK, NEW_AT) == b"n" * BLOCK
    assert mounted.layer("vm2")["state"] == "ok"

    reason = os.strerror(doomed.loss.code)
    sentence = (
        rf"vm1/cow: fdatasync of {doomed.root}/vm1/data failed \({reason}\): .* the disk is read-only\. Check the "
    )
    assert re.search(sentence, mounted.log())
    assert ("cannot note that the store has failed" in mounted.log()) == (state == "state-lost-too")
    assert fails(lambda: os.close(lost)) == errno.EIO
    os.close(other)
    mounted.umount()
    assert LAST_WORDS in mounted.log().splitlines()[-1]

    if state == "state-lost-too":
        return
    doomed.is_repaired()
    again = mount(config)
    assert again.layer("vm1")["state"] == "failed"
    assert os.pread(opened(again.path / "vm1"), BLOCK, FLUSHED_AT) == b"f" * BLOCK


@pytest.mark.logs("vm1/cow: the last flush failed", LAST_WORDS)
def test_an_unmount_after_the_loss_ends_and_says_what_may_be_lost(
    doomed: Doomed, mount: Any, opened: Opened, tmp_path: Path
) -> None:
    config = two_disks(doomed, tmp_path)
    mounted = mount(config)
    for name in ("vm1", "vm2"):
        os.pwrite(opened(mounted.path / name), b"l" * BLOCK, LATE_AT)
    opened.close()
    doomed.is_lost()
    mounted.process.send_signal(signal.SIGTERM)
    assert mounted.process.wait(15) == 1
    assert "vm1/cow: the last flush failed: fdatasync of" in mounted.log()
    assert "what was written since the last flush may be lost" in mounted.log().splitlines()[-1]
    doomed.is_repaired()
    again = mount(config)
    assert again.layer("vm1")["state"] == "failed"
    assert again.layer("vm2")["state"] == "ok"
    assert os.pread(opened(again.path / "vm2"), BLOCK, LATE_AT) == b"l" * BLOCK
