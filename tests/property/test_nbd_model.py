"""The nbd backend over a server that loses what it was not asked to flush, and a network that delivers late.

A simulated server: each request takes a while; a *reset* cuts one connection, whose requests are then lost or carried out late,
but within the fence; a *crash* cuts all of them and takes back what no flush has made durable. Writers own their blocks:
each writes, trims, flushes and reads back, is cancelled at times, and knows what its blocks may hold. Time is simulated.

The mutants are the ways in which such a client loses data. Each must be found by the same search.
"""

from __future__ import annotations

import errno
import random
import struct
import tempfile
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from cachefs.backends.nbd import Nbd
from cachefs.backends.nbdoptions import NbdConfig
from cachefs.errors import BackendError
from cachefs.layers.base import Environment
from cachefs.nbd.handshake import Export, Flag
from cachefs.nbd.protocol import Request
from cachefs.nbd.recovery import Recovery
from cachefs.nbd.transport import Transport
from cachefs.nbd.unflushed import Change, Ranges
from cachefs.testing.nbdscript import (
    DISCONNECT,
    EXPORT,
    FLAGS,
    FLUSH,
    READ,
    WRITE,
    WRITE_ZEROES,
    Heard,
    Network,
    Server,
    answer,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.logs("connection lost", "are to be sent again", "not done within", "the last flush", "flush: "),
]

BLOCK = 512
BLOCKS_PER_WRITER, WRITERS = 3, 4
SIZE = 64 << 10
FENCE_S = 5.0
GONE = (AssertionError, OSError, trio.BrokenResourceError, trio.ClosedResourceError)


@dataclass
class Store:
    """What the server holds, as a page cache does. dirty: blocks that the next flush writes."""

    volatile: bytearray = field(default_factory=lambda: bytearray(SIZE))
    durable: bytearray = field(default_factory=lambda: bytearray(SIZE))
    dirty: set[int] = field(default_factory=set)
    generation: int = 0  # of the server's process

    def carry_out(self, heard: Heard) -> bytes:
        end = heard.offset + heard.length
        if heard.command == READ:
            return bytes(self.volatile[heard.offset : end])
        if heard.command == WRITE:
            self.volatile[heard.offset : end] = heard.data
        elif heard.command == WRITE_ZEROES:
            self.volatile[heard.offset : end] = bytes(heard.length)
        self.dirty.update(range(heard.offset, end, BLOCK))
        return b""

    def flush(self, *, fails: bool) -> None:
        for at in () if fails else self.dirty:
            self.durable[at : at + BLOCK] = self.volatile[at : at + BLOCK]
        self.dirty.clear()  # also when it failed: the next flush succeeds without them

    def crash(self) -> None:
        self.volatile[:] = self.durable
        self.dirty.clear()
        self.generation += 1


class Simulation:
    """The network and its server. Everything that happens is drawn from one seed."""

    def __init__(self, seed: int, network: Network, nursery: trio.Nursery) -> None:
        self.rng = random.Random(seed)
        self.store = Store()
        self.network = network
        self.network.export = replace(EXPORT, size=SIZE, flags=FLAGS | Flag.CAN_MULTI_CONN)
        self.nursery = nursery
        self.is_over = False

    async def dial(self) -> tuple[Transport, Export]:
        made = await self.network.dial()
        self.nursery.start_soon(self._serve, await self.network.accept())
        return made

    async def _serve(self, server: Server) -> None:
        answering = trio.Lock()
        try:
            while True:
                heard = await server.hear(limit_s=float("inf"))
                if heard.command == DISCONNECT:
                    return
                self.nursery.start_soon(self._handle, server, answering, heard, self.store.generation)
        except GONE:
            return

    async def _handle(self, server: Server, answering: trio.Lock, heard: Heard, generation: int) -> None:
        await trio.sleep(self.rng.choice([0, 0, 0.001, 0.01, 0.3]))
        if server.stream.socket.fileno() < 0:  # cut off: lost, or late
            if heard.command not in (WRITE, WRITE_ZEROES) or self.rng.random() < 0.3:
                return
            await trio.sleep(self.rng.uniform(0, FENCE_S - 0.5))
        if self.store.generation != generation:
            return
        data, error = b"", 0
        if heard.command == FLUSH:
            error = errno.EIO if self.rng.random() < 0.1 else 0
            self.store.flush(fails=bool(error))
        else:
            data = self.store.carry_out(heard)
        with suppress(*GONE):
            async with answering:
                await server.say(answer(heard, data, error))

    async def make_trouble(self) -> None:
        while not self.is_over:
            await trio.sleep(self.rng.uniform(0.05, 3))
            living = [server for server in self.network.all if server.stream.socket.fileno() >= 0]
            if self.rng.random() < 0.4:
                self.store.crash()
                for server in living:
                    server.close()
            elif living:
                self.rng.choice(living).close()


