"""The FUSE device: mounted, read, and shared between our data plane and pyfuse3's namespace.

fusermount3 mounts and passes us the descriptor of /dev/fuse (works for root and for users). libfuse is given one end of a
socket pair as if it were an open session ("/dev/fd/N"); what is not a data request goes into the other end unchanged, and
what comes back goes to the device, two replies completed on the way: INIT (flags and limits are ours,
`protocol.compose_init_reply`) and OPEN (how the page cache is used, which pyfuse3 cannot say in full).

    kernel <-> /dev/fuse <-> Channel -+- data request --> Dataplane -> stack
                                      +- the rest ------> socket pair <-> libfuse, pyfuse3 -> Namespace

Source: libfuse lib/mount.c (_FUSE_COMMFD, "/dev/fd/N"), Linux fs/fuse/dev.c.
"""

from __future__ import annotations

import array
import errno
import logging
import os
import socket
import subprocess
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import trio

from cachefs.errors import CachefsError
from cachefs.fuse.buffers import REQUEST_AT
from cachefs.fuse.dataplane import DATA_OPCODES, Dataplane
from cachefs.fuse.polling import PollWindow
from cachefs.fuse.protocol import (
    IN_HEADER,
    INIT_IN,
    OPEN_REPLY,
    OUT_HEADER,
    REQUEST_HEAD,
    Opcode,
    Open,
    compose_init_reply,
)

log = logging.getLogger(__name__)

BATCH = 64  # requests handled before other tasks get their turn
RELAY_BUFFER = 4 << 20
LONGEST_RUN_S = 0.001  # of polling without a turn for other tasks
BUSY_WINDOW_S = 10e-6  # poll no longer than this while requests wait in tasks and may be over soon


