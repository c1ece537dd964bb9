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
import contextlib
import errno
import fcntl
import logging
import os
import socket
import struct
import subprocess
import time
from collections import deque
from pathlib import Path

import trio

from cachefs.errors import CachefsError
from cachefs.fuse.buffers import REQUEST_AT
from cachefs.fuse.dataplane import DATA_OPCODES, Dataplane
from cachefs.fuse.polling import PollWindow
from cachefs.fuse.protocol import (
    FUSE_DEV_IOC_CLONE,
    IN_HEADER,
    INIT_IN,
    INVAL_ENTRY,
    NO_REPLY,
    NOTIFY_INVAL_ENTRY,
    NOTIFY_RESEND,
    OPEN_REPLY,
    OUT_HEADER,
    REQUEST_HEAD,
    Init,
    Opcode,
    Open,
    agreed_flags,
    compose_init_reply,
)
from cachefs.mountstate import MountState

log = logging.getLogger(__name__)

ROOT_NODE = 1
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


def clone_device(device: int) -> int:
    """Another descriptor of the same mount: requests read from it fail when it is closed, and the mount goes on."""
    clone = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.ioctl(clone, FUSE_DEV_IOC_CLONE, struct.pack("I", device))
    except BaseException:
        os.close(clone)
        raise
    return clone


