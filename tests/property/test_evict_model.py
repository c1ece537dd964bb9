"""The eviction policy against a model of lists: any order of installs, touches, evictions and losses."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cachefs.pool.evict import LUCKY, RING_SHARE, ROOM_SHARE, STEPS_PER_CALL, STEPS_PER_VICTIM, Sieve

BLOCKS, CAPACITY = 120, 60
blocks = st.integers(0, 2 * BLOCKS - 1)  # of two images


@dataclass
class Entry:
    """One place in a queue. gone: the block was forgotten, the place waits."""

    block: int
    run: int
    touched: bool = False
    gone: bool = False


class Model:
    """The same policy, said with lists; the hand is an index into the main queue, whose end is the newest."""

    def __init__(self) -> None:
        self.main: list[Entry] = []
        self.hand = 0
        self.ring: list[Entry] = []
        self.evicting: dict[int, Entry] = {}
        self.recent: list[set[int]] = [set(), set()]
        self.noted = 0
        self.newcomers = 0

    def entry(self, block: int) -> Entry | None:
        return next((entry for entry in self.main + self.ring if entry.block == block), None)

    def cached(self) -> set[int]:
        return {entry.block for entry in self.main + self.ring if not entry.gone}

    def insert(self, block: int, run: int, sequential: bool) -> None:
        old = self.entry(block)
        if old is not None:
            old.run, old.touched, old.gone = run, False, False
            return
        entry = Entry(block, run)
        (self.ring if sequential or self.is_on_probation(block) else self.main).append(entry)

    def is_on_probation(self, block: int) -> bool:
        if (CAPACITY - len(self.cached())) * ROOM_SHARE > CAPACITY or block in self.recent[0] | self.recent[1]:
            return False
        self.newcomers += 1
        return self.newcomers % LUCKY != 0

    def victim(self, pinned: set[int]) -> int | None:
        """The next one, with as many steps as it takes; None when all are pinned."""
        for _ in range(8 * (len(self.main) + len(self.ring)) + 8):
            if not self.main and not self.ring:
                return None
            found = self.step_ring(pinned) if self.turn_of_ring() else self.step_main(pinned)
            if found is not None:
                self.evicting[found.block] = found
                return found.block
        return None

    def turn_of_ring(self) -> bool:
        return bool(self.ring) and (len(self.ring) * RING_SHARE > CAPACITY or not self.main)

    def step_main(self, pinned: set[int]) -> Entry | None:
        if self.hand == len(self.main):
            self.hand = 0
        entry = self.main[self.hand]
        if entry.gone:
            self.main.remove(entry)
            return None
        if entry.block in pinned or entry.touched:
            entry.touched = entry.touched and entry.block in pinned
            self.hand += 1
            return None
        self.main.remove(entry)
        return entry

    def step_ring(self, pinned: set[int]) -> Entry | None:
        entry = self.ring.pop(0)
        if entry.gone:
            return None
        if entry.touched:
            entry.touched = False
            self.main.append(entry)
            return None
        if entry.block in pinned:
            self.ring.append(entry)
            return None
        if self.noted * 2 >= CAPACITY:
            self.noted = 0
            self.recent = [set(), self.recent[0]]
        self.noted += 1
        self.recent[0].add(entry.block)
        return entry

    def restore(self, block: int) -> None:
        if self.hand == len(self.main):
            self.main.append(self.evicting.pop(block))  # behind the hand, which has nothing ahead
            self.hand = len(self.main)
        else:
            self.main.insert(self.hand, self.evicting.pop(block))
            self.hand += 1


class Agreement(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.sieve = Sieve(CAPACITY)
        self.images = [self.sieve.add_image(BLOCKS), self.sieve.add_image(BLOCKS)]
        self.model = Model()

    def key(self, block: int) -> int:
        return self.images[block // BLOCKS].base | block % BLOCKS

    def block(self, key: int) -> int:
        image = next(index for index, image in enumerate(self.images) if image.number == key >> 40)
        return image * BLOCKS + (key & (1 << 40) - 1)

    @rule(first=blocks, count=st.integers(1, 40), run=st.integers(0, 5), sequential=st.booleans())
    def read(self, first: int, count: int, run: int, sequential: bool) -> None:
        """As a pool does: room is made first, what is cached is touched."""
        for block in range(first, min(first + count, 2 * BLOCKS)):
            if block in self.model.evicting:
                continue
            if block in self.model.cached():
                self.touch(block, run)
                continue
            while len(self.sieve) + len(self.model.evicting) >= CAPACITY:
                if not self.evict_some(1, set(), True):
                    break
            else:
                self.sieve.insert(self.key(block), run, sequential=sequential)
                self.model.insert(block, run, sequential)

    @rule(block=blocks, run=st.integers(0, 5))
    def touch(self, block: int, run: int) -> None:
        if block in self.model.cached():
            self.images[block // BLOCKS].touch(block % BLOCKS, block % BLOCKS + 1, run)
            entry = self.model.entry(block)
            assert entry is not None
            entry.touched = entry.touched or not run or entry.run != run

    @rule(count=st.integers(1, 20), pinned=st.sets(blocks, max_size=30), done=st.booleans())
    def evict(self, count: int, pinned: set[int], done: bool) -> None:
        """*done*: the punch is over at once; otherwise it is pending."""
        self.evict_some(count, pinned, done)

    def evict_some(self, count: int, pinned: set[int], done: bool) -> bool:
        asked = 0

        def is_pinned(key: int) -> bool:
            nonlocal asked
            asked += 1
            return self.block(key) in pinned

        victims = [self.block(key) for key in self.sieve.victims(count, is_pinned)]
        assert len(victims) <= count
        assert asked <= STEPS_PER_CALL + STEPS_PER_VICTIM * count
        assert not pinned.intersection(victims)
        if not pinned:
            assert victims == [self.model.victim(pinned) for _ in victims]
            assert len(victims) == count or not self.model.cached()
        else:
            # where pinned blocks wait in both queues the order is nobody's business: the model follows
            for victim in victims:
                self.model_follows(victim)
            self.align()
        if done:
            for victim in victims:
                self.sieve.forget(self.key(victim))
                del self.model.evicting[victim]
        return bool(victims)

    def model_follows(self, victim: int) -> None:
        entry = self.model.entry(victim)
        assert entry is not None
        assert not entry.gone
        queue = self.model.main if entry in self.model.main else self.model.ring
        queue.remove(entry)
        self.model.evicting[victim] = entry

    def align(self) -> None:
        """The model takes over the order, the marks and what is noted; what is cached must agree already."""
        sieve, model = self.sieve, self.model
        entries = {entry.block: entry for entry in model.main + model.ring}
        behind = [self.block(key) for key in sieve._behind]
        ahead = [self.block(key) for key in sieve._ahead]
        model.main = [entries[block] for block in behind + ahead]
        model.ring = [entries[self.block(key)] for key in sieve._ring]
        model.hand = len(behind)
        for entry in model.main + model.ring:
            word = self.images[entry.block // BLOCKS].words[entry.block % BLOCKS]
            assert entry.gone == (word & 7 > 3)
            entry.touched = bool(word & 8) and not entry.gone
        model.noted, model.recent = sieve._noted, [
            {index * BLOCKS + block for index, image in enumerate(self.images) for block in plane(image).search(1)}
            for plane in (lambda image: image.recent, lambda image: image.recent_before)
        ]  # fmt: skip

    @rule(restored=st.booleans())
    def end_evictions(self, restored: bool) -> None:
        for block in list(self.model.evicting):
            if restored:
                self.sieve.restore(self.key(block))
                self.model.restore(block)
            else:
                self.sieve.forget(self.key(block))
                del self.model.evicting[block]

    @rule(block=blocks)
    def lose(self, block: int) -> None:
        if block in self.model.cached():
            self.sieve.forget(self.key(block))
            entry = self.model.entry(block)
            assert entry is not None
            entry.gone = True

    @invariant()
    def agree(self) -> None:
        self.sieve.check()
        cached = {block for block in range(2 * BLOCKS) if self.sieve.is_cached(self.key(block))}
        assert cached == self.model.cached()
        assert len(self.sieve) == len(cached) <= CAPACITY


TestAgreement = pytest.mark.slow(Agreement.TestCase)
TestAgreement.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.tuples(st.integers(0, 400), st.booleans()), max_size=400), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_pool_that_keeps_its_capacity_can_always_make_room(reads: list[tuple[int, bool]], capacity: int) -> None:
    sieve = Sieve(capacity)
    image = sieve.add_image(401)
    for run, (block, sequential) in enumerate(reads):
        if not sieve.is_cached(block):
            while len(sieve) >= capacity:
                (victim,) = sieve.victims(1, lambda key: False)
                sieve.forget(victim)
            sieve.insert(block, run % 3, sequential=sequential)
        image.touch(block, block + 1, run % 3)
        assert len(sieve) <= capacity
    sieve.check()
