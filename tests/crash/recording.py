"""cachefs whose stores' system calls are taken down (`cachefs.testing.writelog`). Runs instead of `python -m cachefs`.

    RECORDING_FOLDER=<where the stores are> RECORDING_LOG=<file> [MUTANT=<one of mutants.py>] python recording.py mount ...

Memory backends hold `stacks.pattern` at first. At the end of the daemon the log is written to the file, pickled:
`entries`, `times` and `initial` of a WriteLog.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path

from mutants import applied

from cachefs.backends.memory import Memory
from cachefs.cli import main
from cachefs.testing.stacks import fill, pattern
from cachefs.testing.writelog import WriteLog

_init = Memory.__init__


def _filled(memory: Memory, name: str, size: int, alignment: int = 1) -> None:
    _init(memory, name, size, alignment)
    fill(memory._chunks, pattern(size))


if __name__ == "__main__":
    Memory.__init__ = _filled  # type: ignore[method-assign]
    log = WriteLog(Path(os.environ["RECORDING_FOLDER"]))
    mutant = os.environ.get("MUTANT")
    try:
        with log.recording(), applied(mutant) if mutant else contextlib.nullcontext():
            main()
    finally:
        Path(os.environ["RECORDING_LOG"]).write_bytes(pickle.dumps((log.entries, log.times, log.initial)))
