"""A guest under load, and its store fails: killed, reset in mid-reply, unreachable. Over a writable export and an overlay.

By default the time limits are short. CACHEFS_LONG_OUTAGES=1 adds a run with those of the configuration, and with long outages.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from load import CachedReads, Load, fio, fio_load, guest_load
from nbdservers import Servers
from networks import Network

from cachefs.testing.guest import MIB, Guest, make_image

pytestmark = [
    pytest.mark.vm,
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.timeout(600),
    pytest.mark.logs("connection lost, making a new one", "are to be sent again"),
]

Mount = Callable[..., Any]

FIO_SIZE = 4 * MIB
CACHED_SIZE = 8 * MIB
DOING = r"did (.*) \d+"
DOERS = {"load": 5, "errors": 10}
FAILING = r"error (read vda-.|write vdb-.) \d+ after (\d+) ms"  # the overlay takes whole blocks of vda all the while
FAILERS = 8
SLACK_S = 2  # for QEMU without KVM, on a busy machine


@dataclass(frozen=True)
class Pace:
    """options: of the backend. timeout_s: of those. deadline_s: of a backend whose requests fail.

    hold_from: the deadline of one whose requests are held then. killed_s, unreachable_s: how long. patience_s: for the guest
    to go on. control_s: how long nothing fails before each fault, at least.
    """

    options: dict[str, Any]
    timeout_s: float
    deadline_s: float
    hold_from: str
    killed_s: float
    unreachable_s: float
    patience_s: float
    control_s: float


SHORT = Pace({"timeout": "1s", "connect_timeout": "1s", "fence": "1s"}, 1, 2, "2s", 2, 3, 60, 0)
LONG = Pace({}, 5, 40, "1min", 5, 30, 150, 20)  # a deadline beyond the fence: a reset costs no error
LONG_ONLY = pytest.mark.skipif("CACHEFS_LONG_OUTAGES" not in os.environ, reason="CACHEFS_LONG_OUTAGES is not set")
PACES = [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=LONG_ONLY)]


def run(*command: str | Path, cwd: Path) -> None:
    # what is for file systems lies where a user's PATH does not look
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def exports(tmp_path: Path) -> Path:
    """root: a guest's, with 8 MiB behind the file system; second: an empty ext4; fio, fio-base, cached: bytes."""
    folder = tmp_path / "exports"
    folder.mkdir()
    make_image(folder / "root", 64 * MIB)
    os.truncate(folder / "root", 72 * MIB)
    for name, size in (("second", 48 * MIB), ("fio", FIO_SIZE), ("fio-base", FIO_SIZE), ("cached", CACHED_SIZE)):
        (folder / name).write_bytes(b"" if name == "second" else os.urandom(size))
        os.truncate(folder / name, size)
    run("mke2fs", "-q", "-F", "-t", "ext4", folder / "second", cwd=folder)
    return folder


@pytest.fixture
def network(tmp_path: Path, wait_until: Callable[..., Any]) -> Iterator[Network]:
    made = Network(tmp_path, tmp_path / "a.sock", wait_until)
    yield made
    made.close()


def config(tmp_path: Path, network: Network, **options: Any) -> dict[str, Any]:
    def over(export: str, *layers: Any) -> dict[str, Any]:
        return {"layers": list(layers), "backend": {"nbd": {"uri": f"nbd://{network.address}/{export}", **options}}}

    return {
        "pools": {"node": {"path": str(tmp_path / "pool"), "quota": "1GiB"}},
        "disks": {
            "root": over("root", "cow"),
            "second": over("second"),
            "fio": over("fio"),
            "fio-cow": over("fio-base", "cow"),
            "cached": over("cached", "cow", {"cache": {"pool": "node"}}),
        },
    }


class Store:
    """The server of all exports, behind a network. Each fault lasts until *until* returns."""

    def __init__(self, servers: Servers, exports: Path, network: Network) -> None:
        # a write takes long enough to be under way when something fails
        _, self._server = servers.nbdkit("--filter=delay", "file", f"dir={exports}", "wdelay=10ms")
        self._servers, self._network = servers, network

    def killed(self, until: Callable[[], Any]) -> None:
        self._server.kill()
        until()
        self._servers.restart(self._server)

    def reset(self, until: Callable[[], Any]) -> None:
        print(self._network.reset_in_mid_reply())

    def unreachable(self, until: Callable[[], Any]) -> None:
        self._network.cut()
        until()
        self._network.mend()


