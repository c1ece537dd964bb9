"""The quota of a pool, counted in bytes; pure.

Everything that lies in the pool's directory counts: room of blocks (whole blocks, also where the image ends), pages of
the maps, a fixed sum for each image's header, directory and lock, and what is found in the files that no map owns. One
percent of the quota is left for what the file system adds by itself (extent trees). Room is taken *before* it is written
and given back *after* it was punched, so what is on disk is never more than what is counted here.
"""

from __future__ import annotations

FIXED_BYTES = 32 << 10  # of an image, besides blocks and map pages: directories, header, lock, epoch
POOL_BYTES = 32 << 10  # of the pool itself
LARGEST_INSTALL = (1 << 20) + (64 << 10)  # one flight, and what the map grows by


class Account:
    """All figures in bytes. quota: as configured."""

    def __init__(self, quota: int) -> None:
        self.quota = quota
        self.limit = quota - max(quota // 100, 4096)
        self.used = POOL_BYTES
        # Below the first, room is made in the background until there is the second.
        self.least_free = min(32 << 20, self.limit // 64)
        self.enough_free = min(self.limit // 4, max(LARGEST_INSTALL, min(64 << 20, self.limit // 32)))
        self._withheld = 0

    @property
    def free(self) -> int:
        """May be below 0: after a start with a smaller quota, or when files hold more than their maps know."""
        return self.limit - self.used - self._withheld

    def withhold(self, spare: int) -> None:
        """The file system has *spare* bytes beyond its `min_free`; below 0 they have to be made."""
        self._withheld = max(0, self.limit - self.used - spare)

    @property
    def wants_room(self) -> bool:
        return self.free < self.least_free

    @property
    def has_enough(self) -> bool:
        return self.free >= self.enough_free

    def take(self, count: int) -> bool:
        """Count *count* bytes as used if they fit."""
        if count > self.free:
            return False
        self.used += count
        return True

    def add(self, count: int) -> None:
        """Count what is there already, whether it fits or not."""
        self.used += count

    def give_back(self, count: int) -> None:
        self.used -= count
        assert self.used >= 0, "the pool gave back more than it took"