class Channel:
    """Moves requests and replies. open_flags: the flags of an OPEN's reply by inode, for the files that are disks.

    The device is ours to close. The connection's agreement, and who has what open, are noted in *state*. with_resend=False:
    do not agree on RESEND, as if the kernel had none.
    """

    def __init__(
        self,
        device: int,
        dataplane: Dataplane,
        open_flags: dict[int, Open],
        poll: float,
        state: MountState,
        *,
        with_resend: bool = True,
    ) -> None:
        self._device = self._original = device
        self.can_resend = True
        self._dataplane = dataplane
        self._open_flags = open_flags
        self._state = state
        self._with_resend = with_resend
        self._init_request = b""
        self._replaying: int | None = None  # unique of the INIT that is replayed to libfuse
        self._replayed = trio.Event()
        self._serving = trio.CancelScope()
        self._unanswered: set[int] = set()  # uniques of namespace requests
        self._window = PollWindow(poll)
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._ours, self._theirs):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, RELAY_BUFFER)
        self._unsent: deque[bytes] = deque()  # for libfuse, while the socket is full
        self._init: tuple[int, int] | None = None  # unique of the INIT under way, and the flags it offers
        self._opens: dict[int, int] = {}  # unique of each OPEN of a disk under way -> inode
        self._releases: dict[int, int] = {}  # the same of each RELEASE
        self._turn_due = False  # another task has something to do: do not poll past it

    def hand_over(self) -> str:
        """What pyfuse3.init takes as its mountpoint; the descriptor is libfuse's from here on, which closes it."""
        return f"/dev/fd/{self._theirs.detach()}"

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()  # a no-op once it was handed over
        for device in {self._device, self._original}:
            os.close(device)

    # ---- a connection that is there already

    async def take_over(self, request: bytes, reply: bytes) -> None:
        """Go on where a predecessor stopped: libfuse hears the INIT of then, and the kernel sends again what that left.

        request, reply: of that INIT. Before `serve_requests`; `serve_replies` must run.
        """
        _, self._replaying, _ = REQUEST_HEAD.unpack_from(request)
        self._unsent.append(request)
        self._send_to_libfuse()
        await self._replayed.wait()
        self._agreed_on(reply)
        if self.can_resend:
            os.write(self._device, OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0))

    async def forget_entry(self, name: str) -> None:
        """Have the kernel look *name* up anew in the root directory. While requests are served: it may wait for one."""
        content = name.encode() + b"\0"
        head = INVAL_ENTRY.pack(INVAL_ENTRY.size + len(content), NOTIFY_INVAL_ENTRY, 0, ROOT_NODE, len(content) - 1, 0)
        with contextlib.suppress(OSError):  # ENOENT: it does not know the name
            await trio.to_thread.run_sync(os.write, self._device, head + content)

    def _agreed_on(self, reply: bytes) -> None:
        """Where the kernel cannot send again what a dead daemon had read, that would hang: then it shall fail instead.

        What was read from a clone of the device fails when the clone is closed, and the mount lives on in the original.
        """
        self.can_resend = bool(agreed_flags(reply) & Init.HAS_RESEND)
        if not self.can_resend:
            try:
                self._device = self._dataplane.device = clone_device(self._original)
            except OSError as exc:
                log.warning("cannot clone the FUSE device (%s): requests in flight hang when the daemon dies", exc)

    def pause(self) -> None:
        """Have `serve_requests` return; nothing is read from the device any more."""
        self._serving.cancel()

    async def wait_idle(self, patience_s: float) -> bool:
        """After `pause`: until every request that was read has been answered; False: that takes longer."""
        deadline = trio.current_time() + patience_s
        while self._unanswered or self._dataplane.waiting.table:
            if trio.current_time() > deadline:
                return False
            await trio.sleep(0.001)  # some are answered from threads, which wake nobody
        return True

    # ---- kernel to us

    async def serve_requests(self) -> bool:
        """Until the mount is gone (True) or `pause` (False)."""
        with trio.CancelScope() as self._serving:
            await self._serve_requests()
            return True
        return False

    async def _serve_requests(self) -> None:
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
        handling = self._state.handling
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
                handling[0] = node  # in survivor memory: should we die of it, the successor knows of which disk
                if not handle(buffer, length, opcode, unique, node):
                    buffer = dataplane.pool.take()
                continue
            self._forward(opcode, unique, node, bytes(buffer.view[REQUEST_AT : REQUEST_AT + length]))
        handling[0] = 0
        dataplane.pool.give_back(buffer)
        return handled

    def _forward(self, opcode: int, unique: int, node: int, request: bytes) -> None:
        """Hand a namespace request to libfuse."""
        if opcode == Opcode.INIT and len(request) >= IN_HEADER.size + 16:
            flags, flags2 = INIT_IN.unpack_from(request.ljust(IN_HEADER.size + INIT_IN.size, b"\0"), IN_HEADER.size)[
                3:5
            ]
            offered = flags | flags2 << 32
            self._init = (unique, offered if self._with_resend else offered & ~Init.HAS_RESEND)
            self._init_request = request
        elif opcode == Opcode.OPEN and node in self._open_flags:
            self._opens[unique] = node
        elif opcode == Opcode.RELEASE and node in self._open_flags:
            self._releases[unique] = node
        if opcode not in NO_REPLY:
            self._unanswered.add(unique)
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
                if self._replaying is not None and OUT_HEADER.unpack_from(message)[2] == self._replaying:
                    self._replaying = None  # the kernel has had its answer long ago
                    self._replayed.set()
                else:
                    self._dataplane.reply(self._complete(message))
                    if self._init_request and self._state.agreed is not None:
                        self._init_request = b""
                        self._agreed_on(self._state.agreed[1])
                self._send_to_libfuse()

    def _complete(self, reply: bytes) -> bytes:
        if len(reply) < OUT_HEADER.size:
            return reply
        _, error, unique = OUT_HEADER.unpack_from(reply)
        self._unanswered.discard(unique)
        if self._init is not None and unique == self._init[0]:
            offered, self._init = self._init[1], None
            composed = compose_init_reply(reply, offered)
            self._state.agree(self._init_request, composed)
            return composed
        released = self._releases.pop(unique, None) if self._releases else None
        if released is not None:
            self._state.count(unique, released, -1)
            return reply
        node = self._opens.pop(unique, None) if self._opens else None
        if node is None or error or len(reply) != OPEN_REPLY.size:
            return reply
        self._state.count(unique, node, +1)
        length, error, unique, handle, _, backing = OPEN_REPLY.unpack(reply)
        return OPEN_REPLY.pack(length, error, unique, handle, self._open_flags[node], backing)
