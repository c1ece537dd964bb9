"""Lists of extents: what is cut out of them, and what is laid over them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.extent import Extent, ExtentKind, clip_extents, with_data

D, H = ExtentKind.DATA, ExtentKind.HOLE


def test_clipped_extents_lie_within_the_range() -> None:
    extents = [Extent(0, 10, D), Extent(10, 10, H), Extent(20, 10, D)]
    assert clip_extents(extents, 5, 12) == [Extent(5, 5, D), Extent(10, 2, H)]
    assert clip_extents(extents, 10, 20) == [Extent(10, 10, H)]
    assert clip_extents(extents, 30, 40) == []


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[100], [30, 50, 20], [1, 98, 1]])
@given(held=st.lists(st.tuples(st.integers(0, 99), st.integers(1, 100)).filter(lambda one: one[0] < one[1])))
def test_what_is_held_is_data_and_the_rest_is_as_it_was(lengths: list[int], held: list[tuple[int, int]]) -> None:
    extents, at = [], 0
    for number, length in enumerate(lengths):
        extents.append(Extent(at, length, (H, ExtentKind.ZERO)[number % 2]))
        at += length
    wanted = [one.kind for one in extents for _ in range(one.length)]
    for first, last in held:
        wanted[first:last] = [D] * (last - first)
    found = with_data(extents, sorted(held))
    assert [one.offset for one in found] == [sum(one.length for one in found[:index]) for index in range(len(found))]
    assert [one.kind for one in found for _ in range(one.length)] == wanted
