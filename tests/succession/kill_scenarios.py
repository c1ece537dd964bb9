"""What is killed at every step: `python kill_scenarios.py SCENARIO EVERY FIRST [MUTANT]`, a program because it forks.

A successor reads everything: every request that was acknowledged has happened, the one under way is done or not, per sector.
It does the one under way again, as the kernel would have it, and flushes; then the power is cut: nothing is missing.
The output: `steps N`, or what is wrong and exit code 1.
"""

from __future__ import annotations

import math
import mmap
import os
import random
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path

import trio
from killing import SharedLog, Work, run
from succession_mutants import applied

from cachefs.backends.file import File, FileConfig
from cachefs.backends.nbd import Nbd, NbdConfig
from cachefs.graph import edge
from cachefs.layers.base import Environment, Layer
from cachefs.layers.checked import Checked
from cachefs.layers.coalesce import Coalesce, CoalesceConfig
from cachefs.layers.cow import Cow, CowConfig
from cachefs.pool.summap import State
from cachefs.survivor import Survivors
from cachefs.testing.caches import CacheBench, Opened, copy_sparse, disk_bytes
from cachefs.testing.model import Flush, Op, Read, Trim, Write, Zero, perform, read_all
from cachefs.testing.nbdscript import DISCONNECT, EXPORT, FLUSH, READ, WRITE, WRITE_ZEROES, Network, Server
from cachefs.testing.stacks import Bench, Case, Stack, cow_layer
from cachefs.testing.strategies import patterns
from cachefs.testing.writelog import (
    Began,
    Ended,
    Promises,
    Replay,
    WriteLog,
    at_random,
    everything,
    materialise,
    nothing,
    only,
)

BLOCK = 4096
SIZE = 6 * BLOCK + 1000


# ---- what every scenario does


async def request(top: Layer, op: Op, log: WriteLog) -> None:
    began = log.note(Began(op))
    if isinstance(op, Flush):
        await top.flush()
    else:
        await perform(top, op)
    log.note(Ended(began))


async def look(top: Layer, log: WriteLog, content: bytes) -> Promises:
    """As a successor, of a disk that was *content* at first; what is promised of a power cut from here on."""
    ended = {entry.began for entry in log.entries if isinstance(entry, Ended)}
    under_way = [entry.op for at, entry in enumerate(log.entries) if isinstance(entry, Began) and at not in ended]
    as_if_flushed = [*log.entries, Began(Flush())]
    as_if_flushed.append(Ended(len(as_if_flushed) - 1))
    found = await read_all(top)
    Promises(content, as_if_flushed).check(found, len(as_if_flushed) - 1)
    for op in under_way:
        await request(top, op, log)
    await request(top, Flush(), log)
    return Promises(content, log.entries)


Look = Callable[[Path], Awaitable[bytes]]
"""What the disk reads as when it is opened over files below a folder."""


async def cut_power(log: SharedLog, folder: Path, promises: Promises, look_at: Look) -> None:
    replay, at = Replay(log), len(log.entries) - 1
    replay.advance(at)
    for number, keep in enumerate((nothing, everything, only("data"), only("map"), at_random(random.Random(1)))):
        copy = folder.with_name(f"{folder.name}-cut-{number}")
        copy.mkdir()
        materialise(replay.files(keep), copy / log.folder.relative_to(folder))
        promises.check(await look_at(copy), at)
        shutil.rmtree(copy)


# ---- overlays

OVERLAY: tuple[Op, ...] = (
    Write(0, patterns(1, 2 * BLOCK)),  # absent to data, on the loop
    Write(2 * BLOCK + 100, patterns(2, 500)),  # a part of an absent block
    Trim(BLOCK, BLOCK),  # data to zero
    Flush(),
    Write(BLOCK + 512, patterns(3, 1024)),  # a part of a zero block
    Trim(0, 3 * BLOCK),
    Write(0, patterns(4, BLOCK)),
    Flush(),
    Write(5 * BLOCK, patterns(5, BLOCK + 1000)),  # the last block, which is short
    Write(0, patterns(6, 3 * BLOCK)),  # data again, and zero to data
)


async def overlay(folder: Path, survivors: Survivors, log: SharedLog, is_successor: bool) -> None:
    case = Case("cow", SIZE, cow_layer())

    async def look_at(copy: Path) -> bytes:
        async with Bench(case, copy).open() as stack:
            return await read_all(stack.top)

    bench = Bench(case, folder, survivors=survivors)
    with log.recording():
        async with bench.open() as stack:
            if is_successor:
                await cut_power(log, folder, await look(stack.top, log, bench.content), look_at)
                return
            await write_overlay(stack, log)


