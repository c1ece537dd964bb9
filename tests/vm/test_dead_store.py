"""A store that is dead, or that forgets: a forced unmount is soon, and what was acknowledged and not flushed is there again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from load import fio
from nbdservers import Server, Servers
from networks import Network

from cachefs.testing.guest import MIB

SIZE = 16 * MIB
FORGETFUL_SIZE = 6 * MIB  # written by a shell for each request
ROUNDS = int(os.environ.get("CACHEFS_FORCED_ROUNDS", "1"))
KILLS = 3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.logs("connection lost, making a new one", "are to be sent again"),
]

# An export in a file that dies with the server; only a flush copies it to DURABLE. A flush of a server that was killed, and
# whose shell lives on, does not count any more.
FORGETFUL = """#!/bin/sh
case $1 in
load) cp DURABLE "$tmpdir/volatile" && echo "$tmpdir" >DURABLE.current ;;
thread_model) echo parallel ;;
can_write | can_flush | can_multi_conn) exit 0 ;;
get_size) stat -c %s DURABLE ;;
pread) exec dd if="$tmpdir/volatile" bs=64k iflag=skip_bytes,count_bytes skip="$4" count="$3" status=none ;;
pwrite) exec dd of="$tmpdir/volatile" bs=64k iflag=fullblock oflag=seek_bytes seek="$4" conv=notrunc status=none ;;
flush)
    part=$(mktemp DURABLE.XXXXXX) && cp "$tmpdir/volatile" "$part" || exit 1
    read -r current <DURABLE.current
    if [ "$current" = "$tmpdir" ]; then mv "$part" DURABLE; else exit 1; fi
    ;;
*) exit 2 ;;
esac
"""


@pytest.fixture
def network(tmp_path: Path, wait_until: Callable[..., Any]) -> Iterator[Network]:
    made = Network(tmp_path, tmp_path / "a.sock", wait_until)
    yield made
    made.close()


@pytest.fixture
def exports(tmp_path: Path) -> Path:
    """A folder of two exports."""
    folder = tmp_path / "exports"
    folder.mkdir()
    for name in ("vm1", "vm2"):
        (folder / name).write_bytes(os.urandom(MIB) * (SIZE // MIB))
    return folder


def held(folder: Path) -> list[threading.Thread]:
    """A read, a write of less than a block, and an fsync of another disk (Linux has it wait for writes): a thread for each."""
    first, second = (os.open(folder / name, os.O_RDWR | os.O_CLOEXEC) for name in ("vm1", "vm2"))

    def run(operation: Callable[..., Any], *arguments: Any) -> None:
        with contextlib.suppress(OSError):
            operation(*arguments)
        done.wait()
        with contextlib.suppress(OSError):
            os.close(arguments[0])

    done = threading.Barrier(3)
    operations = [(os.pread, first, 4096, 4 * MIB), (os.pwrite, first, b"w" * 100, 8 * MIB + 50), (os.fsync, second)]
    threads = [threading.Thread(target=run, args=operation, daemon=True) for operation in operations]
    for thread in threads:
        thread.start()
    return threads


@contextlib.contextmanager
def dead(fault: str, servers: Servers, server: Server, network: Network) -> Iterator[None]:
    assert server.process is not None
    if fault == "black hole":
        network.cut()
        yield
        network.mend()
    elif fault == "stopped":
        server.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, server.process.pid, os.WSTOPPED | os.WNOWAIT)
        yield
        server.kill()  # an nbdkit that goes on finds its clients gone, and may abort: raw_send_socket: Assertion `sock >= 0'
        servers.restart(server)
    else:
        server.kill()
        yield
        servers.restart(server)


@pytest.mark.logs("forced stop", "the last flush failed", "Errors in", "failed: ")
@pytest.mark.parametrize("fault", ["killed", "stopped", "black hole"])
@pytest.mark.parametrize("layers", [[], ["cow"]], ids=["nbd", "cow"])
def test_forced_unmount_of_a_dead_store_is_soon(
    mount: Any,
    cachefs: Callable[..., Any],
    servers: Servers,
    network: Network,
    exports: Path,
    wait_until: Callable[..., Any],
    layers: list[str],
    fault: str,
) -> None:
    _, server = servers.nbdkit("file", f"dir={exports}")

    def store(name: str) -> dict[str, Any]:
        return {"nbd": {"uri": f"nbd://{network.address}/{name}", "on_failure": "hold"}}

    def unmount_by_force() -> float:
        mounted = mount({"disks": {name: {"layers": layers, "backend": store(name)} for name in ("vm1", "vm2")}})
        for name in ("vm1", "vm2"):
            with (mounted.path / name).open("r+b", buffering=0) as disk:
                disk.write(b"acknowledged")
        waiting = 2 if layers else 3  # an fsync of an overlay is a local one
        with dead(fault, servers, server, network):
            threads = held(mounted.path)
            wait_until(lambda: mounted.status()["daemon"]["waiting_requests"] == waiting, "requests that are held")
            began = time.monotonic()
            done = cachefs("umount", "--force", mounted.path)
            took = time.monotonic() - began
            assert done.returncode == 0, done.stderr
            for thread in threads:
                thread.join(5)
                assert not thread.is_alive()
        return took

    took = sorted(unmount_by_force() for _ in range(ROUNDS))
    print(f"forced unmount, {fault}: {took[0]:.2f} to {took[-1]:.2f} s")
    assert took[-1] < 5


def test_what_was_acknowledged_outlives_a_server_that_forgets_what_it_was_not_asked_to_flush(
    mount: Any, servers: Servers, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    durable, script = tmp_path / "durable", tmp_path / "forgetful.sh"
    durable.write_bytes(bytes(FORGETFUL_SIZE))
    script.write_text(FORGETFUL.replace("DURABLE", str(durable)))
    script.chmod(0o755)
    uri, server = servers.nbdkit("sh", script)
    mounted = mount({"disks": {"vm": {"backend": {"nbd": {"uri": uri, "fence": "500ms"}}}}})

    def unflushed() -> int:
        found = mounted.layer("vm", -1)["unflushed_bytes"]
        assert isinstance(found, int)
        return found

    def blocks(path: Path, *arguments: str) -> list[str]:
        return fio([path], FORGETFUL_SIZE, 1, "--bsrange=4k-64k", "--fsync=0", *arguments)

    command = blocks(mounted.path / "vm", "--do_verify=0")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as writing:
        for count in range(1, KILLS + 1):
            wait_until(lambda so_far=count: unflushed() > so_far * MIB, "writes that are acknowledged")
            assert not any(durable.read_bytes())
            server.kill()
            servers.restart(server)
        said, _ = writing.communicate(timeout=60)
    assert writing.returncode == 0, said

    def verify(path: Path) -> None:
        done = subprocess.run(blocks(path, "--verify_only"), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    verify(mounted.path / "vm")
    disk = os.open(mounted.path / "vm", os.O_RDWR | os.O_CLOEXEC)
    os.fsync(disk)
    server.kill()  # and forgets for the last time
    verify(durable)
    servers.restart(server)
    verify(mounted.path / "vm")
    print(f"{mounted.layer('vm', -1)['resent']} writes were sent again")
    os.close(disk)
    mounted.umount()
