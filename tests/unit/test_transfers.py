"""Reads and writes of direct files that go to the kernel together: what each comes to, and what a cancellation ends."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.leaving import stuck_threads
from cachefs.store import transfers
from cachefs.store.transfers import READ, WRITE, Ring, Transfer, Transfers
from cachefs.testing.strategies import patterns

PAGE = 4096
PAGES = 64


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "image"
    path.write_bytes(bytes(PAGES * PAGE))
    opened = os.open(path, os.O_RDWR | os.O_DIRECT)
    yield opened
    os.close(opened)


class Opened:
    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor


@pytest.fixture
def queue(descriptor: int) -> Iterator[Transfers]:
    made = Transfers(Opened(descriptor))
    yield made
    made.close()


@pytest.fixture(params=["ring", "without"])
def with_and_without_ring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without":
        monkeypatch.setattr(transfers, "_ring", lambda: None)
    else:
        Ring().close()  # the kernel of the tests has AIO


def page_of(content: bytes = b"") -> memoryview:
    page = memoryview(mmap.mmap(-1, PAGE))
    page[: len(content)] = content
    return page


async def ask(queue: Transfers, command: int, offset: int, page: memoryview) -> int:
    return await queue.transfer(command, offset, page, ctypes.addressof(ctypes.c_char.from_buffer(page)))


class Held:
    """Every batch waits in its thread until it is let go; how many each had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.go_on = threading.Event()
        self.entered = threading.Semaphore(0)
        self._real = transfers.carry_out
        monkeypatch.setattr(transfers, "carry_out", self._carry_out)

    def _carry_out(self, ring: Ring | None, together: Sequence[Transfer]) -> None:
        self.sizes.append(len(together))
        self.entered.release()
        assert self.go_on.wait(20)
        self._real(ring, together)

    async def wait_entered(self) -> None:
        assert await trio.to_thread.run_sync(self.entered.acquire, True, 20)


@pytest.mark.usefixtures("with_and_without_ring")
async def test_every_transfer_comes_to_its_own_end(queue: Transfers, descriptor: int, tmp_path: Path) -> None:
    contents = [patterns(index + 1, PAGE) for index in range(PAGES)]

    async def write(index: int) -> None:
        assert await ask(queue, WRITE, index * PAGE, page_of(contents[index])) == PAGE

    async def read(index: int) -> None:
        page = page_of()
        assert await ask(queue, READ, index * PAGE, page) == PAGE
        assert bytes(page) == contents[index]

    for call in (write, read):
        async with trio.open_nursery() as nursery:
            for index in range(PAGES):
                nursery.start_soon(call, index)
    assert (tmp_path / "image").read_bytes() == b"".join(contents)


@pytest.mark.usefixtures("with_and_without_ring")
async def test_one_that_fails_or_ends_early_leaves_its_neighbours_alone(
    queue: Transfers, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, int] = {}

    async def call(name: str, command: int, offset: int) -> None:
        try:
            found[name] = await ask(queue, command, offset, page_of(patterns(3, PAGE)))
        except OSError as exc:
            found[name] = -(exc.errno or 0)

    monkeypatch.setattr(transfers, "THREADS_WITHOUT_RING", 1)
    monkeypatch.setattr(queue, "_most_threads", 1)
    held = Held(monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call, "before", READ, 0)
        await held.wait_entered()
        for number in range(3):
            nursery.start_soon(call, f"good {number}", WRITE, number * PAGE)
        nursery.start_soon(call, "crooked", WRITE, 100)
        nursery.start_soon(call, "behind the end", READ, PAGES * PAGE)
        for number in range(3, 6):
            nursery.start_soon(call, f"good {number}", READ, number * PAGE)
        await wait_all_tasks_blocked()
        held.go_on.set()
    assert held.sizes == [1, 8]
    assert found.pop("crooked") == -errno.EINVAL
    assert found.pop("behind the end") == 0
    assert found.pop("before") == PAGE
    assert found == {f"good {number}": PAGE for number in range(6)}


