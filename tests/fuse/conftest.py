"""Fixtures of several tests of real mounts."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_faults import opened, threads
from test_files import pattern

__all__ = ["holed_image", "opened", "threads"]

MIB = 1 << 20


@pytest.fixture
def holed_image(tmp_path: Path) -> Path:
    """16 MiB: 1 MiB of data at 0 and at 8 MiB, holes between."""
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
        for offset in (0, 8 * MIB):
            file.seek(offset)
            file.write(pattern(MIB))
    return path
