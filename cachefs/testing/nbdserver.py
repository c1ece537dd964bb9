"""An nbdkit that serves an image for as long as a test wants it."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# nbdkit takes over a socket that listens already (systemd's protocol), so that nobody waits for it to start
_START = 'LISTEN_PID=$$ LISTEN_FDS=1 exec nbdkit --foreground --exit-with-parent file "$1" 3<&0 </dev/null'


@contextmanager
def serve_image(image: Path, path: Path) -> Iterator[str]:
    """The URI of a server of the raw *image*, on a new socket at *path*. Skips the test where there is no nbdkit."""
    if shutil.which("nbdkit") is None:
        pytest.skip("nbdkit is not installed")
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(64)
        server = subprocess.Popen(["sh", "-c", _START, "nbdkit", str(image)], stdin=listening.fileno())
    try:
        yield f"nbd+unix:///?socket={path}"
    finally:
        server.kill()
        server.wait()
