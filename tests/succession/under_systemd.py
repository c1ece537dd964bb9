"""Runs inside of systemd.sh: `under_systemd.py FOLDER ROOT UNIT-FILE`. A mount as a unit, killed and upgraded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

folder, root, unit = map(Path, sys.argv[1:])
mountpoint = folder / "mnt"
FROM_THE_UNIT = (
    *("Type", "NotifyAccess", "FileDescriptorStoreMax", "WatchdogSec", "KillMode", "Restart", "RestartSec"),
    *("RestartPreventExitStatus", "StartLimitIntervalSec"),
)


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=60, cwd="/")
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def show(name: str) -> str:
    return run("systemctl", "--user", "show", "cachefs", "--value", "-p", name).strip()


def status() -> dict[str, Any]:
    daemon: dict[str, Any] = json.loads(os.getxattr(mountpoint, "user.cachefs.status"))["daemon"]
    return daemon


def kill() -> None:
    pid = status()["pid"]
    assert str(pid) == show("MainPID")
    os.kill(pid, signal.SIGKILL)


mountpoint.mkdir()
(folder / "base.raw").write_bytes(b"base" * 65536)
disks = {"vm1": {"layers": [{"cow": {}}], "backend": {"file": {"path": str(folder / "base.raw")}}}}
config = folder / "config.yaml"
config.write_text(json.dumps({"state_dir": str(folder / "state"), "disks": disks}))
lines = [line.split("=", 1) for line in unit.read_text().splitlines() if "=" in line and line[0] != "#"]
properties = [f"--property={name}={value}" for name, value in lines if name in FROM_THE_UNIT]
assert len(properties) == len(FROM_THE_UNIT)
environment = [f"--setenv=PYTHONPATH={root}", f"--setenv=PATH={os.environ['PATH']}"]
command = [sys.executable, "-m", "cachefs", "mount", "-f", config, mountpoint]
run("systemd-run", "--user", "--unit=cachefs", *properties, *environment, *command)
with (mountpoint / "vm1").open("r+b", buffering=0) as disk:
    disk.write(b"acknowledged")
    for _ in range(3):
        kill()
        assert os.pread(disk.fileno(), 12, 0) == b"acknowledged"
    os.environ["PYTHONPATH"] = str(root)
    print(run(sys.executable, "-m", "cachefs", "upgrade", mountpoint), end="")
    kill()  # the successor is the main process now
    assert os.pread(disk.fileno(), 12, 0) == b"acknowledged"
    seen = status()["survives"]
print(json.dumps({"survives": seen, "kept": int(show("NFileDescriptorStore")), "restarts": int(show("NRestarts"))}))
run(sys.executable, "-m", "cachefs", "umount", mountpoint)
while show("ActiveState") not in ("inactive", "failed"):
    pass
print(json.dumps({"state": show("ActiveState"), "kept": int(show("NFileDescriptorStore"))}))
