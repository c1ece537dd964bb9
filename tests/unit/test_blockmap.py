"""The block map against a dict, its rounds, and its durable form."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.errors import FormatError
from cachefs.store.blockmap import BLOCKS_PER_SECTOR, SECTOR_SIZE, BlockMap, SectorCopy, State, working_size
from cachefs.store.files import HEADER_SIZE, decode_header
from cachefs.store.identity import Identity

BLOCK = 4096
BLOCKS = 2 * BLOCKS_PER_SECTOR + 100
GOLDEN = Path(__file__).parents[1] / "crash" / "data" / "overlay-v1" / "map"


def fresh(blocks: int = BLOCKS, block_size: int = BLOCK) -> BlockMap:
    return BlockMap(memoryview(bytearray(working_size(blocks))), blocks, block_size)


def load(sectors: dict[int, bytes], blocks: int = BLOCKS) -> BlockMap:
    loaded = fresh(blocks)
    for index, content in sectors.items():
        loaded.load(index, content, "map")
    return loaded


def states(blockmap: BlockMap) -> list[State]:
    return [blockmap.state(block) for block in range(blockmap.blocks)]


def apply(blockmap: BlockMap, change: tuple[State, int, int]) -> None:
    state, start, end = change
    (blockmap.set_data if state is State.DATA else blockmap.set_zero)(start, end)


edges = st.one_of(
    st.integers(0, 20), st.integers(BLOCKS_PER_SECTOR - 9, BLOCKS_PER_SECTOR + 9), st.integers(BLOCKS - 9, BLOCKS)
)
spans = st.tuples(edges, edges).filter(lambda span: span[0] != span[1]).map(sorted)
changes = st.builds(lambda state, span: (state, *span), st.sampled_from([State.DATA, State.ZERO]), spans)


# ---- states


@given(st.lists(changes, max_size=20), spans)
@settings(max_examples=15, deadline=None)
def test_agrees_with_a_dict(done: list[tuple[State, int, int]], span: list[int]) -> None:
    blockmap, model = fresh(), dict.fromkeys(range(BLOCKS), State.ABSENT)
    for state, start, end in done:
        apply(blockmap, (state, start, end))
        model.update(dict.fromkeys(range(start, end), state))
    assert states(blockmap) == list(model.values())
    assert blockmap.data_blocks == list(model.values()).count(State.DATA)
    start, end = span
    inside = [model[block] for block in range(start, end)]
    assert blockmap.is_data(start, end) == (set(inside) == {State.DATA})
    assert blockmap.count_data(start, end) == inside.count(State.DATA)


@given(st.lists(changes, max_size=10), st.integers(0, 22 * BLOCK), st.integers(1, 22 * BLOCK))
@settings(max_examples=15, deadline=None)
def test_runs_are_the_range_in_longest_pieces_of_one_state(
    done: list[tuple[State, int, int]], offset: int, length: int
) -> None:
    blockmap = fresh()
    for change in done:
        apply(blockmap, change)
    at, last = offset, None
    for run in blockmap.runs(offset, length):
        assert run.offset == at
        assert run.length > 0
        assert run.state is not last
        for byte in (run.offset, run.offset + run.length - 1):
            assert blockmap.state(byte // BLOCK) is run.state
        assert all(
            blockmap.state(block) is run.state for block in range(at // BLOCK, (at + run.length - 1) // BLOCK + 1)
        )
        at, last = run.offset + run.length, run.state
    assert at == offset + length


def test_untouched_map_is_absent_and_clean() -> None:
    blockmap = fresh()
    assert set(states(blockmap)) == {State.ABSENT}
    assert blockmap.dirty_sectors == 0
    assert not blockmap.begin_round()


# ---- rounds


def test_change_makes_its_sectors_dirty_and_a_repetition_none() -> None:
    blockmap = fresh()
    blockmap.set_data(BLOCKS_PER_SECTOR - 1, BLOCKS_PER_SECTOR + 1)
    assert [copy.number for copy in blockmap.begin_round()] == [0, 1]
    blockmap.end_round()
    blockmap.set_data(BLOCKS_PER_SECTOR - 1, BLOCKS_PER_SECTOR + 1)
    assert not blockmap.begin_round()
    blockmap.set_zero(5, 6)
    assert [copy.number for copy in blockmap.begin_round()] == [0]
    blockmap.end_round()
    blockmap.set_zero(5, 6)
    assert not blockmap.begin_round()


def test_copies_are_of_the_moment_in_which_the_round_began() -> None:
    blockmap = fresh()
    blockmap.set_data(0, 1)
    copies = blockmap.begin_round()
    blockmap.set_data(1, 2)
    assert states(load(dict(copies)))[:3] == [State.DATA, State.ABSENT, State.ABSENT]
    blockmap.end_round()
    assert states(load(dict(blockmap.begin_round())))[:3] == [State.DATA, State.DATA, State.ABSENT]


def test_round_that_failed_is_done_again_with_what_came_since() -> None:
    blockmap = fresh()
    blockmap.set_data(0, 1)
    blockmap.begin_round()
    blockmap.set_data(BLOCKS - 1, BLOCKS)
    blockmap.abandon_round()
    assert blockmap.dirty_sectors == 2
    again = blockmap.begin_round()
    assert [copy.number for copy in again] == [0, 2]
    blockmap.end_round()
    assert not blockmap.begin_round()


def test_each_round_has_a_higher_generation_also_after_loading() -> None:
    blockmap = fresh()
    blockmap.set_data(0, 1)
    first = blockmap.begin_round()
    blockmap.end_round()
    loaded = load(dict(first))
    assert loaded.generation == blockmap.generation == 1
    loaded.set_data(1, 2)
    loaded.begin_round()
    assert loaded.generation == 2


# ---- the durable form


@given(st.lists(changes, max_size=20))
@settings(max_examples=15, deadline=None)
def test_what_was_written_out_is_loaded_again(done: list[tuple[State, int, int]]) -> None:
    blockmap = fresh()
    written: dict[int, bytes] = {}
    for change in done:
        apply(blockmap, change)
        if change[1] % 2:
            written.update(blockmap.begin_round())
            blockmap.end_round()
    written.update(blockmap.begin_round())
    loaded = load(written)
    assert states(loaded) == states(blockmap)
    assert loaded.data_blocks == blockmap.data_blocks


@given(st.lists(changes, min_size=1, max_size=6), st.lists(changes, min_size=1, max_size=6), st.randoms())
@settings(max_examples=15, deadline=None)
def test_any_mixture_of_old_and_new_sectors_is_a_map_of_old_and_new_states(
    first: list[tuple[State, int, int]], second: list[tuple[State, int, int]], choose: random.Random
) -> None:
    blockmap = fresh()
    for change in first:
        apply(blockmap, change)
    written: dict[int, bytes] = dict(blockmap.begin_round())
    blockmap.end_round()
    old = states(blockmap)
    for change in second:
        apply(blockmap, change)
    new = states(blockmap)
    reached = {copy.number for copy in blockmap.begin_round() if choose.random() < 0.5}
    blockmap.abandon_round()
    written.update(copy for copy in blockmap.begin_round() if copy.number in reached)
    for block, state in enumerate(states(load(written))):
        assert state is (new if block // BLOCKS_PER_SECTOR in reached else old)[block]


def copies_of(change: tuple[State, int, int]) -> list[SectorCopy]:
    blockmap = fresh()
    apply(blockmap, change)
    return blockmap.begin_round()


@given(st.integers(0, SECTOR_SIZE * 8 - 1))
@settings(max_examples=60, deadline=None)
def test_flipped_bit_of_a_sector_is_refused(bit: int) -> None:
    ((number, content),) = copies_of((State.DATA, 3, 9))
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FormatError, match=r"sector 0 of the block map is damaged .*restore the overlay from a backup"):
        fresh().load(number, bytes(damaged), "map")


@given(st.integers(0, SECTOR_SIZE * 8 - 1))
@settings(max_examples=30, deadline=None)
def test_flipped_bit_of_a_sector_that_was_never_written_is_refused(bit: int) -> None:
    damaged = bytearray(SECTOR_SIZE)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FormatError, match="sector 1 of the block map is damaged"):
        fresh().load(1, bytes(damaged), "map")


def test_sector_at_another_place_is_refused() -> None:
    ((_, content),) = copies_of((State.DATA, 3, 9))
    with pytest.raises(FormatError, match="sector 1 of the block map says it is sector 0"):
        fresh().load(1, content, "map")


def test_states_past_the_end_of_the_disk_do_not_count() -> None:
    ((_, content),) = copies_of((State.DATA, 0, 1000))
    small = load({0: content}, blocks=10)
    assert small.data_blocks == 10


def test_zero_wins_over_written() -> None:
    blockmap = fresh()
    blockmap.set_zero(0, 2)
    blockmap.written[0] = True  # what a kill between the two stores of a change leaves
    assert states(blockmap)[:2] == [State.ZERO, State.ZERO]
    loaded = load(dict(blockmap.begin_round()))
    assert states(loaded)[:2] == [State.ZERO, State.ZERO]
    assert loaded.data_blocks == 0


# ---- bytes of a version that was released


def test_overlay_of_version_1_is_still_read() -> None:
    """GOLDEN is the `map` of a disk of 4000 * 4096 bytes over a memory base: header and three sectors."""
    content = GOLDEN.read_bytes()
    header = decode_header(content[:HEADER_SIZE], "map")
    assert (header.size, header.block_size, header.ephemeral) == (4000 * 4096, 4096, False)
    assert header.base == Identity("memory", {"size": str(4000 * 4096)})
    assert str(header.uuid) == "12345678-9abc-4def-8123-456789abcdef"
    assert header.encode() == content[:HEADER_SIZE]
    sectors = {
        index: content[HEADER_SIZE + index * SECTOR_SIZE : HEADER_SIZE + (index + 1) * SECTOR_SIZE]
        for index in range(3)
    }
    blockmap = load(sectors, blocks=4000)
    found = states(blockmap)
    assert found == golden_states()
    assert blockmap.generation == 2


def golden_states() -> list[State]:
    """What the golden map holds: data 0, 5-9 and 1919-1921, zero 7 and 3999."""
    found = [State.ABSENT] * 4000
    found[0] = State.DATA
    found[5:10] = [State.DATA] * 5
    found[1919:1922] = [State.DATA] * 3
    found[7] = found[3999] = State.ZERO
    return found


def test_sectors_are_written_as_version_1_has_them() -> None:
    blockmap = fresh(4000)
    blockmap.set_data(0, 1)
    blockmap.set_data(5, 10)
    blockmap.set_data(1919, 1922)
    blockmap.set_zero(3999, 4000)
    written = dict(blockmap.begin_round())
    blockmap.end_round()
    blockmap.set_zero(7, 8)
    written.update(blockmap.begin_round())
    assert b"".join(written[index] for index in range(3)) == GOLDEN.read_bytes()[HEADER_SIZE:]
