"""The handshake of NBD as a plan: a generator that says what to send and how much to receive, and does no I/O.

    plan = negotiate("export", tls=False)
    step = next(plan)                         Send: send it; Receive: send the bytes into the plan; StartTls: do so
    ... StopIteration.value                   the Export

Only fixed newstyle with NBD_OPT_GO, which every server of the last years speaks. What a server offers less than that
(structured replies, base:allocation, block sizes) is done without; TLS is never done without when it was asked for.

Every length is checked before it is received, and the number of replies is bounded.
Source: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

from cachefs.errors import PermanentError
from cachefs.nbd.protocol import ProtocolError, printable
from cachefs.units import is_power_of_two

_MAGIC = b"NBDMAGIC"
_OPTION_MAGIC = b"IHAVEOPT"
_REPLY_MAGIC = 0x3E889045565A9

_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")  # magic, option, length
_REPLY = struct.Struct(">QIII")  # magic, option, kind, length
_EXPORT = struct.Struct(">HQH")  # kind of info, size, flags
_BLOCK_SIZE = struct.Struct(">HIII")  # kind of info, minimum, preferred, maximum

_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_STARTTLS, _GO, _STRUCTURED_REPLY, _SET_META_CONTEXT = 5, 7, 8, 10
_ACK, _INFO, _META_CONTEXT = 1, 3, 4
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3
_IS_ERROR = 1 << 31
_UNSUPPORTED, _TLS_REQUIRED, _UNKNOWN, _SHUTDOWN = (_IS_ERROR + number for number in (1, 5, 6, 7))
_REFUSALS = {2: "its policy forbids it", 3: "it calls it invalid", 4: "it cannot on its platform", 9: "it is too big"}

_MAX_REPLY = 16 << 10  # bytes of one: a name of 4096 and a description are the longest
_MAX_REPLIES = 256  # to one option

ALLOCATION = b"base:allocation"
SAFE_MINIMUM, SAFE_MAXIMUM = 512, 32 << 20  # what every server takes that does not say


class RefusedError(PermanentError):
    """The server will not serve this, however often it is asked."""

    def __init__(self, detail: str) -> None:
        super().__init__("nbd", detail)


class Send(NamedTuple):
    data: bytes


class Receive(NamedTuple):
    length: int


class StartTls(NamedTuple):
    pass


Step = Send | Receive | StartTls


class Flag(enum.IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_WRITE_ZEROES = 1 << 6
    CAN_MULTI_CONN = 1 << 8


@dataclass(frozen=True)
class Export:
    """What the server says of an export. minimum, preferred, maximum: bytes of a request; offsets are multiples of *minimum*.

    context: the number that stands for base:allocation, if the server has it.
    """

    size: int
    flags: Flag
    structured: bool
    context: int | None
    minimum: int
    preferred: int
    maximum: int


def negotiate(name: str, *, tls: bool) -> Generator[Step, bytes, Export]:
    """Raises: RefusedError, with what to do about it; ProtocolError."""
    greeting = yield Receive(_GREETING.size)
    magic, option_magic, offered = _GREETING.unpack(greeting)
    if magic != _MAGIC:
        raise RefusedError("what answers there is no NBD server")
    if option_magic != _OPTION_MAGIC or not offered & _FIXED_NEWSTYLE:
        raise RefusedError("the server is too old: it does not speak fixed newstyle")
    yield Send(struct.pack(">I", offered & (_FIXED_NEWSTYLE | _NO_ZEROES)))
    if tls:
        if (yield from _ask(_STARTTLS, b""))[0] != _ACK:
            raise RefusedError("the server does not offer TLS: start it with a certificate, or write nbd:// for plain")
        yield StartTls()
    structured = (yield from _ask(_STRUCTURED_REPLY, b""))[0] == _ACK
    encoded = name.encode()
    counted = struct.pack(">I", len(encoded)) + encoded
    context = None
    if structured:
        query = struct.pack(">II", 1, len(ALLOCATION)) + ALLOCATION
        kind, _, replies = yield from _ask(_SET_META_CONTEXT, counted + query)
        context = _context(replies) if kind == _ACK else None
    kind, message, replies = yield from _ask(_GO, counted + struct.pack(">HH", 1, _INFO_BLOCK_SIZE))
    if kind != _ACK:
        raise _refusal(kind, message, name)
    return _export(replies, structured, context)


def _ask(option: int, data: bytes) -> Generator[Step, bytes, tuple[int, bytes, list[tuple[int, bytes]]]]:
    """The kind and text of the last reply to *option*, and the (kind, content) of those before it."""
    yield Send(_OPTION.pack(_OPTION_MAGIC, option, len(data)) + data)
    replies: list[tuple[int, bytes]] = []
    while len(replies) < _MAX_REPLIES:
        magic, answered, kind, length = _REPLY.unpack((yield Receive(_REPLY.size)))
        if magic != _REPLY_MAGIC or answered != option:
            raise ProtocolError(f"a reply to option {answered} where one to {option} is due")
        if length > _MAX_REPLY:
            raise ProtocolError(f"a reply of {length} bytes to an option")
        content = (yield Receive(length)) if length else b""
        if kind == _ACK or kind & _IS_ERROR:
            return kind, content, replies
        replies.append((kind, content))
    raise ProtocolError(f"more than {_MAX_REPLIES} replies to option {option}")


def _refusal(kind: int, message: bytes, name: str) -> RefusedError | ProtocolError:
    said = f" ({printable(message)})" if message else ""
    if kind == _UNKNOWN:
        return RefusedError(f"the server has no export {name!r}{said}; `nbdinfo --list` shows what it has")
    if kind == _TLS_REQUIRED:
        return RefusedError(f"the server wants TLS{said}: write nbds:// and give tls.ca")
    if kind == _UNSUPPORTED:
        return RefusedError("the server is too old: it does not know NBD_OPT_GO")
    if kind == _SHUTDOWN:
        return ProtocolError("it is shutting down")
    why = _REFUSALS.get(kind - _IS_ERROR, f"error {kind:#x}")
    return RefusedError(f"the server refuses the export {name!r}: {why}{said}")


def _context(replies: list[tuple[int, bytes]]) -> int | None:
    found = [content for kind, content in replies if kind == _META_CONTEXT]
    if not found:
        return None
    if len(found) > 1 or len(found[0]) < 4 or found[0][4:] != ALLOCATION:
        raise ProtocolError("a context that was not asked for")
    return int.from_bytes(found[0][:4], "big")


def _export(replies: list[tuple[int, bytes]], structured: bool, context: int | None) -> Export:
    size = flags = None
    minimum = preferred = maximum = 0
    for kind, content in replies:
        if kind != _INFO or len(content) < 2:
            raise ProtocolError(f"a reply of kind {kind} to NBD_OPT_GO")
        info = int.from_bytes(content[:2], "big")
        if info == _INFO_EXPORT:
            if len(content) != _EXPORT.size:
                raise ProtocolError(f"{len(content)} bytes about an export")
            _, size, flags = _EXPORT.unpack(content)
        elif info == _INFO_BLOCK_SIZE:
            if len(content) != _BLOCK_SIZE.size:
                raise ProtocolError(f"{len(content)} bytes about block sizes")
            _, minimum, preferred, maximum = _BLOCK_SIZE.unpack(content)
            if not is_power_of_two(minimum) or minimum > 64 << 10 or maximum < minimum:
                raise ProtocolError(f"block sizes from {minimum} to {maximum}")
    if size is None or flags is None:
        raise ProtocolError("NBD_OPT_GO was answered without the size of the export")
    if size >= 1 << 63:
        raise ProtocolError(f"an export of {size} bytes")
    if not minimum:
        minimum, maximum = (1 if size % SAFE_MINIMUM else SAFE_MINIMUM), SAFE_MAXIMUM
    if size % minimum:
        raise ProtocolError(f"an export of {size} bytes with blocks of {minimum}")
    preferred = preferred if is_power_of_two(preferred) and preferred >= minimum else max(4096, minimum)
    known = Flag(flags & sum(Flag)) if flags & Flag.HAS_FLAGS else Flag(0)
    return Export(size, known, structured, context, minimum, preferred, maximum - maximum % minimum)
