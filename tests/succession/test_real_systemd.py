"""The settings of our unit, a real systemd and its descriptor store, where the machine lets us run one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from served import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]
HERE = Path(__file__).parent


def test_systemd_keeps_the_mount(tmp_path: Path) -> None:
    if os.getuid() != 0 or not Path("/usr/lib/systemd/systemd").exists() or shutil.which("systemd-run") is None:
        pytest.skip("needs root and systemd")
    command = [sys.executable, HERE / "under_systemd.py", tmp_path, ROOT, ROOT / "systemd" / "cachefs@.service"]
    done = subprocess.run(
        ["unshare", "-m", HERE / "systemd.sh", tmp_path, *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=140,
    )
    if done.returncode == 77:
        pytest.skip(f"this machine runs no manager of ours: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    upgraded, running, ended = done.stdout.splitlines()
    assert re.search(r"took over from .* a pause of \d+ ms", upgraded)
    seen = json.loads(running)
    assert seen["survives"]["keeper"] == "alive"
    assert seen["survives"]["successions"] == 5
    assert seen["kept"] == 7  # the device, two memories, two descriptions each of data and map
    assert seen["restarts"] == 4
    assert json.loads(ended) == {"state": "inactive", "kept": 0}
