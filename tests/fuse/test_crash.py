"""kill -9 of the daemon at random moments, under load: what a guest has synced is there at the next mount.

The rule per 512-byte sector: it holds what the last synced write of it wrote, or what a later write (acknowledged or only
begun) wrote; never anything older, anything else, or a mixture.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # each starts daemons again and again

MIB = 1 << 20
SECTOR = 512
SIZE = 2 * MIB + 3 * SECTOR
ROUNDS = int(os.environ.get("CACHEFS_CRASH_ROUNDS", "20"))
WRITER = Path(__file__).with_name("writer.py")
BASE_NUMBER = 1  # of the base's sectors


class Expected:
    """What each sector may hold."""

    def __init__(self) -> None:
        self.allowed: list[list[int]] = [[BASE_NUMBER] for _ in range(SIZE // SECTOR)]  # the first one is durable
        self.written: list[tuple[int, int, int]] = []  # begun since the last sync: number, offset, length
        self.answered = 0
        self.synced = 0

    def note(self, line: str) -> None:
        kind, number, *rest = line.split()
        if kind == "b":
            offset, length = map(int, rest)
            self.written.append((int(number), offset, length))
            for sector in range(offset // SECTOR, (offset + length) // SECTOR):
                self.allowed[sector].append(int(number))
        elif kind == "w":
            self.answered += 1
        else:
            self.synced += 1
            for number_, offset, length in self.written:  # each of them had been answered
                assert number_ <= int(number)
                for sector in range(offset // SECTOR, (offset + length) // SECTOR):
                    allowed = self.allowed[sector]
                    del allowed[: allowed.index(number_)]
            self.written.clear()

    def check(self, contents: bytes) -> None:
        """Also takes what is there as the new truth: it is what a guest would go on from."""
        assert len(contents) == SIZE
        for index, allowed in enumerate(self.allowed):
            sector = contents[index * SECTOR : (index + 1) * SECTOR]
            number = int.from_bytes(sector[:8], "little")
            assert sector == number.to_bytes(8, "little") * (SECTOR // 8), f"sector {index} is a mixture"
            assert number in allowed, f"sector {index} holds write {number}, may hold {allowed}"
            allowed[:] = [number]
        self.written.clear()


def config(base: Path, **keys: Any) -> dict[str, Any]:
    return {"disks": {"vm1": {"layers": [{"cow": {}}], "backend": {"file": {"path": str(base)}}, **keys}}}


def make_base(folder: Path) -> Path:
    path = folder / "base.raw"
    path.write_bytes(BASE_NUMBER.to_bytes(8, "little") * (SIZE // 8))
    return path


@pytest.mark.timeout(60 + 10 * ROUNDS)
@pytest.mark.parametrize("rounds", [ROUNDS])
def test_nothing_synced_is_lost_when_the_daemon_is_killed(mount: Any, tmp_path: Path, rounds: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # shown when the test fails
    dice = random.Random(seed)
    base = make_base(tmp_path)
    expected = Expected()
    number = BASE_NUMBER
    mounted = mount(config(base))
    for round_ in range(rounds):
        lines = kill_under_load(mounted, number, dice)
        for line in lines:
            expected.note(line)
        number = max((int(line.split()[1]) for line in lines), default=number)
        mounted = mount(config(base))
        expected.check((mounted.path / "vm1").read_bytes())
        # The next round starts from what this one left, so make that durable.
        with (mounted.path / "vm1").open("r+b") as file:
            os.fsync(file.fileno())
        print(f"round {round_}: {len(lines)} steps")
    assert expected.answered > 20 * rounds
    assert expected.synced > rounds
    assert base.read_bytes() == BASE_NUMBER.to_bytes(8, "little") * (SIZE // 8)


def kill_under_load(mounted: Any, number: int, dice: random.Random) -> list[str]:
    """The steps of a writer whose daemon is killed behind its back after a random number of them."""
    command = [sys.executable, str(WRITER), str(mounted.path / "vm1"), str(dice.randrange(1 << 32)), str(number)]
    kill_at = dice.randrange(20, 800)
    lines: list[str] = []
    killer = threading.Thread(target=mounted.kill)  # beside us, who go on reading, so that the writer does not wait
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            lines.append(line)
            if len(lines) == kill_at:
                killer.start()
    assert len(lines) >= kill_at, f"the writer ended by itself after {len(lines)} steps"
    killer.join()
    assert writer.returncode == 0
    return lines


def test_a_dead_mount_is_cleaned_away_and_a_mount_works_again(mount: Any, tmp_path: Path, cachefs: Any) -> None:
    base = make_base(tmp_path)
    mounted = mount(config(base))
    descriptor = os.open(mounted.path / "vm1", os.O_RDWR)
    os.pwrite(descriptor, b"synced!!" * 64, 0)
    os.fsync(descriptor)
    mounted.kill()
    for call in (lambda: os.pread(descriptor, 512, 0), lambda: os.close(descriptor)):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.ENOTCONN

    said = cachefs("status", mounted.path)
    assert said.returncode == 1
    assert "its daemon is dead" in said.stderr
    cleaned = cachefs("umount", mounted.path)
    assert cleaned.returncode == 0, cleaned.stderr
    assert "dead already" in cleaned.stderr
    assert os.listdir(mounted.path) == []
    again = mount(config(base), at=mounted.path)
    assert (again.path / "vm1").read_bytes()[:512] == b"synced!!" * 64


def test_a_mount_over_a_dead_one_replaces_it(mount: Any, tmp_path: Path) -> None:
    base = make_base(tmp_path)
    dead = mount(config(base))
    dead.kill()
    again = mount(config(base), at=dead.path)
    assert "left by a daemon that died" in again.log()
    again.umount()
    assert os.listdir(dead.path) == []


def test_force_cleans_a_dead_mount_away_too(mount: Any, tmp_path: Path, cachefs: Any) -> None:
    mounted = mount(config(make_base(tmp_path)))
    mounted.kill()
    assert cachefs("umount", "--force", mounted.path).returncode == 0
    assert os.listdir(mounted.path) == []


def test_an_ephemeral_overlay_that_a_dead_daemon_left_starts_empty(mount: Any, tmp_path: Path) -> None:
    base = make_base(tmp_path)
    ephemeral = {"disks": {"vm1": {"layers": [{"cow": {"ephemeral": True}}], "backend": {"file": {"path": str(base)}}}}}
    mounted = mount(ephemeral)
    with (mounted.path / "vm1").open("r+b") as file:
        file.write(b"gone")
    mounted.kill()
    again = mount(ephemeral)
    assert (again.path / "vm1").read_bytes() == base.read_bytes()
    again.umount()
    assert not (tmp_path / "state" / "overlays" / "vm1").exists()
