from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cachefs.testing.guest import Guest, GuestError, build, make_image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def guest() -> Guest:
    """The kernel and initramfs that scripts/test made; made here where pytest was run by hand."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    try:
        return build(ROOT / ".build" / "guest")
    except GuestError as exc:
        pytest.skip(f"no test guest: {exc}")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A root file system that nobody may write."""
    path = tmp_path / "base.raw"
    make_image(path)
    path.chmod(0o444)
    return path
