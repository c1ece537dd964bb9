"""The socket on which a daemon takes commands: one JSON object per line, {"command": NAME} and answers.

It lies in state_dir under a name made of the mountpoint, with mode 0600: whoever may use it may do what the daemon may.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from cachefs.errors import CachefsError

log = logging.getLogger(__name__)

Reply = Callable[[dict[str, object]], Awaitable[None]]
Command = Callable[[Reply], Awaitable[None]]
"""Answers through what it is given, once. A CachefsError is an answer too."""
MAX_LINE = 4096


def socket_path(state_dir: Path, mountpoint: Path) -> Path:
    return state_dir / f"control-{hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]}.sock"


@asynccontextmanager
async def listening(path: Path, commands: Mapping[str, Command]) -> AsyncIterator[None]:
    """Take commands while it lasts. The socket stays behind: a successor puts its own in its place."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        temporary = path.with_suffix(f".new-{os.getpid()}")
        with _short_name(temporary) as name:
            listener.bind(name)
        temporary.chmod(0o600)
        listener.listen(8)
        temporary.rename(path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_accept, trio.socket.from_stdlib_socket(listener.dup()), commands)
            yield
            nursery.cancel_scope.cancel()


@contextlib.contextmanager
def _short_name(path: Path) -> Any:
    """A socket's name has at most 107 bytes, wherever it lies."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


async def _accept(listener: trio.socket.SocketType, commands: Mapping[str, Command]) -> None:
    with listener:
        async with trio.open_nursery() as nursery:
            while True:
                connection, _ = await listener.accept()
                nursery.start_soon(_serve, connection, commands)


async def _serve(connection: trio.socket.SocketType, commands: Mapping[str, Command]) -> None:
    async def reply(answer: dict[str, object]) -> None:
        with contextlib.suppress(OSError):  # whoever asked has gone
            await connection.send(json.dumps(answer).encode() + b"\n")

    with connection:
        try:
            command = commands[json.loads(await connection.recv(MAX_LINE))["command"]]
        except (OSError, ValueError, KeyError, TypeError):
            await reply({"error": "this daemon does not know that command; is it of another version?"})
            return
        try:
            await command(reply)
        except CachefsError as exc:
            await reply({"error": exc.detail})
        except Exception as exc:
            log.exception("a command failed")
            await reply({"error": f"it failed on a bug in cachefs: {exc!r}"})


def ask(path: Path, command: str, timeout_s: float) -> dict[str, Any]:
    """Have the daemon behind the socket *path* carry out *command*; its answer. Blocks.

    Raises: CachefsError when it says no, does not answer, or is not there.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as client:
            client.settimeout(timeout_s)
            with _short_name(path) as name:
                client.connect(name)
            client.sendall(json.dumps({"command": command}).encode())
            with client.makefile("rb") as lines:
                answer: dict[str, Any] = json.loads(lines.readline())
    except TimeoutError:
        raise CachefsError(command, f"the daemon did not answer within {timeout_s:.0f} s") from None
    except (OSError, ValueError) as exc:
        raise CachefsError(command, f"the daemon cannot be asked at {path}: {exc}") from exc
    if "error" in answer:
        raise CachefsError(command, answer["error"])
    return answer
