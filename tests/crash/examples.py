"""Examples of power cuts for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st
from powercut import FAULTS, Example, Group

from cachefs.testing.model import Flush
from cachefs.testing.stacks import Case, cow_layer
from cachefs.testing.strategies import changes

BLOCK = 4096
SIZE = 8 * BLOCK + 1000  # small, so that requests meet

CASES = (
    Case("cow", SIZE, cow_layer()),
    Case("cow", SIZE, cow_layer(), slow=True),
    Case("cow-8KiB-zeroes", SIZE, cow_layer(block_size="8KiB", detect_zeroes=True)),
    Case("cow-on-disk", SIZE, cow_layer(), on_disk=True),
    Case("cow-direct", SIZE, cow_layer(direct=True), on_disk=True),
)


FAULT_OR_NONE = (*FAULTS, "write map", "sync data", *(None,) * 6)


@st.composite
def groups(draw: st.DrawFn, most: int) -> tuple[Group, ...]:
    """Up to *most* groups; every third request is a flush, and now and then something fails."""
    dice = draw(st.randoms(use_true_random=True))  # evenly, where hypothesis would prefer the first of a choice
    found = []
    for _ in range(dice.randint(1, most)):
        ops = [
            draw(changes(SIZE, BLOCK, 2 * BLOCK)) if dice.random() < 0.65 else Flush()
            for _ in range(dice.randint(2, 5))
        ]
        fault = dice.choice(FAULT_OR_NONE)
        if fault is not None:  # which only a flush can meet
            ops.append(Flush())
        found.append(Group(tuple(ops), fault))
    return tuple(found)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    after = draw(groups(2)) if draw(st.booleans()) else ()
    return Example(draw(st.sampled_from(CASES)), draw(groups(4)), after, draw(st.integers(0, 1 << 32)))
