"""Operations that fail by rule, never by dice, and a sweep over every place where a scenario can be hit.

    faults.add("read_into", PermanentError("base", "made to fail"), nth=2, start=0, end=4096)

`Faults` is a layer; put it above the child whose operations are to fail. The error comes instead of the operation. For
errors of system calls see `cachefs.testing.gate.FileGate.faults`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from cachefs.errors import CachefsError, PermanentError
from cachefs.extent import Extent
from cachefs.layers.base import Done, Later, Layer
from cachefs.testing.rules import EVERYWHERE, Rule
from cachefs.testing.wrapper import Wrapper

SWEEP_LIMIT = 1000


class Faults(Wrapper):
    """A layer that fails chosen operations; "read_into" and "write" include what the fast path would have done.

    `calls` counts every operation that arrived, by name, failed ones too.
    """

    def __init__(self, child: Layer) -> None:
        super().__init__(child)
        self.rules: list[tuple[Rule, CachefsError]] = []
        self.calls: dict[str, int] = {}

    def add(
        self,
        op: str,
        error: CachefsError | None = None,
        *,
        nth: int = 1,
        start: int = 0,
        end: int = EVERYWHERE,
        once: bool = True,
    ) -> Rule:
        """Fail the *nth* call of *op* that touches bytes *start* to *end*; `once=False`: that one and all later."""
        rule = Rule(op, nth, start, end, once)
        self.rules.append((rule, error or PermanentError(self.name, f"{op}: made to fail")))
        return rule

    def _bars_fast_path(self, op: str, offset: int, length: int) -> bool:
        return any(not rule.spent and rule.concerns(op, offset, length) for rule, _ in self.rules)

    def _meet(self, op: str, offset: int = 0, length: int = EVERYWHERE) -> None:
        self.calls[op] = self.calls.get(op, 0) + 1
        for rule, error in self.rules:
            if rule.matches(op, offset, length):
                raise error

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        if self._bars_fast_path("read_into", offset, len(buffer)) or not self.child.try_read_into(offset, buffer):
            return False
        self._meet("read_into", offset, len(buffer))
        return True

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        if self._bars_fast_path("read_into", offset, len(buffer)):
            return False
        return self.child.try_read_later(offset, buffer, done)

    def try_write(self, offset: int, data: memoryview) -> bool:
        if self._bars_fast_path("write", offset, len(data)) or not self.child.try_write(offset, data):
            return False
        self._meet("write", offset, len(data))
        return True

    def try_flush(self, done: Done) -> bool:
        if self._bars_fast_path("flush", 0, EVERYWHERE):
            return False
        self._meet("flush")
        return self.child.try_flush(done)

    def try_extent(self, offset: int, length: int) -> Extent | None:
        if self._bars_fast_path("extents", offset, length):
            return None
        found = self.child.try_extent(offset, length)
        if found is not None:
            self._meet("extents", offset, length)
        return found

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self._meet("read_into", offset, len(buffer))
        await self.child.read_into(offset, buffer)

    async def write(self, offset: int, data: memoryview) -> None:
        self._meet("write", offset, len(data))
        await self.child.write(offset, data)

    async def flush(self) -> None:
        self._meet("flush")
        await self.child.flush()

    async def trim(self, offset: int, length: int) -> None:
        self._meet("trim", offset, length)
        await self.child.trim(offset, length)

    async def zero(self, offset: int, length: int) -> None:
        self._meet("zero", offset, length)
        await self.child.zero(offset, length)

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        self._meet("extents", offset, length)
        return await self.child.extents(offset, length, limit)


async def sweep(op: str, scenario: Callable[[Callable[[Layer], Faults]], Awaitable[None]]) -> int:
    """Run *scenario* with the first, the second, ... *op* failing, until a run in which none was left to fail.

    *scenario* puts the layer that may fail through the function it is given, and judges what it sees: an error may come
    out of any operation, wrong bytes never. The number of runs that were hit is returned.
    """
    for nth in range(1, SWEEP_LIMIT):
        made: list[Rule] = []

        def wrap(child: Layer, nth: int = nth, made: list[Rule] = made) -> Faults:
            faults = Faults(child)
            made.append(faults.add(op, nth=nth))
            return faults

        await scenario(wrap)
        if not any(rule.hits for rule in made):
            return nth - 1
    raise AssertionError(f"still hit after {SWEEP_LIMIT} runs: the scenario never ends")
