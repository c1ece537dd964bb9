"""Requests and replies of NBD as bytes: no I/O, no clock, nothing that waits.

`ReplyParser` is fed with what the server sends and believes none of it: each reply is held against the request that its
cookie names. Whatever does not fit raises ProtocolError, after which the parser is of no use and the connection is to be
dropped. What it holds is bounded by the requests in flight and `_MAX_STATUS`, whatever the server announces.

    where()          the next bytes belong there. Look it up in the very step that copies them: a request that is given
                     up in between (`abandon`) has its buffer back, and what comes for it goes into a scratch buffer
    received(count)  so many bytes were put there; returns the requests that this completed

State, between two bytes: either a *piece* is being filled (a header, or a payload that is looked at as a whole), after which
its step is called; or *data* goes straight into the buffer of a read (`_left` bytes still to come).

Source: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

from __future__ import annotations

import bisect
import enum
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cachefs.errors import TransientError
from cachefs.extent import Extent, ExtentKind, merge_extents

REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

FUA = 1 << 0  # of a change: durable before it is answered
NO_HOLE = 1 << 1  # of a WRITE_ZEROES: keep the space

_REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
_SIMPLE = struct.Struct(">IQ")  # error, cookie
_CHUNK = struct.Struct(">HHQI")  # flags, kind, cookie, length of the payload
_WHOLE_READ = struct.Struct(">IHHQIQ")  # magic, a chunk's head, offset of its data
_HOLE = struct.Struct(">QI")  # offset, length
_ERROR = struct.Struct(">IH")  # error, length of the message
_DESCRIPTOR = struct.Struct(">II")  # length, flags

_DONE = 1  # flag of the last chunk of a reply
_NONE, _DATA, _DATA_HOLE, _STATUS, _IS_ERROR, _ERROR_OFFSET = 0, 1, 2, 5, 1 << 15, (1 << 15) + 2
_STATE_HOLE, _STATE_ZERO = 1, 2

_SMALL = 32  # bytes: every piece but a status and an error
_MAX_MESSAGE = 4096
_MAX_STATUS = 8 << 20  # of a payload: nbdkit ends a reply after a million descriptors, qemu-nbd after 128 Ki
_MOST_DESCRIPTORS = 16384  # of a payload that are looked at, on the loop: the rest is asked for again
_MAX_FRAGMENTS = 1024  # of a read that were received and do not touch each other
MAX_STATUS_LENGTH = (1 << 32) - (64 << 10)
"""Most bytes to ask for with one BLOCK_STATUS; a multiple of every alignment that a server may want."""

_REASONS = {
    1: "it does not permit that",
    5: "input/output error",
    12: "it is out of memory",
    22: "it calls the request invalid",
    28: "no space left",
    75: "the request is too long for it",
    95: "it does not support that",
    108: "it is shutting down",
}
SHUTTING_DOWN = 108
TRANSIENT_ERRORS = frozenset({12, SHUTTING_DOWN})

_scratch = memoryview(bytearray(64 << 10))  # written by everybody, read by nobody


class ProtocolError(TransientError):
    """The server said something that it must not say: the connection is to be dropped."""

    def __init__(self, detail: str) -> None:
        super().__init__("nbd", f"the server breaks the protocol: {detail}")


class Command(enum.IntEnum):
    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


CHANGES = frozenset({Command.WRITE, Command.WRITE_ZEROES})


def _nobody(request: Request) -> None:
    """Hears of the end of a request that nobody waits for."""


@dataclass(eq=False, slots=True)
class Request:
    """A request and what was answered. buffer: of a READ, exactly *length* bytes; None when it was given up.

    error: the server's, 0 is none. extents: of a BLOCK_STATUS, a prefix of its range that is not empty. then: told once
    that it was answered, or never will be (`is_answered`). token: its sender's, not looked at here.
    """

    command: Command
    offset: int = 0
    length: int = 0
    flags: int = 0
    buffer: memoryview | None = None
    cookie: int = -1
    then: Callable[[Request], None] = _nobody
    sent_at: float = 0.0
    is_answered: bool = False
    error: int = 0
    message: str = ""
    extents: list[Extent] | None = None
    chunks: int = 0
    fragments: list[tuple[int, int]] = field(default_factory=list)
    """Parts of a READ that have come in chunks: (start, end), sorted, none touching the next."""
    token: object = None

    @property
    def reason(self) -> str:
        """What the error means, for a sentence."""
        why = _REASONS.get(self.error) or f"error {self.error}"
        return why + (f" ({self.message})" if self.message else "")

    @property
    def end(self) -> int:
        return self.offset + self.length

    def encode(self) -> bytes:
        return _REQUEST.pack(REQUEST_MAGIC, self.flags, self.command, self.cookie, self.offset, self.length)


class ReplyParser:
    """structured: what the handshake agreed on. context: the number of base:allocation, if there is one."""

    def __init__(self, *, structured: bool, context: int | None = None) -> None:
        self.pending: dict[int, Request] = {}
        """By cookie, the oldest first. Given up requests stay until they are answered."""
        self._structured = structured
        self._context = context
        self._finished: list[Request] = []
        self._small = memoryview(bytearray(_SMALL))  # the pieces, but for long ones
        self._magic = self._small[:4]
        self._piece = self._magic
        self._have = 0
        self._step: Callable[[memoryview], None] = self._take_magic
        self._request: Request | None = None  # whose chunk it is
        self._is_last = False
        self._at = self._left = 0  # in the buffer of a read

    # ---- what the client says

    def expect(self, request: Request) -> None:
        """*request*, with a cookie that nobody has, is about to be sent."""
        assert request.cookie not in self.pending
        self.pending[request.cookie] = request

    def abandon(self, request: Request) -> None:
        """Nobody waits for *request* any more: its buffer is not touched again, its cookie stays its own."""
        request.buffer = None

    def where(self) -> memoryview:
        """Where the next bytes belong; never empty."""
        if not self._left:
            return self._piece[self._have :]
        assert self._request is not None
        buffer = self._request.buffer
        return _scratch[: self._left] if buffer is None else buffer[self._at : self._at + self._left]

    @property
    def data_left(self) -> int:
        """Bytes that go into the buffer of a read before the next header."""
        return self._left

    def advance(self, count: int) -> None:
        """Fewer bytes than `data_left` were put where `where` says."""
        self._at += count
        self._left -= count

    def received(self, count: int) -> list[Request]:
        """*count* bytes were put where `where` says. Returns what is answered now. Raises: ProtocolError."""
        if self._left:
            self._at += count
            self._left -= count
            if not self._left:
                self._end_chunk()
        else:
            self._have += count
            if self._have == len(self._piece):
                self._step(self._piece)
        finished, self._finished = self._finished, []
        return finished

    def feed(self, data: memoryview) -> Iterator[Request]:
        """All of *data* has come: what it answers, one by one, so that a lie takes no answer back that came before it.

        Raises: ProtocolError.
        """
        at, end = 0, len(data)
        while at < end:
            if self._piece is self._magic and not self._have and end - at >= _WHOLE_READ.size:
                request = self._find_whole_read(data, at)
                if request is not None:
                    at += _WHOLE_READ.size
                    until = at + request.length
                    if until <= end:
                        if request.buffer is not None:
                            request.buffer[:] = data[at:until]
                        at = until
                        del self.pending[request.cookie]
                        request.is_answered = True
                        yield request
                    else:
                        request.chunks, request.fragments, self._is_last = 1, [(0, request.length)], True
                        self._begin_data(request, 0, request.length)
                    continue
            target = self.where()
            count = min(len(target), end - at)
            target[:count] = data[at : at + count]
            at += count
            yield from self.received(count)

    def _find_whole_read(self, data: memoryview, at: int) -> Request | None:
        """The read that all of is answered by one chunk which begins at *at*: what nearly every reply is.

        None: it is something else, or is none at all; the steps look closer.
        """
        magic, flags, kind, cookie, length, offset = _WHOLE_READ.unpack_from(data, at)
        if magic != STRUCTURED_REPLY_MAGIC or flags != _DONE or kind != _DATA or not self._structured or self._left:
            return None
        request = self.pending.get(cookie)
        if (
            request is None
            or request.command is not Command.READ
            or request.chunks
            or offset != request.offset
            or length != request.length + 8
            or not request.length
        ):
            return None
        return request

    # ---- the steps

    def _expect(self, count: int, step: Callable[[memoryview], None]) -> None:
        piece = self._small[:count] if count <= _SMALL else memoryview(bytearray(count))
        self._piece, self._have, self._step = piece, 0, step

    def _expect_reply(self) -> None:
        self._piece, self._have, self._step = self._magic, 0, self._take_magic

    def _find(self, cookie: int) -> Request:
        request = self._request = self.pending.get(cookie)
        if request is None:
            raise ProtocolError(f"a reply to request {cookie}, which is not waiting for one")
        return request

    def _take_magic(self, piece: memoryview) -> None:
        magic = int.from_bytes(piece, "big")
        if magic == SIMPLE_REPLY_MAGIC:
            self._expect(_SIMPLE.size, self._take_simple)
        elif magic == STRUCTURED_REPLY_MAGIC and self._structured:
            self._expect(_CHUNK.size, self._take_chunk)
        else:
            raise ProtocolError(f"a reply that begins with {magic:#010x}")

    def _take_simple(self, piece: memoryview) -> None:
        error, cookie = _SIMPLE.unpack(piece)
        request = self._find(cookie)
        if request.chunks or (request.command is Command.READ and self._structured):
            raise ProtocolError(f"a simple reply to {request.command.name}, which needs a structured one")
        request.error = error
        self._is_last = True
        if request.command is Command.READ and not error:
            self._begin_data(request, 0, request.length)
        else:
            self._finish(request)

    def _take_chunk(self, piece: memoryview) -> None:
        flags, kind, cookie, length = _CHUNK.unpack(piece)
        request = self._find(cookie)
        request.chunks += 1
        self._is_last = bool(flags & _DONE)
        is_read = request.command is Command.READ
        if request.chunks > 64 + request.length // 512:
            raise ProtocolError("a reply in more chunks than it has sectors")
        if flags & ~_DONE:
            raise ProtocolError(f"a chunk with unknown flags {flags:#x}")
        if kind == _NONE and length == 0 and self._is_last:
            self._end_chunk()
        elif kind == _DATA and is_read and 8 < length <= request.length + 8:
            self._expect(8, lambda piece: self._take_data(piece, length - 8))
        elif kind == _DATA_HOLE and is_read and length == _HOLE.size:
            self._expect(length, self._take_hole)
        elif kind == _STATUS and request.command is Command.BLOCK_STATUS and 12 <= length <= _MAX_STATUS + 4:
            self._expect(length, self._take_status)
        elif kind & _IS_ERROR and _ERROR.size <= length <= _ERROR.size + _MAX_MESSAGE + 8:
            self._expect(length, lambda piece: self._take_error(piece, kind))
        else:
            raise ProtocolError(f"a chunk of kind {kind} and {length} bytes in a reply to {request.command.name}")

    def _take_data(self, piece: memoryview, length: int) -> None:
        request = self._current()
        at = self._claim(request, int.from_bytes(piece, "big"), length)
        self._begin_data(request, at, length)

    def _take_hole(self, piece: memoryview) -> None:
        request = self._current()
        offset, length = _HOLE.unpack(piece)
        at = self._claim(request, offset, length)
        if request.buffer is not None:
            request.buffer[at : at + length] = bytes(length)
        self._end_chunk()

    def _take_status(self, piece: memoryview) -> None:
        request = self._current()
        if self._context is None or int.from_bytes(piece[:4], "big") != self._context or request.extents is not None:
            raise ProtocolError("a block status that was not asked for")
        if (len(piece) - 4) % _DESCRIPTOR.size:
            raise ProtocolError(f"a block status of {len(piece)} bytes")
        extents: list[Extent] = []
        at = request.offset
        for length, flags in _DESCRIPTOR.iter_unpack(piece[4 : 4 + _MOST_DESCRIPTORS * _DESCRIPTOR.size]):
            if not length or at >= request.end:
                raise ProtocolError(f"a block status that is empty, or begins beyond its range, at {at}")
            extents.append(Extent(at, min(length, request.end - at), _kind(flags)))  # the last one may be longer
            at += length
        request.extents = merge_extents(extents)
        self._end_chunk()

    def _take_error(self, piece: memoryview, kind: int) -> None:
        request = self._current()
        error, length = _ERROR.unpack_from(piece)
        rest = len(piece) - _ERROR.size - length
        if not error or rest < 0 or (kind == _ERROR_OFFSET and rest != 8):
            raise ProtocolError("an error chunk that does not hold what it announces")
        request.error = request.error or error
        message = bytes(piece[_ERROR.size : _ERROR.size + length])
        request.message = request.message or printable(message)
        self._end_chunk()

    # ---- of a chunk and its request

    def _current(self) -> Request:
        assert self._request is not None
        return self._request

    def _claim(self, request: Request, offset: int, length: int) -> int:
        """Note that a part of a read has come; where it belongs in the buffer."""
        at = offset - request.offset
        if not length or at < 0 or at + length > request.length:
            raise ProtocolError(f"{offset}+{length} in a reply to a read of {request.offset}+{request.length}")
        start, end, fragments = at, at + length, request.fragments
        index = bisect.bisect(fragments, (start, end))
        if (index and fragments[index - 1][1] > start) or (index < len(fragments) and fragments[index][0] < end):
            raise ProtocolError(f"{offset}+{length} of a read twice")
        if index < len(fragments) and fragments[index][0] == end:
            end = fragments.pop(index)[1]
        if index and fragments[index - 1][1] == start:
            index -= 1
            start = fragments.pop(index)[0]
        fragments.insert(index, (start, end))
        if len(fragments) > _MAX_FRAGMENTS:
            raise ProtocolError("a read in more fragments than anybody needs")
        return at

    def _begin_data(self, request: Request, at: int, length: int) -> None:
        self._request, self._at, self._left = request, at, length

    def _end_chunk(self) -> None:
        request = self._current()
        if not self._is_last:
            self._expect_reply()
            return
        if request.chunks and request.command is Command.READ and not request.error:
            whole = [(0, request.length)]
            if request.fragments != whole:
                raise ProtocolError(f"a read of {request.offset}+{request.length} ended before all of it was sent")
        self._finish(request)

    def _finish(self, request: Request) -> None:
        if request.command is Command.BLOCK_STATUS and not request.error and request.extents is None:
            raise ProtocolError("a block status without a status")
        del self.pending[request.cookie]
        request.is_answered = True
        self._finished.append(request)
        self._request = None
        self._expect_reply()


def _kind(flags: int) -> ExtentKind:
    """Of base:allocation. A hole that does not say that it reads as zeros may read as anything."""
    if not flags & _STATE_ZERO:
        return ExtentKind.DATA
    return ExtentKind.HOLE if flags & _STATE_HOLE else ExtentKind.ZERO


def printable(message: bytes) -> str:
    """What the server wrote, for a log: short, on one line, nothing that a terminal obeys."""
    text = message[:200].decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else "?" for letter in text)
