"""Cancelling an operation at each of its awaits, one run per await, without a clock."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import trio

MOST_STEPS = 200


class _CancelAtStep(trio.abc.Instrument):
    def __init__(self, task: trio.lowlevel.Task, scope: trio.CancelScope, step: int) -> None:
        self._task = task
        self._scope = scope
        self._left = step

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._left -= 1
            if self._left == 0:
                self._scope.cancel()


async def cancel_at(step: int, operation: Callable[[], Awaitable[object]]) -> bool:
    """Run *operation* and cancel it when it suspends for the *step*-th time (0: before it begins).

    Whether it was suspended that often; it may have ended well all the same.
    """
    with trio.CancelScope() as scope:
        if step == 0:
            scope.cancel()
            await operation()
            return True
        instrument = _CancelAtStep(trio.lowlevel.current_task(), scope, step)
        trio.lowlevel.add_instrument(instrument)
        try:
            await operation()
        finally:
            trio.lowlevel.remove_instrument(instrument)
    return scope.cancel_called


async def cancel_everywhere(operation: Callable[[], Awaitable[object]]) -> AsyncIterator[int]:
    """Cancel *operation* before it begins, then at its first await, its second, ...; yields after each such run.

    Ends after the first run that did not suspend often enough. The body of the loop looks at what was left behind.
    """
    for step in range(MOST_STEPS):
        if not await cancel_at(step, operation):
            return
        yield step
    raise AssertionError(f"still suspended after {MOST_STEPS} steps")
