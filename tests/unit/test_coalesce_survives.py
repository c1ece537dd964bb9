"""What was gathered outlives the daemon: its memory is looked at between any two lines, and taken over after every request."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.backends.memory import Memory
from cachefs.errors import CachefsError, FormatError
from cachefs.layers import coalesce
from cachefs.layers.base import Environment
from cachefs.layers.checked import Checked
from cachefs.layers.coalesce import Coalesce, CoalesceConfig
from cachefs.store import clusters
from cachefs.store.clusters import Clusters, Slot
from cachefs.testing.faults import Faults
from cachefs.testing.model import (
    Changing,
    Flush,
    Model,
    Op,
    Trim,
    Write,
    Zero,
    assert_same,
    check_possible,
    perform,
    read_all,
)
from cachefs.testing.stacks import fill, pattern, unfold
from cachefs.testing.strategies import patterns

CLUSTER, SLOTS = 64 << 10, 5
SIZE = 2 * CLUSTER + 3000
CONFIG = CoalesceConfig.model_validate({"cluster": CLUSTER, "buffer": "400KiB", "max_delay": "1h"})

STEPS: Sequence[Op | str] = [
    Write(100, patterns(1, 1000)),
    Write(CLUSTER - 500, patterns(2, 1500)),
    Write(600, patterns(3, 2000)),
    Trim(512, 1024),
    Flush(),
    Write(2 * CLUSTER + 2900, patterns(4, 100)),
    "fail",
    Flush(),
    Write(2 * CLUSTER + 1000, patterns(5, 1950)),
    Zero(2 * CLUSTER, 3000),
    Write(0, patterns(6, CLUSTER)),
    Write(50, patterns(7, 100)),
    Flush(),
    Write(40, patterns(8, 30)),
    Trim(0, SIZE),
]


@dataclass
class Kept:
    """The memory that a dead daemon left, in place of a SurvivorMemory."""

    body: memoryview

    async def __aenter__(self) -> Kept:
        return self

    async def __aexit__(self, *_: object) -> None: ...


@dataclass
class Disk:
    """layer: over a store of *chunks*. body: its memory."""

    layer: Coalesce
    top: Checked
    faults: Faults
    chunks: dict[int, bytearray]
    body: bytearray
    forced_stop: trio.Event

    def hang(self, until: trio.Event) -> None:
        """Every write below waits, from now on."""

        async def wait(offset: int, data: memoryview) -> None:
            await until.wait()

        self.faults.try_write = lambda offset, data: False  # type: ignore[method-assign]
        self.faults.write = wait  # type: ignore[method-assign]
        self.layer.write_outs._child = Checked(self.faults)

    def store(self) -> bytes:
        return unfold(self.chunks, SIZE)


@asynccontextmanager
async def opened(body: bytearray, content: bytes) -> AsyncIterator[Disk]:
    chunks: dict[int, bytearray] = {}
    fill(chunks, content)
    faults = Faults(Checked(Memory("vm1/memory", SIZE, 512, chunks)))
    with mock.patch.object(coalesce, "_open_memory", return_value=Kept(memoryview(body))):
        env = Environment("vm1", Path("/nonexistent"))
        async with Coalesce.open(CONFIG, Checked(faults), env) as layer:
            yield Disk(layer, Checked(layer), faults, chunks, body, env.forced_stop)


def new_body() -> bytearray:
    return bytearray(clusters.body_size(CLUSTER, SLOTS))


async def perform_step(disk: Disk, step: Op | str) -> None:
    if isinstance(step, str):
        disk.faults.add("write")
        return
    with contextlib.suppress(CachefsError):
        await perform(disk.top, step)
    await wait_all_tasks_blocked()


# ---- between any two lines


@dataclass
class Watcher:
    """Looks at what a successor would find, at every line of what changes the memory."""

    disk: Disk
    model: Model
    op: Changing | None = None
    seen: bytes = b""
    looks: int = 0
    problems: list[AssertionError] = field(default_factory=list)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        is_ours = code.co_filename == clusters.__file__ or code.co_name.startswith("mutant_")
        return self._look if is_ours else None

    def _look(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        body = bytes(self.disk.body)
        if body != self.seen and not self.problems:
            self.seen = body
            self.looks += 1
            content = bytearray(self.disk.store())
            Clusters(memoryview(bytearray(body)), SIZE, CLUSTER, SLOTS).overlay(0, memoryview(content))
            changes = [] if self.op is None else [self.op]
            try:
                check_possible(bytes(content), 0, changes, bytes(self.model.content), old_allowed=True)
            except AssertionError as exc:
                self.problems.append(exc)
        return self._look


async def watch_all_steps() -> Watcher:
    async with opened(new_body(), pattern(SIZE)) as disk:
        watcher = Watcher(disk, Model(pattern(SIZE)))
        with watcher.watching():
            for step in STEPS:
                watcher.op = step if isinstance(step, (Write, Trim, Zero)) else None
                await perform_step(disk, step)
                if not isinstance(step, str):
                    watcher.model.apply(step)
    return watcher


@pytest.mark.logs("a write-out failed")
async def test_a_kill_between_any_two_lines_leaves_every_acknowledged_byte() -> None:
    watcher = await watch_all_steps()
    assert not watcher.problems, watcher.problems[0]
    assert watcher.looks > 40


def mutant_bits_before_bytes(slot: Slot, start: int, data: memoryview | bytes) -> None:
    end = start + len(data)
    slot.low, slot.high = min(slot.low, start), max(slot.high, end)
    slot.filled += end - start - slot.bits.count(1, start, end)
    slot.bits[start:end] = True
    slot.data[start:end] = data


def mutant_cleared_when_used_again(these: Clusters, cluster: int) -> Slot:
    slot = _take(these, cluster)
    slot.bits.setall(False)
    return slot


def mutant_not_cleared(these: Clusters, slot: Slot) -> None:
    these._body[clusters._PAGE + slot.number * clusters._SLOT.size] = clusters._FREE
    these._free.append(slot.number)


_take = Clusters._take


@pytest.mark.logs("a write-out failed")
@pytest.mark.parametrize(
    "patches",
    [
        [(Slot, "put", mutant_bits_before_bytes)],
        [(Clusters, "_give_back", mutant_not_cleared), (Clusters, "_take", mutant_cleared_when_used_again)],
    ],
    ids=["bits-before-bytes", "cleared-when-used-again"],
)
async def test_a_step_in_the_wrong_order_is_noticed(patches: list[tuple[type, str, Callable[..., Any]]]) -> None:
    with contextlib.ExitStack() as stack:
        for owner, name, instead in patches:
            stack.enter_context(mock.patch.object(owner, name, instead))
        assert (await watch_all_steps()).problems


# ---- a successor


@pytest.mark.logs("a write-out failed")
async def test_a_successor_has_every_acknowledged_byte_and_writes_it_out() -> None:
    model = Model(pattern(SIZE))
    async with opened(new_body(), pattern(SIZE)) as disk:
        for step in STEPS:
            await perform_step(disk, step)
            if not isinstance(step, str):
                model.apply(step)
            async with opened(bytearray(disk.body), disk.store()) as successor:
                assert_same(await read_all(successor.top), model.content, 0)
                await wait_all_tasks_blocked()
                assert_same(successor.store(), model.content, 0)
                assert successor.layer.clusters.free == SLOTS


@pytest.mark.logs("stopped by force")
async def test_a_forced_stop_does_not_wait_for_what_hangs_says_so_and_leaves_it_in_the_memory(
    caplog: pytest.LogCaptureFixture,
) -> None:
    body = new_body()
    held = trio.Event()
    with trio.fail_after(5):
        async with opened(body, pattern(SIZE)) as disk:
            await perform_step(disk, Write(100, patterns(1, 1000)))
            disk.hang(held)
            disk.forced_stop.set()
    assert "stopped by force, 1536 bytes are not written" in caplog.text  # with what completes the sectors
    async with opened(body, pattern(SIZE)) as successor:
        await wait_all_tasks_blocked()
        assert successor.store()[100:1100] == patterns(1, 1000)


async def test_a_successor_of_one_that_was_killed_in_a_write_out_and_the_append_to_it() -> None:
    model = Model(pattern(SIZE))
    async with opened(new_body(), pattern(SIZE)) as disk:
        these = disk.layer.clusters
        for op in (Write(100, patterns(1, 5000)), Write(2000, patterns(2, 5000))):
            await perform_step(disk, op)
            model.apply(op)
            if op.offset == 100:
                assert these.freeze(0) is not None
        left = bytearray(disk.body)
        these.thaw(these.frozen[0])
    async with opened(left, pattern(SIZE)) as successor:
        await wait_all_tasks_blocked()
        assert_same(successor.store(), model.content, 0)
        assert successor.layer.statistics().values["writes_out"] == 1


async def test_memory_of_another_configuration_is_taken_over_as_it_is() -> None:
    body = bytearray(clusters.body_size(2 * CLUSTER, 7))
    these = Clusters(memoryview(body), SIZE, 2 * CLUSTER, 7)
    these.put(CLUSTER - 10, patterns(1, 100))
    async with opened(body, pattern(SIZE)) as successor:
        assert successor.layer.clusters.cluster_size == 2 * CLUSTER
        await successor.top.flush()
        assert successor.store()[CLUSTER - 10 : CLUSTER + 90] == patterns(1, 100)


@pytest.mark.parametrize(("at", "byte"), [(4096, 2), (4096 + 16, 255), (0, 7), (1, 0x10), (15, 1)])
def test_memory_that_cannot_be_is_refused(at: int, byte: int) -> None:
    body = new_body()
    Clusters(memoryview(body), SIZE, CLUSTER, SLOTS).put(0, b"x")  # into the first slot
    body[at] = byte
    with pytest.raises(FormatError):
        Clusters(memoryview(body), SIZE, CLUSTER, SLOTS)
