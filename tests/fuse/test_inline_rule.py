"""What may run on the event loop while something slow is under way on a file system: by file system, through a real mount.

gatedfiles.py holds what is slow, on vm1, and says which thread did what. vm2 has its overlay on the same file system, vm3 on
another one of the same kind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from loopmounts import fresh_file_system
from test_faults import Opened, punch

pytestmark = pytest.mark.slow

GATED = (str(Path(__file__).with_name("gatedfiles.py")),)
SIZE, BLOCK = 1 << 20, 4096


def punch_it(descriptor: int) -> None:
    punch(descriptor, 0, BLOCK)


def sync_it(descriptor: int) -> None:
    os.pwrite(descriptor, b"s" * BLOCK, 0)
    os.fsync(descriptor)


def write_it(descriptor: int) -> None:
    """A part of a block that is not in the overlay: no write for the loop."""
    os.pwrite(descriptor, b"w", SIZE - 1)


SLOW: dict[str, Callable[[int], None]] = {"punch": punch_it, "sync": sync_it, "write": write_it}


@pytest.fixture
def file_systems(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Path]]:
    """Two of the same kind. Named before `mount`, whose daemon must have let go of them."""
    with contextlib.ExitStack() as stack:
        if request.param == "tmpfs":
            folders = [tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") for _ in range(2)]
            yield [Path(stack.enter_context(folder)) for folder in folders]
        else:
            made = [fresh_file_system(request.param, tmp_path / str(number)) for number in range(2)]
            yield [stack.enter_context(one)[0] for one in made]


class Disks:
    """vm1 to vm3, open, with a few blocks of data each."""

    def __init__(self, mounted: Any, opened: Opened) -> None:
        self.mounted = mounted
        self.descriptors = {name: opened(mounted.path / name) for name in ("vm1", "vm2", "vm3")}
        for descriptor in self.descriptors.values():
            os.pwrite(descriptor, b"a" * 4 * BLOCK, 0)

    def counted(self, name: str) -> dict[str, int]:
        statistics = self.mounted.layer(name)
        return {key: value for key, value in statistics.items() if key.endswith(("_on_loop", "_in_threads"))}

    def who_reads(self, name: str) -> dict[str, int]:
        """What was counted while two blocks were read from the overlay of disk *name*."""
        before = self.counted(name)
        assert os.pread(self.descriptors[name], 2 * BLOCK, 2 * BLOCK) == b"a" * 2 * BLOCK
        return grown(before, self.counted(name))

    def who_writes(self, name: str, offset: int = BLOCK, times: int = 1) -> dict[str, int]:
        """What was counted while a block of disk *name* was written; where it is by default, one is already."""
        before = self.counted(name)
        for _ in range(times):
            os.pwrite(self.descriptors[name], b"b" * BLOCK, offset)
        assert os.pread(self.descriptors[name], BLOCK, offset) == b"b" * BLOCK
        return grown(before, self.counted(name), "write")

    def is_held(self) -> bool:
        return bool(self.mounted.layer("vm1")["held"] == 1)


def grown(before: dict[str, int], after: dict[str, int], only: str = "") -> dict[str, int]:
    return {name: after[name] - before[name] for name in after if only in name and after[name] != before[name]}


@pytest.fixture
def serve(
    file_systems: list[Path],
    threads: ThreadPoolExecutor,
    mount: Any,
    opened: Opened,
    monkeypatch: pytest.MonkeyPatch,
    wait_until: Any,
) -> Callable[[str], Disks]:
    """`serve(what)` -> disks of which vm1 does something slow, which is held."""

    def start(slow: str) -> Disks:
        monkeypatch.setenv("HELD", slow)
        folders = {"vm1": file_systems[0], "vm2": file_systems[0], "vm3": file_systems[1]}
        config = {
            name: {"layers": [{"cow": {"path": str(folder / name)}}], "backend": {"memory": {"size": SIZE}}}
            for name, folder in folders.items()
        }
        disks = Disks(mount({"disks": config}, program=GATED), opened)
        threads.submit(SLOW[slow], disks.descriptors["vm1"])
        wait_until(disks.is_held, f"the {slow} is held")
        return disks

    return start


@pytest.mark.parametrize("slow", SLOW)
@pytest.mark.parametrize("file_systems", ["ext4"], indirect=True)
def test_on_ext4_writes_leave_the_loop_while_something_slow_is_under_way_on_that_file_system(
    serve: Callable[[str], Disks], wait_until: Any, slow: str
) -> None:
    disks = serve(slow)
    assert disks.who_writes("vm2") == {"writes_in_threads": 1}
    assert disks.who_writes("vm2", 8 * BLOCK) == {"writes_in_threads": 1}
    assert disks.who_writes("vm3") == {"plain_writes_on_loop": 1}
    for name in ("vm1", "vm2", "vm3"):
        assert disks.who_reads(name) == {"reads_on_loop": 1}
    assert disks.is_held()
    disks.mounted.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: disks.who_writes("vm2") == {"plain_writes_on_loop": 1}, "writes are back on the loop")


@pytest.mark.parametrize("file_systems", ["xfs"], indirect=True)
def test_on_xfs_a_write_on_the_loop_may_never_block(serve: Callable[[str], Disks], wait_until: Any) -> None:
    disks = serve("punch")
    assert disks.who_reads("vm2") == {"reads_on_loop": 1}
    # The kernel says which it is: it may not change the time of the file here, which it has to once in each of its ticks.
    wait_until(lambda: disks.who_writes("vm2") == {"writes_in_threads": 1}, "one that would block")
    wait_until(lambda: "nowait_writes_on_loop" in disks.who_writes("vm2", times=100), "one that would not")
    assert disks.is_held()
    for name in ("vm1", "vm2", "vm3"):
        assert disks.counted(name)["plain_writes_on_loop"] == 0


@pytest.mark.parametrize("file_systems", ["tmpfs"], indirect=True)
def test_on_tmpfs_the_loop_writes_whatever_is_under_way(serve: Callable[[str], Disks]) -> None:
    disks = serve("punch")
    for name in ("vm1", "vm2"):
        assert disks.who_writes(name) == {"plain_writes_on_loop": 1}
        assert disks.who_reads(name) == {"reads_on_loop": 1}
    assert disks.is_held()