async def write_overlay(stack: Stack, log: SharedLog) -> None:
    for op in OVERLAY:
        await request(stack.top, op, log)
    assert stack.cow is not None
    await stack.cow.store.wait_punched()
    os._exit(0)


async def ephemeral(folder: Path, survivors: Survivors, log: SharedLog, is_successor: bool) -> None:
    """It makes no promise for a power cut, and the same one for the death of the daemon."""
    bench = Bench(Case("cow", SIZE, cow_layer(ephemeral=True)), folder, survivors=survivors)
    with log.recording():
        async with bench.open() as stack:
            if is_successor:
                await look(stack.top, log, bench.content)
            else:
                await write_overlay(stack, log)


# ---- an overlay over a cache that evicts

LARGE = 32 << 10
IMAGE = patterns(7, 24 * LARGE)
STACKED: tuple[Op, ...] = (
    Read(0, 4 * LARGE),
    Write(LARGE + 100, patterns(1, 3 * BLOCK)),  # parts of absent blocks, which are read from the cache
    *(Read(at * LARGE, LARGE) for at in range(4, 20, 2)),
    Trim(0, 2 * BLOCK),
    Flush(),
    *(Read(at * LARGE, LARGE) for at in (21, 1, 3)),
    Write(9 * LARGE, patterns(2, BLOCK)),
)


@asynccontextmanager
async def open_stacked(folder: Path, survivors: Survivors) -> AsyncIterator[tuple[Layer, Cow, Opened]]:
    """The disk, its overlay and its cache; the quota is right for some ten blocks."""
    bench = CacheBench(folder, IMAGE, quota=512 << 10, block_size=LARGE, survivors=survivors)
    async with bench.open() as opened:
        check_room(bench, opened)
        async with Cow.open(CowConfig(), opened.top, Environment("vm", folder / "state", survivors=survivors)) as cow:
            yield edge(cow), cow, opened
        check_room(bench, opened)


async def stacked(folder: Path, survivors: Survivors, log: SharedLog, is_successor: bool) -> None:
    async def look_at(copy: Path) -> bytes:
        copy_sparse(folder / "pool", copy / "pool")
        async with open_stacked(copy, Survivors()) as (top, _, _):
            return await read_all(top)

    with log.recording():
        async with open_stacked(folder, survivors) as (top, cow, opened):
            if is_successor:
                check_nothing_is_being_evicted(opened)
                await cut_power(log, folder, await look(top, log, IMAGE), look_at)
                return
            for op in STACKED:
                await request(top, op, log)
                await opened.settled()
            await cow.store.wait_punched()
            await opened.image.sync()
            assert opened.image.evicted_blocks > 2
            os._exit(0)


# ---- pools

BLOCKS = 180
POOLED = patterns(7, BLOCKS * BLOCK)


