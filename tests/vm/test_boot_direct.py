"""A guest on a disk that is written past the page cache, its writes gathered: it boots again, also after a power cut."""

from __future__ import annotations

import pickle
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cachefs.testing.guest import MIB, Guest, make_tools
from cachefs.testing.writelog import Replay, SyncEnded, WriteLog, at_random, materialise, nothing

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(300)]

Mount = Callable[..., Any]
DRIVER = (str(Path(__file__).parents[1] / "crash" / "recording.py"),)
CUTS = 4


@pytest.fixture
def disk(base: Path) -> Path:
    """The root file system, alone in a folder, to be written in place."""
    folder = base.parent / "disks"
    folder.mkdir()
    path = base.rename(folder / "vm1.raw")
    path.chmod(0o600)
    return path


def gathered(disk: Path) -> dict[str, Any]:
    layers = [{"coalesce": {"cluster": "256KiB", "buffer": "8MiB"}}]
    return {"disks": {"vm1": {"layers": layers, "backend": {"file": {"path": str(disk), "direct": True}}}}}


def check_file_system(image: Path) -> None:
    """Its journal replayed, as a mount would; nothing else may be wrong then."""
    for arguments, allowed in ((["-E", "journal_only", "-p"], (0, 1)), (["-f", "-n"], (0,))):
        done = subprocess.run(["e2fsck", *arguments, str(image)], capture_output=True, text=True, check=False)
        assert done.returncode in allowed, done.stdout + done.stderr


def test_what_a_guest_synced_survives_the_death_of_the_daemon(mount: Mount, guest: Guest, disk: Path) -> None:
    mounted = mount(gathered(disk))
    assert "boot 1, wrote before: nothing" in guest.boot(mounted.path / "vm1")
    mounted.kill()
    check_file_system(disk)
    mounted = mount(gathered(disk))
    assert "boot 2, wrote before: ok" in guest.boot(mounted.path / "vm1")
    mounted.umount()
    check_file_system(disk)


def test_fio_in_a_guest_finds_every_byte_again(mount: Mount, guest: Guest, disk: Path, tmp_path: Path) -> None:
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    make_tools(tmp_path / "tools", "fio")
    mounted = mount(gathered(disk))
    assert "fio: 1 job without an error" in guest.boot(mounted.path / "vm1", "fio", second=tmp_path / "tools")
    assert mounted.layer("vm1")["bytes_in"] > 30 * MIB
    mounted.umount()
    check_file_system(disk)


def test_a_power_cut_at_any_time_leaves_a_whole_file_system(
    mount: Mount, guest: Guest, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A superblock has two sectors. Of two that a cut has left from different times only the checksum would be wrong.
    subprocess.run(["tune2fs", "-O", "^metadata_csum", disk], check=True, capture_output=True)
    monkeypatch.setenv("RECORDING_FOLDER", str(disk.parent))
    monkeypatch.setenv("RECORDING_LOG", str(tmp_path / "log"))
    mounted = mount(gathered(disk), program=DRIVER)
    guest.boot(mounted.path / "vm1")
    mounted.umount()
    log = WriteLog(disk.parent)
    log.entries, log.times, log.initial = pickle.loads((tmp_path / "log").read_bytes())
    seed = random.randrange(1 << 16)
    print(f"seed {seed}, {len(log.entries)} entries")  # shown when the test fails
    dice = random.Random(seed)
    replay = Replay(log)
    for at in sorted(dice.sample(range(len(log.entries)), CUTS)):
        replay.advance(at)
        materialise(replay.files(at_random(dice)), tmp_path / "cut")
        check_file_system(tmp_path / "cut" / disk.name)
    synced = [index for index, entry in enumerate(log.entries) if isinstance(entry, SyncEnded)]
    replay.advance(synced[-1])
    materialise(replay.files(nothing), tmp_path / "cut")
    again = mount(gathered(tmp_path / "cut" / disk.name))
    assert "boot 2, wrote before: ok" in guest.boot(again.path / "vm1")
    again.umount()
