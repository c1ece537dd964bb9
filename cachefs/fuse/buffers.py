"""Where a request lies between kernel and stack.

Laid out so that the data of a WRITE and of a READ's reply begin on a page, and nothing is copied on a hit:

    ... | 80 bytes: header + WRITE_IN | data, 1 MiB ... |        as it comes from the kernel
    ...            | 16 bytes: header | data ...        |        as a READ's reply goes back
                                      ^ DATA_AT
"""

from __future__ import annotations

import mmap

from cachefs.fuse.protocol import IN_HEADER, MAX_WRITE, OUT_HEADER, WRITE_REQUEST_SIZE

PAGE = 4096
DATA_AT = PAGE
REQUEST_AT = DATA_AT - WRITE_REQUEST_SIZE
BODY_AT = REQUEST_AT + IN_HEADER.size
REPLY_AT = DATA_AT - OUT_HEADER.size


class Buffer:
    """Room for one request or READ reply; `vector` is what a readv of a request fills."""

    __slots__ = ("vector", "view")

    def __init__(self) -> None:
        self.view = memoryview(mmap.mmap(-1, DATA_AT + MAX_WRITE + PAGE))
        self.vector = (self.view[REQUEST_AT:],)


def read_reply(view: memoryview, unique: int, size: int) -> memoryview:
    """The reply to a READ whose *size* bytes of data are in place."""
    OUT_HEADER.pack_into(view, REPLY_AT, OUT_HEADER.size + size, 0, unique)
    return view[REPLY_AT : DATA_AT + size]


class BufferPool:
    """Buffers that are free; a few dozen are kept."""

    KEPT = 128

    def __init__(self) -> None:
        self._free: list[Buffer] = []

    def take(self) -> Buffer:
        return self._free.pop() if self._free else Buffer()

    def give_back(self, buffer: Buffer) -> None:
        if len(self._free) < self.KEPT:
            self._free.append(buffer)