async def pool(folder: Path, survivors: Survivors, log: SharedLog, is_successor: bool) -> None:
    """Installs, evictions and syncs; afterwards every byte is right and the pool, of some 100 blocks, within its quota."""
    bench = CacheBench(folder, POOLED, quota=512 << 10, survivors=survivors)
    async with bench.open() as opened:
        if is_successor:
            check_nothing_is_being_evicted(opened)
        check_room(bench, opened)
        for start in (0, BLOCKS // 2, BLOCKS // 4):
            for block in range(start, start + BLOCKS // 2):
                got = await perform(opened.top, Read(block * BLOCK, BLOCK))
                assert got == POOLED[block * BLOCK : (block + 1) * BLOCK], f"block {block} is wrong"
            await opened.settled()
            check_room(bench, opened)
        await opened.image.sync()
        if not is_successor:
            assert opened.image.evicted_blocks > 10
            os._exit(0)


def check_nothing_is_being_evicted(opened: Opened) -> None:
    image = opened.image
    evicting = [block for block in range(image.count) if image.map.state(block) is State.EVICTING]
    assert not evicting, f"blocks {evicting} are still being evicted"


def check_room(bench: CacheBench, opened: Opened) -> None:
    account = opened.pool.account
    held = disk_bytes(bench.pool_path)
    assert held <= account.used <= account.limit, (
        f"{held} bytes on disk, counted {account.used}, may be {account.limit}"
    )


# ---- a coalescer over a file

CLUSTER = 64 << 10
FILE_SIZE = 2 * CLUSTER + 3000
GATHER = CoalesceConfig.model_validate({"cluster": CLUSTER, "buffer": "400KiB", "max_delay": "1h"})
GATHERED: tuple[Op, ...] = (
    Write(100, patterns(1, 1000)),
    Flush(),  # of a change over gathered parts of a sector a kill may leave a part, until it is sent again
    Write(CLUSTER - 512, patterns(2, 1536)),
    Write(1536, patterns(3, 2048)),
    Trim(512, 2048),
    Flush(),
    Write(2 * CLUSTER + 2560, patterns(4, 440)),
    Write(2 * CLUSTER + 1024, patterns(5, 1536)),
    Trim(2 * CLUSTER, 3000),
    Write(0, patterns(6, CLUSTER)),  # written out at once
    Write(512, patterns(7, 512)),
    Flush(),
    Write(1024, patterns(8, 1024)),
)


async def gathered(folder: Path, survivors: Survivors, log: SharedLog, is_successor: bool) -> None:
    image, content = log.folder / "disk.raw", patterns(9, FILE_SIZE)
    if not image.exists():
        image.parent.mkdir(parents=True)
        image.write_bytes(content)

    async def look_at(copy: Path) -> bytes:
        left = copy / image.relative_to(folder)  # the file is the disk
        return left.read_bytes() if left.exists() else content

    env = Environment("vm", folder / "memory", survivors=survivors)
    with log.recording():
        async with (
            File.open(FileConfig(path=image), env) as file,
            Coalesce.open(GATHER, Checked(file), env) as layer,
        ):
            top = Checked(layer)
            if is_successor:
                await cut_power(log, folder, await look(top, log, content), look_at)
                return
            for op in GATHERED:
                await request(top, op, log)
            os._exit(0)


# ---- an export of an NBD server

REMOTE: tuple[Op, ...] = (
    Write(0, patterns(1, 2048)),
    Write(1024, patterns(2, 2048)),
    Trim(512, 1024),
    Flush(),
    Write(8192, patterns(3, 512)),
    Zero(8192, 4096),
    Write(9216, patterns(4, 1024)),
    Write(9216, patterns(5, 1024)),
    Flush(),
    Write(0, patterns(6, 3072)),
    Trim(1024, 512),
)


class RemoteStore:
    """A server in the daemon's own process; what it holds outlives that. volatile: as in a page cache."""

    def __init__(self, folder: Path, log: SharedLog) -> None:
        self._log = log
        folder.mkdir(exist_ok=True)
        self.volatile, self.durable = (_shared(folder / name, EXPORT.size) for name in ("volatile", "durable"))

    def crash(self) -> None:
        self.volatile[:] = self.durable

    async def serve(self, network: Network) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                nursery.start_soon(self._serve, await network.accept(limit_s=math.inf))

    async def _serve(self, server: Server) -> None:
        while (heard := await server.hear(limit_s=math.inf)).command != DISCONNECT:
            end = heard.offset + heard.length
            if heard.command == WRITE:
                self.volatile[heard.offset : end] = heard.data
            elif heard.command == WRITE_ZEROES:
                self.volatile[heard.offset : end] = bytes(heard.length)
            elif heard.command == FLUSH:
                self.durable[:] = self.volatile
            self._log.step()
            await server.answer(heard, bytes(self.volatile[heard.offset : end]) if heard.command == READ else b"")


def _shared(path: Path, size: int) -> memoryview:
    with path.open("a+b") as file:
        file.truncate(size)
        return memoryview(mmap.mmap(file.fileno(), size))


async def remote(
    folder: Path, survivors: Survivors, log: SharedLog, is_successor: bool, *, is_lost: bool = False
) -> None:
    """is_lost: the server dies with the daemon, and loses what it was not asked to flush."""
    store, network = RemoteStore(folder, log), Network()
    if is_successor and is_lost:
        store.crash()
    config = NbdConfig.model_validate({"uri": "nbd://store/disk", "fence": 0, "unflushed": "4MiB"})
    env = Environment("vm", folder / "state", survivors=survivors)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.serve, network)
        async with Nbd.open(config, env, network.dial) as disk:
            top = Checked(disk)
            if is_successor:
                promises = await look(top, log, bytes(EXPORT.size))
                promises.check(bytes(store.durable), len(log.entries) - 1)
            else:
                for op in REMOTE:
                    await request(top, op, log)
                os._exit(0)
        nursery.cancel_scope.cancel()


SCENARIOS: dict[str, Work] = {
    "overlay": overlay,
    "ephemeral": ephemeral,
    "stacked": stacked,
    "pool": pool,
    "gathered": gathered,
    "remote": remote,
    "remote-lost": partial(remote, is_lost=True),
}


def main(arguments: Sequence[str]) -> None:
    name, every, first, *mutant = arguments
    with applied(mutant[0]) if mutant else nullcontext():
        try:
            print("steps", run(SCENARIOS[name], int(every), int(first)))
        except AssertionError as exc:
            print(exc)
            sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
