"""Examples of power cuts for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st
from powercut import FAULTS, Example, Group

from cachefs.testing.model import Flush
from cachefs.testing.stacks import Case, cow_layer
from cachefs.testing.strategies import changes

BLOCK = 4096
SIZE = 3 * BLOCK + 1000  # so that requests meet

CASES = (
    Case("cow", SIZE, cow_layer()),
    Case("cow", SIZE, cow_layer(), slow=True),
    Case("cow-8KiB-zeroes", SIZE, cow_layer(block_size="8KiB", detect_zeroes=True)),
    Case("cow-on-disk", SIZE, cow_layer(), on_disk=True),
)


def groups(most: int) -> st.SearchStrategy[tuple[Group, ...]]:
    """Up to *most* groups; now and then something fails."""
    ops = st.one_of(changes(SIZE, BLOCK), changes(SIZE, BLOCK), st.just(Flush()))
    faults = st.one_of(st.none(), st.none(), st.none(), st.none(), st.sampled_from(sorted(FAULTS)))
    group = st.builds(Group, st.lists(ops, min_size=1, max_size=5).map(tuple), faults)
    return st.lists(group, min_size=1, max_size=most).map(tuple)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    after = draw(groups(2)) if draw(st.booleans()) else ()
    return Example(draw(st.sampled_from(CASES)), draw(groups(4)), after, draw(st.integers(0, 1 << 32)))
