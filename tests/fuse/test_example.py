"""Every stack of config.example.yaml mounts, reads and, unless it says otherwise, writes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cachefs.backends.file import FileConfig
from cachefs.config import load
from cachefs.testing.nbdserver import serve_image

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "config.example.yaml"
SIZE = 3 << 20
CONTENT = b"the image's own bytes".ljust(4096, b".")


@pytest.fixture
def example(tmp_path: Path) -> Iterator[Path]:
    """A copy, with images and a server where it names some."""
    copy = tmp_path / "config.yaml"
    copy.write_text(EXAMPLE.read_text().replace("/run/nbd/", f"{tmp_path}/"))
    config = load(copy)
    backends = [image.backend for image in config.images.values()]
    backends += [disk.backend for disk in config.disks.values() if disk.backend is not None]
    for backend in backends:
        if isinstance(backend.options, FileConfig):
            path = backend.options.path
            assert path.is_relative_to(tmp_path), "the example must not name files that are not beside it"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(CONTENT)
            os.truncate(path, SIZE)
    with ExitStack() as servers:
        for name in ("remote", "volume"):
            image = tmp_path / f"{name}.raw"
            image.write_bytes(CONTENT)
            os.truncate(image, SIZE)
            servers.enter_context(serve_image(image, tmp_path / f"{name}.sock"))
        yield copy


def test_every_stack_of_the_example_is_served(mount: Any, example: Path, cachefs: Any) -> None:
    config = load(example)
    assert cachefs("check", example).stderr == ""
    mounted = mount(example)
    assert os.listdir(mounted.path) == list(config.disks)
    for name, disk in config.disks.items():
        path = mounted.path / name
        assert path.stat().st_mode & 0o777 == disk.mode
        if disk.backend is None or disk.backend.kind == "file":
            assert path.read_bytes() == CONTENT.ljust(SIZE, b"\0")
        if not disk.writable:
            with pytest.raises(OSError) as caught:
                os.open(path, os.O_RDWR)
            assert caught.value.errno == errno.EROFS
            continue
        text = f"written to {name}".encode()
        with path.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), text, 100_001)
            os.fsync(file.fileno())
            assert os.pread(file.fileno(), len(text), 100_001) == text
    assert mounted.status()["daemon"]["internal_errors"] == 0
    mounted.umount()

    again = mount(example)
    for name, disk in config.disks.items():
        text = f"written to {name}".encode()
        gone = any(getattr(layer.options, "ephemeral", False) for layer in disk.layers)
        gone = gone or not disk.writable or (disk.backend is not None and disk.backend.kind == "memory")
        with (again.path / name).open("rb") as file:
            assert os.pread(file.fileno(), len(text), 100_001) == (bytes(len(text)) if gone else text)
    again.umount()
