"""The file backend's trims and zeros: in pieces, and what is left when one of them is cancelled or fails."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from cachefs.backends.file import PIECE, File, FileConfig
from cachefs.errors import BackendError
from cachefs.layers.base import Environment
from cachefs.testing.gate import FileGate
from cachefs.testing.model import read
from cachefs.testing.rules import Rule

SIZE = 3 * PIECE
ENDS = (0, PIECE - 1, PIECE, 2 * PIECE - 1, 2 * PIECE, SIZE - 1)


@asynccontextmanager
async def opened(tmp_path: Path) -> AsyncIterator[tuple[File, FileGate]]:
    """A sparse image with a byte at both ends of each piece."""
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for at in ENDS:
            file.seek(at)
            file.write(b"x")
    async with File.open(FileConfig(path=path), Environment("disk", tmp_path)) as backend:
        yield backend, FileGate(backend._file, backend._rounds)


async def left(backend: File) -> list[int]:
    """Where there still is something."""
    return [at for at in ENDS if await read(backend, at, 1) == b"x"]


@pytest.mark.parametrize("op", ["punch", "zero_range"])
async def test_long_trims_and_zeros_go_in_pieces_and_others_have_their_turn(tmp_path: Path, op: str) -> None:
    async with opened(tmp_path) as (backend, gate):
        held = gate.hold(op, nth=2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.trim if op == "punch" else backend.zero, 0, SIZE)
            await held.wait_until_held()
            assert await left(backend) == list(ENDS[2:])
            held.open()
        assert await left(backend) == []


async def test_cancelled_trim_ends_behind_the_piece_that_is_under_way(tmp_path: Path) -> None:
    async with opened(tmp_path) as (backend, gate):
        held = gate.hold("punch")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.trim, 0, SIZE)
            await held.wait_until_held()
            nursery.cancel_scope.cancel()
            held.open()
        assert await left(backend) == list(ENDS[2:])


async def test_trim_that_fails_says_where(tmp_path: Path) -> None:
    async with opened(tmp_path) as (backend, gate):
        gate.faults.append((Rule("punch", nth=2), OSError(errno.EIO, "Input/output error")))
        with pytest.raises(BackendError, match=f"punch {PIECE}"):
            await backend.trim(0, SIZE)
        assert await left(backend) == list(ENDS[2:])


async def test_pieces_that_cannot_be_punched_are_zeroed(tmp_path: Path) -> None:
    async with opened(tmp_path) as (backend, gate):
        gate.faults.append((Rule("punch", nth=2), OSError(errno.EOPNOTSUPP, "not supported")))
        await backend.trim(0, SIZE)
        assert await left(backend) == []
