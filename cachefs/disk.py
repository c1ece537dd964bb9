"""One disk: a named stack, and what the file that presents it says of it.

opening -> serving (or failed: no flush can clear it) -> closed
   '-> refused: EIO -> serving
"""

from __future__ import annotations

import enum
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from cachefs.extent import STATE_OF, MapRun
from cachefs.layers.base import Layer
from cachefs.layers.cache import Cache
from cachefs.layers.cow import Cow
from cachefs.layers.extents import Extents
from cachefs.unopened import Unopened


class DiskState(enum.Enum):
    SERVING = "serving"
    FAILED = "failed"  # a write-out error that no flush can clear: see its layers' statistics
    OPENING = "opening"  # its requests wait
    REFUSED = "refused"  # its requests fail: `error` in the status says why


@dataclass
class Disk:
    """A named stack. inode: its file's, never used twice in a mount. mode, uid, gid: of the file."""

    name: str
    top: Layer
    inode: int
    writable: bool
    mode: int
    uid: int
    gid: int
    page_cache: bool = False
    mtime_ns: int = field(default_factory=time.time_ns)
    """Of the last write, from memory: tools like rsync look at it to see whether the disk changed."""

    def __post_init__(self) -> None:
        self.size = self.top.geometry.size

    @property
    def state(self) -> DiskState:
        if isinstance(self.top, Unopened):
            return DiskState(self.top.state)
        return DiskState.SERVING if self.top.pending_error() is None else DiskState.FAILED

    def allocated_bytes(self) -> int:
        """For st_blocks: space held in the stack, never 0, or `tar -S` would archive nothing but zeros."""
        return max(4096, self.top.allocated_bytes())

    def map_layers(self) -> list[MapLayer]:
        """The disk as a whole; then the layers that have a map of their own, top to bottom; then the backend.

        An extent cache above the backend answers for it, so that it is asked once.
        """
        nodes = list(_layers(self.top))
        own = [node for node in nodes if isinstance(node, Cow | Cache | Extents)]
        keepers = [index for index, node in enumerate(nodes) if isinstance(node, Cow | Cache)]
        below = nodes[keepers[-1] + 1 if keepers else 0]
        return [
            MapLayer(self.name, partial(runs_of, self.top)),
            *(MapLayer(layer.name, partial(_own_runs, layer)) for layer in own),
            MapLayer(nodes[-1].name, partial(runs_of, below)),
        ]

    def status(self) -> dict[str, object]:
        """For people and programs; values are JSON."""
        error = self.top.pending_error()
        waits_for = self.top.reason if isinstance(self.top, Unopened) else ""
        return {
            "name": self.name,
            "state": self.state.value,
            "size": self.size,
            "writable": self.writable,
            **({"error": str(error)} if error is not None else {}),
            **({"waits_for": waits_for} if error is None and waits_for else {}),
            "layers": [{"layer": s.layer, **s.values} for s in self.top.statistics().chain()],
        }


class MapLayer(NamedTuple):
    """A layer that has a map of its own. ask: from an offset on, at most so many runs; CachefsError when nobody tells."""

    name: str
    ask: Callable[[int, int], Awaitable[list[MapRun]]]


async def _own_runs(layer: Cow | Cache | Extents, offset: int, limit: int) -> list[MapRun]:
    return layer.map_runs(offset, limit)


async def runs_of(layer: Layer, offset: int, limit: int) -> list[MapRun]:
    """What *layer* with all below it holds, from *offset* on: a non-empty prefix of the rest."""
    found = await layer.extents(offset, layer.geometry.size - offset, limit)
    return [MapRun(extent.offset, extent.length, STATE_OF[extent.kind]) for extent in found]


def _layers(top: Layer) -> Iterator[Layer]:
    node: Layer | None = top
    while node is not None:
        yield node
        node = getattr(node, "child", None)
