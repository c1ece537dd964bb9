"""The unit file is one that systemd accepts, and says what docs/deploy.md says about it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cachefs import supervisor

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "systemd" / "cachefs@.service"
# each gives the daemon a mount namespace of its own: what it mounts would be seen by nobody else
NAMESPACES = {
    "BindPaths",
    "BindReadOnlyPaths",
    "DynamicUser",
    "ExecPaths",
    "ExtensionDirectories",
    "ExtensionImages",
    "InaccessiblePaths",
    "MountAPIVFS",
    "MountFlags",
    "MountImages",
    "NoExecPaths",
    "PrivateDevices",
    "PrivateIPC",
    "PrivateMounts",
    "PrivateTmp",
    "ProcSubset",
    "ProtectControlGroups",
    "ProtectHome",
    "ProtectHostname",
    "ProtectKernelLogs",
    "ProtectKernelModules",
    "ProtectKernelTunables",
    "ProtectProc",
    "ProtectSystem",
    "ReadOnlyPaths",
    "ReadWritePaths",
    "RootDirectory",
    "RootImage",
    "TemporaryFileSystem",
}


def settings() -> dict[str, str]:
    lines = [line for line in UNIT.read_text().splitlines() if line and line[0] not in "#["]
    return dict(line.split("=", 1) for line in lines)


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    # verify wants programs that exist; where cachefs is installed is not what is tested
    program = tmp_path / "cachefs"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / "cachefs@disks.service"
    text = UNIT.read_text()
    assert text.count("/opt/cachefs/bin/cachefs ") == 2
    copy.write_text(text.replace("/opt/cachefs/bin/cachefs ", f"{program} "))
    done = subprocess.run([analyze, "verify", "--man=no", copy], capture_output=True, text=True)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "cachefs" in line]
    assert (done.returncode, ours) == (0, [])


def test_unit_leaves_the_mount_visible_to_the_host() -> None:
    assert not settings().keys() & NAMESPACES


def test_unit_stops_by_draining_and_never_restarts_what_restarting_cannot_help() -> None:
    unit = settings()
    assert unit["ExecStop"].split()[1] == "umount"
    assert "--force" not in unit["ExecStop"]
    # the exit codes of ConfigError and StoreError, see cachefs.errors
    assert unit["RestartPreventExitStatus"] == "0 2 3"


def test_unit_keeps_what_outlives_the_daemon_and_touches_no_mount_before_it_is_served_again() -> None:
    unit = settings()
    assert int(unit["FileDescriptorStoreMax"]) >= supervisor.MOST_DESCRIPTORS
    assert unit["Restart"] == "always"
    assert unit["StartLimitIntervalSec"] == "0"
    assert unit["NotifyAccess"] == "main"
    assert "WatchdogSec" in unit
    assert "mountinfo" in unit["ExecStartPre"]
    assert "ExecStopPost" not in unit


def test_manual_tells_the_places_that_the_unit_uses() -> None:
    manual = (ROOT / "docs" / "deploy.md").read_text()
    unit = settings()
    program, _, _, config, mountpoint = unit["ExecStart"].split()
    for place in (program.rsplit("/", 1)[0], config.replace("%i", "disks"), mountpoint.replace("%i", "disks")):
        assert place in manual
    for setting in ("TimeoutStopSec", "RestartPreventExitStatus", "KillMode"):
        assert setting in manual
