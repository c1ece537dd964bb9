"""What unit tests of stores share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory: these tests are about order and bytes, not about a disk."""
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir="/dev/shm") as name:
        yield Path(name)
