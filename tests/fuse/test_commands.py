"""The commands as an operator meets them: what they return, what they say, and what they wait for."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cachefs import mounts

pytestmark = pytest.mark.slow  # each starts a daemon, and commands beside it

SIZE = 1 << 20
ROOT = Path(__file__).parents[2]
FAULTY = (str(Path(__file__).with_name("faulty.py")),)


def config(*names: str, **keys: Any) -> dict[str, Any]:
    disk = {"layers": [{"cow": {}}], "backend": {"memory": {"size": SIZE}}, **keys}
    return {"disks": dict.fromkeys(names or ("vm1",), disk)}


def one_sentence(done: Any) -> str:
    """What a command that was refused said: one line, no traceback."""
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    return str(done.stderr)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A mountpoint that nobody uses, nor does afterwards."""
    path = tmp_path / "mountpoint"
    path.mkdir()
    yield path
    if mounts.find_mount(path) is not None:
        mounts.try_unmount(path, lazy=True)


def has_ended(pid: int) -> bool:
    """A zombie is nobody's daemon either: whoever adopted it has not looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class Command:
    """A command of cachefs that runs beside the test, with what it says."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cachefs", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self.said = ""

    def wait_for(self, pattern: str) -> str:
        """Until it said *pattern*."""
        assert self.process.stderr is not None
        deadline = time.monotonic() + 15
        while not re.search(pattern, self.said):
            ready, _, _ = select.select([self.process.stderr], [], [], deadline - time.monotonic())
            assert ready, f"never said {pattern!r}, only {self.said!r}"
            new = os.read(self.process.stderr.fileno(), 65536).decode()
            assert new, f"ended without {pattern!r}, said {self.said!r}"
            self.said += new
        return self.said

    def end(self) -> int:
        _, error = self.process.communicate(timeout=15)
        self.said += error.decode()
        return self.process.returncode


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def begin(*arguments: object) -> Command:
        started.append(Command(*arguments))
        return started[-1]

    yield begin
    for command in started:
        command.process.kill()
        command.process.communicate()


# ---- mount


def test_a_mount_in_the_background_returns_when_it_answers(mount: Any, cachefs: Any, folder: Path) -> None:
    started = time.monotonic()
    mounted = mount(config("vm1", "vm2"), foreground=False, at=folder)
    assert sorted(os.listdir(folder)) == ["vm1", "vm2"]
    assert mounted.status()["daemon"]["uptime_s"] <= time.monotonic() - started
    assert os.getsid(mounted.pid) != os.getsid(0)  # a Ctrl-C here does not reach it
    assert cachefs("umount", folder).returncode == 0
    assert has_ended(mounted.pid)
    assert os.listdir(folder) == []


def test_a_background_mount_logs_where_it_says(mount: Any) -> None:
    mounted = mount(config(), foreground=False)
    if Path("/run/systemd/journal/dev-log").is_socket():
        pytest.skip("the log goes to the journal here")
    assert "serving 1 disk at" in mounted.log()
    assert mounted.log() == mounted.log().replace("\x1b", "")
    for number in (0, 1, 2):
        assert str(mounted.path) not in os.readlink(f"/proc/{mounted.pid}/fd/{number}")


@pytest.mark.parametrize("foreground", [False, True], ids=["background", "foreground"])
@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("disks: [", 2, r"config0\.yaml:\d+:\d+: "),
        ("disks: {vm1: {layers: [cwo], image: b}}", 2, r"did you mean 'cow'"),
        ("state_dir: ./s\ndisks: {vm1: {backend: {file: {path: none.raw}}}}", 3, r"none\.raw: No such file"),
    ],
)
def test_a_refused_start_says_why_and_mounts_nothing(
    mount: Any, cachefs: Any, folder: Path, text: str, code: int, says: str, foreground: bool
) -> None:
    done = cachefs("mount", *(["-f"] if foreground else []), mount.write(text), folder)
    assert done.returncode == code
    assert re.search(says, done.stderr)
    assert "Traceback" not in done.stderr
    assert mounts.find_mount(folder) is None


