"""The map of a pool's image: states, checksums, and the form in which they survive."""

from __future__ import annotations

import itertools
import random

import pytest

from cachefs.errors import FormatError
from cachefs.pool.summap import BLOCKS_PER_SECTOR, SECTORS_PER_PAGE, State, SumMap, checksum, working_size

BLOCKS = 3 * BLOCKS_PER_SECTOR + 7


def fresh(blocks: int = BLOCKS) -> SumMap:
    return SumMap(memoryview(bytearray(working_size(blocks))), blocks)


def reopened(before: SumMap) -> SumMap:
    """What a successor loads of what *before* would write now."""
    after = fresh(before.blocks)
    for copy in before.begin_round():
        after.load(copy.number, copy.content, "map")
    return after


def states(found: SumMap) -> list[State]:
    return [found.state(block) for block in range(found.blocks)]


def test_map_begins_with_nothing_cached() -> None:
    found = fresh()
    assert set(states(found)) == {State.ABSENT}
    assert found.held == found.pages == found.dirty_sectors == 0
    assert not found.ready.any()
    assert list(found.held_runs()) == []


def test_checksum_depends_on_the_place_and_is_never_a_state() -> None:
    assert checksum(1, b"x" * 100) != checksum(2, b"x" * 100)
    assert checksum(1, b"x" * 100) != checksum(1, b"y" * 100)
    assert all(checksum(block, b"") >= State.DATA for block in range(100))


def test_checksum_that_looks_like_a_state_is_moved_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in range(4):
        monkeypatch.setattr("xxhash.xxh3_64_intdigest", lambda content, seed, found=found: found)
        assert checksum(0, b"x") == found + State.DATA


def test_only_data_is_ready_and_only_until_it_changes() -> None:
    found = fresh()
    found.set_data(5, 99)
    assert found.ready[5]
    assert found.entry(5) == 99
    for change in (found.set_evicting, found.set_spoiled, found.set_absent):
        found.set_data(5, 99)
        change(5)
        assert not found.ready[5]


def test_held_counts_the_blocks_that_have_room_in_the_file() -> None:
    found = fresh()
    for block, change in enumerate((found.set_spoiled, found.set_evicting, found.set_zero, found.set_absent)):
        found.set_data(block, 99)
        change(block)
        change(block)
    found.set_data(10, 99)
    assert found.held == 3
    assert [found.holds(block) for block in (0, 1, 2, 3, 10)] == [True, True, False, False, True]
    assert found.zero.count(1) == 1


def test_parts_are_runs_of_one_kind() -> None:
    found = fresh()
    for block in (2, 3, 4, 6):
        found.set_data(block, 99)
    found.ready[4] = False
    found.set_zero(5)
    parts = [(part.state, part.ready, part.start, part.end) for part in found.parts(1, 9)]
    assert parts == [
        (State.ABSENT, False, 1, 2),
        (State.DATA, True, 2, 4),
        (State.DATA, False, 4, 5),
        (State.ZERO, False, 5, 6),
        (State.DATA, True, 6, 7),
        (State.ABSENT, False, 7, 9),
    ]


def test_change_that_changes_nothing_makes_nothing_dirty() -> None:
    found = fresh()
    found.set_data(1, 99)
    found.begin_round()
    found.end_round()
    found.set_data(1, 99)
    assert found.dirty_sectors == 0
    found.set_data(1, 98)
    assert found.dirty_sectors == 1


def test_round_that_failed_is_written_again() -> None:
    found = fresh()
    found.set_data(1, 99)
    first = found.begin_round()
    found.abandon_round()
    found.set_data(70, 99)
    again = found.begin_round()
    assert [copy.number for copy in first] == [0]
    assert [copy.number for copy in again] == [0, 1]


def test_reopened_map_has_every_state_and_believes_nothing_unseen() -> None:
    found = fresh()
    order = random.Random(3)
    for block in range(BLOCKS):
        order.choice((found.set_absent, found.set_spoiled, found.set_zero, lambda at: found.set_data(at, at + 99)))(
            block
        )
    after = reopened(found)
    assert states(after) == states(found)
    assert after.held == found.held
    assert after.zero == found.zero
    assert not after.ready.any()
    assert [after.entry(block) for block in range(BLOCKS)] == [found.entry(block) for block in range(BLOCKS)]


def test_reopened_map_holds_room_for_what_was_being_evicted_and_does_not_believe_it() -> None:
    found = fresh()
    found.set_data(3, 99)
    found.set_evicting(3)
    assert reopened(found).state(3) is State.SPOILED


def test_reopened_map_of_nothing_but_data_is_the_same() -> None:
    found = fresh(2 * BLOCKS_PER_SECTOR)
    for block in range(found.blocks):
        found.set_data(block, block + 4)
    after = reopened(found)
    assert after.held == found.blocks
    assert list(after.held_runs()) == [(0, found.blocks)]


def test_damaged_sector_is_refused_and_its_room_in_the_map_counted() -> None:
    found = fresh()
    found.set_data(3, 99)
    (copy,) = found.begin_round()
    content = bytearray(copy.content)
    content[100] ^= 1
    after = fresh()
    with pytest.raises(FormatError, match="sector 0 of the block map is damaged"):
        after.load(0, bytes(content), "map")
    assert set(states(after)) == {State.ABSENT}
    assert after.pages == 1
    with pytest.raises(FormatError, match="sector 1 of the block map says it is sector 0"):
        after.load(1, copy.content, "map")


def test_sector_that_was_forgotten_is_written_anew() -> None:
    found = fresh()
    found.forget_sector(2)
    assert [copy.number for copy in found.begin_round()] == [2]


def test_entries_past_the_end_of_the_image_are_not_taken_over() -> None:
    larger, smaller = fresh(BLOCKS_PER_SECTOR), fresh(10)
    for block in range(BLOCKS_PER_SECTOR):
        larger.set_data(block, 99)
    (copy,) = larger.begin_round()
    smaller.load(0, copy.content, "map")
    assert smaller.held == 10
    assert list(smaller.held_runs()) == [(0, 10)]


def test_pages_of_the_map_are_counted_once() -> None:
    per_page = BLOCKS_PER_SECTOR * SECTORS_PER_PAGE
    found = fresh(3 * per_page)
    assert found.new_pages(0, per_page + 1) == 2
    found.set_zero(5)
    assert found.new_pages(0, per_page + 1) == 1
    assert found.pages == 1
    found.set_absent(5)
    assert found.pages == 1  # its page in the file stays
    found.set_data(2 * per_page, 99)
    assert found.pages == 2
    assert reopened(found).pages == 2


@pytest.mark.parametrize("seed", range(5))
def test_held_runs_are_what_a_look_at_every_block_gives(seed: int) -> None:
    order = random.Random(seed)
    found = fresh()
    for _ in range(6):
        start = order.randrange(BLOCKS)
        for block in range(start, min(BLOCKS, start + order.randrange(1, 90))):
            order.choice((found.set_spoiled, found.set_spoiled, found.set_zero))(block)
    for _ in range(20):
        begin = order.randrange(BLOCKS)
        until = order.randrange(begin, BLOCKS + 1)
        runs = list(found.held_runs(begin, until))
        assert [block for run in runs for block in range(*run)] == [
            block for block in range(begin, until) if found.holds(block)
        ]
        assert all(one[1] < other[0] for one, other in itertools.pairwise(runs))
