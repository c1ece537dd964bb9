"""Who waits, and whether the channel has to hurry for them."""

from __future__ import annotations

import time

import trio

from cachefs.backends.memory import Memory
from cachefs.disk import Disk
from cachefs.fuse.boundary import Boundary
from cachefs.fuse.buffers import BufferPool
from cachefs.fuse.protocol import Opcode
from cachefs.fuse.spill import Spill
from cachefs.fuse.waiting import BRISK_S, Request, Waiting
from cachefs.graph import edge


async def test_requests_that_have_hung_for_long_are_no_reason_for_the_channel_to_poll_less(
    nursery: trio.Nursery,
) -> None:
    disk = Disk("vm1", edge(Memory("vm1/memory", 4096)), 2, writable=True, mode=0o600, uid=0, gid=0)
    replies: list[bytes | memoryview] = []

    async def work(_: Request) -> bytes:
        raise AssertionError("registered only")

    waiting = Waiting(
        nursery, BufferPool(), Boundary(), replies.append, lambda request, done: False, work, 65535, Spill(None)
    )
    assert not waiting.is_brisk(time.perf_counter())
    first, second = (Request(disk, Opcode.FSYNC, unique, 0) for unique in (1, 2))
    waiting.register(first)
    registered = time.perf_counter()
    assert waiting.is_brisk(registered)
    assert not waiting.is_brisk(registered + BRISK_S)
    waiting.register(second)
    assert waiting.is_brisk(time.perf_counter())
    for request in (first, second):
        waiting.finish(request, b"")
    assert not waiting.is_brisk(time.perf_counter())
    assert len(replies) == 2
