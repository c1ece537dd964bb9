"""The extent cache over a backend that counts how often it is asked, whose operations can be held and failed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.backends.memory import CHUNK, Memory
from cachefs.errors import CachefsError, PermanentError
from cachefs.extent import Extent, ExtentKind, merge_extents
from cachefs.graph import edge
from cachefs.layers.base import Environment, Layer
from cachefs.layers.extents import ASK_TRIES, Extents, ExtentsConfig
from cachefs.testing.faults import Faults
from cachefs.testing.gate import Gate
from cachefs.testing.model import read, write
from cachefs.testing.wrapper import SlowOnly, Wrapper

MIB = 1 << 20
SIZE = 4 * MIB
DATA, ZERO, HOLE = ExtentKind


class Asked(Wrapper):
    """Notes what it is asked, and answers with *most* extents at most."""

    def __init__(self, child: Layer) -> None:
        super().__init__(child)
        self.questions: list[tuple[int, int]] = []
        self.reads = 0
        self.most = 1000

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        self.reads += 1
        return self.child.try_read_into(offset, buffer)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads += 1
        await self.child.read_into(offset, buffer)

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        self.questions.append((offset, length))
        return await self.child.extents(offset, length, min(limit, self.most))


@dataclass
class Rig:
    """top: what a layer above would hold. fast: whether the fast path goes down to the backend."""

    top: Layer
    cache: Extents
    gate: Gate
    faults: Faults
    below: Asked

    async def map(self, offset: int = 0, end: int = SIZE) -> list[Extent]:
        """All of the range, as a tool that loops over it gets it."""
        found: list[Extent] = []
        while offset < end:
            found += await self.top.extents(offset, end - offset)
            offset = found[-1].end
        return merge_extents(found)

    def asks(self) -> int:
        """Questions since the last call."""
        count = len(self.below.questions)
        self.below.questions.clear()
        return count


@asynccontextmanager
async def rig(*, slow: bool = True, memory: str = "32MiB") -> AsyncIterator[Rig]:
    """Four extents of 1 MiB: data, hole, data, hole."""
    backend = Memory("disk/memory", SIZE)
    for at in (0, 2 * MIB):
        backend.try_write(at, memoryview(b"\x21" * MIB))
    below = Asked(SlowOnly(backend) if slow else backend)
    faults = Faults(below)
    gate = Gate(faults)
    env = Environment("disk", Path("/nonexistent"))
    async with Extents.open(ExtentsConfig.model_validate({"memory": memory}), edge(gate), env) as cache:
        yield Rig(edge(cache), cache, gate, faults, below)


FOUR = [Extent(0, MIB, DATA), Extent(MIB, MIB, HOLE), Extent(2 * MIB, MIB, DATA), Extent(3 * MIB, MIB, HOLE)]

Change = Callable[[Layer], Awaitable[None]]
changes = pytest.mark.parametrize(
    ("at", "change"),
    [
        (MIB, lambda top: top.write(MIB, memoryview(b"\x22" * MIB))),
        (2 * MIB, lambda top: top.trim(2 * MIB, MIB)),
        (2 * MIB, lambda top: top.zero(2 * MIB, MIB)),
        (MIB, lambda top: write(top, MIB, b"\x22" * MIB)),
    ],
    ids=["write", "trim", "zero", "try_write"],
)


# ---- the sequences of nbdkit's extent cache


async def test_extents_asks_once_for_what_is_mapped_three_times() -> None:
    async with rig() as disk:
        for _ in range(3):
            assert await disk.map() == FOUR
        assert disk.below.questions == [(0, SIZE)]


async def test_extents_asks_again_for_what_was_discarded_and_nothing_else() -> None:
    async with rig() as disk:
        await disk.map()
        await disk.top.trim(0, MIB)
        disk.asks()
        assert await disk.map() == [Extent(0, 2 * MIB, HOLE), *FOUR[2:]]
        assert disk.below.questions == [(0, MIB)]


async def test_extents_asks_twice_when_the_discard_comes_first_after_a_cold_map() -> None:
    async with rig() as disk:
        await disk.map()
        await disk.top.trim(0, 1)
        await disk.map()
        assert disk.asks() == 2


async def test_extents_does_not_ask_again_after_reads() -> None:
    async with rig() as disk:
        await disk.map()
        assert await read(disk.top, MIB - 10, 20) == b"\x21" * 10 + bytes(10)
        assert await disk.map() == FOUR
        assert disk.asks() == 1


async def test_extents_asks_for_the_written_range_again_and_not_for_the_rest() -> None:
    async with rig() as disk:
        await disk.map()
        await write(disk.top, MIB, b"x")
        disk.asks()
        found = await disk.map()
        assert disk.below.questions == [(MIB, 4096)]
        assert found[0] == Extent(0, MIB + 4096, DATA)
        assert await disk.map() == found
        assert disk.asks() == 1


async def test_extents_goes_on_behind_a_prefix() -> None:
    async with rig() as disk:
        disk.below.most = 1
        assert await disk.map() == FOUR
        assert disk.asks() == 4
        assert await disk.map(MIB // 2, 3 * MIB) == [Extent(MIB // 2, MIB // 2, DATA), *FOUR[1:3]]
        assert disk.asks() == 0


async def test_extents_asks_only_for_the_gap_between_what_is_known() -> None:
    async with rig() as disk:
        disk.below.most = 1
        await disk.top.extents(0, 10)
        await disk.top.extents(2 * MIB, 10)
        disk.asks()
        await disk.top.extents(MIB, 10)
        assert disk.below.questions == [(MIB, MIB)]


# ---- one question for all


async def test_extents_asks_one_question_for_all_who_wait_for_its_range() -> None:
    async with rig() as disk:
        held = disk.gate.hold("extents")
        found: list[list[Extent]] = []

        async def ask(offset: int) -> None:
            found.append(await disk.map(offset))

        async with trio.open_nursery() as nursery:
            for offset in (0, 0, 5 * 4096, MIB, SIZE - 1):
                nursery.start_soon(ask, offset)
                await held.wait_until_held()
            await wait_all_tasks_blocked()
            held.open()
        assert len(found) == 5
        assert disk.asks() == 1


async def test_question_goes_on_when_the_one_who_asked_is_cancelled() -> None:
    async with rig() as disk:
        held = disk.gate.hold("extents")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.map)
            await held.wait_until_held()
            nursery.cancel_scope.cancel()
        held.open()
        assert await disk.map() == FOUR
        assert disk.asks() == 1


async def test_failed_question_is_told_to_all_who_wait_and_asked_again_by_the_next() -> None:
    async with rig() as disk:
        disk.faults.add("extents", PermanentError("below", "made to fail"))
        held = disk.gate.hold("extents")
        errors: list[str] = []

        async def ask() -> None:
            try:
                await disk.map()
            except CachefsError as exc:
                errors.append(exc.detail)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
            await held.wait_until_held()
            await wait_all_tasks_blocked()
            held.open()
        assert errors == ["made to fail"] * 2
        assert await disk.map() == FOUR


# ---- changes beside questions


@changes
async def test_map_after_a_change_that_was_held_in_flight_says_what_it_left(at: int, change: Change) -> None:
    """A map during the change may say either; what it learnt must be gone afterwards."""
    async with rig() as disk:
        op = {"write": "write", "trim": "trim", "zero": "zero"}
        async with trio.open_nursery() as nursery:
            helds = [disk.gate.hold(name) for name in op]
            nursery.start_soon(change, disk.top)
            await wait_all_tasks_blocked()
            assert any(held.is_held for held in helds)
            assert await disk.map() == FOUR
            for held in helds:
                held.open()
        assert await disk.map() == await _truth(disk)


@changes
async def test_answer_that_was_under_way_during_a_change_is_not_kept_for_its_range(at: int, change: Change) -> None:
    async with rig() as disk:
        held = disk.gate.hold("extents", after=True)  # the answer is made, and not yet given
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.map)
            await held.wait_until_held()
            await change(disk.top)
            held.open()
        assert await disk.map() == await _truth(disk)


@changes
async def test_answer_is_kept_for_all_but_the_changed_range(at: int, change: Change) -> None:
    async with rig() as disk:
        held = disk.gate.hold("extents", after=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.top.extents, 0, 10)
            await held.wait_until_held()
            await change(disk.top)
            held.open()
        disk.asks()
        await disk.map()
        assert disk.below.questions == [(at, MIB)]


@changes
async def test_who_asks_after_a_change_does_not_get_the_answer_from_before_it(at: int, change: Change) -> None:
    async with rig() as disk:
        held = disk.gate.hold("extents", after=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.map)
            await held.wait_until_held()
            await change(disk.top)
            with trio.fail_after(5):  # nor waits for it
                assert await disk.top.extents(at, MIB) == await _truth(disk, at, at + MIB)
            held.open()


@pytest.mark.parametrize("op", ["write", "trim", "zero"])
async def test_failed_change_is_forgotten_like_one_that_went_well(op: str) -> None:
    """It may have changed a part of its range before it failed."""

    class HalfDone(Wrapper):
        async def write(self, offset: int, data: memoryview) -> None:
            await self.child.write(offset, data[: len(data) // 2])
            raise PermanentError("below", "half done")

        async def trim(self, offset: int, length: int) -> None:
            await self.child.trim(offset, length // 2)
            raise PermanentError("below", "half done")

        async def zero(self, offset: int, length: int) -> None:
            await self.trim(offset, length)

    async with rig() as disk:
        disk.gate.child = HalfDone(disk.gate.child)
        await disk.map()
        target = MIB if op == "write" else 0
        asked = {
            "write": partial(disk.top.write, target, memoryview(b"\x22" * MIB)),
            "trim": partial(disk.top.trim, target, MIB),
            "zero": partial(disk.top.zero, target, MIB),
        }
        with pytest.raises(PermanentError):
            await asked[op]()
        assert await disk.map() == await _truth(disk)
        assert await read(disk.top, target, 10) == (b"\x22" * 10 if op == "write" else bytes(10))


async def test_write_that_failed_while_a_question_was_under_way_is_marked() -> None:
    async with rig() as disk:

        class HalfDone(Wrapper):
            async def write(self, offset: int, data: memoryview) -> None:
                await self.child.write(offset, data[: len(data) // 2])
                raise PermanentError("below", "half done")

        disk.gate.child = HalfDone(disk.gate.child)
        held = disk.gate.hold("extents", after=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.map)
            await held.wait_until_held()
            with pytest.raises(PermanentError):
                await disk.top.write(MIB, memoryview(b"\x22" * MIB))
            held.open()
        assert await disk.map() == await _truth(disk)


async def test_cancelled_write_is_forgotten_when_it_has_ended() -> None:
    async with rig() as disk:
        await disk.map()
        held = disk.gate.hold("write", after=True)  # it is there; who waits for it is not any more
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.top.write, MIB, memoryview(b"\x22" * CHUNK))
            await held.wait_until_held()
            nursery.cancel_scope.cancel()
        assert await disk.map() == await _truth(disk)
        assert await read(disk.top, MIB, 8192) == b"\x22" * 8192


async def test_fast_write_that_did_a_part_and_gave_up_is_forgotten() -> None:
    class Halfway(Wrapper):
        def try_write(self, offset: int, data: memoryview) -> bool:
            self.child.try_write(offset, data[:100])
            return False

    async with rig(slow=False) as disk:
        await disk.map()
        disk.gate.child = Halfway(disk.gate.child)
        assert not disk.top.try_write(MIB, memoryview(b"\x22" * 4096))
        assert await read(disk.top, MIB, 100) == b"\x22" * 100


async def test_writes_do_not_wait_for_a_question_nor_it_for_them() -> None:
    async with rig() as disk:
        question, change = disk.gate.hold("extents"), disk.gate.hold("write")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.map)
            await question.wait_until_held()
            nursery.start_soon(disk.top.write, 0, memoryview(b"x"))
            await change.wait_until_held()  # it went down beside the question
            await disk.top.write(8192, memoryview(b"y"))
            question.open()
            assert len(await disk.top.extents(MIB, MIB)) == 1
            change.open()


async def test_map_of_what_is_written_all_the_time_is_answered_all_the_same() -> None:
    async with rig() as disk:

        class Busy(Wrapper):
            async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
                found = await self.child.extents(offset, length, limit)
                await disk.top.write(MIB, memoryview(b"x"))
                return found

        disk.gate.child = Busy(disk.gate.child)
        assert (await disk.top.extents(MIB, MIB))[0].offset == MIB
        assert disk.asks() <= ASK_TRIES + 1
        assert (await disk.top.extents(2 * MIB, MIB)) == [FOUR[2]]
        assert disk.asks() == 0  # what a busy writer does not touch is kept


async def test_marks_of_a_question_stay_bounded() -> None:
    async with rig() as disk:
        held = disk.gate.hold("extents", after=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.top.extents, 0, 10)
            await held.wait_until_held()
            for number in range(1000):  # never beside the one before
                await disk.top.write(number * 37 % 64 * CHUNK, memoryview(b"x" * CHUNK))
                await disk.top.write(number * 37 % 64 * CHUNK + 8192, memoryview(b"y"))
            assert len(disk.cache._questions[0].changed) <= 64
            held.open()
        assert await disk.map() == await _truth(disk)


# ---- reads


@pytest.mark.parametrize("slow", [True, False])
async def test_reads_of_known_zeros_touch_nothing_below(slow: bool) -> None:
    async with rig(slow=slow) as disk:
        await disk.map()
        for offset, length in ((MIB, MIB), (MIB + 1, 100), (2 * MIB - 1, 1), (3 * MIB, MIB)):
            fast = bytearray(b"\xa5" * length)
            assert disk.top.try_read_into(offset, memoryview(fast))
            buffer = bytearray(b"\xa5" * length)
            await disk.top.read_into(offset, memoryview(buffer))
            assert fast == buffer == bytes(length)
        assert disk.below.reads == 0
        assert await read(disk.top, MIB - 1, 2) == b"\x21\0"
        assert disk.below.reads >= 1


async def test_known_zeros_longer_than_the_buffer_of_zeros_are_read_whole() -> None:
    async with rig() as disk:
        await disk.top.trim(0, SIZE)
        await disk.map()
        buffer = bytearray(b"\xa5" * SIZE)
        assert disk.cache.try_read_into(0, memoryview(buffer))
        assert buffer == bytes(SIZE)


async def test_memory_is_bounded_and_the_oldest_knowledge_goes_first() -> None:
    async with rig(memory="64KiB") as disk:  # 256 runs
        await disk.map()
        for at in range(0, MIB, 8192):
            await disk.top.write(3 * MIB + at, memoryview(b"x"))
            await disk.top.extents(3 * MIB + at, 10)
        assert len(disk.cache.known) <= 256


async def _truth(disk: Rig, offset: int = 0, end: int = SIZE) -> list[Extent]:
    """What the backend says now."""
    return await disk.below.child.extents(offset, end - offset)
