"""Writes that wait: which of them leave memory, and that each comes back as it was."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from cachefs.errors import BackendError
from cachefs.fuse import spill as module
from cachefs.fuse.spill import Piece, Spill

KEPT = 1000


@pytest.fixture
async def spill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Spill]:
    monkeypatch.setattr(module, "KEPT_BYTES", KEPT)
    made = Spill(tmp_path)
    yield made
    made.close()


async def settled(spill: Spill) -> None:
    """Until the thread has done what it was handed, and the loop has heard of it."""
    done = trio.Event()
    token = trio.lowlevel.current_trio_token()
    spill._thread.submit(lambda: token.run_sync_soon(done.set))
    await done.wait()


async def taken(spill: Spill, piece: Piece) -> bytes:
    buffer = bytearray(piece.length)
    await spill.take(piece, memoryview(buffer))
    return bytes(buffer)


async def test_what_fits_stays_in_memory_and_the_rest_comes_back_from_the_file(spill: Spill) -> None:
    contents = [bytes([number]) * 400 for number in range(1, 8)]
    pieces = [spill.put(content) for content in contents]
    await settled(spill)
    assert spill.memory_bytes == 800
    assert spill.spilled_bytes == 5 * 400
    assert [piece.data is None for piece in pieces] == [False] * 2 + [True] * 5
    assert [await taken(spill, piece) for piece in reversed(pieces)] == contents[::-1]
    assert spill.memory_bytes == 0


async def test_one_that_is_taken_before_it_was_written_comes_from_memory(spill: Spill) -> None:
    gate = threading.Event()

    def hold() -> None:
        gate.wait(10)

    spill._thread.submit(hold)
    pieces = [spill.put(bytes([number]) * KEPT) for number in (1, 2)]
    assert await taken(spill, pieces[1]) == b"\x02" * KEPT
    gate.set()
    await settled(spill)
    assert spill.memory_bytes == KEPT
    assert await taken(spill, pieces[0]) == b"\x01" * KEPT


async def test_the_file_has_no_name_and_shrinks_when_nothing_is_left_in_it(spill: Spill, tmp_path: Path) -> None:
    pieces = [spill.put(bytes(KEPT)) for _ in range(3)]
    await settled(spill)
    assert os.listdir(tmp_path) == []
    assert os.fstat(spill._descriptor).st_size == 2 * KEPT
    for piece in pieces:
        spill.forget(piece)
    await settled(spill)
    assert os.fstat(spill._descriptor).st_size == 0
    later = [spill.put(bytes([7]) * KEPT) for _ in range(2)]
    await settled(spill)
    assert [await taken(spill, piece) for piece in later] == [bytes([7]) * KEPT] * 2


@pytest.mark.logs("cannot make a file for writes that wait")
async def test_without_a_file_everything_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    for directory in (None, tmp_path / "missing"):
        spill = Spill(directory)
        piece = spill.put(b"x" * 10)
        assert spill.memory_bytes == 10
        assert await taken(spill, piece) == b"x" * 10
        spill.close()


async def test_a_file_that_cannot_be_written_leaves_them_in_memory(
    spill: Spill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 3)
    pieces = [spill.put(bytes([number]) * KEPT) for number in (1, 2, 3)]
    await settled(spill)
    assert spill.memory_bytes == 3 * KEPT
    assert [await taken(spill, piece) for piece in pieces] == [bytes([number]) * KEPT for number in (1, 2, 3)]


async def test_one_that_cannot_be_read_back_is_an_error_and_never_other_bytes(spill: Spill) -> None:
    pieces = [spill.put(bytes(KEPT)) for _ in range(2)]
    await settled(spill)
    os.ftruncate(spill._descriptor, KEPT // 2)
    with pytest.raises(BackendError, match="could not be read back"):
        await taken(spill, pieces[1])
