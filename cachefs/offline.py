"""Commands on the stores of disks that are not mounted."""

from __future__ import annotations

from pathlib import Path

from cachefs.config import Config, DiskSpec, load
from cachefs.errors import CachefsError, StoreError
from cachefs.layers.cow import CowConfig, overlay_path
from cachefs.store.failedflag import FailedFlag
from cachefs.store.files import StoreLock


def _disk(config: Config, name: str) -> DiskSpec:
    spec = config.disks.get(name)
    if spec is None:
        raise CachefsError(str(config.file), f"has no disk {name!r}; it has {', '.join(config.disks)}")
    return spec


def failed_flag(path: Path, disk: str) -> FailedFlag:
    """The flag of *disk*, which is set.

    Raises: ConfigError; CachefsError when there is no such disk; StoreError when it has not failed.
    """
    config = load(path)
    flag = FailedFlag(config.state_dir, _disk(config, disk).name)
    if flag.error is None:
        raise StoreError(disk, "has not failed: there is nothing to clear")
    return flag


def clear_failed(path: Path, disk: str) -> None:
    """Clear the flag of *disk*. Raises: as `failed_flag`; LockedError while the overlay is served."""
    flag = failed_flag(path, disk)
    config = load(path)
    locks: list[StoreLock] = []
    try:
        for layer in _disk(config, disk).layers:
            if isinstance(layer.options, CowConfig):
                store = overlay_path(config.state_dir, disk, layer.options.path)
                if store.exists():
                    locks.append(StoreLock(store, "cachefs overlay clear-failed"))
        flag.clear()
    finally:
        for lock in locks:
            lock.close()
