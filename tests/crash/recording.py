"""cachefs whose stores' system calls are taken down (`cachefs.testing.writelog`). Runs instead of `python -m cachefs`.

    RECORDING_FOLDER=<where the stores are> RECORDING_LOG=<file> [MUTANT=<one of mutants.py, or of MORE_MUTANTS>]
    [RECORDING_WRITES=1] python recording.py mount ...

Memory backends hold `stacks.pattern` at first. At the end of the daemon the log is written to the file, pickled:
`entries`, `times` and `initial` of a WriteLog. With RECORDING_WRITES the WRITEs that wait, and so all synchronous ones, are
entries too: begun when they come, ended when their good reply is about to be written. That is for clients which cannot say
when they were told.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path
from unittest import mock

from mutants import MUTANTS, Patch, applied

from cachefs.backends.memory import Memory
from cachefs.cli import main
from cachefs.fuse.buffers import DATA_AT, Buffer
from cachefs.fuse.dataplane import Dataplane
from cachefs.fuse.protocol import OUT_HEADER, Opcode
from cachefs.fuse.waiting import Request, Waiting
from cachefs.testing.model import Write
from cachefs.testing.stacks import fill, pattern
from cachefs.testing.writelog import Began, Ended, WriteLog

_init = Memory.__init__


def _filled(memory: Memory, name: str, size: int, alignment: int = 1) -> None:
    _init(memory, name, size, alignment)
    fill(memory._chunks, pattern(size))


# ---- the WRITEs of the clients


class Writes:
    """Notes in *log* what the dataplane takes on and answers."""

    def __init__(self, log: WriteLog) -> None:
        self._log = log
        self._began: dict[int, int] = {}  # unique of each WRITE under way -> its entry
        self._add, self._finish = Waiting.add, Waiting.finish

    def recording(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(mock.patch.object(Waiting, "add", lambda *arguments: self._note_begin(*arguments)))
        stack.enter_context(mock.patch.object(Waiting, "finish", lambda *arguments: self._note_end(*arguments)))
        return stack

    def _note_begin(self, waiting: Waiting, request: Request, buffer: Buffer) -> bool:
        if request.opcode == Opcode.WRITE:
            data = bytes(buffer.view[DATA_AT : DATA_AT + request.size])
            self._began[request.unique] = self._log.note(Began(Write(request.offset, data), synced=bool(request.flags)))
        return self._add(waiting, request, buffer)

    def _note_end(self, waiting: Waiting, request: Request, reply: bytes | memoryview) -> None:
        """Before the reply is written: what it promises must be so by then."""
        began = self._began.pop(request.unique, None)
        _, error, _ = OUT_HEADER.unpack_from(reply)
        if began is not None and not error and request.unique in waiting.table:
            self._log.note(Ended(began))
        self._finish(waiting, request, reply)


async def _write_and_sync_nothing(dataplane: Dataplane, request: Request) -> bytes:
    request.flags = 0
    return await _write(dataplane, request)


_write = Dataplane._write
MORE_MUTANTS: dict[str, tuple[Patch, ...]] = {
    "synchronous-write-not-flushed": ((Dataplane, "_write", _write_and_sync_nothing),),
}


if __name__ == "__main__":
    Memory.__init__ = _filled  # type: ignore[method-assign]
    MUTANTS.update(MORE_MUTANTS)
    log = WriteLog(Path(os.environ["RECORDING_FOLDER"]))
    mutant = os.environ.get("MUTANT")
    writes = Writes(log).recording() if os.environ.get("RECORDING_WRITES") else contextlib.nullcontext()
    try:
        with log.recording(), writes, applied(mutant) if mutant else contextlib.nullcontext():
            main()
    finally:
        Path(os.environ["RECORDING_LOG"]).write_bytes(pickle.dumps((log.entries, log.times, log.initial)))
