"""A network to a server that a test can break: resets in mid-reply, and a link that is down, so that nothing is heard any more.

The server, on a unix socket, is reached through a relay in a network namespace of its own, over a veth pair. Where namespaces
are not allowed the relay runs beside the server and is stopped instead: the kernel answers for it then, but nobody else.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbdservers import free_port

RELAY = Path(__file__).with_name("relay.py")
PORT = 10809


class Network:
    """address: HOST:PORT of the relay to *socket*."""

    def __init__(self, folder: Path, socket: Path, wait_until: Callable[..., Any]) -> None:
        self._log = folder / "relay.log"
        self._name = f"cfs{random.randrange(1 << 32):08x}"
        self._wait_until = wait_until
        self._relay: subprocess.Popen[bytes] | None = None
        self.is_real = _may_make_namespaces(self._name)
        try:
            host, port = self._link() if self.is_real else ("127.0.0.1", free_port())
            self.address = f"{host}:{port}"
            self._start_relay(host, port, socket)
        except BaseException:
            self.close()
            raise

    def _start_relay(self, host: str, port: int, socket: Path) -> None:
        command = [sys.executable, str(RELAY), host, str(port), str(socket)]
        inside = ["ip", "netns", "exec", self._name] if self.is_real else []
        with self._log.open("wb") as log:
            self._relay = relay = subprocess.Popen(
                [*inside, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._wait_until(lambda: "ready" in self._log.read_text() or relay.poll() is not None, "the relay")
        assert relay.poll() is None, self._log.read_text()

    def _link(self) -> tuple[str, int]:
        """A veth pair; its other end, "there", is in the namespace."""
        name, net = self._name, f"198.18.{random.randrange(256)}.{4 * random.randrange(64)}"  # for tests of networks
        first, _, last = net.rpartition(".")
        ours, theirs = (f"{first}.{int(last) + index}" for index in (1, 2))
        _ip("link", "add", name, "type", "veth", "peer", "name", "there", "netns", name)
        _ip("addr", "add", f"{ours}/30", "dev", name)
        _ip("link", "set", name, "up")
        _ip("-n", name, "addr", "add", f"{theirs}/30", "dev", "there")
        _ip("-n", name, "link", "set", "there", "up")
        return theirs, PORT

    def cut(self) -> None:
        """Nothing that is sent arrives any more, and nobody says so."""
        if self.is_real:
            _ip("-n", self._name, "link", "set", "there", "down")
        else:
            self._signal(signal.SIGSTOP)

    def mend(self) -> None:
        if self.is_real:
            _ip("-n", self._name, "link", "set", "there", "up")
        else:
            self._signal(signal.SIGCONT)

    def reset_in_mid_reply(self) -> str:
        """Returns when the connection was reset, with what the relay said."""
        before = self._resets()
        self._signal(signal.SIGUSR1)
        self._wait_until(lambda: len(self._resets()) > len(before), "a reply to cut through")
        return self._resets()[-1]

    def _resets(self) -> list[str]:
        return re.findall("reset after .*", self._log.read_text())

    def _signal(self, number: int) -> None:
        assert self._relay is not None
        self._relay.send_signal(number)

    def close(self) -> None:
        if self._relay is not None:
            self._relay.kill()
            self._relay.wait(10)
        if self.is_real:
            with contextlib.suppress(AssertionError):  # it was not made
                _ip("link", "delete", self._name)  # it would go with the namespace, some time later
            _ip("netns", "delete", self._name)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def _may_make_namespaces(name: str) -> bool:
    if shutil.which("ip") is None or os.getuid() != 0:
        return False
    return subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
