"""What is said in NBD, and that nothing that a server says is believed without a look."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.extent import Extent, ExtentKind
from cachefs.nbd.address import Address, parse_uri
from cachefs.nbd.handshake import Export, Flag, Receive, RefusedError, Send, StartTls, negotiate
from cachefs.nbd.protocol import NO_HOLE, Command, ProtocolError, ReplyParser, Request

CONTEXT = 7
MOST_HELD = (1 << 20) + 4  # bytes of the longest payload that is looked at as a whole


# ---- what a server says


def simple(cookie: int, data: bytes = b"", error: int = 0) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


def chunk(cookie: int, kind: int, payload: bytes = b"", *, done: bool = True, length: int | None = None) -> bytes:
    announced = len(payload) if length is None else length
    return struct.pack(">IHHQI", 0x668E33EF, int(done), kind, cookie, announced) + payload


def data(cookie: int, offset: int, content: bytes, *, done: bool = True) -> bytes:
    return chunk(cookie, 1, struct.pack(">Q", offset) + content, done=done)


def hole(cookie: int, offset: int, length: int, *, done: bool = True) -> bytes:
    return chunk(cookie, 2, struct.pack(">QI", offset, length), done=done)


def status(cookie: int, *descriptors: tuple[int, int], context: int = CONTEXT, done: bool = True) -> bytes:
    packed = b"".join(struct.pack(">II", *one) for one in descriptors)
    return chunk(cookie, 5, struct.pack(">I", context) + packed, done=done)


def failure(cookie: int, error: int, message: bytes = b"", *, done: bool = True, tail: bytes = b"") -> bytes:
    kind = 0x8002 if tail else 0x8001
    return chunk(cookie, kind, struct.pack(">IH", error, len(message)) + message + tail, done=done)


# ---- the client's side


def read_of(offset: int, length: int, cookie: int = 1) -> Request:
    return Request(Command.READ, offset, length, buffer=memoryview(bytearray(b"?" * length)), cookie=cookie)


def asked(*requests: Request, structured: bool = True) -> ReplyParser:
    parser = ReplyParser(structured=structured, context=CONTEXT)
    for request in requests:
        parser.expect(request)
    return parser


def content(request: Request) -> bytes:
    assert request.buffer is not None
    return bytes(request.buffer)


def feed(parser: ReplyParser, said: bytes) -> list[Request]:
    return list(parser.feed(memoryview(said)))


def test_request_is_encoded_as_the_protocol_says() -> None:
    request = Request(Command.WRITE_ZEROES, 0x1122334455, 0x667788, NO_HOLE, cookie=9)
    expected = "25609513 0002 0006 0000000000000009 0000001122334455 00667788"
    assert request.encode() == bytes.fromhex(expected)


def test_simple_replies_in_any_order_reach_their_requests() -> None:
    first, second, third = read_of(0, 4, 1), read_of(8, 2, 2), Request(Command.FLUSH, cookie=3)
    parser = asked(first, second, third, structured=False)
    finished = feed(parser, simple(3) + simple(2, b"xy") + simple(1, error=5))
    assert finished == [third, second, first]
    assert (content(second), first.error, third.error) == (b"xy", 5, 0)
    assert not parser.pending


@pytest.mark.slow
@settings(deadline=None)  # the machine's time, not ours
@given(st.data())
def test_a_read_in_any_chunks_and_any_pieces_gives_its_bytes(draw: st.DataObject) -> None:
    length = draw.draw(st.integers(1, 300))
    whole = draw.draw(st.binary(min_size=length, max_size=length))
    cuts = sorted({0, length, *draw.draw(st.lists(st.integers(0, length), max_size=6))})
    parts = list(itertools.pairwise(cuts))
    expected = bytearray(whole)
    said = b""
    for number, (start, end) in enumerate(draw.draw(st.permutations(parts))):
        done = number == len(parts) - 1
        if draw.draw(st.booleans()):
            expected[start:end] = bytes(end - start)
            said += hole(1, 1000 + start, end - start, done=done)
        else:
            said += data(1, 1000 + start, whole[start:end], done=done)
    request = read_of(1000, length)
    parser = asked(request)
    finished: list[Request] = []
    while said:
        count = draw.draw(st.integers(1, len(said)))
        assert not finished
        finished, said = feed(parser, said[:count]), said[count:]
    assert finished == [request]
    assert content(request) == expected
    assert request.error == 0


def test_block_status_is_a_prefix_of_the_range_with_holes_that_read_as_zeros() -> None:
    request = Request(Command.BLOCK_STATUS, 4096, 4096, cookie=1)
    assert feed(asked(request), status(1, (512, 0), (512, 3), (512, 2), (512, 1), (9999, 3))) == [request]
    assert request.extents == [
        Extent(4096, 512, ExtentKind.DATA),
        Extent(4608, 512, ExtentKind.HOLE),
        Extent(5120, 512, ExtentKind.ZERO),
        Extent(5632, 512, ExtentKind.DATA),  # a hole that does not read as zeros
        Extent(6144, 2048, ExtentKind.HOLE),
    ]


def test_error_chunk_fails_its_request_and_no_other() -> None:
    first, second = read_of(0, 8, 1), read_of(0, 8, 2)
    said = (
        data(1, 0, b"1234", done=False)
        + failure(1, 5, b"broken\x1b[2J disk", done=False, tail=struct.pack(">Q", 4))
        + data(2, 0, b"abcdefgh")
        + chunk(1, 0)
    )
    assert feed(asked(first, second), said) == [second, first]
    assert (first.error, first.message) == (5, "broken?[2J disk")
    assert content(second) == b"abcdefgh"


def test_late_reply_to_a_given_up_read_does_not_touch_its_buffer() -> None:
    first, second = read_of(0, 8, 1), read_of(0, 8, 2)
    buffer = first.buffer
    assert buffer is not None
    parser = asked(first, second)
    said = data(1, 0, b"12345678")
    assert feed(parser, said[:-4]) == []  # half of the data is in
    buffer[:] = b"reused!!"
    parser.abandon(first)
    assert feed(parser, said[-4:] + data(2, 0, b"abcdefgh")) == [first, second]
    assert bytes(buffer) == b"reused!!"
    assert content(second) == b"abcdefgh"


READ, STATUS_OF, WRITE = 1, 2, 3
LIES = {
    "wrong magic": b"\x00" * 16,
    "cookie of nobody": simple(99),
    "chunk for nobody": data(99, 4096, b"1234"),
    "simple reply to a structured read": simple(READ, bytes(8)),
    "simple status": simple(STATUS_OF),
    "data before the range": data(READ, 4095, b"1234"),
    "data beyond the range": data(READ, 4100, b"12345"),
    "data longer than the range": data(READ, 4096, b"123456789"),
    "offset that overflows": data(READ, (1 << 64) - 4, b"1234"),
    "no data": data(READ, 4096, b""),
    "data twice": data(READ, 4096, b"1234", done=False) + data(READ, 4098, b"12", done=False),
    "all of it after a part": data(READ, 4096, b"12", done=False) + data(READ, 4096, b"12345678"),
    "data over a hole": hole(READ, 4096, 8, done=False) + data(READ, 4103, b"1"),
    "hole beyond the range": hole(READ, 4096, 9),
    "hole of nothing": hole(READ, 4096, 0),
    "hole of a wrong length": chunk(READ, 2, bytes(13)),
    "end before all of it": data(READ, 4096, b"1234"),
    "end without anything": chunk(READ, 0),
    "none that is not the last": chunk(READ, 0, done=False),
    "none with a payload": chunk(READ, 0, b"1234"),
    "unknown kind": chunk(READ, 77, b"1234"),
    "unknown flags": struct.pack(">IHHQIQ", 0x668E33EF, 3, 1, READ, 16, 4096) + bytes(8),
    "status of a read": status(READ, (8, 0)),
    "data of a write": data(WRITE, 0, b"1234"),
    "two answers": chunk(WRITE, 0) + chunk(WRITE, 0),
    "error of zero": failure(READ, 0),
    "error that is too short": chunk(READ, 0x8001, b"12345"),
    "error with a longer message than it has": chunk(READ, 0x8001, struct.pack(">IH", 5, 10) + b"short"),
    "error without its offset": chunk(READ, 0x8002, struct.pack(">IH", 5, 0) + b"1234"),
    "endless error": chunk(READ, 0x8001, length=1 << 30),
    "status of another context": status(STATUS_OF, (8, 0), context=8),
    "status without descriptors": chunk(STATUS_OF, 5, struct.pack(">I", CONTEXT)),
    "status of a broken length": chunk(STATUS_OF, 5, struct.pack(">I", CONTEXT) + bytes(12)),
    "status of nothing": status(STATUS_OF, (0, 0)),
    "status beyond its range": status(STATUS_OF, (8, 0), (8, 0)),
    "status twice": status(STATUS_OF, (4, 0), done=False) + status(STATUS_OF, (4, 0)),
    "status left out": chunk(STATUS_OF, 0),
    "endless status": chunk(STATUS_OF, 5, length=(1 << 32) - 4),
    "endless chunks": b"".join(failure(WRITE, 5, done=False) for _ in range(100)),
}


@pytest.mark.parametrize("said", LIES.values(), ids=LIES)
def test_a_lie_costs_the_connection(said: bytes) -> None:
    requests = (
        read_of(4096, 8, READ),
        Request(Command.BLOCK_STATUS, 0, 8, cookie=STATUS_OF),
        Request(Command.WRITE, 0, 4, cookie=WRITE),
    )
    with pytest.raises(ProtocolError):
        feed(asked(*requests), said)


def test_structured_reply_that_was_not_agreed_on_costs_the_connection() -> None:
    with pytest.raises(ProtocolError):
        feed(asked(read_of(0, 4), structured=False), data(1, 0, b"1234"))


def test_a_read_in_too_many_fragments_costs_the_connection() -> None:
    request = read_of(0, 4 << 20)
    parser = asked(request)
    said = b"".join(data(1, at, b"1", done=False) for at in range(0, 4 << 20, 1024))
    with pytest.raises(ProtocolError, match="fragments"):
        feed(parser, said)
    assert len(request.fragments) <= 1025


PIECES: list[Callable[[int], bytes]] = [
    lambda cookie: simple(cookie),
    lambda cookie: simple(cookie, error=5),
    lambda cookie: data(cookie, 4096, b"12345678"),
    lambda cookie: data(cookie, 4096, b"1234", done=False),
    lambda cookie: hole(cookie, 4100, 4),
    lambda cookie: status(cookie, (8, 3)),
    lambda cookie: failure(cookie, 28, b"full"),
    lambda cookie: chunk(cookie, 0),
]
said_by_anybody = st.lists(
    st.one_of(
        st.builds(lambda piece, cookie: piece(cookie), st.sampled_from(PIECES), st.integers(0, 5)),
        st.binary(max_size=40),
        st.builds(
            struct.Struct(">IHHQI").pack,
            st.just(0x668E33EF),
            st.integers(0, 3),
            st.sampled_from([0, 1, 2, 5, 6, 0x8001, 0x8002, 0x9000]),
            st.integers(0, 5),
            st.integers(0, (1 << 32) - 1),
        ),
    ),
    max_size=12,
).map(b"".join)


@given(said_by_anybody, st.integers(0, 300), st.booleans())
def test_whatever_is_said_there_is_an_error_or_an_answer_and_memory_is_bounded(
    said: bytes, cut: int, structured: bool
) -> None:
    frame = bytearray(b"#" * 24)  # the read's buffer is its middle
    reading = Request(Command.READ, 4096, 8, buffer=memoryview(frame)[8:16], cookie=1)
    others = [
        read_of(0, 4096, 2),
        Request(Command.BLOCK_STATUS, 0, 8, cookie=3),
        Request(Command.WRITE, 0, 8, cookie=4),
    ]
    parser = asked(reading, *others, structured=structured)
    parser.abandon(others[0])
    finished: list[Request] = []
    try:
        for part in (said[:cut], said[cut:]):
            for request in parser.feed(memoryview(part)):
                finished.append(request)
                assert len(parser._piece) <= MOST_HELD
            assert parser.where()
    except ProtocolError:
        pass
    assert frame[:8] == frame[16:] == b"#" * 8
    assert len(finished) == len(set(map(id, finished))) == 4 - len(parser.pending)


@given(st.lists(st.integers(0, 7), max_size=6), st.integers(1, 40))
def test_a_truncated_stream_answers_nothing_that_is_not_there(order: list[int], cut: int) -> None:
    request = read_of(4096, 8)
    said = data(1, 4096, b"12345678")
    assert feed(asked(request), said[: max(0, len(said) - cut)]) == []


# ---- the handshake

GREETING = b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3)
STRUCTURED, SET_META, GO, STARTTLS = 8, 10, 7, 5


def option(number: int, kind: int, payload: bytes = b"", length: int | None = None) -> bytes:
    announced = len(payload) if length is None else length
    return struct.pack(">QIII", 0x3E889045565A9, number, kind, announced) + payload


def info(size: int = 1 << 20, flags: int = 0x1 | 0x4 | 0x40 | 0x100) -> bytes:
    return option(GO, 3, struct.pack(">HQH", 0, size, flags))


def blocks(minimum: int, preferred: int, maximum: int) -> bytes:
    return option(GO, 3, struct.pack(">HIII", 3, minimum, preferred, maximum))


ALLOCATION = option(SET_META, 4, struct.pack(">I", CONTEXT) + b"base:allocation") + option(SET_META, 1)
UP_TO_GO = GREETING + option(STRUCTURED, 1) + ALLOCATION


def shake(said: bytes, *, tls: bool = False) -> tuple[Export | None, bytes, int]:
    """What it ends with (None: it wants to hear more), what the client says, and how often it starts TLS."""
    plan = negotiate("disk", tls=tls)
    sent, started = b"", 0
    step = next(plan)
    try:
        while True:
            if isinstance(step, Send):
                sent += step.data
                step = next(plan)
            elif isinstance(step, StartTls):
                started += 1
                step = next(plan)
            else:
                assert isinstance(step, Receive)
                assert 0 < step.length <= 16 << 10
                if len(said) < step.length:
                    return None, sent, started
                heard, said = said[: step.length], said[step.length :]
                step = plan.send(heard)
    except StopIteration as done:
        return done.value, sent, started


def test_handshake_agrees_on_what_both_can() -> None:
    export, sent, _ = shake(UP_TO_GO + info() + blocks(4096, 65536, 1 << 25) + option(GO, 1))
    assert export == Export(
        1 << 20,
        Flag.HAS_FLAGS | Flag.SEND_FLUSH | Flag.SEND_WRITE_ZEROES | Flag.CAN_MULTI_CONN,
        True,
        CONTEXT,
        4096,
        65536,
        1 << 25,
    )
    assert sent.startswith(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", STRUCTURED, 0))
    assert sent.endswith(struct.pack(">II", GO, 4 + 4 + 4) + b"\0\0\0\4disk" + b"\0\1\0\3")


def test_handshake_does_without_what_the_server_lacks() -> None:
    export, sent, _ = shake(GREETING + option(STRUCTURED, 0x80000001) + info(size=1000) + option(GO, 1))
    assert export is not None
    assert (export.structured, export.context, export.minimum, export.maximum) == (False, None, 1, 32 << 20)
    assert b"base:allocation" not in sent


def test_sizes_that_nobody_states_are_those_that_every_server_takes() -> None:
    export, _, _ = shake(UP_TO_GO + info() + option(GO, 1))
    assert export is not None
    assert (export.minimum, export.preferred, export.maximum) == (512, 4096, 32 << 20)


def test_tls_comes_before_anything_that_is_worth_hiding() -> None:
    said = GREETING + option(STARTTLS, 1) + option(STRUCTURED, 1) + ALLOCATION + info() + option(GO, 1)
    export, sent, started = shake(said, tls=True)
    assert export is not None
    assert started == 1
    assert b"disk" not in shake(GREETING + option(STARTTLS, 1), tls=True)[1]
    assert sent[4:].startswith(b"IHAVEOPT" + struct.pack(">II", STARTTLS, 0))


def test_server_without_tls_is_refused_where_tls_was_asked_for() -> None:
    with pytest.raises(RefusedError, match="does not offer TLS"):
        shake(GREETING + option(STARTTLS, 0x80000001), tls=True)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (0x80000006, "no export 'disk' \\(gone fishing\\)"),
        (0x80000005, "wants TLS.*nbds://"),
        (0x80000001, "too old"),
        (0x80000002, "policy"),
        (0x80000063, "error 0x80000063"),
    ],
)
def test_refusal_says_what_to_do(kind: int, sentence: str) -> None:
    with pytest.raises(RefusedError, match=sentence):
        shake(UP_TO_GO + option(GO, kind, b"gone fishing"))


BAD_HANDSHAKES = {
    "http": b"HTTP/1.1 400 Bad Request",
    "oldstyle": b"NBDMAGIC" + bytes.fromhex("00420281861253") + bytes(20),
    "not fixed": b"NBDMAGIC" + b"IHAVEOPT" + bytes(2),
    "another option": GREETING + option(GO, 1),
    "wrong reply magic": GREETING + bytes(20),
    "endless reply": GREETING + option(STRUCTURED, 3, length=(1 << 32) - 1),
    "endless replies": UP_TO_GO + info() * 1000,
    "no size": UP_TO_GO + option(GO, 1),
    "size beyond all": UP_TO_GO + info(size=1 << 63) + option(GO, 1),
    "short info": UP_TO_GO + option(GO, 3, b"\0\0\1") + option(GO, 1),
    "short block sizes": UP_TO_GO + option(GO, 3, b"\0\3\1") + info() + option(GO, 1),
    "minimum of 3": UP_TO_GO + info() + blocks(3, 4096, 1 << 20) + option(GO, 1),
    "minimum of 1 MiB": UP_TO_GO + info() + blocks(1 << 20, 1 << 20, 1 << 20) + option(GO, 1),
    "maximum below minimum": UP_TO_GO + info() + blocks(4096, 4096, 512) + option(GO, 1),
    "size beside its blocks": UP_TO_GO + info(size=5000) + blocks(4096, 4096, 8192) + option(GO, 1),
    "another context": GREETING + option(STRUCTURED, 1) + option(SET_META, 4, b"\0\0\0\1x:y") + option(SET_META, 1),
}


@pytest.mark.parametrize("said", BAD_HANDSHAKES.values(), ids=BAD_HANDSHAKES)
def test_bad_handshake_is_an_error(said: bytes) -> None:
    with pytest.raises((RefusedError, ProtocolError)):
        shake(said)


def _handshakes() -> Iterator[bytes]:
    yield from (GREETING, option(STRUCTURED, 1), ALLOCATION, info(), option(GO, 1), option(GO, 0x80000006, b"no"))
    yield from (option(STARTTLS, 1), blocks(512, 4096, 1 << 20), option(STRUCTURED, 0x80000001))


@given(
    st.lists(st.one_of(st.sampled_from(list(_handshakes())), st.binary(max_size=30)), max_size=8).map(b"".join),
    st.booleans(),
)
def test_whatever_is_said_in_a_handshake_it_ends(said: bytes, tls: bool) -> None:
    try:
        export, _, _ = shake(GREETING + said, tls=tls)
    except (RefusedError, ProtocolError):
        return
    assert export is None or 0 <= export.size < 1 << 63


# ---- URIs


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("nbd://store", Address("", "store")),
        ("nbd://store:1234/a/b%20c", Address("a/b c", "store", 1234)),
        ("nbds://[::1]/disk", Address("disk", "::1", tls=True)),
        ("nbd+unix:///disk?socket=/run/x.sock", Address("disk", socket="/run/x.sock")),
        ("nbd+unix:///?socket=/run/x.sock", Address("", socket="/run/x.sock")),
    ],
)
def test_uri_names_an_export(uri: str, address: Address) -> None:
    assert parse_uri(uri) == address


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "disk.raw",
        "http://store/disk",
        "nbd:///disk",
        "nbd://store:99999/disk",
        "nbd://user@store/disk",
        "nbd://store/disk?socket=/x",
        "nbd+unix:///disk",
        "nbd+unix:///disk?socket=x",
        "nbd+unix://host/disk?socket=/x",
        "nbd://store/%00",
        "nbd://[::1/disk",
    ],
)
def test_what_is_no_nbd_uri_is_refused_with_a_sentence(uri: str) -> None:
    with pytest.raises(ValueError, match=r"NBD|export|socket|host"):
        parse_uri(uri)