def test_a_missing_config_is_a_configuration_error(cachefs: Any, folder: Path, tmp_path: Path) -> None:
    done = cachefs("mount", tmp_path / "nothing.yaml", folder)
    assert done.returncode == 2
    assert "nothing.yaml" in one_sentence(done)


def test_every_store_that_cannot_be_opened_is_named(mount: Any, cachefs: Any, folder: Path) -> None:
    backends = {name: {"backend": {"file": {"path": f"{name}.raw"}}} for name in ("one", "two")}
    done = cachefs("mount", mount.write({"disks": backends}), folder)
    assert done.returncode == 3
    assert "one.raw" in done.stderr
    assert "two.raw" in done.stderr


def test_a_locked_overlay_names_the_daemon_that_holds_it(mount: Any, cachefs: Any, folder: Path) -> None:
    mounted = mount(config())
    done = cachefs("mount", mount.write(config()), folder)
    assert done.returncode == 3
    assert f"pid {mounted.pid}" in one_sentence(done)
    assert mounted.status()["daemon"]["state"] == "serving"


def test_a_missing_mountpoint_says_how_to_make_it(mount: Any, cachefs: Any, tmp_path: Path) -> None:
    done = cachefs("mount", mount.write(config()), tmp_path / "none")
    assert done.returncode == 1
    assert f"mkdir -p {tmp_path / 'none'}" in one_sentence(done)


def test_a_mountpoint_that_is_in_use_says_so(mount: Any, cachefs: Any) -> None:
    mounted = mount(config())
    done = cachefs("mount", mount.write(config("other")), mounted.path)
    assert done.returncode == 1
    assert f"cachefs umount {mounted.path}" in one_sentence(done)
    assert os.listdir(mounted.path) == ["vm1"]


@pytest.mark.parametrize("where", ["state_dir", "overlay", "link"])
def test_a_store_inside_the_mountpoint_is_refused(
    mount: Any, cachefs: Any, folder: Path, tmp_path: Path, where: str
) -> None:
    (tmp_path / "link").symlink_to(folder)
    inside = {"state_dir": folder / "state", "overlay": folder / "overlay", "link": tmp_path / "link" / "overlay"}[
        where
    ]
    text = config() if where == "state_dir" else config(layers=[{"cow": {"path": str(inside)}}])
    if where == "state_dir":
        text["state_dir"] = str(inside)
    done = cachefs("mount", mount.write(text), folder)
    assert done.returncode == 3
    assert "inside the mountpoint" in one_sentence(done)
    assert mounts.find_mount(folder) is None
    assert os.listdir(folder) == []  # nothing was made in it either


def test_ctrl_c_during_the_start_leaves_nothing_behind(
    start: Callable[..., Command], folder: Path, tmp_path: Path, wait_until: Any
) -> None:
    os.mkfifo(tmp_path / "config.yaml")  # a configuration that takes its time
    command = start("mount", tmp_path / "config.yaml", folder)

    def opened() -> int | None:
        with contextlib.suppress(OSError):  # ENXIO: nobody reads it yet
            return os.open(tmp_path / "config.yaml", os.O_WRONLY | os.O_NONBLOCK)
        return None

    descriptor = wait_until(opened, "the daemon reads its configuration")
    try:
        command.process.send_signal(signal.SIGINT)
        assert command.end() == 1
        assert command.said.splitlines()[-1] == "interrupted; nothing is mounted"
        with pytest.raises(BrokenPipeError):  # the daemon that was starting is gone
            os.write(descriptor, b"#")
    finally:
        os.close(descriptor)
    assert mounts.find_mount(folder) is None


# ---- umount


