"""Twenty kills and five upgrades under load, beside a guest that boots again and again; minutes, so only where asked for.

CACHEFS_LONG_SUCCESSION=1 python -m pytest -s tests/succession/test_long_run.py
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_mounted_succession as short
from served import ROOT, Served

from cachefs.testing.guest import Guest, GuestError, build, make_image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vm,
    pytest.mark.timeout(1500),
    pytest.mark.skipif("CACHEFS_LONG_SUCCESSION" not in os.environ, reason="set CACHEFS_LONG_SUCCESSION for it"),
]

KILLS, UPGRADES = 20, 5
INTERVAL_S = 15.5  # from one kill to the next: five within a minute are a crash loop
image = short.image


class Boots(threading.Thread):
    """Boots the guest from *disk* until `over`."""

    def __init__(self, guest: Guest, disk: Path) -> None:
        super().__init__(daemon=True)
        self._guest, self._disk = guest, disk
        self.over = threading.Event()
        self.count = 0
        self.problem = ""

    def run(self) -> None:
        while not self.over.is_set() and not self.problem:
            try:
                said = self._guest.boot(self._disk)
            except Exception as exc:
                if "start_kernel" in str(exc):  # before it has seen a disk: emulated clocks do not suit a busy node
                    continue
                self.problem = repr(exc)
                return
            self.count += 1
            heard = "; ".join(said)
            if "digests ok" not in heard or (self.count > 1 and "wrote before: ok" not in heard):
                self.problem = heard


def longest_of(reader: short.Reader) -> float:
    longest, reader.longest_s = reader.longest_s, 0.0
    return round(longest, 3)


def test_twenty_kills_and_five_upgrades(
    served: Callable[..., Served], image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    try:
        guest = build(ROOT / ".build" / "guest")
    except GuestError as exc:
        pytest.skip(f"no test guest: {exc}")
    seconds = (KILLS + 1) * INTERVAL_S
    monkeypatch.setattr(short, "SIZE", int(seconds) * (1 << 20))
    config: dict[str, Any] = short.disks(image, tmp_path)
    base = tmp_path / "guest.raw"
    make_image(base)
    large = tmp_path / "large.raw"
    with large.open("wb") as file:
        file.truncate(short.SIZE)
        file.seek(0)
        file.write(image.read_bytes())
    config["images"]["large"] = {"layers": [{"cache": {"pool": "node"}}], "backend": {"file": {"path": str(large)}}}
    config["disks"]["vm2"]["image"] = "large"
    config["disks"]["guest"] = {"layers": [{"cow": {}}], "backend": {"file": {"path": str(base)}}}
    mounted = served(config)
    boots = Boots(guest, mounted.path / "guest")
    boots.start()
    crashes, upgrades, reported = [], [], []
    with short.load(mounted, image, seconds) as reader:
        for number in range(KILLS):
            time.sleep(INTERVAL_S / 2)
            longest_of(reader)
            if number % 4 == 3:
                reported.append(mounted.upgrade())
                time.sleep(1)
                upgrades.append(longest_of(reader))
            time.sleep(INTERVAL_S / 2)
            longest_of(reader)
            mounted.kill()
            time.sleep(3)
            crashes.append(longest_of(reader))
            print(f"kill {number + 1}: {crashes[-1]} s", flush=True)
    boots.over.set()
    boots.join(120)
    print(
        f"longest waits: after a crash {sorted(crashes)} s, at an upgrade {sorted(upgrades)} s (reported {reported} ms)"
    )
    print(f"{boots.count} boots; {mounted.status()['daemon']['survives']}")
    assert not boots.problem
    assert boots.count > 2
    assert len(upgrades) == UPGRADES
    mounted.umount()
