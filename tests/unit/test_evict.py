"""The eviction policies: what goes first, what a scan may not push out, what is refused."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from cachefs.pool import evict
from cachefs.pool.evict import RUN_IDS, STEPS_PER_CALL, STEPS_PER_VICTIM, ImageBlocks, Never, Policy, Sieve

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import replay

CAPACITY = 400
RING = CAPACITY // 20


def no_pins(key: int) -> bool:
    return False


def evict_one(policy: Policy) -> int | None:
    victims = policy.victims(1, no_pins)
    for key in victims:
        policy.forget(key)
    return victims[0] if victims else None


class Cache:
    """A cache of one image that reads block by block and keeps the policy at its capacity."""

    def __init__(self, policy: Policy, blocks: int = 32_000) -> None:
        self.policy = policy
        self.image = policy.add_image(blocks)

    def read(self, blocks: Iterable[int], run: int, *, sequential: bool = False, requests: int = 4) -> float:
        """The hit ratio; each block is read by *requests* requests of *run*."""
        hits = count = 0
        for block in blocks:
            count += 1
            if self.policy.is_cached(block):
                hits += 1
            else:
                while len(self.policy) >= self.policy.capacity:
                    evict_one(self.policy)
                self.policy.insert(self.image.base | block, run, sequential=sequential)
            for _ in range(requests):
                self.image.touch(block, block + 1, run)
        return hits / max(1, count)

    def cached(self, blocks: Iterable[int]) -> list[int]:
        return [block for block in blocks if self.policy.is_cached(block)]


def filled(blocks: int = CAPACITY) -> Cache:
    cache = Cache(Sieve(CAPACITY))
    cache.read(range(blocks), run=1)
    cache.policy.check()
    return cache


# ---- SIEVE


def test_first_in_goes_first() -> None:
    cache = Cache(Sieve(100))
    cache.read(range(50), run=1)
    assert [evict_one(cache.policy) for _ in range(50)] == list(range(50))
    assert evict_one(cache.policy) is None
    assert len(cache.policy) == 0


def test_touched_block_is_passed_over_once() -> None:
    cache = Cache(Sieve(100))
    cache.read(range(4), run=1)
    cache.image.touch(0, 2, run=2)
    assert [evict_one(cache.policy) for _ in range(4)] == [2, 3, 0, 1]


def test_hand_keeps_its_place() -> None:
    """What survived lies behind the hand: newer blocks that nobody touched go before it is asked again."""
    cache = Cache(Sieve(100))
    cache.read(range(4), run=1)
    cache.image.touch(0, 2, run=2)
    assert evict_one(cache.policy) == 2
    cache.read([10, 11], run=3)
    assert [evict_one(cache.policy) for _ in range(5)] == [3, 10, 11, 0, 1]


def test_touch_by_the_run_that_brought_a_block_in_does_not_count() -> None:
    cache = Cache(Sieve(100))
    cache.read([0, 1], run=7, requests=16)
    assert evict_one(cache.policy) == 0
    cache.image.touch(1, 2, run=8)
    cache.read([2], run=7)
    assert evict_one(cache.policy) == 2


def test_every_touch_counts_for_nobodys_run() -> None:
    policy = Sieve(100)
    image = policy.add_image(10)
    policy.adopt(image, 0, 2)
    image.touch(0, 1)
    assert evict_one(policy) == 1


def test_last_run_number_fits() -> None:
    cache = Cache(Sieve(100))
    cache.read([0, 1], run=RUN_IDS - 1)
    cache.image.touch(0, 1, run=RUN_IDS - 1)
    assert evict_one(cache.policy) == 0


# ---- ring and probation


def test_sequential_blocks_go_before_all_others() -> None:
    cache = Cache(Sieve(CAPACITY))
    cache.read(range(100), run=1)
    cache.read(range(1000, 1100), run=2, sequential=True)
    assert [evict_one(cache.policy) for _ in range(100 - RING)] == list(range(1000, 1100 - RING))
    assert evict_one(cache.policy) == 0


def test_block_of_the_ring_that_another_run_touches_moves_to_the_main_queue() -> None:
    cache = Cache(Sieve(CAPACITY))
    cache.read(range(1000, 1100), run=2, sequential=True)
    cache.image.touch(1000, 1001, run=2)
    cache.image.touch(1001, 1002, run=3)
    assert [evict_one(cache.policy) for _ in range(2)] == [1000, 1002]
    assert cache.policy.ring_blocks == 97  # type: ignore[attr-defined]
    cache.policy.check()


def test_ring_of_touched_blocks_is_searched_to_its_end_before_the_main_queue_loses_one() -> None:
    sieve = Sieve(60)
    image = sieve.add_image(200)
    for block in range(36):
        sieve.insert(block)
    for block in range(100, 124):
        sieve.insert(block, 1, sequential=True)
    image.touch(100, 118, 2)  # all but the last six
    assert sieve.victims(1, lambda key: False) == [118]


def test_new_blocks_are_on_probation_when_the_pool_is_full() -> None:
    cache = filled()
    cache.read(range(1000, 3000), run=2)
    assert len(cache.cached(range(CAPACITY))) >= CAPACITY * 0.87
    assert len(cache.policy) == CAPACITY


def test_block_that_comes_back_soon_is_off_probation() -> None:
    cache = filled()
    for _ in range(2):
        cache.read(range(1000, 1100), run=2)
    for _ in range(2):
        assert cache.read(range(1000, 1100), run=3) >= 0.8
        cache.policy.check()


def test_block_that_comes_back_late_is_not() -> None:
    cache = filled()
    cache.read([5000], run=2)
    cache.read(range(10000, 10000 + 3 * CAPACITY), run=2)
    assert not cache.policy.is_cached(5000)
    cache.read([5000], run=2)
    cache.read(range(20000, 20000 + CAPACITY), run=2)
    assert not cache.policy.is_cached(5000)


@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "random"])
@pytest.mark.parametrize("boot_set", [CAPACITY // 2, CAPACITY * 9 // 10, CAPACITY * 2], ids=["half", "fits", "double"])
def test_boot_set_survives_a_scan_after_one_boot(boot_set: int, sequential: bool) -> None:
    shuffled = random.Random(1)
    boot = shuffled.sample(range(10 * CAPACITY), boot_set)

    def next_boot(scan: int) -> float:
        cache = Cache(Sieve(CAPACITY))
        cache.read(boot, run=1, requests=3)
        cache.read(shuffled.sample(boot, boot_set // 10), run=2)  # some are read again
        blocks = range(10_000, 10_000 + scan)
        cache.read(blocks if sequential else shuffled.sample(blocks, scan), run=3, sequential=sequential, requests=16)
        cache.policy.check()
        return cache.read(boot, run=4)

    assert next_boot(10 * CAPACITY) >= 0.9 * next_boot(0)
    assert next_boot(0) >= min(0.8 * CAPACITY / boot_set, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("request_size", [4 << 10, 128 << 10], ids=["4KiB", "128KiB"])
@pytest.mark.parametrize("percent", [25, 50, 110])
def test_recorded_boot_survives_a_scan_after_one_boot(percent: int, request_size: int) -> None:
    """percent: the quota, of what the guest reads."""
    trace = replay.Trace.load(replay.TRACE)
    capacity = trace.distinct() * percent // 100

    def second_boot(scan: int) -> float:
        cache = replay.Cache(replay.Ours(capacity), trace.size + (1 << 40))
        cache.play(trace.reads)
        for read in replay.scan(1 << 40, scan, request_size):
            cache.play([read])
        return cache.play(trace.reads)[0]

    assert second_boot(10 * capacity * replay.BLOCK) >= 0.9 * second_boot(0)


def test_pool_that_is_full_of_a_scan_learns_a_boot_set() -> None:
    cache = Cache(Sieve(CAPACITY))
    cache.read(range(10_000, 10_000 + 10 * CAPACITY), run=1)
    boot = range(CAPACITY // 2)
    ratios = [cache.read(boot, run=2 + boot_number) for boot_number in range(4)]
    assert ratios[3] >= 0.9


# ---- the plan


def test_pinned_blocks_are_never_named() -> None:
    cache = filled()
    pinned = set(range(0, CAPACITY, 3))
    while victims := cache.policy.victims(7, pinned.__contains__):
        assert not pinned.intersection(victims)
        for key in victims:
            cache.policy.forget(key)
    assert set(cache.cached(range(CAPACITY))) == pinned
    cache.policy.check()


def test_work_of_a_call_is_bounded() -> None:
    cache = filled()
    asked = []

    def pinned(key: int) -> bool:
        asked.append(key)
        return True

    big = Cache(Sieve(10_000))
    big.policy.adopt(big.image, 0, 10_000)
    assert big.policy.victims(2, pinned) == []
    assert len(asked) == STEPS_PER_CALL + 2 * STEPS_PER_VICTIM
    big.image.touch(0, 10_000)
    assert big.policy.victims(2, no_pins) == []
    while not big.policy.victims(2, no_pins):
        pass
    assert cache.policy.victims(0, no_pins) == []


def test_victim_is_not_named_twice() -> None:
    cache = filled(10)
    assert cache.policy.victims(6, no_pins) == [0, 1, 2, 3, 4, 5]
    assert cache.policy.victims(6, no_pins) == [6, 7, 8, 9]
    assert len(cache.policy) == 0
    cache.policy.restore(3)
    cache.policy.forget(4)
    cache.policy.check()
    assert cache.policy.victims(6, no_pins) == [3]


def test_forgotten_block_comes_back_to_its_place() -> None:
    cache = filled(10)
    cache.policy.forget(3)
    cache.policy.forget(5)
    assert len(cache.policy) == 8
    cache.policy.check()
    cache.policy.insert(3, run=9)
    cache.policy.check()
    assert [evict_one(cache.policy) for _ in range(9)] == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_blocks_of_a_dropped_image_are_gone() -> None:
    policy = Sieve(100)
    first, second = policy.add_image(20), policy.add_image(20)
    policy.adopt(first, 0, 10)
    policy.adopt(second, 5, 10)
    policy.insert(first.base | 15, sequential=True)
    policy.drop_image(first)
    assert len(policy) == 5
    policy.check()
    assert [evict_one(policy) for _ in range(6)] == [*(second.base | block for block in range(5, 10)), None]


@pytest.mark.parametrize("policy", [Sieve(10), Never(10)], ids=["sieve", "never"])
def test_misuse_is_refused(policy: Policy) -> None:
    image = policy.add_image(4)
    with pytest.raises(ValueError, match="forget of block 2 of image 0, which is ABSENT"):
        policy.forget(image.base | 2)
    policy.insert(image.base | 2)
    with pytest.raises(ValueError, match="insert of block 2 of image 0, which is MAIN"):
        policy.insert(image.base | 2)
    with pytest.raises(ValueError, match="restore of block 2 of image 0, which is MAIN"):
        policy.restore(image.base | 2)
    with pytest.raises(KeyError):
        policy.insert(1 << 60)


def test_victim_cannot_be_installed_anew_before_it_is_gone() -> None:
    cache = filled(10)
    (key,) = cache.policy.victims(1, no_pins)
    assert not cache.policy.is_cached(key)
    with pytest.raises(ValueError, match="insert of block 0 of image 0, which is EVICTING"):
        cache.policy.insert(key)
    cache.policy.forget(key)
    cache.policy.insert(key)


# ---- prefetched blocks


def test_prefetched_blocks_are_counted_as_used_or_wasted() -> None:
    cache = Cache(Sieve(100))
    for block in range(4):
        cache.policy.insert(block, run=1, prefetched=block > 0)
    cache.image.touch(0, 2, run=1)
    cache.image.touch(1, 2, run=2)
    assert (cache.image.used_blocks, cache.image.wasted_blocks) == (1, 0)
    assert [evict_one(cache.policy) for _ in range(2)] == [0, 2]
    assert (cache.image.used_blocks, cache.image.wasted_blocks) == (1, 1)


# ---- never


def test_never_evicts_nothing() -> None:
    policy = Never(10)
    image = policy.add_image(100)
    for block in range(10):
        policy.insert(image.base | block)
    image.touch(0, 10)
    assert policy.victims(5, no_pins) == []
    policy.forget(image.base | 3)
    assert len(policy) == 9
    policy.check()


# ---- size


def test_eviction_state_is_at_most_eleven_bytes_for_a_block() -> None:
    policy = Sieve(50_000)
    image: ImageBlocks = policy.add_image(50_000)
    for block in random.Random(1).sample(range(50_000), 50_000):
        policy.insert(image.base | block)
    fifos = (policy._ahead, policy._behind, policy._ring)
    size = sum(chunk.buffer_info()[1] * chunk.itemsize for fifo in fifos for chunk in fifo._chunks)
    size += image.words.nbytes + image.recent.nbytes + image.recent_before.nbytes
    assert size <= 11 * len(policy)
    assert evict.CHUNK * 8 <= 1 << 15  # the part of a chunk that may lie idle
