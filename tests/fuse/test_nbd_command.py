"""Disks whose server the daemon starts itself: it comes back when it ends, hangs alone, and goes with the daemon."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from readers import reading
from test_files import need, run

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def nbdkit_is_here() -> None:
    need("nbdkit")


def disk(*command: object, layers: tuple[Any, ...] = (), **options: Any) -> dict[str, Any]:
    return {"layers": [*layers], "backend": {"nbd": {"command": [*map(str, command)], **options}}}


def server_pid(mounted: Any, name: str) -> int:
    return int(mounted.layer(name, -1)["server_pid"])


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("foreground", [True, False])
def test_disk_on_a_server_of_its_own_keeps_what_was_written(
    mount: Any, holed_image: Path, foreground: bool, wait_until: Callable[..., Any]
) -> None:
    need("mkfs.ext4")
    mounted = mount({"disks": {"vm": disk("nbdkit", "file", holed_image)}}, foreground=foreground)
    pid = server_pid(mounted, "vm")
    run("mkfs.ext4", "-q", "-F", mounted.path / "vm")
    assert mounted.layer("vm", -1)["connections"] == 4
    mounted.umount()
    wait_until(lambda: not runs(pid), "the end of the server")
    run("fsck.ext4", "-f", "-n", holed_image)


@pytest.mark.logs("connection lost, making a new one", "starting it again")
def test_server_that_is_killed_under_reads_is_started_again_and_costs_no_error(
    mount: Any, holed_image: Path, wait_until: Callable[..., Any]
) -> None:
    mounted = mount(
        {"disks": {"vm": disk("nbdkit", "-r", "--filter=delay", "file", holed_image, "rdelay=10ms", layers=("cow",))}}
    )
    pids = set()
    with reading(mounted.path / "vm", holed_image.read_bytes(), wait_until) as readers:
        for _ in range(3):
            readers.wait_for_reads()
            pid = wait_until(lambda: server_pid(mounted, "vm"), "a server")
            pids.add(pid)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: server_pid(mounted, "vm") not in (0, pid), "the next server")
    assert len(pids) == 3
    assert mounted.layer("vm", -1)["server_starts"] == 4
    mounted.umount()
    assert (
        len(re.findall(r"vm/nbd: the server \(nbdkit .*\) was ended by SIGKILL; starting it again in", mounted.log()))
        == 3
    )


@pytest.mark.logs("the server did not end", "connection lost", "forced stop", "of stuck failed", "stuck/nbd")
def test_server_that_hangs_stops_neither_other_disks_nor_a_forced_unmount(
    mount: Any, holed_image: Path, tmp_path: Path, cachefs: Any, wait_until: Callable[..., Any]
) -> None:
    mounted = mount(
        {
            "disks": {
                "stuck": disk("nbdkit", "-r", "file", holed_image, layers=("cow",)),
                "fine": disk("nbdkit", "memory", "1M"),
            }
        }
    )
    pid = server_pid(mounted, "stuck")
    os.kill(pid, signal.SIGSTOP)
    reader = threading.Thread(target=_read_if_possible, args=(mounted.path / "stuck",))
    reader.start()
    wait_until(lambda: mounted.layer("stuck", -1)["in_flight"] > 0, "the read")
    with (mounted.path / "fine").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"fine", 4096)
        os.fsync(file.fileno())
        assert os.pread(file.fileno(), 4, 4096) == b"fine"
    done = cachefs("umount", "--force", mounted.path)
    assert done.returncode == 0, done.stderr
    reader.join(30)
    mounted.process.wait(30)
    wait_until(lambda: not runs(pid), "the end of the server")
    assert "the stop was forced, and the server did not end" in mounted.log()
    assert "something still hangs" not in mounted.log()


def _read_if_possible(path: Path) -> None:
    try:
        path.read_bytes()
    except OSError:
        return


def test_servers_end_when_the_daemon_is_killed_and_the_next_mount_has_new_ones(
    mount: Any, holed_image: Path, wait_until: Callable[..., Any]
) -> None:
    need("qemu-nbd")
    config = {
        "disks": {
            "vm": disk("qemu-nbd", "-t", "-e", "4", "-f", "raw", holed_image),
            "scratch": disk("nbdkit", "memory", "1M"),
        }
    }
    mounted = mount(config)
    with (mounted.path / "vm").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"acknowledged", 4096)
    pids = [server_pid(mounted, name) for name in config["disks"]]
    mounted.kill()
    mounted.clean_up()
    # at once: image locks of a server that is not quite gone must not be in the way
    mounted = mount(config)
    assert not any(runs(pid) for pid in pids)
    assert (mounted.path / "vm").read_bytes()[4096:4108] == b"acknowledged"
    mounted.umount()


def test_what_the_server_says_is_logged_with_the_name_of_the_disk(mount: Any, holed_image: Path) -> None:
    script = 'echo "first line" >&2; echo "second line" >&2; exec nbdkit file "$1"'
    mounted = mount({"disks": {"vm": disk("sh", "-c", script, "sh", holed_image)}})
    mounted.umount()
    assert re.search(r"vm/nbd: server: first line\n.*vm/nbd: server: second line\n", mounted.log())


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (
            ("no-such-server",),
            "vm/nbd: there is no program 'no-such-server' to start: install it, or write its whole path",
        ),
        (
            ("nbdkit", "file", "/no/such/image"),
            r"vm/nbd: the server \(nbdkit file /no/such/image\) ended with exit status 1: nbdk",
        ),
        (("nbdkit", "-U", "/tmp/x", "null"), "leave out what names one"),
        (("sleep", "60"), "no connection within 1 s"),
    ],
)
def test_command_that_does_not_serve_fails_the_mount_in_one_sentence(
    mount: Any, tmp_path: Path, cachefs: Any, command: tuple[str, ...], sentence: str
) -> None:
    (tmp_path / "mnt").mkdir()
    config = mount.write({"disks": {"vm": disk(*command, deadline="1s", connect_timeout="200ms")}})
    done = cachefs("mount", "--foreground", config, tmp_path / "mnt")
    assert done.returncode == 3, done.stderr
    assert re.search(sentence, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    left = run("sh", "-c", f"grep -lsz CACHEFS_SERVER={tmp_path}/ /proc/[0-9]*/environ || true").stdout
    assert left == ""
