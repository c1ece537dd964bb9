"""The interval map of extents against one byte of model per unit."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.extent import Extent, ExtentKind
from cachefs.store.extentmap import ExtentMap

SIZE = 64
KINDS = tuple(ExtentKind)
DATA, ZERO, HOLE = KINDS

ranges = st.builds(lambda a, b: (min(a, b), max(a, b) + 1), st.integers(0, SIZE - 1), st.integers(0, SIZE - 1))
answers = st.builds(
    lambda at, parts: [
        Extent(at + sum(length for length, _ in parts[:index]), length, kind)
        for index, (length, kind) in enumerate(parts)
    ],
    st.integers(0, SIZE),
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from(KINDS)), min_size=1, max_size=6),
)
steps = st.lists(st.one_of(st.tuples(answers, st.lists(ranges, max_size=3)), ranges), max_size=20)


def described(known: dict[int, ExtentKind], offset: int, end: int) -> list[Extent]:
    """What the model knows from *offset* on without a gap, merged."""
    found: list[Extent] = []
    while offset < end and offset in known:
        if found and found[-1].kind is known[offset]:
            found[-1] = Extent(found[-1].offset, found[-1].length + 1, found[-1].kind)
        else:
            found.append(Extent(offset, 1, known[offset]))
        offset += 1
    return found


@pytest.mark.slow
@given(steps)
@settings(deadline=None)
def test_map_knows_what_was_learnt_last_and_not_forgotten(steps: list[object]) -> None:
    found, known = ExtentMap(10_000), {}
    for step in steps:
        match step:
            case (int() as start, int() as end):
                found.forget(start, end)
                known = {at: kind for at, kind in known.items() if not start <= at < end}
            case (list() as answer, list() as without):
                found.learn(answer, without)
                for extent in answer:
                    for at in range(extent.offset, extent.end):
                        known.pop(at, None)
                        if not any(start <= at < end for start, end in without):
                            known[at] = extent.kind
        for offset in range(SIZE + 1):
            whole = described(known, offset, 2 * SIZE)
            assert found.known(offset, 2 * SIZE, 1000) == whole
            first = found.at(offset, 2 * SIZE)
            assert (first is None) is (not whole)
            assert first is None or (
                first.end <= whole[0].end and (first.offset, first.kind) == (offset, whole[0].kind)
            )
            end = whole[-1].end if whole else offset
            if not whole:
                gap = next((at for at in range(offset, 3 * SIZE) if at in known), 2 * SIZE)
                assert found.gap_end(offset, 2 * SIZE) == min(gap, 2 * SIZE)
            for last in (offset + 1, end, end + 1):
                if last > offset:
                    zero = all(known.get(at, DATA) is not DATA for at in range(offset, last))
                    assert found.is_zero(offset, last) is zero
        assert sum(extent.length for extent in found.snapshot()) == len(known)


def test_limit_of_entries_and_of_the_range_is_kept() -> None:
    found = ExtentMap(100)
    found.learn([Extent(0, 10, HOLE), Extent(10, 10, DATA), Extent(20, 10, ZERO)])
    assert found.known(5, 25, 2) == [Extent(5, 5, HOLE), Extent(10, 10, DATA)]
    assert found.known(5, 25, 9) == [Extent(5, 5, HOLE), Extent(10, 10, DATA), Extent(20, 5, ZERO)]
    assert found.known(30, 40, 9) == []


def test_beyond_its_limit_the_oldest_knowledge_goes_first() -> None:
    found = ExtentMap(4)
    for at in (0, 100, 200):
        found.learn([Extent(at, 10, HOLE), Extent(at + 10, 10, DATA)])
    assert not found.known(0, 10, 1)
    assert not found.known(10, 20, 1)
    assert found.known(100, 120, 9) == [Extent(100, 10, HOLE), Extent(110, 10, DATA)]
    found.forget(102, 104)  # one run more than there is room for: the older answer goes, not what was learnt last
    assert not found.known(104, 105, 1)
    assert found.known(200, 220, 9) == [Extent(200, 10, HOLE), Extent(210, 10, DATA)]


def test_an_answer_longer_than_the_limit_is_kept_in_part() -> None:
    found = ExtentMap(3)
    found.learn([Extent(at, 1, HOLE if at % 2 else DATA) for at in range(10)])
    assert len(found) == 3
    assert found.known(0, 10, 10)[-1].end == 3


@pytest.mark.parametrize("forgets", [False, True])
def test_memory_stays_bounded_whatever_is_learnt_and_forgotten(forgets: bool) -> None:
    found, draw = ExtentMap(50), random.Random(1)
    for _ in range(2000):
        at = draw.randrange(100_000)
        found.learn([Extent(at, 700, HOLE)])
        if forgets:
            found.forget(at, at + 700)  # an answer of which nothing is left
        found.forget(at + 100, at + 101)
        assert len(found) <= 50
        assert len(found._answers) <= 50
        assert len(found._runs) == len(found)
