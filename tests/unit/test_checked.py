"""checked: what it lets through, what it refuses, and what it does for a layer that cannot."""

from __future__ import annotations

import pytest

from cachefs.backends.memory import Memory
from cachefs.errors import ReadOnlyError, RequestError
from cachefs.extent import Extent, ExtentKind
from cachefs.layers.base import Caps, Geometry
from cachefs.layers.checked import Checked
from cachefs.testing.wrapper import Wrapper

SIZE = 130000


class Recorder(Wrapper):
    """Notes what arrives; `answer` is what extents say."""

    def __init__(self, caps: Caps, max_io: int = 65536) -> None:
        super().__init__(Memory("memory", SIZE))
        self.caps = caps
        self.geometry = Geometry(SIZE, max_io=max_io)
        self.calls: list[tuple[str, int, int]] = []
        self.answer: list[Extent] = []

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self.calls.append(("read", offset, len(buffer)))

    async def write(self, offset: int, data: memoryview) -> None:
        assert not any(data)
        self.calls.append(("write", offset, len(data)))

    async def trim(self, offset: int, length: int) -> None:
        self.calls.append(("trim", offset, length))

    async def zero(self, offset: int, length: int) -> None:
        self.calls.append(("zero", offset, length))

    async def prefetch(self, offset: int, length: int) -> None:
        self.calls.append(("prefetch", offset, length))

    async def flush(self) -> None:
        self.calls.append(("flush", 0, 0))

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        return self.answer


async def test_empty_requests_end_at_the_edge() -> None:
    """A hint for no bytes too: posix_fadvise takes a length of 0 for "to the end of the file"."""
    below = Recorder(Caps.WRITE | Caps.TRIM | Caps.ZERO)
    edge = Checked(below)
    nothing = memoryview(bytearray())
    await edge.read_into(5, nothing)
    await edge.write(5, nothing)
    await edge.trim(5, 0)
    await edge.zero(5, 0)
    await edge.prefetch(5, 0)
    assert below.calls == []


async def test_long_requests_go_down_in_pieces() -> None:
    below = Recorder(Caps.WRITE, max_io=4096)
    edge = Checked(below)
    await edge.read_into(100, memoryview(bytearray(10000)))
    await edge.write(100, memoryview(bytearray(4097)))
    assert below.calls == [
        ("read", 100, 4096),
        ("read", 4196, 4096),
        ("read", 8292, 1808),
        ("write", 100, 4096),
        ("write", 4196, 1),
    ]


async def test_what_a_layer_cannot_do_is_done_for_it() -> None:
    below = Recorder(Caps.WRITE)
    edge = Checked(below)
    await edge.trim(100, 70000)
    await edge.zero(7, 1)
    await edge.flush()
    assert below.calls == [("write", 100, 65536), ("write", 65636, 4464), ("write", 7, 1)]
    assert await edge.extents(3, 4) == [Extent(3, 4, ExtentKind.DATA)]
    below = Recorder(Caps.WRITE | Caps.ZERO)
    await Checked(below).trim(100, 70000)
    assert below.calls == [("zero", 100, 70000)]


async def test_flush_of_what_cannot_be_flushed_ends_at_once() -> None:
    told: list[Exception | None] = []
    assert Checked(Recorder(Caps.NONE)).try_flush(told.append)
    assert told == [None]


async def test_layer_that_cannot_write_is_never_asked_to() -> None:
    below = Recorder(Caps.EXTENTS)
    edge = Checked(below)
    assert not edge.try_write(0, memoryview(b"x"))
    for refused in (edge.write(0, memoryview(b"x")), edge.trim(0, 1), edge.zero(0, 1)):
        with pytest.raises(ReadOnlyError, match="put a cow layer above it"):
            await refused
    assert below.calls == []


@pytest.mark.parametrize(
    "answer",
    [
        [],
        [Extent(11, 5, ExtentKind.DATA)],
        [Extent(10, 5, ExtentKind.DATA), Extent(16, 5, ExtentKind.HOLE)],
        [Extent(10, 5, ExtentKind.DATA), Extent(14, 5, ExtentKind.HOLE)],
        [Extent(10, 0, ExtentKind.DATA)],
        [Extent(10, 101, ExtentKind.DATA)],
    ],
)
async def test_extents_that_do_not_fit_together_are_a_bug_below(answer: list[Extent]) -> None:
    below = Recorder(Caps.EXTENTS)
    below.answer = answer
    with pytest.raises(RequestError, match=r"extents of 10\+100 came back"):
        await Checked(below).extents(10, 100)


async def test_requests_that_are_not_aligned_are_refused() -> None:
    edge = Checked(Memory("memory", SIZE, alignment=512))
    for offset, length in ((1, 512), (0, 511), (512, 100)):
        buffer = memoryview(bytearray(length))
        assert not edge.try_read_into(offset, buffer)
        with pytest.raises(RequestError, match="not aligned to 512 bytes"):
            await edge.read_into(offset, buffer)
    await edge.read_into(SIZE // 512 * 512, memoryview(bytearray(SIZE % 512)))  # the end of the disk is a good end
