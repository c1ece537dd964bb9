"""A mount that is not root's may have fewer requests in the background of the kernel; a hung disk must not use them up."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

USER = 65534
PROGRAM = (str(Path(__file__).with_name("faulty_as_user.py")),)
LIMIT = Path("/sys/module/fuse/parameters/max_user_bgreq")
BACKGROUND = 128
ALLOWED = BACKGROUND * 7 // 8
SIZE = 1 << 20


@pytest.fixture
def few_in_the_background() -> Iterator[None]:
    """Of mounts that users make from now on."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user, and change the kernel's limit")
    if os.stat("/dev/fuse").st_mode & 0o006 != 0o006:
        pytest.skip("/dev/fuse is not open to users")
    with LIMIT.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two test runs at once would restore each other's
        before = file.read()
        try:
            LIMIT.write_text(str(BACKGROUND))
        except OSError as exc:
            pytest.skip(f"{LIMIT} cannot be changed here: {exc.strerror}")
        yield
        LIMIT.write_text(before)


@pytest.fixture
def folder() -> Iterator[Path]:
    """The user's own; pytest's are for root only."""
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as name:
        (Path(name) / "mnt").mkdir()
        for path in (Path(name), Path(name) / "mnt"):
            os.chown(path, USER, USER)
        yield Path(name)


def as_user(*command: object) -> subprocess.Popen[str]:
    """Without allow_other the mount is there for its user only, and not for root."""
    for program in (str(command[0]), "getfattr"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    return subprocess.Popen(
        list(map(str, command)),
        user=USER,
        group=USER,
        extra_groups=[],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd="/",
    )


def fio(disk: Path, reads: int, *arguments: str) -> subprocess.Popen[str]:
    """That many direct reads at a time, which are background requests."""
    ways = ("--ioengine=libaio", "--direct=1", "--rw=randread", "--bs=4k", "--norandommap", f"--io_size={reads * 4}k")
    fixed = (f"--filename={disk}", f"--size={SIZE}", f"--iodepth={reads}", "--thread", "--output-format=json")
    return as_user("fio", "--name=reads", *ways, *fixed, *arguments)


def daemon(at: Path) -> Any:
    output, _ = as_user("getfattr", "--only-values", "-n", "user.cachefs.status", "--absolute-names", at).communicate()
    return json.loads(output)["daemon"]


@pytest.fixture
def hung(few_in_the_background: None, folder: Path, mount: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """vm1 hangs; vm2 does not finish reads at once, but soon."""
    monkeypatch.setenv("RUN_AS", str(USER))
    backend = {"memory": {"size": SIZE}}
    rules = {"vm1": ["read * hang"], "vm2": ["read none hang"]}
    disks = {name: {"layers": [{"faulty": {"rules": rules[name]}}], "backend": backend} for name in rules}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"state_dir": str(folder / "state"), "disks": disks}))
    return mount(config, at=folder / "mnt", program=PROGRAM)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.logs("refused with EIO: too many requests of this disk wait")
def test_a_hung_disk_of_a_users_mount_leaves_room_in_the_kernel_for_the_others(
    hung: Any, wait_until: Callable[..., Any]
) -> None:
    refused = 2 * BACKGROUND - ALLOWED
    assert f"Uid:\t{USER}\t{USER}\t{USER}" in Path(f"/proc/{hung.pid}/status").read_text()
    client = fio(hung.path / "vm1", 2 * BACKGROUND, "--continue_on_error=read")
    wait_until(lambda: daemon(hung.path)["refused_requests"] == refused, "what is too much is refused")
    assert daemon(hung.path)["waiting_requests"] == ALLOWED
    other = fio(hung.path / "vm2", BACKGROUND - ALLOWED)
    output, _ = other.communicate(timeout=15)
    assert other.returncode == 0
    assert json.loads(output)["jobs"][0]["read"]["total_ios"] == BACKGROUND - ALLOWED
    assert daemon(hung.path)["waiting_requests"] == ALLOWED
    assert client.poll() is None

    hung.process.send_signal(signal.SIGUSR1)
    output, _ = client.communicate(timeout=15)
    job = json.loads(output)["jobs"][0]
    assert (job["total_err"], job["first_error"]) == (refused, errno.EIO)
    assert job["read"]["total_ios"] == 2 * BACKGROUND
    assert len(re.findall("refused with EIO", hung.log())) == 1
