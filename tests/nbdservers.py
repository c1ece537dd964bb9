"""Real servers for tests, on sockets and ports of their own: nbdkit, qemu-nbd, nbd-server, nginx; and certificates for them."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import signal
import socket as sockets
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def _path(program: str) -> str:
    """Servers lie where a user's PATH does not look. Skips the test where there is none."""
    found = shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


_NGINX = """
daemon off; master_process off; user root; pid {folder}/nginx.pid; error_log stderr;
events {{ worker_connections 256; }}
http {{
    log_format range '$request_method $http_range $body_bytes_sent';
    access_log {log} range;
    client_body_temp_path {folder}/nginx-body; proxy_temp_path {folder}/nginx-proxy;
    fastcgi_temp_path {folder}/nginx-fastcgi; uwsgi_temp_path {folder}/nginx-uwsgi; scgi_temp_path {folder}/nginx-scgi;
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


class Server:
    """An NBD server on a unix socket (or, with *port*, on TCP), which can be killed and started again."""

    def __init__(self, command: list[str], ready: Callable[[], bool], log: Path) -> None:
        self._command, self._ready, self._log = [_path(command[0]), *command[1:]], ready, log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, wait_until: Callable[..., Any]) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        process = self.process
        wait_until(lambda: process.poll() is not None or self._ready(), "the server's socket")
        assert process.poll() is None, self._log.read_text()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)


class Servers:
    """Starts servers in *folder*; all are killed at the end of the test."""

    def __init__(self, folder: Path, wait_until: Callable[..., Any]) -> None:
        self.folder = folder
        self._wait_until = wait_until
        self.all: list[Server] = []

    def _start(self, command: list[str], socket: Path) -> Server:
        def ready() -> bool:
            return _listens(socket)

        server = Server(command, ready, self.folder / f"server{len(self.all)}.log")
        self.all.append(server)
        server.start(self._wait_until)
        return server

    def nbdkit(self, *arguments: object, name: str = "a") -> tuple[str, Server]:
        socket = self.folder / f"{name}.sock"
        server = self._start(["nbdkit", "-f", "--exit-with-parent", "-U", str(socket), *map(str, arguments)], socket)
        return f"nbd+unix:///?socket={socket}", server

    def qemu_nbd(self, image: Path, form: str, *arguments: str) -> tuple[str, Server]:
        socket = self.folder / "q.sock"
        command = ["qemu-nbd", "-k", str(socket), "-f", form, "-x", "disk", "-t", "-e", "8", *arguments, str(image)]
        return f"nbd+unix:///disk?socket={socket}", self._start(command, socket)

    def nbdkit_tls(self, made: Path, *arguments: object) -> tuple[str, Server]:
        """On TCP, for those who have a certificate of *made*'s CA: see `certificates`."""
        port = free_port()
        tls = ("--tls=require", f"--tls-certificates={made}", "--tls-verify-peer")
        command = ["nbdkit", "-f", "--exit-with-parent", "-i", "127.0.0.1", "-p", str(port), *tls, *map(str, arguments)]
        server = Server(command, lambda: _listens_at(port), self.folder / f"server{len(self.all)}.log")
        self.all.append(server)
        server.start(self._wait_until)
        return f"nbds://localhost:{port}/", server

    def nbd_server(self, image: Path, **options: object) -> str:
        """Debian's nbd-server, which knows neither structured replies nor block sizes."""
        port, config, pid_file = free_port(), self.folder / "nbd-server.conf", self.folder / "nbd-server.pid"
        lines = ["[generic]", "listenaddr = 127.0.0.1", f"port = {port}", "[disk]", f"exportname = {image}"]
        config.write_text("\n".join([*lines, *(f"{key} = {value}" for key, value in options.items()), ""]))
        server = Daemon(["nbd-server", "-C", str(config), "-p", str(pid_file)], pid_file)
        self.all.append(server)
        server.start(self._wait_until)
        self._wait_until(lambda: _listens_at(port), "the server's port")
        return f"nbd://127.0.0.1:{port}/disk"

    def nginx(self, root: Path) -> tuple[str, Path]:
        """The address of a web server of the folder *root*, and its log: for each request the range and the bytes sent."""
        port, config, log = free_port(), self.folder / "nginx.conf", self.folder / "nginx-requests.log"
        config.write_text(_NGINX.format(folder=self.folder, root=root, port=port, log=log))
        command = ["nginx", "-p", str(self.folder), "-c", str(config), "-e", "stderr"]
        server = Server(command, lambda: _listens_at(port), self.folder / "nginx.log")
        self.all.append(server)
        server.start(self._wait_until)
        return f"http://127.0.0.1:{port}", log

    def restart(self, server: Server) -> None:
        for socket in self.folder.glob("*.sock"):
            socket.unlink()
        server.start(self._wait_until)


class Daemon(Server):
    """A server that only runs in the background, and says in *pid_file* where."""

    def __init__(self, command: list[str], pid_file: Path) -> None:
        self._command, self._pid_file = [_path(command[0]), *command[1:]], pid_file

    def start(self, wait_until: Callable[..., Any]) -> None:
        subprocess.run(self._command, stdin=subprocess.DEVNULL, check=True)
        wait_until(lambda: self._pid_file.exists() and self._pid_file.read_text().strip(), "the server's pid")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(int(self._pid_file.read_text()), signal.SIGKILL)


def _listens_at(port: int) -> bool:
    return f":{port:04X} 00000000:0000 0A" in Path("/proc/net/tcp").read_text()


def _listens(socket: Path) -> bool:
    return any(line.endswith(f" {socket}") for line in Path("/proc/net/unix").read_text().splitlines())


def certificates(folder: Path) -> Path:
    """A CA, the server's certificate for "localhost" and a client's, with the names that nbdkit looks for."""
    trustme = pytest.importorskip("trustme")
    expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    ca = trustme.CA()
    folder.mkdir()
    ca.cert_pem.write_to_path(str(folder / "ca-cert.pem"))
    for role, name in (("server", "localhost"), ("client", "node1")):
        made = ca.issue_cert(name, not_after=expires)
        made.private_key_pem.write_to_path(str(folder / f"{role}-key.pem"))
        made.cert_chain_pems[0].write_to_path(str(folder / f"{role}-cert.pem"))
    return folder


def free_port() -> int:
    with sockets.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