def mount_device(mountpoint: Path, options: str) -> int:
    """Mount at *mountpoint* and return the descriptor of /dev/fuse, non-blocking. Blocks until fusermount3 has ended.

    Raises: CachefsError with what fusermount3 said.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        try:
            done = subprocess.run(
                ["fusermount3", "-o", options, "--", str(mountpoint)],
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=(theirs.fileno(),),
                capture_output=True,
                check=False,
            )
        except FileNotFoundError:
            raise CachefsError("mount", "fusermount3 is not installed: apt-get install fuse3", errno.ENOENT) from None
        theirs.close()
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().removeprefix("fusermount3: ") or "fusermount3 failed"
            if "user_allow_other" in said:
                said += "; or give every disk a mode for its owner only (mode: 0600), which needs no allow_other"
            raise CachefsError(f"mount at {mountpoint}", said, errno.EPERM)
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(array.array("i").itemsize))
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors = array.array("i")
            descriptors.frombytes(content[: descriptors.itemsize])
            os.set_blocking(descriptors[0], False)
            os.set_inheritable(descriptors[0], False)
            return descriptors[0]
    raise CachefsError(f"mount at {mountpoint}", "fusermount3 sent no descriptor; is its version 3?")


class Channel:
    """Moves requests and replies. open_flags: the flags of an OPEN's reply by inode, for the files that are disks.

    device is ours to close.
    """

    def __init__(self, device: int, dataplane: Dataplane, open_flags: Mapping[int, Open], poll: float) -> None:
        self._device = device
        self._dataplane = dataplane
        self._open_flags = open_flags
        self._window = PollWindow(poll)
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._ours, self._theirs):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, RELAY_BUFFER)
        self._unsent: deque[bytes] = deque()  # for libfuse, while the socket is full
        self._init: tuple[int, int] | None = None  # unique of the INIT under way, and the flags it offers
        self._opens: dict[int, int] = {}  # unique of each OPEN under way -> inode
        self._turn_due = False  # another task has something to do: do not poll past it

    def hand_over(self) -> str:
        """What pyfuse3.init takes as its mountpoint; the descriptor is libfuse's from here on, which closes it."""
        return f"/dev/fd/{self._theirs.detach()}"

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()  # a no-op once it was handed over
        os.close(self._device)

    # ---- kernel to us

    async def serve_requests(self) -> None:
        """Until the mount is gone."""
        window = self._window
        while True:
            since = time.perf_counter()
            try:
                await trio.lowlevel.wait_readable(self._device)
            except OSError as exc:
                if exc.errno == errno.ENODEV:
                    return
                raise
            window.slept(time.perf_counter() - since)
            ran_since = time.perf_counter()
            while True:
                handled = self._handle_batch()
                if handled < 0:
                    return
                now = time.perf_counter()
                brisk = self._dataplane.waiting.is_brisk(now)
                if handled == BATCH or self._turn_due or now - ran_since > LONGEST_RUN_S or (brisk and handled):
                    self._turn_due = False
                    await trio.lowlevel.checkpoint()
                    ran_since = time.perf_counter()
                if handled == 0:
                    limit = min(window.window, BUSY_WINDOW_S) if brisk else window.window
                    if not self._poll(now + limit):
                        break

    def _poll(self, until: float) -> bool:
        """Ask the device on until *until* (time.perf_counter()). True: a request was handled."""
        while time.perf_counter() < until:
            if self._handle_batch():
                return True
        return False

    def _handle_batch(self) -> int:
        """Up to BATCH requests; how many were there, or -1 when the mount is gone."""
        dataplane = self._dataplane
        counts, handle = dataplane.counts, dataplane.handle
        unpack_head, readv, device = REQUEST_HEAD.unpack_from, os.readv, self._device
        buffer = dataplane.pool.take()
        handled = 0
        while handled < BATCH:
            try:
                length = readv(device, buffer.vector)
            except BlockingIOError:
                break
            except OSError as exc:
                if exc.errno in (errno.EINTR, errno.ENOENT):  # ENOENT: interrupted before we had it
                    continue
                if exc.errno not in (errno.ENODEV, errno.ECONNABORTED):
                    log.error("reading /dev/fuse failed: %s; the mount ends", exc)
                dataplane.pool.give_back(buffer)
                return -1
            if not handled:
                dataplane.now_ns = time.time_ns()
            handled += 1
            if length < IN_HEADER.size:
                log.error("the kernel sent a request of %d bytes, shorter than any header; ignored", length)
                continue
            opcode, unique, node = unpack_head(buffer.view, REQUEST_AT)
            counts[opcode & 63] += 1
            if opcode in DATA_OPCODES:
                if not handle(buffer, length, opcode, unique, node):
                    buffer = dataplane.pool.take()
                continue
            self._forward(opcode, unique, node, bytes(buffer.view[REQUEST_AT : REQUEST_AT + length]))
        dataplane.pool.give_back(buffer)
        return handled

    def _forward(self, opcode: int, unique: int, node: int, request: bytes) -> None:
        """Hand a namespace request to libfuse."""
        if opcode == Opcode.INIT and len(request) >= IN_HEADER.size + 16:
            flags, flags2 = INIT_IN.unpack_from(request.ljust(IN_HEADER.size + INIT_IN.size, b"\0"), IN_HEADER.size)[
                3:5
            ]
            self._init = (unique, flags | flags2 << 32)
        elif opcode == Opcode.OPEN and node in self._open_flags:
            self._opens[unique] = node
        self._unsent.append(request)
        self._send_to_libfuse()
        self._turn_due = True

    def _send_to_libfuse(self) -> None:
        while self._unsent:
            try:
                self._ours.send(self._unsent[0])
            except BlockingIOError:
                return  # serve_replies goes on when there is room
            self._unsent.popleft()

    # ---- libfuse to the kernel

    async def serve_replies(self) -> None:
        """Write libfuse's replies and notifications to the device, for ever."""
        while True:
            await trio.lowlevel.wait_readable(self._ours)
            while True:
                try:
                    message = self._ours.recv(RELAY_BUFFER)
                except BlockingIOError:
                    break
                if not message:
                    return
                self._dataplane.reply(self._complete(message))
                self._send_to_libfuse()

    def _complete(self, reply: bytes) -> bytes:
        if len(reply) < OUT_HEADER.size:
            return reply
        _, error, unique = OUT_HEADER.unpack_from(reply)
        if self._init is not None and unique == self._init[0]:
            offered, self._init = self._init[1], None
            return compose_init_reply(reply, offered)
        node = self._opens.pop(unique, None) if self._opens else None
        if node is None or error or len(reply) != OPEN_REPLY.size:
            return reply
        length, error, unique, handle, _, backing = OPEN_REPLY.unpack(reply)
        return OPEN_REPLY.pack(length, error, unique, handle, self._open_flags[node], backing)
