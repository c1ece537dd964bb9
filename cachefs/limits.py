"""How much of the daemon one disk may hold with requests that wait; pure bookkeeping.

A disk whose store hangs collects requests: each keeps a buffer, and a place in the kernel's limit of background requests,
beyond which the kernel would hold back every other disk of the mount. So for each disk only BUFFERS_PER_DISK requests keep
a buffer and run; what comes then is queued as what it needs (a READ its header, a WRITE its data), in order of arrival,
up to `queue_bytes` for all disks together. Beyond that, beyond REQUESTS_PER_DISK, and for the disk that holds most when
all together near the kernel's limit, a request is refused.

One event loop; nothing here awaits.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

BUFFERS_PER_DISK = 64  # of 1 MiB
REQUESTS_PER_DISK = 4096
QUEUE_BYTES = 4 << 30
HEADER_BYTES = 512  # what a queued request costs beside its data

Queued = TypeVar("Queued")


class Verdict(enum.Enum):
    RUN = "run"
    QUEUE = "queue"
    REFUSE = "refuse"


@dataclass
class _Disk(Generic[Queued]):
    running: int = 0
    queue: deque[tuple[Queued, int]] = field(default_factory=deque)  # and the bytes that each counts

    @property
    def requests(self) -> int:
        return self.running + len(self.queue)


class Admission(Generic[Queued]):
    """The requests of all disks (by inode) that are not answered. background: the kernel's max_background."""

    def __init__(self, background: int, queue_bytes: int = QUEUE_BYTES) -> None:
        self._crowded = background * 7 // 8
        self._queue_bytes = queue_bytes
        self._disks: dict[int, _Disk[Queued]] = {}
        self.requests = 0
        self.queued_bytes = 0
        self.refused = 0
        self.most_requests = 0

    def ask(self, disk: int, data_bytes: int) -> Verdict:
        """What is to become of a request that cannot be finished at once. RUN is counted; QUEUE is followed by `put`.

        data_bytes: of a WRITE's data, 0 for others.
        """
        held = self._disks.get(disk)
        if held is None:
            held = self._disks[disk] = _Disk()
        if held.requests >= REQUESTS_PER_DISK or (self.requests >= self._crowded and self._holds_most(held)):
            self.refused += 1
            return Verdict.REFUSE
        if held.running < BUFFERS_PER_DISK and not held.queue:
            held.running += 1
            self._count(1)
            return Verdict.RUN
        if self.queued_bytes + data_bytes + HEADER_BYTES > self._queue_bytes:
            self.refused += 1
            return Verdict.REFUSE
        return Verdict.QUEUE

    def put(self, disk: int, request: Queued, data_bytes: int) -> None:
        """Queue a request that `ask` said QUEUE to."""
        cost = data_bytes + HEADER_BYTES
        self._disks[disk].queue.append((request, cost))
        self.queued_bytes += cost
        self._count(1)

    def done(self, disk: int) -> Queued | None:
        """One that ran has ended; the one to run in its place, already counted, or None."""
        held = self._disks[disk]
        held.running -= 1
        self._count(-1)
        if not held.queue:
            return None
        request, cost = held.queue.popleft()
        self.queued_bytes -= cost
        held.running += 1
        return request

    def take_queued(self, disk: int, request: Queued) -> bool:
        """Remove one that waits in the queue, because nobody wants its answer. False: it is not there."""
        held = self._disks.get(disk)
        for entry in held.queue if held is not None else ():
            if entry[0] is request:
                assert held is not None
                held.queue.remove(entry)
                self.queued_bytes -= entry[1]
                self._count(-1)
                return True
        return False

    def _count(self, change: int) -> None:
        self.requests += change
        self.most_requests = max(self.most_requests, self.requests)

    def _holds_most(self, held: _Disk[Queued]) -> bool:
        return held.requests >= max(disk.requests for disk in self._disks.values())

    def statistics(self) -> dict[str, int]:
        return {
            "waiting_requests": self.requests,
            "most_waiting_requests": self.most_requests,
            "queued_bytes": self.queued_bytes,
            "refused_requests": self.refused,
        }
