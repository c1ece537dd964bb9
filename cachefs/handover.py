"""One daemon hands its mount to another, which was started beside it: the messages between the two.

    predecessor, serving                       successor
      starts the successor                ->     imports, checks the configuration
                                          <-     READY, or an error, and that was it
      stops reading requests; those that
      are quick are answered
      GO, with all descriptors            ->     looks again who has what open
                                          <-     ACCEPTED, or an error: the predecessor serves on
      names the successor to the keeper   ->     LEAVING: nobody else will follow
      ends, like a daemon that dies       ->     (end of file) opens the stores, serves

A predecessor that dies in between is followed by whom its keeper starts; the successor ends, or there would be two.
Descriptors go in messages of at most BATCH. All functions block; a SEQPACKET socket pair carries one message each.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cachefs.errors import CachefsError

BATCH = 200
_MESSAGE_BYTES = 1 << 16
START_TIMEOUT_S = 60.0
ACCEPT_TIMEOUT_S = 2.0  # nothing is served meanwhile


class Refused(CachefsError):
    """The successor cannot take over."""


def _send(end: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    socket.send_fds(end, [json.dumps(message).encode()], list(descriptors))


def _receive(end: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Raises: EOFError when the other one is gone."""
    try:
        content, descriptors, _, _ = socket.recv_fds(end, _MESSAGE_BYTES, BATCH)
    except ConnectionResetError:  # it had not read all that we have sent
        content = b""
    if not content:
        raise EOFError
    return json.loads(content), list(descriptors)


# ---- the predecessor's side


class Candidate:
    """A process that would take over, as its predecessor sees it."""

    def __init__(self, config: Path, mountpoint: Path, *, options: Sequence[str], state: int) -> None:
        """options: of `cachefs mount`. state: descriptor of the mount's memory."""
        self._end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            numbers = [str(theirs.fileno()), str(state)]
            command = [sys.executable, "-m", "cachefs", "mount", "--foreground", *options]
            command += ["--take-over", ",".join(numbers), str(config), str(mountpoint)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), state), start_new_session=True
            )
        self.pid = self._process.pid

    def wait_ready(self) -> str:
        """Its version. Raises: Refused, with the reason."""
        return str(self._answer(START_TIMEOUT_S)["version"])

    def hand_over(self, descriptors: Sequence[tuple[str, int]], unflushed: Sequence[str]) -> None:
        """unflushed: disks that hold what is not durable. Raises: Refused: then nothing was handed over."""
        for start in range(0, max(1, len(descriptors)), BATCH):
            some = descriptors[start : start + BATCH]
            is_last = start + BATCH >= len(descriptors)
            message: dict[str, Any] = {"names": [name for name, _ in some]}
            if is_last:
                message["unflushed"] = list(unflushed)
            try:
                _send(self._end, message, [descriptor for _, descriptor in some])
            except OSError as exc:
                raise Refused("upgrade", f"the successor ended: {exc.strerror}") from exc
        self._answer(ACCEPT_TIMEOUT_S)

    def leave(self) -> None:
        """Whoever keeps us alive knows of the successor: it is its turn when we have ended. An error: it has ended itself."""
        with contextlib.suppress(OSError):
            _send(self._end, {"leaving": True})

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        self._end.settimeout(timeout_s)
        try:
            answer, _ = _receive(self._end)
        except TimeoutError:
            raise Refused("upgrade", f"the successor did not answer within {timeout_s:.0f} s") from None
        except (EOFError, OSError):
            code = self._process.wait()
            raise Refused("upgrade", f"the successor ended with exit code {code}; the log has its last words") from None
        if "error" in answer:
            raise Refused("upgrade", answer["error"])
        return answer

    def dismiss(self) -> None:
        """It is not needed: it ends. First the process: the end of the way means to it that we have ended."""
        self._process.kill()
        self._process.wait()
        self._end.close()


# ---- the successor's side


class Predecessor:
    """The process whose mount is taken over, as its successor sees it. *descriptor*: our end."""

    def __init__(self, descriptor: int) -> None:
        self._end = socket.socket(fileno=descriptor)
        self._end.set_inheritable(False)

    def ready(self, version: str) -> None:
        _send(self._end, {"version": version})

    def refuse(self, reason: str) -> None:
        _send(self._end, {"error": reason})

    def wait_go(self) -> tuple[list[tuple[str, int]], set[str]]:
        """What it hands over; which disks hold what is not durable. Raises: EOFError when it changed its mind, or died."""
        found: list[tuple[str, int]] = []
        while True:
            message, descriptors = _receive(self._end)
            found += zip(message["names"], descriptors, strict=True)
            if "unflushed" in message:
                for _, descriptor in found:
                    os.set_inheritable(descriptor, False)
                return found, set(message["unflushed"])

    def accept(self) -> None:
        _send(self._end, {"accepted": True})

    def wait_gone(self) -> None:
        """Until it has ended. Raises: EOFError when it died before it could leave: its keeper starts another successor."""
        _receive(self._end)
        with contextlib.suppress(EOFError, OSError):
            _receive(self._end)
        self._end.close()
