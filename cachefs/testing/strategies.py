"""Operations for hypothesis to try, with the offsets and lengths at which layers break: edges of sectors and blocks.

    @given(operations(size=130000, block=4096))

Every write has a byte pattern of its own, so that a byte says which write it came from.
"""

from __future__ import annotations

from hypothesis import strategies as st

from cachefs.testing.model import Changing, Extents, Flush, Op, Read, Trim, Write, Zero


def ranges(size: int, block: int, longest: int | None = None) -> st.SearchStrategy[tuple[int, int]]:
    """Non-empty (offset, length) within a disk of *size* bytes; many begin or end at a block, a sector, or the end."""
    longest = min(size, longest or size)
    blocks = st.integers(0, size // block).map(lambda index: index * block)
    sectors = st.integers(0, size // 512).map(lambda index: index * 512)
    nearly = st.builds(lambda at, by: at + by, blocks, st.integers(-2, 2))
    points = st.one_of(blocks, sectors, nearly, st.integers(0, size), st.just(size))

    def between(one: int, other: int) -> tuple[int, int]:
        start, end = sorted((min(max(one, 0), size), min(max(other, 0), size)))
        if start == end:
            start, end = (start, start + 1) if start < size else (size - 1, size)
        return start, min(end - start, longest)

    return st.builds(between, points, points)


def patterns(seed: int, length: int) -> bytes:
    """*length* bytes of a pattern that depends on *seed*, 1 to 250, and has no zeros."""
    unit = bytes((seed + index * 7) % 255 + 1 for index in range(255))
    return (unit * (length // 255 + 1))[:length]


def changes(size: int, block: int, longest: int | None = None) -> st.SearchStrategy[Changing]:
    """A write (now and then one of zeros), trim or zero."""
    where = ranges(size, block, longest)
    seeds = st.one_of(st.integers(1, 250), st.just(0))
    writes = st.builds(lambda at, seed: Write(at[0], patterns(seed, at[1]) if seed else bytes(at[1])), where, seeds)
    return st.one_of(writes, writes, st.builds(lambda at: Trim(*at), where), st.builds(lambda at: Zero(*at), where))


def operations(size: int, block: int, longest: int | None = None) -> st.SearchStrategy[Op]:
    where = ranges(size, block, longest)
    return st.one_of(
        changes(size, block, longest),
        changes(size, block, longest),
        st.builds(lambda at: Read(*at), where),
        st.builds(lambda at, limit: Extents(at[0], at[1], limit), where, st.sampled_from((1, 2, 1024))),
        st.just(Flush()),
    )
