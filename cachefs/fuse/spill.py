"""The data of WRITEs that wait in the queue: a part in memory, the rest in a file that has no name.

A disk that hangs collects writes, up to `spill` bytes of all disks. KEPT_BYTES of them, of all disks together, stay in
memory; what comes then goes to a file in the state directory, written and read by a thread, and is given back to memory
when its turn comes. Nothing of it was acknowledged, so nothing of it has to outlive the daemon.

    in memory -> (a thread writes) -> in the file -> (a thread reads) -> in the buffer of the request
        '-> in the buffer of the request; or forgotten, from any state

Where the file cannot be written the data stays in memory, as if there were no file: it is bounded all the same.

Concurrency: one event loop; the thread touches nothing but the file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from pathlib import Path

import trio

from cachefs.errors import BackendError
from cachefs.limits import QUEUE_BYTES
from cachefs.store.rounds import WorkThread

log = logging.getLogger(__name__)

KEPT_BYTES = 64 << 20


class Piece:
    """The data of one request. Either *data* is there, or it lies in the file at *offset*."""

    __slots__ = ("data", "length", "offset")

    def __init__(self, data: bytes) -> None:
        self.data: bytes | None = data
        self.length = len(data)
        self.offset = -1


class Spill:
    """directory: where the file is made, once it is needed; None: everything stays in memory. limit: most bytes at once."""

    def __init__(self, directory: Path | None, limit: int = QUEUE_BYTES) -> None:
        self.limit = limit
        self._directory = directory
        self._descriptor = -1
        self._end = 0  # of the file
        self._pieces = 0  # that have a place in it
        self._token = trio.lowlevel.current_trio_token()
        self._thread = WorkThread("spill")
        self.memory_bytes = 0
        self.spilled_bytes = 0  # so far

    def put(self, data: bytes) -> Piece:
        """Keep *data* until it is taken or forgotten."""
        piece = Piece(data)
        self.memory_bytes += piece.length
        if self.memory_bytes > KEPT_BYTES and self._open():
            piece.offset, self._end = self._end, self._end + piece.length
            self._pieces += 1
            self._thread.submit(lambda: self._write(piece, data))
        return piece

    async def take(self, piece: Piece, view: memoryview) -> None:
        """Move the data into *view*, which is as long. Raises: BackendError."""
        if piece.data is not None:
            view[:] = piece.data
            self.forget(piece)
            return
        try:
            await trio.to_thread.run_sync(self._read, piece.offset, view)
        finally:
            self.forget(piece)

    def forget(self, piece: Piece) -> None:
        """Nobody wants it any more."""
        if piece.data is not None:
            self.memory_bytes -= piece.length
            piece.data = None
        if piece.offset >= 0:
            piece.offset = -1
            self._pieces -= 1
            if not self._pieces:
                self._end = 0
                self._thread.submit(self._truncate)  # behind the writes that are still under way

    def close(self) -> None:
        self._thread.submit(self._close)
        self._thread.close()

    def _open(self) -> bool:
        if self._descriptor < 0 and self._directory is not None:
            try:
                self._descriptor, path = tempfile.mkstemp(prefix="spill-", dir=self._directory)
                os.unlink(path)
            except OSError as exc:
                log.warning("cannot make a file for writes that wait in %s: %s", self._directory, exc.strerror)
                self._directory = None
        return self._descriptor >= 0

    # ---- in the thread

    def _write(self, piece: Piece, data: bytes) -> None:
        offset = piece.offset
        if offset < 0:
            return  # forgotten
        try:
            if os.pwrite(self._descriptor, data, offset) < len(data):
                return  # it stays in memory
        except OSError:
            return
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._written, piece, offset)

    def _read(self, offset: int, view: memoryview) -> None:
        if os.preadv(self._descriptor, (view,), offset) < len(view):
            raise BackendError("spill", f"a write that waited could not be read back at {offset}; it was answered EIO")

    def _truncate(self) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    # ---- on the loop

    def _written(self, piece: Piece, offset: int) -> None:
        if piece.offset == offset and piece.data is not None:
            self.memory_bytes -= piece.length
            self.spilled_bytes += piece.length
            piece.data = None
