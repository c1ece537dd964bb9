"""A disk that is read by several threads at once, all the while, each in an order of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

READERS = 4
BLOCK = 4096


class Readers:
    """reads: finished, by each. wrong: offsets that held something else than they should, and errors."""

    def __init__(self, wait_until: Callable[..., Any]) -> None:
        self.reads = [0] * READERS
        self.wrong: list[object] = []
        self._stop = threading.Event()
        self._wait_until = wait_until

    def wait_for_reads(self) -> None:
        """A few more by everybody; or something is wrong."""
        before = min(self.reads)
        self._wait_until(lambda: self.wrong or min(self.reads) > before + 3, "reads by everybody")

    def stop(self) -> None:
        self._stop.set()

    def look(self, number: int, path: Path, content: bytes) -> None:
        disk = os.open(path, os.O_RDONLY)
        try:
            while not self._stop.is_set():
                at = (self.reads[number] * 7919 + number) * BLOCK % len(content)
                if os.pread(disk, BLOCK, at) != content[at : at + BLOCK]:
                    self.wrong.append(at)
                self.reads[number] += 1
        except OSError as exc:
            self.wrong.append(exc)
        finally:
            os.close(disk)


@contextmanager
def reading(path: Path, content: bytes, wait_until: Callable[..., Any]) -> Iterator[Readers]:
    """The file at *path* is read until the end of the block; nothing of it may have been wrong."""
    readers = Readers(wait_until)
    threads = [threading.Thread(target=readers.look, args=(number, path, content)) for number in range(READERS)]
    for thread in threads:
        thread.start()
    try:
        yield readers
        readers.wait_for_reads()
    finally:
        readers.stop()
        for thread in threads:
            thread.join(30)
    assert readers.wrong == []