async def test_what_comes_after_the_file_was_closed_meets_no_other_one(
    queue: Transfers, descriptor: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    errors: list[int | None] = []

    async def write(offset: int) -> None:
        try:
            await ask(queue, WRITE, offset, page_of(patterns(1, PAGE)))
        except OSError as exc:
            errors.append(exc.errno)

    monkeypatch.setattr(queue, "_most_threads", 1)
    held = Held(monkeypatch)
    async with trio.open_nursery() as nursery:
        for offset in (0, PAGE, 2 * PAGE):
            nursery.start_soon(write, offset)
            await wait_all_tasks_blocked()
        await held.wait_entered()
        queue._file.descriptor = -1
        held.go_on.set()
    assert errors == [errno.EBADF] * 3
    assert not any((tmp_path / "image").read_bytes())


async def test_a_bug_in_the_middle_of_a_batch_leaves_nothing_under_way_and_the_next_one_is_right(
    queue: Transfers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its callers have their buffers back only when the kernel has not, and nobody is told the results of that batch."""
    monkeypatch.setattr(queue, "_most_threads", 1)
    held = Held(monkeypatch)
    found: list[object] = []

    async def read(offset: int) -> None:
        try:
            found.append(await ask(queue, READ, offset, page_of()))
        except (MemoryError, OSError) as exc:
            found.append(type(exc))

    async def batch(*offsets: int) -> list[object]:
        found.clear()
        held.go_on.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, 0)
            await held.wait_entered()
            for offset in offsets:
                nursery.start_soon(read, offset)
            await wait_all_tasks_blocked()
            held.go_on.set()
        await trio.to_thread.run_sync(held.entered.acquire, True, 20)
        return [*found]

    class Fails:
        size = transfers._EVENT.size

        def iter_unpack(self, events: memoryview) -> None:
            raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(transfers, "_EVENT", Fails())
        assert await batch(PAGE, 2 * PAGE) == [PAGE, MemoryError, MemoryError]
    assert not transfers.batches_under_way()
    assert await batch(PAGE, PAGES * PAGE) in ([PAGE, PAGE, 0], [PAGE, 0, PAGE])


async def test_what_is_asked_for_while_a_thread_is_busy_goes_down_together(
    queue: Transfers, descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "_most_threads", 1)
    held = Held(monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, queue, WRITE, 0, page_of())
        await held.wait_entered()
        for index in range(1, 11):
            nursery.start_soon(ask, queue, WRITE, index * PAGE, page_of())
        await wait_all_tasks_blocked()
        held.go_on.set()
    assert held.sizes == [1, 10]


async def test_one_that_waits_for_its_turn_is_dropped_and_one_that_was_handed_over_is_not(
    queue: Transfers, descriptor: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(transfers, "DEPTH", 2)
    held = Held(monkeypatch)
    scopes = [trio.CancelScope() for _ in range(3)]

    async def write(index: int, scope: trio.CancelScope) -> None:
        with scope:
            await ask(queue, WRITE, index * PAGE, page_of(patterns(index + 1, PAGE)))
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for index, scope in enumerate(scopes):
            nursery.start_soon(write, index, scope)
            await wait_all_tasks_blocked()
        await held.wait_entered()
        for scope in scopes:
            scope.cancel()
        await wait_all_tasks_blocked()
        held.go_on.set()
    content = (tmp_path / "image").read_bytes()
    assert content[: 2 * PAGE] == patterns(1, PAGE) + patterns(2, PAGE)
    assert not any(content[2 * PAGE :])
    assert all(scope.cancelled_caught for scope in scopes)
    assert await ask(queue, READ, 0, page_of()) == PAGE  # both places are free again
    assert await ask(queue, READ, 0, page_of()) == PAGE


async def test_a_bug_is_told_to_those_that_met_it(
    queue: Transfers, descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(transfers, "carry_out", lambda ring, together: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await ask(queue, READ, 0, page_of())
    assert await ask(queue, READ, 0, page_of()) == PAGE


async def test_a_place_that_is_free_goes_to_the_one_that_waited_longest(
    queue: Transfers, descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "DEPTH", 1)
    order: list[int] = []

    async def read(index: int) -> None:
        await ask(queue, READ, 0, page_of())
        order.append(index)

    async with trio.open_nursery() as nursery:
        for index in range(5):
            nursery.start_soon(read, index)
            await wait_all_tasks_blocked()
    assert order == sorted(order)


async def test_a_batch_that_the_kernel_has_counts_as_stuck(
    queue: Transfers, descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgrade waits for it, as for a thread in a pwrite that does not end: the process cannot."""
    go_on, entered = threading.Event(), threading.Event()
    real: Callable[..., int] = transfers._libc.syscall

    def wait_in_getevents(number: Any, *arguments: Any) -> int:
        if len(arguments) == 5:
            entered.set()
            assert go_on.wait(20)
        return real(number, *arguments)

    monkeypatch.setattr(queue, "_most_threads", 1)
    monkeypatch.setattr(transfers._libc, "syscall", wait_in_getevents)
    held = Held(monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, queue, WRITE, 0, page_of())
        await held.wait_entered()
        for index in range(1, 3):
            nursery.start_soon(ask, queue, WRITE, index * PAGE, page_of())
        await wait_all_tasks_blocked()
        held.go_on.set()
        assert await trio.to_thread.run_sync(entered.wait, 20)
        (batch,) = transfers.batches_under_way()
        assert batch in stuck_threads()
        go_on.set()
    assert not transfers.batches_under_way()
