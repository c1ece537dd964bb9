"""The flag that a store's fdatasync has failed: a synced file that outlives the daemon.

The kernel may have dropped the pages that it could not write, and says so once: a daemon that starts anew would be told that
all is well. So the disk stays read-only and its flushes fail until an operator, who knows what to think of the device,
takes the flag away (`cachefs overlay clear-failed`).

<state_dir>/failed/<disk or image>.json: {"reason": ..., "when": ISO 8601}. In state_dir, because the store's own device is the
one that does not write. All functions block.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
from pathlib import Path

from cachefs.errors import BackendError, ReadOnlyError, StoreError
from cachefs.store.files import sync_directory

log = logging.getLogger(__name__)


class FailedFlag:
    """The flag of one store of *owner* (the name of a disk or image); *name* is its layer's, for messages."""

    def __init__(self, state_dir: Path, owner: str, name: str = "") -> None:
        self.path = state_dir / "failed" / f"{owner}.json"
        self._name = name or owner
        reason = self.read()
        self.error = None if reason is None else BackendError(self._name, reason)
        """What every flush raises; set once, never cleared while the store is open."""

    def fail(self, exc: OSError, path: Path | str) -> BackendError:
        """A sync of *path* raised *exc*: set the flag. Returns the error to raise. Blocks, may be called in any thread."""
        self.error = BackendError(
            self._name,
            f"fdatasync of {path} failed ({exc.strerror}): what was written since the last flush may be lost; the disk is "
            "read-only. Check the device; then `cachefs overlay clear-failed` lets it be written again",
        )
        self.set(self.error.detail)
        return self.error

    def check_writable(self) -> None:
        """Raises: ReadOnlyError once the store has failed."""
        if self.error is not None:
            raise ReadOnlyError(self._name, f"read-only since an earlier error: {self.error.detail}")

    def read(self) -> str | None:
        """Why and when the store failed, or None. What cannot be read counts as failed."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return f"{content['reason']} (at {content['when']})"
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return f"{self.path} cannot be read, so the store counts as failed"

    def set(self, reason: str) -> None:
        """Durable on return where the device lets it be; an error is logged, because there is no better place for it."""
        content = json.dumps({"reason": reason, "when": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(f".new-{os.getpid()}")
            with temporary.open("w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self.path)
            for folder in (self.path.parent, self.path.parent.parent):
                sync_directory(folder)
        except OSError as exc:
            log.critical("%s: cannot note that the store has failed: %s", self.path, exc)

    def clear(self) -> None:
        """Raises: StoreError when it cannot be taken away."""
        try:
            self.path.unlink(missing_ok=True)
            if self.path.parent.is_dir():
                sync_directory(self.path.parent)
        except OSError as exc:
            raise StoreError(str(self.path), f"cannot be removed: {exc.strerror}; check its rights") from exc
