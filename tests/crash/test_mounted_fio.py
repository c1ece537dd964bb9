"""fio writes with O_DIRECT and O_DSYNC, many requests at a time, and the power is cut afterwards: what it was told is there.

For such writes of libaio and io_uring the kernel sends no FSYNC, and fio does not say when each was acknowledged. So the
daemon's log says it: a WRITE ends where its reply goes out. fio writes each byte once, and looks itself, on a mount of what
a cut at the very end leaves, whether everything is there.
"""

from __future__ import annotations

import pickle
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from powercut import Recorded, cut_everywhere, overlays

from cachefs.testing.model import Write
from cachefs.testing.stacks import Case, cow_layer, pattern
from cachefs.testing.writelog import Began, Ended, Replay, WriteLog, materialise, nothing

SIZE = 192 << 10  # read whole after each cut
CASE = Case("fio", SIZE, cow_layer(), on_disk=True)
DRIVER = (str(Path(__file__).with_name("recording.py")),)
CONFIG = {"disks": {"disk": {"layers": [{"cow": {}}], "backend": {"memory": {"size": SIZE}}}}}

pytestmark = pytest.mark.slow


def fio(path: Path, seed: int, *arguments: str) -> None:
    """Blocks of 512 bytes to 8 KiB at random, each byte of the disk in exactly one of them."""
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    blocks = ("--rw=randwrite", "--bsrange=512-8k", f"--size={SIZE}", f"--randseed={seed}", "--verify=crc32c")
    ways = ("--direct=1", "--sync=dsync", "--iodepth=8", "--thread", "--verify_state_save=0")
    command = ["fio", "--name=told", f"--filename={path}", *blocks, *ways, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def record(mount: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int, engine: str) -> Recorded:
    """What happened from the first mount to the unmount, fio in between."""
    monkeypatch.setenv("RECORDING_FOLDER", str(overlays(folder)))
    monkeypatch.setenv("RECORDING_LOG", str(folder / "log"))
    monkeypatch.setenv("RECORDING_WRITES", "1")
    mounted = mount(CONFIG, program=DRIVER)
    fio(mounted.path / "disk", seed, f"--ioengine={engine}", "--do_verify=0")
    came = mounted.status()["daemon"]["requests"]
    assert "FSYNC" not in came
    mounted.umount()
    log = WriteLog(overlays(folder))
    log.entries, log.times, log.initial = pickle.loads((folder / "log").read_bytes())
    begun = [entry for entry in log.entries if isinstance(entry, Began)]
    assert len(begun) == came["WRITE"]
    assert all(entry.synced for entry in begun)
    assert sum(entry.op.length for entry in begun if isinstance(entry.op, Write)) == SIZE
    assert sum(isinstance(entry, Ended) for entry in log.entries) == len(begun)
    return Recorded(CASE, folder / "again", pattern(SIZE), log)


def has_io_uring() -> bool:
    try:
        return Path("/proc/sys/kernel/io_uring_disabled").read_text().strip() == "0"
    except OSError:
        return False


@pytest.mark.parametrize("engine", ["libaio", "io_uring"])
async def test_what_fio_was_told_is_durable_survives_a_power_cut_at_any_time(
    mount: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    if engine == "io_uring" and not has_io_uring():
        pytest.skip("this kernel allows no io_uring")
    seed = random.randrange(1 << 16)
    print(f"seed {seed}")  # shown when the test fails
    disk = record(mount, tmp_path, monkeypatch, seed, engine)
    await cut_everywhere(disk, random.Random(seed), randoms=1)
    print(disk.counted)

    last = max(index for index, entry in enumerate(disk.log.entries) if isinstance(entry, Ended))
    replay = Replay(disk.log)
    replay.advance(last)
    materialise(replay.files(nothing), overlays(tmp_path / "cut"))
    after = mount({**CONFIG, "state_dir": str(tmp_path / "cut" / "state")})
    fio(after.path / "disk", seed, "--verify_only")


async def test_a_dataplane_that_does_not_flush_for_o_dsync_is_noticed(
    mount: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUTANT", "synchronous-write-not-flushed")
    disk = record(mount, tmp_path, monkeypatch, 1, "libaio")
    with pytest.raises(AssertionError, match="cut after entry"):
        await cut_everywhere(disk, random.Random(1))