class Owner:
    """Writes blocks of its own. may_hold: for each, what a read may find."""

    def __init__(self, number: int, disk: Nbd, rng: random.Random) -> None:
        self.rng = rng
        self.disk = disk
        self.first = number * BLOCKS_PER_WRITER
        self.may_hold: list[set[bytes]] = [{bytes(BLOCK)} for _ in range(BLOCKS_PER_WRITER)]
        self.count = 0

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            step = self.rng.choices([self.write, self.trim, self.read, self.flush], [6, 1, 4, 1])[0]
            await step()
            if self.rng.random() < 0.3:
                await trio.sleep(self.rng.uniform(0, 0.5))

    async def write(self) -> None:
        self.count += 1
        data = struct.pack("<HHI", self.first, self.count, self.rng.getrandbits(32)) * (BLOCK // 8)
        await self._change(self.rng.randrange(BLOCKS_PER_WRITER), data, self.disk.write)

    async def trim(self) -> None:
        await self._change(self.rng.randrange(BLOCKS_PER_WRITER), bytes(BLOCK), None)

    async def _change(self, block: int, data: bytes, write: Callable[..., Any] | None) -> None:
        offset = (self.first + block) * BLOCK
        before = set(self.may_hold[block])
        self.may_hold[block] = before | {data}
        limit = self.rng.choice([float("inf"), float("inf"), 0.02, 1.0])
        with trio.move_on_after(limit) as scope:
            try:
                if write is None:
                    await self.disk.trim(offset, BLOCK)
                else:
                    await write(offset, memoryview(data))
            except BackendError:
                return
        if not scope.cancelled_caught:
            self.may_hold[block] = {data}

    async def read(self) -> None:
        block = self.rng.randrange(BLOCKS_PER_WRITER)
        found = bytearray(BLOCK)
        try:
            await self.disk.read_into((self.first + block) * BLOCK, memoryview(found))
        except BackendError:
            return
        assert bytes(found) in self.may_hold[block], "a read found what was replaced"

    async def flush(self) -> None:
        await flushed(self.disk)


async def flushed(disk: Nbd) -> bool:
    try:
        await disk.flush()
    except BackendError:
        return False
    return True


async def run_once(seed: int, policy: str) -> None:
    """Raises: AssertionError when something acknowledged is lost, TooSlowError when something hangs."""
    network = Network()
    with closing(network), tempfile.TemporaryDirectory() as folder:
        await run_over(network, Path(folder), seed, policy)


async def run_over(network: Network, folder: Path, seed: int, policy: str) -> None:
    async with trio.open_nursery() as nursery:
        simulation = Simulation(seed, network, nursery)
        config = NbdConfig.model_validate(
            {
                "uri": "nbd://store/disk",
                "connections": 3,
                "fence": f"{FENCE_S:.0f}s",
                "timeout": "2s",
                "on_failure": policy,
            }
        )
        async with Nbd.open(config, Environment("disk", folder), simulation.dial) as disk:
            owners = [Owner(number, disk, random.Random(f"{seed} {number}")) for number in range(WRITERS)]
            with trio.fail_after(3600):
                async with trio.open_nursery() as troubles:
                    troubles.start_soon(simulation.make_trouble)
                    async with trio.open_nursery() as working:
                        for owner in owners:
                            working.start_soon(owner.run, 25)
                    simulation.is_over = True
                while not await flushed(disk):
                    pass
            simulation.store.crash()
            for owner in owners:
                for block, allowed in enumerate(owner.may_hold):
                    at = (owner.first + block) * BLOCK
                    assert bytes(simulation.store.volatile[at : at + BLOCK]) in allowed, (
                        "an acknowledged change is lost"
                    )
        nursery.cancel_scope.cancel()


def run_seed(seed: int, policy: str) -> None:
    trio.run(run_once, seed, policy, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("policy", ["hold", "error"])
def test_nothing_acknowledged_is_lost(policy: str) -> None:
    first = random.randrange(1 << 30)
    for seed in range(first, first + 40):
        print("seed", seed)
        run_seed(seed, policy)


# ---- mutants


async def no_fence(backend: Nbd, lost_at: float) -> None:
    await trio.lowlevel.checkpoint()


async def send_only_what_nobody_answered(recovery: Recovery) -> None:
    recovery._due = [change for change in recovery._due if not change.is_answered]
    await RESEND(recovery)


def forget_copies(recovery: Recovery, request: Request) -> None:
    CHECK(recovery, request)
    if isinstance(request.token, Change):
        recovery._in_flight.discard(request.token)


def forget_failed_flushes(recovery: Recovery, reason: str) -> None:
    if reason != "a flush failed":
        BEGIN(recovery, reason)


RESEND, CHECK, BEGIN = Recovery._resend, Recovery.check, Recovery._begin

MUTANTS: dict[str, tuple[type, str, Any]] = {
    "no fence": (Nbd, "_fence", no_fence),
    "nothing is barred": (Ranges, "overlap", lambda *_: False),
    "acknowledged changes are not sent again": (Recovery, "_resend", send_only_what_nobody_answered),
    "a second copy on its way needs no fence": (Recovery, "check", forget_copies),
    "a failed flush is forgotten": (Recovery, "_begin", forget_failed_flushes),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_found(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, replacement = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, replacement, raising=False)
    assert any(finds_a_loss(seed) for seed in range(400)), "400 runs have not shown it"


def finds_a_loss(seed: int) -> bool:
    try:
        run_seed(seed, "hold")
    except BaseExceptionGroup as group:
        if group.subgroup(AssertionError) is None:
            raise
        print("found with seed", seed)
        return True
    return False