def test_umount_says_who_it_waits_for_and_ends_when_they_close(mount: Any, start: Callable[..., Command]) -> None:
    mounted = mount(config())
    with (mounted.path / "vm1").open("rb"):
        command = start("umount", mounted.path)
        said = command.wait_for("leaves the mount")
        name = Path(f"/proc/{os.getpid()}/comm").read_text().strip()
        assert f"waiting for {name} (pid {os.getpid()}), which has vm1 open" in said
        assert mounted.status()["daemon"]["state"] == "serving"
    assert command.end() == 0
    assert mounted.process.wait(15) == 0
    assert mounts.find_mount(mounted.path) is None


def test_umount_names_a_process_that_stands_in_the_directory(mount: Any, start: Callable[..., Command]) -> None:
    mounted = mount(config())
    with subprocess.Popen(["sleep", "60"], cwd=mounted.path) as holder:
        command = start("umount", mounted.path)
        assert f"sleep (pid {holder.pid}), which has the directory open" in command.wait_for("leaves the mount")
        holder.kill()
    assert command.end() == 0


def test_umount_names_the_loop_device_over_a_disk(mount: Any, start: Callable[..., Command]) -> None:
    mounted = mount(config())
    done = subprocess.run(
        ["losetup", "--find", "--show", mounted.path / "vm1"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no loop device: {done.stderr}")
    device = done.stdout.strip()
    try:
        command = start("umount", mounted.path)
        said = command.wait_for("leaves the mount")
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
    assert f"loop device {device}, which is set up over vm1 (losetup -d {device})" in said
    assert command.end() == 0


def test_ctrl_c_of_umount_leaves_the_mount_as_it_is(mount: Any, start: Callable[..., Command]) -> None:
    mounted = mount(config())
    with (mounted.path / "vm1").open("r+b", buffering=0) as file:
        command = start("umount", mounted.path)
        command.wait_for("leaves the mount")
        command.process.send_signal(signal.SIGINT)
        assert command.end() == 1
        assert "Traceback" not in command.said
        file.write(b"goes on")
    assert mounted.status()["daemon"]["state"] == "serving"
    assert (mounted.path / "vm1").read_bytes()[:7] == b"goes on"


def test_umount_flushes(mount: Any, cachefs: Any) -> None:
    mounted = mount(config())
    with (mounted.path / "vm1").open("r+b") as file:
        file.write(b"never synced")
    assert cachefs("umount", mounted.path).returncode == 0
    assert (mount(config()).path / "vm1").read_bytes()[:12] == b"never synced"


def test_umount_of_what_is_not_mounted_says_so(cachefs: Any, folder: Path) -> None:
    for path in (folder, folder / "none", Path("/proc")):
        done = cachefs("umount", path)
        assert done.returncode == 1
        assert "no cachefs is mounted there" in one_sentence(done)


@pytest.mark.alone
@pytest.mark.logs("forced stop", "something still hangs")
def test_umount_by_force_ends_a_daemon_whose_layer_hangs(mount: Any, cachefs: Any, wait_until: Any) -> None:
    with ThreadPoolExecutor() as threads:  # ends after the mount is gone
        layers = [{"faulty": {"rules": ["read 0 hang"]}}, {"cow": {}}]
        mounted = mount(config(layers=layers), program=FAULTY)
        descriptor = os.open(mounted.path / "vm1", os.O_RDWR)
        os.pwrite(descriptor, b"acknowledged", 4096)
        read = threads.submit(os.pread, descriptor, 1, 0)
        try:
            wait_until(lambda: mounted.layer("vm1")["hanging"], "the read hangs")
            started = time.monotonic()
            done = cachefs("umount", "--force", mounted.path)
            assert time.monotonic() - started < 5
        finally:
            mounted.kill()
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert isinstance(read.exception(), OSError)
    with pytest.raises(OSError):
        os.close(descriptor)
    assert mounts.find_mount(mounted.path) is None
    assert os.listdir(mounted.path) == []
    assert (mount(config()).path / "vm1").read_bytes()[4096:4108] == b"acknowledged"


def test_umount_by_force_ends_a_daemon_that_does_not_run(mount: Any, cachefs: Any) -> None:
    mounted = mount(config())
    mounted.process.send_signal(signal.SIGSTOP)
    patient = cachefs("umount", mounted.path)
    assert patient.returncode == 1
    assert f"cachefs umount --force {mounted.path}" in one_sentence(patient)
    forced = cachefs("umount", "--force", mounted.path)
    assert "Traceback" not in forced.stderr
    assert mounts.find_mount(mounted.path) is None
    # nothing tells who serves a mount that does not answer: it ends as soon as it runs again
    mounted.process.send_signal(signal.SIGCONT)
    mounted.process.wait(15)


# ---- signals


@pytest.mark.logs("still serving .*: waiting for .* which has vm1 open")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(mount: Any, wait_until: Any, number: int) -> None:
    mounted = mount(config())
    with (mounted.path / "vm1").open("r+b", buffering=0) as file:
        mounted.process.send_signal(number)
        wait_until(lambda: mounted.status()["daemon"]["state"] == "draining", "it drains")
        wait_until(lambda: "still serving" in mounted.log(), "it says who it waits for")
        assert file.write(b"served to the end") == 17
    assert mounted.process.wait(15) == 0
    assert mounts.find_mount(mounted.path) is None
    assert (mount(config()).path / "vm1").read_bytes()[:17] == b"served to the end"


@pytest.mark.logs("still serving", "forced stop")
def test_a_second_signal_does_not_wait(mount: Any, wait_until: Any) -> None:
    mounted = mount(config())
    descriptor = os.open(mounted.path / "vm1", os.O_RDWR)
    os.pwrite(descriptor, b"flushed all the same", 0)
    mounted.process.send_signal(signal.SIGTERM)
    wait_until(lambda: mounted.status()["daemon"]["state"] == "draining", "it drains")
    mounted.process.send_signal(signal.SIGTERM)
    mounted.process.wait(15)
    with pytest.raises(OSError):
        os.close(descriptor)
    assert mounts.find_mount(mounted.path) is None
    assert (mount(config()).path / "vm1").read_bytes()[:20] == b"flushed all the same"


# ---- status and check


def test_status_is_a_table_for_people(mount: Any, cachefs: Any) -> None:
    mounted = mount(config("vm1", "vm2"))
    (mounted.path / "vm1").read_bytes()
    done = cachefs("status", mounted.path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{mounted.path}: serving, pid {mounted.pid}, ")
    assert any(re.match(r"vm1 +cow +serving +1 ?MiB", line) for line in lines), done.stdout
    assert len([line for line in lines if "memory" in line]) == 2


def test_status_as_json_has_everything(mount: Any, cachefs: Any) -> None:
    mounted = mount(config("vm1", "vm2"))
    done = cachefs("status", "--json", mounted.path)
    found = json.loads(done.stdout)
    assert found["daemon"]["pid"] == mounted.pid
    assert found["daemon"]["mountpoint"] == str(mounted.path)
    assert list(found["disks"]) == ["vm1", "vm2"]
    assert found["disks"]["vm1"]["size"] == SIZE
    assert [layer["layer"] for layer in found["disks"]["vm1"]["layers"]] == ["vm1/cow", "vm1/memory"]


def test_status_of_what_is_not_mounted_says_so(cachefs: Any, folder: Path) -> None:
    done = cachefs("status", folder)
    assert done.returncode == 1
    assert "no mount of cachefs" in one_sentence(done)


def test_status_of_a_daemon_that_hangs_says_so(mount: Any, cachefs: Any) -> None:
    mounted = mount(config())
    mounted.process.send_signal(signal.SIGSTOP)
    done = cachefs("status", mounted.path)
    assert done.returncode == 1
    assert "did not answer" in one_sentence(done)


def test_check_mounts_nothing_and_makes_nothing(mount: Any, cachefs: Any, tmp_path: Path) -> None:
    done = cachefs("check", mount.write(config("vm1", "vm2")))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("ok: 2 disks, 0 images\n")
    assert not (tmp_path / "state").exists()
