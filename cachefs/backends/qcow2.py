"""qcow2: an image with its backing files, read and written by a qemu-nbd that is started for it.

`qcow2: {path: debian12.qcow2}` is `nbd: {command: [qemu-nbd, ...]}` with what has to be right: a format that is not guessed,
as many clients as connections, read-only unless the disk is written, and then `--cache=writeback`: what was flushed is
durable, and nothing is before. QEMU's own locks hold the whole chain.

The identity is exact, unlike that of other exports: size, modification time and inode number of every file of the chain, before
the server has them. So all of them must be regular files of this machine.

What fails, and what then: see `cachefs.backends.nbd`.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from cachefs.backends.nbd import Nbd
from cachefs.backends.nbdoptions import ClientOptions, NbdConfig
from cachefs.errors import StoreError
from cachefs.layers.base import Environment
from cachefs.store.identity import Identity
from cachefs.units import LocalPath

_PLAIN_COMMAND = ("qemu-nbd", "-t", "-e", "8", "-f", "qcow2")


class Qcow2Config(ClientOptions):
    path: LocalPath
    """The image. Its backing files are found by what it says; `qemu-img info --backing-chain` shows them."""


class Qcow2:
    """Opens to a `Nbd` that knows its image."""

    Config = Qcow2Config

    @classmethod
    @asynccontextmanager
    async def open(cls, config: Qcow2Config, env: Environment) -> AsyncIterator[Nbd]:
        """Raises: StoreError when the path is missing, no such image, or held by somebody else."""
        name, path = f"{env.owner}/qcow2", str(config.path)
        await trio.to_thread.run_sync(_check_regular, name, path)
        chain = await _chain(name, path, config.deadline)
        identity = await trio.to_thread.run_sync(_identity, name, path, chain)
        shared = {key: getattr(config, key) for key in ClientOptions.model_fields}
        options = NbdConfig.model_construct(command=_command(config, writable=env.writable), **shared)
        async with Nbd.open(options, env, kind="qcow2") as backend:
            backend.identity = identity
            yield backend


def _command(config: Qcow2Config, *, writable: bool) -> tuple[str, ...]:
    mode = ("--cache=writeback", "--discard=unmap") if writable else ("--read-only",)
    clients = f"--shared={config.connections}"
    return ("qemu-nbd", "--persistent", clients, "--format=qcow2", *mode, os.fspath(config.path))


def _check_regular(name: str, path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError as exc:
        raise StoreError(name, f"cannot open {path}: {exc.strerror}; check backend.qcow2.path") from exc
    if not stat.S_ISREG(mode):
        raise StoreError(name, f"{path} is not a regular file; name a qcow2 image")


def _identity(name: str, path: str, chain: list[dict[str, Any]]) -> Identity:
    """Raises: StoreError when a file of the chain is none."""
    facts: dict[str, str] = {}
    for index, image in enumerate(chain):
        part = "image" if not index else f"backing file {index}"
        file = image["filename"]
        elsewhere = image.get("format-specific", {}).get("data", {}).get("data-file")
        if elsewhere is not None or not os.path.isfile(file):
            wrong = f"has its data in {elsewhere}" if elsewhere else f"is {file}, which is no regular file"
            start = shlex.join(_PLAIN_COMMAND) + f" {path}"
            raise StoreError(name, f"{path}: the {part} {wrong}; write nbd: {{command: ...}} instead, such as {start}")
        status = os.stat(file)
        facts |= {
            f"size of the {part}": str(status.st_size),
            f"modification time of the {part}": str(status.st_mtime_ns),
            f"inode of the {part}": str(status.st_ino),
        }
    return Identity("qcow2", facts)


async def _chain(name: str, path: str, deadline_s: float) -> list[dict[str, Any]]:
    """What `qemu-img info` says of the image and its backing files, top to bottom."""
    if shutil.which("qemu-img") is None:
        raise StoreError(name, "there is no program 'qemu-img': apt-get install qemu-utils")
    # -U: the server that is started next finds out whether somebody else writes it
    command = ["qemu-img", "info", "-U", "-f", "qcow2", "--backing-chain", "--output=json", path]
    with trio.move_on_after(deadline_s):
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        if done.returncode == 0:
            chain: list[dict[str, Any]] = json.loads(done.stdout)
            return chain
        raise StoreError(name, f"cannot open {path}: {_last_line(done)}; check backend.qcow2.path")
    raise StoreError(name, f"cannot open {path}: qemu-img did not answer within {deadline_s:.0f} s")


def _last_line(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"qemu-img ended with exit status {done.returncode}"
