"""Read-ahead: windows grow while they pay, streams are told apart, and the store is never asked for much too much."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.pool.evict import RUN_IDS
from cachefs.pool.readahead import (
    MAX_WINDOW,
    PROBE_EVERY,
    SHARE,
    SLACK,
    STREAM_SHARE,
    STREAMS,
    TRIALS,
    Plan,
    ReadAhead,
)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 64 * KIB


class Cache:
    """An empty cache without limit over an image; counts what is fetched."""

    def __init__(self, size: int = GIB, **options: int) -> None:
        self.ahead = ReadAhead(size, BLOCK, **options)
        self.cached: dict[int, int | None] = {}  # block: the run that fetched it ahead, None when it was read
        self.fetches: list[int] = []  # blocks
        self.waits = 0  # reads that missed

    def read(self, offset: int, length: int = 128 * KIB) -> Plan:
        asked = range(offset // BLOCK, -(-(offset + length) // BLOCK))
        missing = [block for block in asked if block not in self.cached]
        self.waits += bool(missing)
        plan = self.ahead.read(offset, length, missed=bool(missing))
        until = -(-(offset + length + plan.ahead) // BLOCK)
        more = [block for block in range(asked.stop, until) if block not in self.cached]
        for block in asked:
            run = self.cached.get(block)
            if run is not None:
                self.ahead.used(block, run)
            self.cached[block] = None
        self.cached.update(dict.fromkeys(more, plan.run))
        self.ahead.fetched(plan.run, len(missing) * BLOCK, len(more) * BLOCK)
        if missing or more:
            self.fetches.append(len(missing) + len(more))
        return plan

    def read_all(self, offsets: Iterable[int], length: int = 128 * KIB) -> list[Plan]:
        return [self.read(offset, length) for offset in offsets]

    @property
    def unread(self) -> int:
        return sum(run is not None for run in self.cached.values()) * BLOCK


def test_window_of_a_sequential_reader_grows_to_its_maximum() -> None:
    cache = Cache()
    plans = cache.read_all(range(0, 256 * MIB, 128 * KIB))
    assert {plan.run for plan in plans} == {plans[0].run}
    assert plans[0].ahead == BLOCK
    assert max(cache.fetches) * BLOCK >= MAX_WINDOW // 2
    assert len(cache.fetches) <= 200
    assert cache.unread <= MAX_WINDOW


def test_sequential_reader_is_kept_a_window_ahead() -> None:
    cache = Cache()
    cache.read_all(range(0, 256 * MIB, 128 * KIB))
    assert cache.waits <= 10


def test_small_sequential_reads_are_read_ahead_as_well() -> None:
    cache = Cache()
    cache.read_all(range(0, 64 * MIB, 4 * KIB), 4 * KIB)
    assert len(cache.fetches) <= 200  # 1024 blocks


def test_run_is_sequential_beyond_its_first_bytes() -> None:
    cache = Cache(scan_bytes=2 * MIB)
    plans = cache.read_all(range(0, 4 * MIB, 128 * KIB))
    assert [plan.sequential for plan in plans] == [False] * 16 + [True] * 16
    assert not any(plan.sequential for plan in cache.read_all(random.Random(1).sample(range(0, GIB, MIB), 100)))


def test_step_out_of_order_does_not_end_a_run() -> None:
    cache = Cache()
    offsets = [number * 128 * KIB for number in (0, 1, 3, 2, 4, 6, 5, 7, 8)]
    assert len({plan.run for plan in cache.read_all(offsets)}) == 1


def test_interleaved_readers_are_two_runs_each_with_its_window() -> None:
    cache = Cache()
    runs = [(cache.read(offset).run, cache.read(500 * MIB + offset).run) for offset in range(0, 64 * MIB, 128 * KIB)]
    assert len(set(runs)) == 1
    assert runs[0][0] != runs[0][1]
    assert len(cache.fetches) <= 250


def test_random_reads_stop_being_read_ahead() -> None:
    cache = Cache(64 * GIB)
    plans = cache.read_all((block * BLOCK for block in random.Random(1).sample(range(1 << 20), 4000)), 4 * KIB)
    tries = sum(plan.ahead > 0 for plan in plans[100:])
    assert tries <= len(plans[100:]) / PROBE_EVERY + 1
    assert sum(plan.ahead > 0 for plan in plans[:10]) >= 1


def test_reader_that_turns_sequential_is_read_ahead_again() -> None:
    cache = Cache(64 * GIB)
    cache.read_all(block * BLOCK for block in random.Random(1).sample(range(1 << 19), 3000))
    before = len(cache.fetches)
    cache.read_all(range(40 * GIB, 40 * GIB + 128 * MIB, 128 * KIB))
    assert len(cache.fetches) - before <= 400  # 1024 reads


def test_sizes_of_requests_are_judged_apart() -> None:
    cache = Cache(64 * GIB)
    places = iter(random.Random(1).sample(range(1, 16 << 10), 4000))
    for _ in range(1000):
        cache.read(next(places) * 4 * MIB, 4 * KIB)
        start = next(places) * 4 * MIB
        cache.read(start, 16 * KIB)
        cache.read(start + BLOCK, 16 * KIB)
    tiny = [cache.read(next(places) * 4 * MIB, 4 * KIB).ahead for _ in range(100)]
    small = [cache.read(next(places) * 4 * MIB, 16 * KIB).ahead for _ in range(10)]
    assert sum(ahead > 0 for ahead in tiny) <= 100 / PROBE_EVERY + 1
    assert all(small)


def test_memory_is_bounded() -> None:
    cache = Cache(1 << 45)
    for place in random.Random(1).sample(range(1 << 24), 12000):
        cache.read(place * MIB, 4 * KIB)
    assert cache.ahead.streams <= STREAMS
    assert len(cache.ahead._judged) <= TRIALS


def test_run_numbers_wrap_and_are_never_nobodys() -> None:
    ahead = ReadAhead(1 << 45)
    runs = [ahead.read(place * 8 * MIB, 4 * KIB, missed=True).run for place in range(RUN_IDS + 5)]
    assert min(runs) == 1
    assert max(runs) == RUN_IDS - 1
    assert runs[RUN_IDS - 1] == 1


def test_stream_that_is_used_is_kept() -> None:
    cache = Cache(1 << 40)
    first = cache.read(0).run
    for place in range(3 * STREAMS):
        cache.read((place + 2) * 8 * MIB)
        assert cache.read((place + 1) * 4 * KIB, 4 * KIB).run == first


SIZE = 8 * MIB + 1000
reads = st.lists(
    st.tuples(st.integers(0, SIZE - 1), st.sampled_from([1, 512, 4 * KIB, 16 * KIB, 128 * KIB, MIB])),
    min_size=1,
    max_size=60,
)


@given(reads)
@settings(max_examples=100, deadline=None)
def test_plan_ends_at_a_block_or_at_the_end_of_the_image(requests: list[tuple[int, int]]) -> None:
    cache = Cache(SIZE)
    for offset, length in requests:
        length = min(length, SIZE - offset)
        plan = cache.read(offset, length)
        end = offset + length + plan.ahead
        assert plan.ahead >= 0
        assert plan.ahead < MAX_WINDOW + BLOCK
        assert not plan.ahead or end == SIZE or end % BLOCK == 0
        assert end <= SIZE
        assert 0 < plan.run < RUN_IDS


@pytest.mark.slow
@given(st.integers(0, 1 << 32), st.sampled_from([4 * KIB, 16 * KIB, 64 * KIB, 128 * KIB]), st.integers(1, 200))
@settings(max_examples=20, deadline=None)
def test_store_is_asked_for_little_more_than_is_read(seed: int, length: int, longest: int) -> None:
    """Runs of any length from anywhere: what was fetched and never read stays below the bound, at every moment."""
    cache = Cache(16 * GIB)
    dice = random.Random(seed)
    for _ in range(60):
        start = dice.randrange(0, 15 * GIB, 4 * KIB)
        count, step = dice.randint(1, longest), dice.choice([1, 1, 1, 2])
        for number in range(count):
            cache.read(start + number * length * step, length)
        assert cache.unread == cache.ahead.unproven
        fetched = cache.ahead.fetched_bytes
        assert cache.unread <= SLACK + fetched // SHARE + fetched // STREAM_SHARE + BLOCK
