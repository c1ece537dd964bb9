"""The nbd backend over a server that loses what it was not asked to flush, and a network that delivers late.

A simulated server: each request takes a while; a *reset* cuts one connection, whose requests are then lost or carried out late,
but within the fence; a *crash* cuts all of them and takes back what no flush has made durable. At times the first change that
is sent again after either meets another reset. Writers own their blocks: each writes, trims, flushes and reads back, is
cancelled at times, and knows what its blocks may hold. Time is simulated.

The mutants are the ways in which such a client loses data. Each must be found by the scenario that was written for it, where
nothing is left to chance, and by the search that the unchanged client has to withstand: else the search says nothing.
"""

from __future__ import annotations

import errno
import random
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

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

pytestmark = pytest.mark.logs("connection lost", "are to be sent again", "not done within", "the last flush", "flush: ")

BLOCK = 512
BLOCKS_PER_WRITER, WRITERS = 3, 4
SIZE = 64 << 10
FENCE_S = 5.0
GONE = (AssertionError, OSError, trio.BrokenResourceError, trio.ClosedResourceError)


class Lost(AssertionError):
    """The disk does not hold what it must."""


def must(holds: bool, promise_broken: str) -> None:
    if not holds:
        raise Lost(promise_broken)


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
    """The network and its server. What happens is drawn from one seed; the order of tasks, and the client's pauses, are not.

    cuts_next_copy: the next write that was heard before meets a reset.
    """

    def __init__(self, seed: int, network: Network, nursery: trio.Nursery) -> None:
        self.rng = random.Random(seed)
        self.store = Store()
        self.network = network
        self.network.export = replace(EXPORT, size=SIZE, flags=FLAGS | Flag.CAN_MULTI_CONN)
        self.nursery = nursery
        self.is_over = False
        self.cuts_next_copy = False
        self._written: set[bytes] = set()  # the data of every write is another

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
                if self.cuts_next_copy and heard.data in self._written:
                    self.cuts_next_copy = False
                    server.close()
                if heard.command == WRITE:
                    self._written.add(heard.data)
                self.nursery.start_soon(self._handle, server, answering, heard, self.store.generation)
        except GONE:
            return

    async def _handle(self, server: Server, answering: trio.Lock, heard: Heard, generation: int) -> None:
        await trio.sleep(self.rng.choice([0, 0, 0.001, 0.01, 0.3]))
        if not is_open(server):  # cut off: lost, or late
            if heard.command not in (WRITE, WRITE_ZEROES) or self.rng.random() < 0.3:
                return
            await trio.sleep(self.rng.uniform(0, FENCE_S - 0.5))
        flush_fails = heard.command == FLUSH and self.rng.random() < 0.1
        await self._carry_out(server, answering, heard, generation, flush_fails=flush_fails)

    async def _carry_out(
        self, server: Server, answering: trio.Lock, heard: Heard, generation: int, *, flush_fails: bool
    ) -> None:
        if self.store.generation != generation:
            return
        data, error = b"", 0
        if heard.command == FLUSH:
            error = errno.EIO if flush_fails else 0
            self.store.flush(fails=flush_fails)
        else:
            data = self.store.carry_out(heard)
        with suppress(*GONE):
            async with answering:
                await server.say(answer(heard, data, error))

    async def make_trouble(self) -> None:
        while not self.is_over:
            await trio.sleep(self.rng.uniform(0.05, 3))
            self.cuts_next_copy = self.rng.random() < 0.5
            if self.rng.random() < 0.4:
                self.crash()
            elif living := self._living():
                self.rng.choice(living).close()

    def crash(self) -> None:
        self.store.crash()
        for server in self._living():
            server.close()

    def _living(self) -> list[Server]:
        return [server for server in self.network.all if is_open(server)]


def is_open(server: Server) -> bool:
    return server.stream.socket.fileno() >= 0


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
        must(bytes(found) in self.may_hold[block], "a read found what was replaced")

    async def flush(self) -> None:
        await flushed(self.disk)


async def flushed(disk: Nbd) -> bool:
    try:
        await disk.flush()
    except BackendError:
        return False
    return True


Simulated = TypeVar("Simulated", bound=Simulation)


@asynccontextmanager
async def opened(
    make: Callable[[Network, trio.Nursery], Simulated], policy: str = "hold"
) -> AsyncIterator[tuple[Nbd, Simulated]]:
    network = Network()
    config = NbdConfig.model_validate(
        {
            "uri": "nbd://store/disk",
            "connections": 3,
            "fence": f"{FENCE_S:.0f}s",
            "timeout": "2s",
            "on_failure": policy,
        }
    )
    with closing(network), tempfile.TemporaryDirectory() as folder:
        async with trio.open_nursery() as nursery:
            simulation = make(network, nursery)
            async with Nbd.open(config, Environment("disk", Path(folder)), simulation.dial) as disk:
                yield disk, simulation
            nursery.cancel_scope.cancel()


async def run_once(seed: int, policy: str) -> None:
    """Raises: Lost when something acknowledged is, TooSlowError when something hangs."""
    async with opened(partial(Simulation, seed), policy) as (disk, simulation):
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
        simulation.store.crash()  # before the disk is closed, which flushes
        for owner in owners:
            for block, allowed in enumerate(owner.may_hold):
                at = (owner.first + block) * BLOCK
                must(bytes(simulation.store.volatile[at : at + BLOCK]) in allowed, "an acknowledged change is lost")


