"""What a disk must hold, and whether it does: a bytearray and nothing of the product.

One after the other, every byte is what the last operation left (`run_one`). Several at once, in any order
(`run_overlapping`): a byte that one of them touches is that one's; a byte that several touch is what one of them would
leave; a read may give what was there before or what any of them leaves. `run_*` offer each request to the fast path
first, as the daemon does.

`durable` is the content at the last flush that returned.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

import trio

from cachefs.extent import ExtentKind
from cachefs.layers.base import Layer


@dataclass(frozen=True)
class Write:
    offset: int
    data: bytes = field(repr=False)

    @property
    def length(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return f"Write({self.offset}+{len(self.data)}, {self.data[:1].hex()}...)"


@dataclass(frozen=True)
class Trim:
    offset: int
    length: int


@dataclass(frozen=True)
class Zero:
    offset: int
    length: int


@dataclass(frozen=True)
class Read:
    offset: int
    length: int


@dataclass(frozen=True)
class Extents:
    offset: int
    length: int
    limit: int = 1024


@dataclass(frozen=True)
class Flush:
    offset = length = 0


Op = Write | Trim | Zero | Read | Extents | Flush
Changing = Write | Trim | Zero


def left_by(op: Changing) -> bytes:
    """What *op* leaves in its range."""
    return op.data if isinstance(op, Write) else bytes(op.length)


class Model:
    """A disk of *content*."""

    def __init__(self, content: bytes | bytearray) -> None:
        self.content = bytearray(content)
        self.durable = bytes(content)

    def apply(self, op: Op) -> None:
        if isinstance(op, (Write, Trim, Zero)):
            self.content[op.offset : op.offset + op.length] = left_by(op)
        elif isinstance(op, Flush):
            self.durable = bytes(self.content)


# ---- requests


async def read(layer: Layer, offset: int, length: int) -> bytes:
    """*length* bytes, by the fast path or without a task where that takes it."""
    buffer = bytearray(b"\xa5" * length)  # nothing that a test writes by chance
    if not layer.try_read_into(offset, memoryview(buffer)) and not await _read_later(layer, offset, buffer):
        await layer.read_into(offset, memoryview(buffer))
    return bytes(buffer)


async def _read_later(layer: Layer, offset: int, buffer: bytearray) -> bool:
    """Fill *buffer* by `try_read_later`, if that takes it and comes to something."""
    over = trio.Event()
    told: list[float | None] = []

    def done(until: float | None) -> None:
        told.append(until)
        over.set()

    if not layer.try_read_later(offset, memoryview(buffer), done):
        return False
    assert not told, "told before it returned"
    await over.wait()
    return told == [None]


async def write(layer: Layer, offset: int, data: bytes) -> None:
    """*data*, by the fast path where that takes it. Nobody may keep what was handed over: it is spoilt afterwards."""
    buffer = bytearray(data)
    if not layer.try_write(offset, memoryview(buffer)):
        await layer.write(offset, memoryview(buffer))
    buffer[:] = b"\x5a" * len(buffer)


async def flush(layer: Layer) -> None:
    """Flush, by `try_flush` where that takes it."""
    over = trio.Event()
    token = trio.lowlevel.current_trio_token()
    errors: list[Exception | None] = []

    def done(error: Exception | None) -> None:
        errors.append(error)
        token.run_sync_soon(over.set)

    if not layer.try_flush(done):
        await layer.flush()
        return
    await over.wait()
    if errors[0] is not None:
        raise errors[0]


async def read_all(layer: Layer) -> bytes:
    return await read(layer, 0, layer.geometry.size)


async def perform(layer: Layer, op: Op) -> bytes | None:
    """Do *op*; the bytes of a Read. The answer of an Extents is checked for its shape alone."""
    match op:
        case Write(offset, data):
            await write(layer, offset, data)
        case Trim(offset, length):
            await layer.trim(offset, length)
        case Zero(offset, length):
            await layer.zero(offset, length)
        case Read(offset, length):
            return await read(layer, offset, length)
        case Extents(offset, length, limit):
            at = offset
            found = await layer.extents(offset, length, limit)
            assert 0 < len(found) <= limit, f"{op}: {len(found)} entries"
            for extent in found:
                assert extent.offset == at, f"{op}: gap or overlap at {at}: {found}"
                assert extent.length > 0, f"{op}: empty entry at {at}"
                at = extent.end
            assert at <= offset + length, f"{op}: ends at {at}"
        case Flush():
            await flush(layer)
    return None


# ---- one after the other


async def run_one(layer: Layer, op: Op, model: Model) -> None:
    """Do *op* on both, and compare what a Read gives and what an Extents claims."""
    got = await perform(layer, op)
    model.apply(op)
    if isinstance(op, Read):
        assert_same(got or b"", model.content[op.offset : op.offset + op.length], op.offset)
    elif isinstance(op, Extents):
        await check_extents(layer, op.offset, op.length, model)


async def check_all(layer: Layer, model: Model) -> None:
    """The whole disk is what the model says, bytes and extents."""
    assert_same(await read_all(layer), model.content, 0)
    await check_extents(layer, 0, layer.geometry.size, model)


async def check_extents(layer: Layer, offset: int, length: int, model: Model, limit: int = 1024) -> None:
    """Extents cover the range without a gap, and what they call zero or hole is zeros."""
    end = offset + length
    while offset < end:
        at_once = layer.try_extent(offset, end - offset)
        for extent in [*([at_once] if at_once else []), *await layer.extents(offset, end - offset, limit)]:
            if extent is at_once:
                assert (extent.offset, extent.end <= end) == (offset, True), f"{extent} is told at once of {offset}"
            else:
                assert extent.offset == offset, f"extents leave a gap or overlap at {offset}"
                offset = extent.end
            assert extent.length > 0, f"empty extent at {offset}"
            if extent.kind is not ExtentKind.DATA:
                held = model.content[extent.offset : extent.end]
                assert held.count(0) == len(held), f"{extent} is said to be zeros, and is not"
    assert offset == end, f"extents end at {offset}, not at {end}"


def assert_same(got: bytes | bytearray, wanted: bytes | bytearray, offset: int) -> None:
    """Equal, or the first difference, as an offset of the disk."""
    if got == wanted:
        return
    assert len(got) == len(wanted), f"{len(got)} bytes instead of {len(wanted)}"
    at = next(index for index, (one, other) in enumerate(zip(got, wanted, strict=True)) if one != other)
    raise AssertionError(
        f"byte {offset + at} is {got[at]:#04x} instead of {wanted[at]:#04x}; from there "
        f"{bytes(got[at : at + 16]).hex()} instead of {bytes(wanted[at : at + 16]).hex()}"
    )


# ---- at the same time


async def run_overlapping(
    layer: Layer,
    ops: Sequence[Op],
    model: Model,
    meanwhile: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Do all *ops* at once and check every byte; *meanwhile* runs beside them until they are done (it opens gates).

    Afterwards the model is what the disk is: one of the contents that were possible.
    """
    read_back: list[tuple[Read, bytes]] = []

    async def one(op: Op) -> None:
        got = await perform(layer, op)
        if isinstance(op, Read):
            read_back.append((op, got or b""))

    async with trio.open_nursery() as beside:
        if meanwhile is not None:
            beside.start_soon(meanwhile)
        async with trio.open_nursery() as nursery:
            for op in ops:
                nursery.start_soon(one, op)
        beside.cancel_scope.cancel()
    changes = [op for op in ops if isinstance(op, (Write, Trim, Zero))]
    before = bytes(model.content)
    for asked, got in read_back:
        check_possible(got, asked.offset, changes, before, old_allowed=True)
    after = await read_all(layer)
    check_possible(after, 0, changes, before, old_allowed=False)
    model.content[:] = after
    await check_extents(layer, 0, layer.geometry.size, model)


