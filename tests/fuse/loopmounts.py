"""File systems of a test's own, each in a file over a loop device: what they can do is known, and they can be broken."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_io import FILE_SYSTEMS, loop_device, mounted_at, need, run


@contextlib.contextmanager
def fresh_file_system(kind: str, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Where it is mounted, and its device; both are gone afterwards. kind: ext4 or xfs. folder: is made."""
    make, _, size = FILE_SYSTEMS[kind]
    need(make[0])
    folder.mkdir()
    image = folder / "image"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(size)
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(loop_device(image))
        run(*make, device)
        try:
            root = stack.enter_context(mounted_at(device, folder / "root"))
        except AssertionError as exc:
            pytest.skip(f"this kernel does not mount {kind}: {exc}")
        yield root, Path(device)
