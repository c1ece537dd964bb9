"""`cachefs pool`: look at the pools of a configuration while nobody serves from them, check them, delete from them.

Every function holds the pool's lock while it works, so none of this happens beside a daemon.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cachefs.bytebar import ByteBar
from cachefs.config import Config, PoolSpec, load
from cachefs.errors import CachefsError, FormatError, LockedError, StoreError
from cachefs.pool.image import is_all_zero
from cachefs.pool.pool import POOL_IMAGE, check_version, mark_clean, read_label, take_clean_mark
from cachefs.pool.summap import State, SumMap, checksum, working_size
from cachefs.store import files
from cachefs.store.files import StoreLock
from cachefs.store.localfile import LocalFile
from cachefs.store.mapfile import load_sectors, open_pair, read_header, write_sectors
from cachefs.units import format_size, short_size

READ_BYTES = 1 << 20  # at once
ID_LENGTH = 12  # characters of a digest that are shown
_ADVICE = "unmount it there first (`cachefs umount`); `cachefs status MOUNTPOINT` shows a pool that is in use"


@dataclass
class StoredImage:
    """An image as it lies in a pool. problem: why it cannot be opened. damaged: sectors of its map."""

    path: Path
    label: str
    problem: StoreError | None = None
    damaged: list[str] = field(default_factory=list)
    size: int = 0
    shift: int = 0
    map: SumMap | None = None
    data: LocalFile | None = None
    map_file: LocalFile | None = None

    @property
    def name(self) -> str:
        return f"{self.label} ({self.path.name[:ID_LENGTH]})"

    @property
    def held_bytes(self) -> int:
        if self.map is None:
            return 0
        beyond = (self.map.blocks << self.shift) - self.size  # of the last block, behind the image's end
        return (self.map.held << self.shift) - (beyond if self.map.holds(self.map.blocks - 1) else 0)

    @property
    def share(self) -> float:
        """Of the blocks, those that need not be fetched."""
        return 0.0 if self.map is None else (self.map.held + self.map.zero.count(1)) / self.map.blocks

    def close(self) -> None:
        for file in (self.data, self.map_file):
            if file is not None:
                file.close()


def find_pools(path: Path, name: str | None) -> list[PoolSpec]:
    """The pool *name* of the configuration *path*, or all. Raises: ConfigError, CachefsError."""
    config = load(path)
    if name is None:
        return list(config.pools.values())
    return [_find_pool(config, name)]


def _find_pool(config: Config, name: str) -> PoolSpec:
    if name not in config.pools:
        there = f"it has {', '.join(config.pools)}" if config.pools else "it has none"
        raise CachefsError(str(config.file), f"has no pool {name!r}; {there}")
    return config.pools[name]


@contextlib.contextmanager
def held(spec: PoolSpec) -> Iterator[Path]:
    """The directory of a pool that is there, locked. Raises: StoreError, LockedError."""
    path = spec.options.path
    if not (path / "pool").exists():
        raise StoreError(str(path), f"there is no pool {spec.name} yet; the first mount makes it")
    lock = StoreLock(path, "cachefs pool", _ADVICE)
    try:
        check_version(path)
        yield path
    except OSError as exc:
        raise StoreError(str(path), f"{exc.strerror}; check its rights and its device") from exc
    finally:
        lock.close()


def image_paths(pool: Path) -> list[Path]:
    return sorted(path for path in (pool / "images").iterdir() if not path.name.startswith("."))


def choose(pool: Path, image: str | None) -> list[Path]:
    """The images that *image*, a label or the beginning of an id, stands for: one, or all for None.

    Raises: CachefsError.
    """
    paths = image_paths(pool)
    if image is None:
        return paths
    found = [path for path in paths if read_label(path) == image] or [p for p in paths if p.name.startswith(image)]
    if len(found) == 1:
        return found
    if found:
        ids = ", ".join(path.name[:ID_LENGTH] for path in found)
        raise CachefsError(str(pool), f"has several images {image!r}: say which by its id, {ids}")
    there = ", ".join(sorted({read_label(path) for path in paths})) or "none"
    raise CachefsError(str(pool), f"has no image {image!r}; there is {there}")


@contextlib.contextmanager
def opened(path: Path, block_size: int | None = None) -> Iterator[StoredImage]:
    """The image at *path* with its map; `problem` says what keeps it from being used in a pool of *block_size*."""
    image = StoredImage(path, read_label(path))
    try:
        header = read_header(path, POOL_IMAGE)
        image.size, image.shift = header.size, header.block_size.bit_length() - 1
        if block_size is not None and header.block_size != block_size:
            raise FormatError(str(path), f"has blocks of {header.block_size} bytes, and the configuration {block_size}")
        image.data, image.map_file = open_pair(path, header)
        blocks = -(-header.size // header.block_size)
        states = image.map = SumMap(memoryview(mmap.mmap(-1, working_size(blocks))), blocks)

        def take(number: int, content: bytes) -> None:
            try:
                states.load(number, content, str(path / "map"))
            except FormatError as exc:
                image.damaged.append(str(exc))
                states.forget_sector(number)

        load_sectors(image.map_file, header, take)
    except LockedError:
        raise
    except StoreError as exc:
        image.problem = exc
    except OSError as exc:
        image.problem = StoreError(str(path), f"cannot be read: {exc.strerror}")
    if image.problem is not None:
        image.map = None
    try:
        yield image
    finally:
        image.close()


def disk_bytes(path: Path) -> int:
    """What all files below *path* take on disk."""
    found = 0
    for folder, _, names in os.walk(path):
        for name in (".", *names):
            with contextlib.suppress(FileNotFoundError):
                found += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return found


# ---- ls


def show(spec: PoolSpec) -> None:
    """Print what the pool holds. Raises: StoreError, LockedError."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    keys = spec.options
    if not (keys.path / "pool").exists():
        text = f"{spec.name}: {keys.path} is not there yet; the first mount makes it"
        console.print(text, soft_wrap=True, highlight=False, markup=False)
        return
    with held(spec) as path:
        table = Table("image", "id", "size", "held", "of it", "on disk", "", box=None, pad_edge=False)
        for place in image_paths(path):
            with opened(place, keys.block_size) as image:
                table.add_row(
                    image.label,
                    place.name[:ID_LENGTH],
                    format_size(image.size) if image.size else "?",
                    short_size(image.held_bytes),
                    f"{100 * image.share:.1f} %",
                    short_size(disk_bytes(place)),
                    "cannot be used: the next mount deletes it" if image.problem else "",
                )
        used, count = disk_bytes(path), table.row_count
        clean = "" if (path / "clean").exists() else "; it was not closed in order, so some of it may be gone"
    console.print(
        f"{spec.name}: {path}: {short_size(used)} of {format_size(keys.quota)} on disk "
        f"({100 * used / keys.quota:.1f} %), {count} image{'s' * (count != 1)}{clean}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    if count:
        console.print(table)


# ---- verify


@dataclass
class Verdict:
    """blocks: that have been read. wrong: findings. lost: blocks that a crash kept from the disk, which is nobody's fault."""

    began: float = field(default_factory=time.monotonic)
    blocks: int = 0
    seen_bytes: int = 0
    wrong: int = 0
    lost: int = 0
    interrupted: bool = False

    def sentence(self, *, dry_run: bool) -> str:
        seen = f"{self.blocks} block{'s' * (self.blocks != 1)} ({short_size(self.seen_bytes)}) read"
        left = "as they were" if dry_run else "forgotten, and fetched again when they are wanted"
        parts = ["interrupted"] if self.interrupted else []
        parts.append(seen)
        parts.append(f"{self.wrong} wrong" + (f", {left}" if self.wrong else ""))
        if self.lost:
            parts.append(f"{self.lost} that a crash kept from the disk" + ("" if dry_run else ", forgotten too"))
        return "; ".join(parts)


def verify(spec: PoolSpec, image: str | None, *, dry_run: bool) -> Verdict:
    """Compare every block that the pool holds with its checksum; what disagrees is told and, unless *dry_run*, forgotten.

    Ctrl-C ends it; what was found by then counts. Raises: StoreError, LockedError, CachefsError.
    """
    verdict = Verdict()
    with held(spec) as path, contextlib.ExitStack() as stack:
        images = [stack.enter_context(opened(place, spec.options.block_size)) for place in choose(path, image)]
        was_clean = (path / "clean").exists()
        bad: dict[Path, list[int]] = {}
        with ByteBar(sum(one.held_bytes for one in images)) as bar:
            try:
                for one in images:
                    for problem in ([str(one.problem)] if one.problem is not None else []) + one.damaged:
                        verdict.wrong += 1
                        bar.say(problem)
                    bad[one.path] = []
                    for block in _verify_image(one, was_clean, verdict, bar):
                        bad[one.path].append(block)
            except KeyboardInterrupt:
                verdict.interrupted = True
        if not dry_run:
            agree = [_mend(path, one, bad.get(one.path, [])) for one in images]
            if was_clean and all(agree):
                mark_clean(path)
    return verdict


def _verify_image(image: StoredImage, was_clean: bool, verdict: Verdict, bar: ByteBar) -> Iterator[int]:
    """The blocks to forget."""
    states, data = image.map, image.data
    if states is None or data is None:
        return
    at_once = max(1, READ_BYTES >> image.shift)
    for start, end in states.held_runs():
        for first in range(start, end, at_once):
            last = min(end, first + at_once)
            for block, finding in _compare(image, states, data, first, last):
                if finding == "zeros" and not was_clean:
                    verdict.lost += 1
                else:
                    verdict.wrong += 1
                    bar.say(f"{image.name}: the block at {block << image.shift} {_FINDINGS.get(finding, finding)}")
                yield block
            verdict.blocks += last - first
            verdict.seen_bytes += min(image.size, last << image.shift) - (first << image.shift)
            rate = verdict.seen_bytes / max(1e-3, time.monotonic() - verdict.began)
            bar.update(verdict.seen_bytes, what=image.label, text=f"{short_size(int(rate))}/s")


_FINDINGS = {"other": "disagrees with its checksum", "zeros": "is gone: there are only zeros in its place"}


def _compare(image: StoredImage, states: SumMap, data: LocalFile, start: int, end: int) -> Iterator[tuple[int, str]]:
    """The blocks of the range that are DATA and not right, each with what is wrong."""
    offset = start << image.shift
    buffer = memoryview(bytearray(min(image.size, end << image.shift) - offset))
    try:
        data.read_now(offset, buffer)
    except OSError as exc:
        if end - start > 1:
            for block in range(start, end):
                yield from _compare(image, states, data, block, block + 1)
        elif states.state(start) is State.DATA:
            yield start, f"cannot be read: {exc.strerror}"
        return
    for block in range(start, end):
        if states.state(block) is not State.DATA:
            continue
        content = buffer[(block << image.shift) - offset : ((block + 1) << image.shift) - offset]
        if checksum(block, content) != states.entry(block):
            yield block, "zeros" if is_all_zero(content) else "other"


def _mend(pool: Path, image: StoredImage, bad: list[int]) -> bool:
    """Make the pool forget what is wrong. Whether maps and data files still agree; what keeps them from it is found by
    the next mount, because the pool counts as not closed from here until it is marked again.
    """
    if isinstance(image.problem, FormatError):
        files.remove(image.path)
    states, data, map_file = image.map, image.data, image.map_file
    if states is None or data is None or map_file is None or not (bad or image.damaged):
        return True
    take_clean_mark(pool)
    for block in bad:
        try:
            data.punch_now(block << image.shift, 1 << image.shift)
            states.set_absent(block)
        except OSError:
            states.set_spoiled(block)
    write_sectors(map_file, states.begin_round())
    map_file.sync_now()
    return not image.damaged  # what a lost sector described is still in the file


# ---- drop


def describe(spec: PoolSpec, image: str | None) -> list[str]:
    """What `drop` would delete, a line each. Raises: StoreError, LockedError, CachefsError."""
    with held(spec) as path:
        return [
            f"{read_label(place)} ({place.name[:ID_LENGTH]}), {short_size(disk_bytes(place))}"
            for place in choose(path, image)
        ]


def drop(spec: PoolSpec, image: str | None) -> int:
    """Delete one image, or all; how many. Raises: StoreError, LockedError, CachefsError."""
    with held(spec) as path:
        chosen = choose(path, image)
        for place in chosen:
            files.remove(place)
        return len(chosen)