def run(operation: Callable[..., Awaitable[None]], *arguments: Any) -> None:
    trio.run(operation, *arguments, clock=MockClock(autojump_threshold=0))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["hold", "error"])
def test_nothing_acknowledged_is_lost(policy: str) -> None:
    first = random.randrange(1 << 30)
    for seed in range(first, first + 40):
        print("seed", seed)
        run(run_once, seed, policy)


# ---- scenarios: in each, the first block holds NEW at last

LATE_S = FENCE_S - 1
OLD, NEW = memoryview(b"old " * (BLOCK // 4)), memoryview(b"new " * (BLOCK // 4))


class Scripted(Simulation):
    """Nothing is drawn: requests are carried out at once, those whose connection is cut LATE_S later."""

    def __init__(self, network: Network, nursery: trio.Nursery) -> None:
        super().__init__(0, network, nursery)
        self.cuts_next_write = False
        self.fails_next_flush = False
        self._cut = trio.Event()

    async def wait_until_cut(self) -> None:
        """A write was, and the client knows."""
        await self._cut.wait()
        await wait_all_tasks_blocked()

    async def _handle(self, server: Server, answering: trio.Lock, heard: Heard, generation: int) -> None:
        if heard.command == WRITE and self.cuts_next_write:
            self.cuts_next_write = False
            server.close()
            self._cut.set()
        if not is_open(server):
            await trio.sleep(LATE_S)
        flush_fails = heard.command == FLUSH and self.fails_next_flush
        self.fails_next_flush &= not flush_fails
        await self._carry_out(server, answering, heard, generation, flush_fails=flush_fails)


async def first_copy_is_late(disk: Nbd, simulation: Scripted) -> None:
    simulation.cuts_next_write = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.write, 0, OLD)
        await simulation.wait_until_cut()
        await disk.write(0, NEW)
    await trio.sleep(FENCE_S)


async def second_copy_is_late(disk: Nbd, simulation: Scripted) -> None:
    """The first was answered: nothing was under way when its server fell, so the second is sent without a fence."""
    await disk.write(0, OLD)
    simulation.cuts_next_write = True
    simulation.crash()
    await simulation.wait_until_cut()
    await disk.write(0, NEW)
    await trio.sleep(FENCE_S)


async def read_before_it_is_sent_again(disk: Nbd, simulation: Scripted) -> None:
    await disk.write(0, NEW)
    simulation.cuts_next_write = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.write, BLOCK, OLD)  # for the fence, during which the server is without NEW
        await simulation.wait_until_cut()
        simulation.crash()
        await read_new(disk)


async def server_falls(disk: Nbd, simulation: Scripted) -> None:
    await disk.write(0, NEW)
    simulation.crash()
    await wait_all_tasks_blocked()


async def flush_that_fails(disk: Nbd, simulation: Scripted) -> None:
    await disk.write(0, NEW)
    simulation.fails_next_flush = True
    assert not await flushed(disk)


async def read_new(disk: Nbd) -> None:
    found = bytearray(BLOCK)
    await disk.read_into(0, memoryview(found))
    must(found == NEW, "a read found what was replaced")


Scenario = Callable[[Nbd, Scripted], Awaitable[None]]


async def run_scenario(scenario: Scenario) -> None:
    """Raises: Lost."""
    async with opened(Scripted) as (disk, simulation):
        with trio.fail_after(60):
            await scenario(disk, simulation)
            await disk.flush()
            await read_new(disk)
        simulation.store.crash()  # before the disk is closed, which flushes
        must(simulation.store.volatile[:BLOCK] == NEW, "an acknowledged change is lost")


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

FOUND_BY: dict[str, Scenario] = {
    "no fence": first_copy_is_late,
    "nothing is barred": read_before_it_is_sent_again,
    "acknowledged changes are not sent again": server_falls,
    "a second copy on its way needs no fence": second_copy_is_late,
    "a failed flush is forgotten": flush_that_fails,
}


@pytest.fixture
def mutant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    owner, name, replacement = MUTANTS[request.param]
    monkeypatch.setattr(owner, name, replacement, raising=False)
    return str(request.param)


@pytest.mark.parametrize("scenario", FOUND_BY.values(), ids=lambda scenario: scenario.__name__)
def test_nothing_is_lost_in(scenario: Scenario) -> None:
    run(run_scenario, scenario)


@pytest.mark.parametrize("mutant", MUTANTS, indirect=True)
def test_a_scenario_finds_mutant(mutant: str) -> None:
    assert finds_a_loss(run_scenario, FOUND_BY[mutant])


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, indirect=True)
def test_mutant_is_found(mutant: str) -> None:
    for seed in range(400):
        if finds_a_loss(run_once, seed, "hold"):
            print("found with seed", seed)
            return
    pytest.fail("400 runs have not shown it")


def finds_a_loss(operation: Callable[..., Awaitable[None]], *arguments: Any) -> bool:
    """Any other failure is raised."""
    found = False
    try:
        run(operation, *arguments)
    except* Lost:
        found = True
    return found
