"""The cache against the model: any operations with eviction, faults, reopening and kills, in order and at the same time."""

from __future__ import annotations

import errno
import random
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.testing.caches import CacheBench, Opened, disk_bytes
from cachefs.testing.gate import open_in_random_order
from cachefs.testing.model import Model, Op, Read, check_all, run_one, run_overlapping
from cachefs.testing.rules import Rule
from cachefs.testing.strategies import changes, operations, patterns, ranges

BLOCK = 4096
SIZE = 60 * BLOCK + 1000
SMALL = 5 * BLOCK + 1000  # so that requests meet
CONTENT = patterns(3, 20 * BLOCK) + bytes(20 * BLOCK) + patterns(9, 20 * BLOCK + 1000)
TINY_QUOTA = 160 << 10  # some 15 blocks
SCRATCH = "/dev/shm"


@dataclass(frozen=True)
class Fault:
    """From now on each call of this kind to the pool's files fails; "" ends it."""

    op: str


REOPEN, KILL, SYNC, SETTLE = "reopen", "kill", "sync", "settle"
steps_of_pools = st.one_of(
    st.sampled_from([REOPEN, KILL, SYNC, SETTLE, SETTLE]),
    st.sampled_from(["", "", "read", "write", "punch", "sync", "map-write", "extents"]).map(Fault),
)
reads = st.builds(lambda at: Read(*at), ranges(SIZE, BLOCK))
benches = st.fixed_dictionaries(
    {
        "quota": st.sampled_from([TINY_QUOTA, TINY_QUOTA, 64 << 20]),
        "evict": st.sampled_from(["sieve", "sieve", "never"]),
        "slow": st.booleans(),
    }
)


def check(opened: Opened, bench: CacheBench) -> None:
    assert disk_bytes(bench.pool_path) <= opened.pool.account.used <= bench.quota
    opened.pool.policy.check()


async def run(bench: CacheBench, model: Model, steps: list[Op | str | Fault]) -> None:
    kills = 0
    async with AsyncExitStack() as opened:
        now = await opened.enter_async_context(bench.open())
        for step in steps:
            if isinstance(step, Fault):
                bench.gate.faults[:] = [(Rule(step.op, once=False), OSError(errno.EIO, ""))] if step.op else []
            elif step == SETTLE:
                await now.settled()
            elif step == SYNC:
                await now.image.sync()
            elif isinstance(step, str):
                if step == KILL:
                    kills += 1
                    chunks, bench = bench.chunks, bench.crash(f"kill{kills}")
                    bench.chunks = chunks  # what lies below is not the pool's
                await opened.aclose()
                now = await opened.enter_async_context(bench.open())
            else:
                await run_one(now.top, step, model)
            check(now, bench)
        bench.gate.faults.clear()
        await check_all(now.top, model)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again at once."""
    monkeypatch.setattr("cachefs.pool.health.FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr("cachefs.pool.health.LONGEST_PAUSE_S", 0.0)


@pytest.mark.logs("the cache failed")
@given(benches, st.lists(st.one_of(reads, reads, reads, steps_of_pools), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
async def test_cache_gives_what_lies_below_after_anything(
    options: dict[str, object], steps: list[Op | str | Fault]
) -> None:
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir=SCRATCH) as folder:
        bench = CacheBench(Path(folder), CONTENT, block_size=BLOCK, patience_s=0.3, **options)  # type: ignore[arg-type]
        await run(bench, Model(CONTENT), steps)


@pytest.mark.logs("the cache failed")
@given(
    benches,
    st.lists(st.one_of(operations(SIZE, BLOCK), operations(SIZE, BLOCK), steps_of_pools), min_size=1, max_size=30),
)
@settings(max_examples=60, deadline=None)
async def test_cache_in_write_through_mode_agrees_with_the_model(
    options: dict[str, object], steps: list[Op | str | Fault]
) -> None:
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir=SCRATCH) as folder:
        bench = CacheBench(
            Path(folder),
            CONTENT,
            block_size=BLOCK,
            patience_s=0.3,
            mode="write-through",
            **options,  # type: ignore[arg-type]
        )
        await run(bench, Model(CONTENT), steps)


requests = st.one_of(changes(SMALL, BLOCK), st.builds(lambda at: Read(*at), ranges(SMALL, BLOCK)))
rounds = st.lists(st.lists(requests, min_size=2, max_size=7), min_size=1, max_size=4)


@given(rounds, st.integers(0, 1 << 32), st.booleans())
@settings(max_examples=80, deadline=None)
async def test_cache_requests_at_the_same_time_see_what_some_order_gives(
    rounds: list[list[Op]], seed: int, slow: bool
) -> None:
    content = patterns(3, SMALL)
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir=SCRATCH) as folder:
        bench = CacheBench(Path(folder), content, 120 << 10, BLOCK, mode="write-through", slow=slow)
        model = Model(content)
        order = random.Random(seed)
        async with bench.open() as opened:
            gates = [opened.disk.below, bench.gate]
            for ops in rounds:
                for nth in range(1, 6):
                    opened.disk.below.hold("read_into", nth=nth, after=order.random() < 0.5)
                    opened.disk.below.hold("write", nth=nth, after=order.random() < 0.5)
                    for op in ("read", "write", "punch"):
                        bench.gate.hold(op, nth=nth, after=order.random() < 0.5)
                await run_overlapping(opened.top, ops, model, lambda: open_in_random_order(gates, order))
                check(opened, bench)
            await opened.settled()
            await check_all(opened.top, model)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_cache_is_right_and_within_its_quota_over_many_operations(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two disks, four readers, each after its own dice: small reads of popular blocks, now and then a long one anywhere."""
    blocks, quota, operations_wanted = 4000, 4 << 20, 400_000
    seed = random.randrange(1 << 32)  # put the printed one here to run it again
    orders = [random.Random(seed + number) for number in range(4)]
    content = b"".join(block.to_bytes(8, "big") * (BLOCK // 8) for block in range(1, blocks + 1))
    done = [0] * 4
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cachefs-", dir=SCRATCH) as folder:
        bench = CacheBench(Path(folder), content, quota, BLOCK)
        async with bench.open(2) as opened:

            async def reader(number: int, until: int) -> None:
                top, dice = opened.disks[number % 2].top, orders[number].random
                small, long = memoryview(bytearray(8)), memoryview(bytearray(32 * BLOCK))
                while done[number] < until:
                    done[number] += 1
                    if dice() < 0.985:
                        offset, buffer = int(dice() ** 2 * 600) * BLOCK + 8, small
                    else:
                        offset, buffer = int(dice() * (blocks - 32)) * BLOCK, long
                    if not top.try_read_into(offset, buffer):
                        await top.read_into(offset, buffer)
                    assert buffer == content[offset : offset + len(buffer)]
                    if done[number] % 64 == 0:
                        await trio.lowlevel.checkpoint()

            share = operations_wanted // 4
            for until in range(share // 20, share + 1, share // 20):
                async with trio.open_nursery() as nursery:
                    for number in range(4):
                        nursery.start_soon(reader, number, until)
                check(opened, bench)
                await opened.settled()
                assert opened.pool.account.used == opened.pool._room_of(opened.image) + (32 << 10)
            evicted = opened.image.evicted_blocks
            hits = sum(disk.cache.hits for disk in opened.disks)
    with capsys.disabled():
        print(
            f"\nseed {seed}: {sum(done)} operations, {evicted} evictions, {hits / sum(done):.1%} hits, "
            f"{time.monotonic() - began:.0f} s",
            file=sys.stderr,
        )
    assert sum(done) >= operations_wanted
    assert evicted >= 40_000
