from __future__ import annotations

import pytest

from cachefs.fuse import protocol
from cachefs.fuse.protocol import (
    INIT_REPLY,
    INIT_REPLY_SIZE,
    LIBFUSE_DECIDES,
    MAX_BACKGROUND,
    MAX_PAGES,
    MAX_WRITE,
    OUT_HEADER,
    WANTED,
    Init,
    compose_init_reply,
    error_reply,
)

EVERYTHING = (1 << 64) - 1


@pytest.mark.parametrize(
    ("name", "size"),
    # sizeof() of include/uapi/linux/fuse.h; those of replies with the 16 bytes of fuse_out_header
    [
        ("IN_HEADER", 40),
        ("OUT_HEADER", 16),
        ("READ_IN", 40),
        ("WRITE_IN", 40),
        ("WRITE_REPLY", 16 + 8),
        ("FALLOCATE_IN", 32),
        ("LSEEK_IN", 24),
        ("LSEEK_REPLY", 16 + 8),
        ("OPEN_REPLY", 16 + 16),
        ("WRITE_REQUEST_SIZE", 80),
        ("INIT_REPLY_SIZE", 16 + 64),
    ],
)
def test_layouts_have_the_kernels_sizes(name: str, size: int) -> None:
    found = getattr(protocol, name)
    assert (found if isinstance(found, int) else found.size) == size


def test_short_layouts_find_the_fields_of_the_full_ones() -> None:
    header = protocol.IN_HEADER.pack(1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert protocol.REQUEST_HEAD.unpack_from(header) == (2, 3, 4)
    body = protocol.READ_IN.pack(1, 2, 3, 4, 5, 6, 7)
    assert protocol.READ_WHERE.unpack_from(body) == (2, 3)
    assert protocol.WRITE_WHERE.unpack_from(body) == (2, 3, 6)


def init_reply(flags: int, flags2: int = 0, error: int = 0) -> bytes:
    fields = [INIT_REPLY_SIZE, error, 5, 7, 40, 131072, flags, 12, 9, 4096, 1, 3, 77, flags2, 88]
    return INIT_REPLY.pack(*fields).ljust(INIT_REPLY_SIZE, b"\0")


def composed(flags: int, offered: int, flags2: int = 0) -> dict[str, int]:
    reply = compose_init_reply(init_reply(flags, flags2), offered)
    assert len(reply) == INIT_REPLY_SIZE
    names = (
        "length error unique major minor max_readahead flags max_background congestion_threshold max_write "
        "time_gran max_pages map_alignment flags2 max_stack_depth"
    )
    return dict(zip(names.split(), INIT_REPLY.unpack_from(reply), strict=True))


def test_the_reply_to_init_keeps_what_is_agreed_and_sets_our_limits() -> None:
    found = composed(0, EVERYTHING)
    assert (found["unique"], found["error"], found["major"], found["minor"]) == (5, 0, 7, 40)
    assert (found["max_readahead"], found["time_gran"]) == (131072, 1)
    assert (found["max_background"], found["congestion_threshold"]) == (MAX_BACKGROUND, MAX_BACKGROUND)
    assert (found["max_write"], found["max_pages"]) == (MAX_WRITE, MAX_PAGES)


def test_flags_are_ours_where_the_kernel_offers_them() -> None:
    everything = composed(0, EVERYTHING)
    assert everything["flags"] | everything["flags2"] << 32 == WANTED
    some = composed(0, Init.ASYNC_READ | Init.MAX_PAGES)
    assert (some["flags"], some["flags2"]) == (Init.ASYNC_READ | Init.MAX_PAGES, 0)


def test_what_libfuse_wants_is_not_taken_over() -> None:
    flags = composed(0xFFFFFFFF, EVERYTHING, 0xFFFFFFFF)
    assert flags["flags"] | flags["flags2"] << 32 == WANTED | LIBFUSE_DECIDES
    for never in (Init.AUTO_INVAL_DATA, Init.WRITEBACK_CACHE):
        assert not flags["flags"] & never


def test_the_upper_flags_need_init_ext() -> None:
    assert composed(0, Init.HAS_RESEND)["flags2"] == 0
    assert composed(0, Init.HAS_RESEND | Init.INIT_EXT)["flags2"] == Init.HAS_RESEND >> 32


@pytest.mark.parametrize("reply", [init_reply(3, error=-5), init_reply(3)[:40], b""])
def test_an_error_or_an_old_layout_stays_as_it_is(reply: bytes) -> None:
    assert compose_init_reply(reply, EVERYTHING) == reply


def test_an_error_reply_is_a_header() -> None:
    assert OUT_HEADER.unpack(error_reply(9, 5)) == (16, -5, 9)
