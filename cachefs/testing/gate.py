"""Operations that wait until the test lets them go on: races are scripted, not slept for.

    held = gate.hold("read_into", start=0, end=4096)      # the next read of these bytes from the layer below
    nursery.start_soon(disk.write, 512, data)
    await held.wait_until_held()                          # it is there, nothing has been done yet
    ...
    held.open()

`Gate` is a layer; put it above the child whose operations are to be held. `FileGate` does the same for the calls that a
`LocalFile` makes in threads: these are held inside their thread, where a cancellation does not reach them. `PoolGate` is
that for the files of a pool's images, whose calls are made by threads that do more than one of them.

While a rule waits for its call, the fast path over the same bytes is refused, so that the call comes at all.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.extent import Extent
from cachefs.layers.base import Done, Later, Layer
from cachefs.store.localfile import PUNCH_HOLE, LocalFile, fallocate
from cachefs.store.rounds import FlushRounds
from cachefs.testing.rules import EVERYWHERE, Rule
from cachefs.testing.wrapper import Wrapper

T = TypeVar("T")

THREAD_DEADLINE_S = 20.0  # a thread that nobody let go would keep the test from ending


class Held:
    """One hold. *after*: held when the work is done and not yet reported, instead of before it."""

    def __init__(self, rule: Rule, after: bool = False) -> None:
        self.rule = rule
        self.after = after
        self._arrived = trio.Event()
        self._opened = trio.Event()
        self._opened_for_threads = threading.Event()
        self._token = trio.lowlevel.current_trio_token()

    @property
    def is_held(self) -> bool:
        return self._arrived.is_set() and not self._opened.is_set()

    async def wait_until_held(self) -> None:
        await self._arrived.wait()

    def open(self) -> None:
        """Let the held call go on, and every later one."""
        self._opened.set()
        self._opened_for_threads.set()

    async def _pass(self) -> None:
        self._arrived.set()
        await self._opened.wait()

    def _pass_in_thread(self) -> None:
        trio.from_thread.run_sync(self._arrived.set, trio_token=self._token)
        if not self._opened_for_threads.wait(THREAD_DEADLINE_S):
            raise TimeoutError(f"nobody opened the hold of {self.rule.op}")


class _Holds:
    def __init__(self) -> None:
        self.holds: list[Held] = []

    def hold(
        self,
        op: str,
        *,
        nth: int = 1,
        start: int = 0,
        end: int = EVERYWHERE,
        once: bool = True,
        after: bool = False,
    ) -> Held:
        """Hold the *nth* call of *op* that touches bytes *start* to *end*; `once=False`: that one and all later."""
        held = Held(Rule(op, nth, start, end, once), after)
        self.holds.append(held)
        return held

    def open_all(self) -> None:
        """Let everything go on, and hold nothing any more."""
        for held in self.holds:
            held.open()
        self.holds.clear()

    def _bars_fast_path(self, op: str, offset: int, length: int) -> bool:
        return any(not held.rule.spent and held.rule.concerns(op, offset, length) for held in self.holds)

    def _find(self, op: str, offset: int, length: int) -> Held | None:
        found = None
        for held in self.holds:
            if held.rule.matches(op, offset, length) and found is None:
                found = held
        return found


async def open_in_random_order(gates: Sequence[_Holds], order: random.Random) -> None:
    """Whenever nothing else can go on, let one held operation go, whichever *order* says.

    Runs until it is cancelled, and takes all holds of *gates* away then.
    """
    try:
        while True:
            await wait_all_tasks_blocked(0.0005)  # real seconds: time for a thread that is not held to come back
            waiting = [held for gate in gates for held in gate.holds if held.is_held]
            if waiting:
                order.choice(waiting).open()
    finally:
        for gate in gates:
            gate.open_all()


class Gate(_Holds, Wrapper):
    """A layer that holds chosen operations; "read_into" and "write" include what the fast path would have done."""

    def __init__(self, child: Layer) -> None:
        _Holds.__init__(self)
        Wrapper.__init__(self, child)

    async def _before(self, op: str, offset: int = 0, length: int = EVERYWHERE) -> Held | None:
        """Wait where a rule says so; what is returned is to be waited for afterwards."""
        held = self._find(op, offset, length) if self.holds else None
        if held is None or held.after:
            return held
        await held._pass()
        return None

    @staticmethod
    async def _after(held: Held | None) -> None:
        if held is not None:
            await held._pass()

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        if self._bars_fast_path("read_into", offset, len(buffer)):
            return False
        return self.child.try_read_into(offset, buffer)

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        if self._bars_fast_path("read_into", offset, len(buffer)):
            return False
        return self.child.try_read_later(offset, buffer, done)

    def try_write(self, offset: int, data: memoryview) -> bool:
        if self._bars_fast_path("write", offset, len(data)):
            return False
        return self.child.try_write(offset, data)

    def try_flush(self, done: Done) -> bool:
        return not self._bars_fast_path("flush", 0, EVERYWHERE) and self.child.try_flush(done)

    def try_extent(self, offset: int, length: int) -> Extent | None:
        return None if self._bars_fast_path("extents", offset, length) else self.child.try_extent(offset, length)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        held = await self._before("read_into", offset, len(buffer))
        await self.child.read_into(offset, buffer)
        await self._after(held)

    async def write(self, offset: int, data: memoryview) -> None:
        held = await self._before("write", offset, len(data))
        await self.child.write(offset, data)
        await self._after(held)

    async def flush(self) -> None:
        held = await self._before("flush")
        await self.child.flush()
        await self._after(held)

    async def trim(self, offset: int, length: int) -> None:
        held = await self._before("trim", offset, length)
        await self.child.trim(offset, length)
        await self._after(held)

    async def zero(self, offset: int, length: int) -> None:
        held = await self._before("zero", offset, length)
        await self.child.zero(offset, length)
        await self._after(held)

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        held = await self._before("extents", offset, length)
        found = await self.child.extents(offset, length, limit)
        await self._after(held)
        return found


class FileGate(_Holds):
    """Holds calls of *file* inside their threads: "read", "write", "punch", "zero_range", "extents", "sync".

    "sync" is the work of one of *rounds*; for a block store fdatasync, map, fdatasync. `faults` are raised instead of the
    call: `gate.faults.append((Rule("write"), OSError(errno.EIO, "...")))`.
    """

    def __init__(self, file: LocalFile, rounds: FlushRounds[Any], *, forbid_inline: bool = False) -> None:
        super().__init__()
        self._work: Callable[[object], None] = rounds._work
        setattr(rounds, "_work", self._gated_work)  # noqa: B010
        self.faults: list[tuple[Rule, OSError]] = []
        self._forbid_inline = forbid_inline
        self._run = file.run
        self._try_read, self._try_write = file.try_read, file.try_write
        for name in ("run", "try_read", "try_write"):
            setattr(file, name, getattr(self, "_gated_" + name))

    def _is_barred(self, op: str, offset: int, length: int) -> bool:
        faulty = any(not rule.spent and rule.concerns(op, offset, length) for rule, _ in self.faults)
        return self._forbid_inline or faulty or self._bars_fast_path(op, offset, length)

    def _gated_try_read(self, offset: int, buffer: memoryview) -> bool:
        return not self._is_barred("read", offset, len(buffer)) and self._try_read(offset, buffer)

    def _gated_try_write(self, offset: int, data: memoryview) -> bool:
        return not self._is_barred("write", offset, len(data)) and self._try_write(offset, data)

    def _gated_work(self, job: object) -> None:
        fault, held = self._meet("sync", 0, EVERYWHERE)
        _in_thread(held, fault, self._work, (job,))

    def _meet(self, op: str, offset: int, length: int) -> tuple[OSError | None, Held | None]:
        fault = next((error for rule, error in self.faults if rule.matches(op, offset, length)), None)
        return fault, self._find(op, offset, length)

    async def _gated_run(self, call: Callable[..., T], *arguments: object) -> T:
        fault, held = self._meet(*_describe(call, arguments))
        if fault is None and held is None:
            return await self._run(call, *arguments)
        return await self._run(_in_thread, held, fault, call, arguments)


class PoolGate(_Holds):
    """Holds calls to the files of a pool's images, inside the threads that make them, from the moment they are opened.

    "read", "write", "punch", "sync" and "extents" of the data file, "map-write" and "map-sync" of the map. `faults` are
    raised instead of the call: `gate.faults.append((Rule("write"), OSError(errno.EIO, "...")))`; a Rule of "any" counts
    all of them. calls: how many were made, held and failed ones too.
    """

    def __init__(self, *, forbid_inline: bool = False) -> None:
        super().__init__()
        self.faults: list[tuple[Rule, Exception]] = []
        self.calls: Counter[str] = Counter()
        self.forbid_inline = forbid_inline
        self._lock = threading.Lock()  # threads count in the rules

    def watch(self, data: LocalFile, map_file: LocalFile) -> None:
        """From now on, before anybody has taken a method of them."""
        try_read = data.try_read

        def gated_try_read(offset: int, buffer: memoryview) -> bool:
            return not self._is_barred(offset, len(buffer)) and try_read(offset, buffer)

        setattr(data, "try_read", gated_try_read)  # noqa: B010
        for file, name, op in (
            (data, "read_now", "read"),
            (data, "write_now", "write"),
            (data, "punch_now", "punch"),
            (data, "extents_now", "extents"),
            (data, "sync_now", "sync"),
            (map_file, "write_now", "map-write"),
            (map_file, "sync_now", "map-sync"),
        ):
            setattr(file, name, self._gated(op, getattr(file, name)))

    def _is_barred(self, offset: int, length: int) -> bool:
        if self.forbid_inline or self._bars_fast_path("read", offset, length):
            return True
        return any(not rule.spent and rule.concerns("read", offset, length) for rule, _ in self.faults)

    def _gated(self, op: str, call: Callable[..., object]) -> Callable[..., object]:
        def gated(*arguments: Any) -> object:
            offset, length = _range_of(op, arguments)
            with self._lock:
                self.calls[op] += 1
                met = [error for rule, error in self.faults if _matches(rule, op, offset, length)]
                held = self._find(op, offset, length)
            return _in_thread(held, met[0] if met else None, call, arguments)

        return gated


def _matches(rule: Rule, op: str, offset: int, length: int) -> bool:
    return rule.matches("any" if rule.op == "any" else op, offset, length)


def _range_of(op: str, arguments: tuple[Any, ...]) -> tuple[int, int]:
    if "sync" in op:
        return 0, EVERYWHERE
    offset, what = arguments[:2]
    if "write" in op:
        return offset, sum(map(len, what))
    return offset, len(what) if op == "read" else what


def _in_thread(held: Held | None, fault: Exception | None, call: Callable[..., T], arguments: tuple[object, ...]) -> T:
    if held is not None and not held.after:
        held._pass_in_thread()
    if fault is not None:
        raise fault
    result = call(*arguments)
    if held is not None and held.after:
        held._pass_in_thread()
    return result


def _describe(call: Callable[..., object], arguments: tuple[object, ...]) -> tuple[str, int, int]:
    """The operation's name and range of a call that a LocalFile hands to a thread."""
    if call is fallocate:
        _, mode, offset, length = arguments
        assert isinstance(mode, int)
        assert isinstance(offset, int)
        assert isinstance(length, int)
        return "punch" if mode & PUNCH_HOLE else "zero_range", offset, length
    match getattr(call, "__name__", ""), arguments:
        case "read_now", (int() as offset, memoryview() as buffer):
            return "read", offset, len(buffer)
        case "write_now", (int() as offset, tuple() as pieces):
            return "write", offset, sum(map(len, pieces))
        case "extents_now", (int() as offset, int() as length, _):
            return "extents", offset, length
    return "other", 0, EVERYWHERE