def check_possible(got: bytes, offset: int, changes: Iterable[Changing], before: bytes, *, old_allowed: bool) -> None:
    """Every byte of *got* (at *offset* of the disk) is one that *changes*, done at once over *before*, could leave.

    old_allowed: a byte that is touched may still be the old one (a read during the changes, a change broken off).
    """
    end = offset + len(got)
    touching = [op for op in changes if op.length and op.offset < end and offset < op.offset + op.length]
    edges = {offset, end}
    for op in touching:
        edges |= {max(offset, op.offset), min(end, op.offset + op.length)}
    bounds = sorted(edges)
    for start, stop in itertools.pairwise(bounds):
        over = [op for op in touching if op.offset <= start and stop <= op.offset + op.length]
        allowed = [left_by(op)[start - op.offset : stop - op.offset] for op in over]
        if old_allowed or not over:
            allowed.append(before[start:stop])
        part = got[start - offset : stop - offset]
        for at in range(0, len(part), 512):  # a change broken off leaves some of its sectors
            one = slice(at, at + 512)
            if not any(part[one] == choice[one] for choice in allowed):
                _check_bytes(part[one], start + at, [choice[one] for choice in allowed], over)


def _check_bytes(part: bytes, start: int, allowed: Sequence[bytes], over: Sequence[Changing]) -> None:
    for index, byte in enumerate(part):
        if all(one[index] != byte for one in allowed):
            wanted = " or ".join(sorted({f"{one[index]:#04x}" for one in allowed}))
            who = ", ".join(map(repr, over)) or "nobody"
            raise AssertionError(f"byte {start + index} is {byte:#04x} instead of {wanted}; touched by {who}")