class Scene:
    """A mount whose disks are under load, and fail."""

    def __init__(self, mounted: Any, load: Load, cached: CachedReads, pace: Pace, wait_until: Any) -> None:
        self._mounted, self._load, self._cached = mounted, load, cached
        self._patience_s, self._control_s, self._wait_until = pace.patience_s, pace.control_s, wait_until

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self._wait_until(lambda: time.monotonic() >= end, timeout=seconds + 5)

    def wait_for_the_guest(self) -> float:
        """Each thing that it does it does again, as of now. When it had: seconds of the monotonic clock."""
        return self._load.wait_for(DOING, DOERS[self._load.scenario], since=time.monotonic(), timeout=self._patience_s)

    def wait_for_errors(self) -> None:
        self._load.wait_for(FAILING, FAILERS, since=time.monotonic(), timeout=self._patience_s)

    def fail(self, fault: Callable[[Callable[[], Any]], None], until: Callable[[], Any]) -> None:
        """*fault*, while a write is under way, until *until* returns; then everything goes on by itself."""
        with self._cached.phase("control"):
            self.wait_for_the_guest()
            self.wait(self._control_s)
        self._wait_until(lambda: self._mounted.layer("second", -1)["in_flight"], "a write under way")
        began = time.monotonic()
        with self._cached.phase("outage"):
            fault(until)
        mended = time.monotonic()
        went_on = self.wait_for_the_guest()
        self._wait_until(self._is_ok, "everything to be sent again", timeout=self._patience_s)
        stalls = sorted(
            (int(match[1]) for _, match in self._load.said(r"stalled .* for (\d+) ms", began)), reverse=True
        )
        print(
            f"{fault.__name__} for {mended - began:.1f} s; everything in the guest goes on {went_on - mended:.1f} s later, "
            f"everything was sent again {time.monotonic() - mended:.1f} s later; longest stalls (ms): {stalls[:5]}"
        )

    def _is_ok(self) -> bool:
        return all(
            self._mounted.layer(disk, -1)["state"] == "ok" for disk in ("root", "second", "fio", "fio-cow", "cached")
        )


@pytest.mark.parametrize("pace", PACES)
def test_guest_sees_no_error_of_a_store_that_is_waited_for(
    mount: Mount,
    guest: Guest,
    servers: Servers,
    exports: Path,
    network: Network,
    tmp_path: Path,
    wait_until: Callable[..., Any],
    pace: Pace,
) -> None:
    store = Store(servers, exports, network)
    mounted = mount(config(tmp_path, network, on_failure="hold", deadline=pace.hold_from, **pace.options))
    disks = mounted.path

    with ExitStack() as stack:
        cached = stack.enter_context(CachedReads(disks / "cached", CACHED_SIZE).running())
        load = stack.enter_context(
            guest_load(
                guest, "load", disks / "root", disks / "second", "writeback", wait_until, 90 + 3 * pace.patience_s
            )
        )
        seeds = stack.enter_context(fio_load([disks / "fio", disks / "fio-cow"], FIO_SIZE))
        scene = Scene(mounted, load, cached, pace, wait_until)
        scene.fail(store.killed, lambda: scene.wait(pace.killed_s))
        scene.fail(store.reset, lambda: None)
        scene.fail(store.unreachable, lambda: scene.wait(pace.unreachable_s))
    print(f"fio: {len(seeds)} rounds; {cached.figures('control')}; {cached.figures('outage')}")
    assert cached.failed == []
    assert max(cached.latencies["outage"]) < pace.timeout_s
    assert mounted.status()["daemon"]["request_errors"] == 0
    mounted.umount()
    # what the server has, without us
    run("e2fsck", "-fn", exports / "second", cwd=tmp_path)
    run("debugfs", "-R", f"rdump / {tmp_path}", exports / "second", cwd=tmp_path)
    run("sha256sum", "--check", "--quiet", "load.sha256", cwd=tmp_path)
    run(*fio([exports / "fio"], FIO_SIZE, seeds[-1], "--verify_only"), cwd=tmp_path)


@pytest.mark.logs("(failed|flush): .*(not done within|refused, the store|not answered in time)")
@pytest.mark.parametrize("pace", PACES)
def test_guest_gets_errors_within_the_deadline_and_goes_on_when_the_store_is_back(
    mount: Mount,
    guest: Guest,
    servers: Servers,
    exports: Path,
    network: Network,
    tmp_path: Path,
    wait_until: Callable[..., Any],
    pace: Pace,
) -> None:
    store = Store(servers, exports, network)
    mounted = mount(config(tmp_path, network, on_failure="error", deadline=f"{pace.deadline_s}s", **pace.options))
    disks = mounted.path

    with ExitStack() as stack:
        cached = stack.enter_context(CachedReads(disks / "cached", CACHED_SIZE).running())
        load = stack.enter_context(
            guest_load(guest, "errors", disks / "root", disks / "second", "none", wait_until, 90 + 3 * pace.patience_s)
        )

        scene = Scene(mounted, load, cached, pace, wait_until)
        scene.fail(store.reset, scene.wait_for_errors)
        assert load.said(FAILING) == []
        scene.fail(store.killed, scene.wait_for_errors)
        scene.fail(store.unreachable, scene.wait_for_errors)
    took = [int(match[2]) for _, match in load.said(FAILING)]
    print(f"{len(took)} errors, within at most {max(took)} ms; {cached.figures('control')}; {cached.figures('outage')}")
    assert max(took) < 1000 * (pace.deadline_s + SLACK_S)
    assert [match[0] for _, match in load.said(r"error write vda.*")] == []  # whole blocks of the overlay
    assert cached.failed == []
    assert max(cached.latencies["outage"]) < pace.timeout_s
    mounted.umount()
