"""Reads and writes past the page cache, several with one system call and one way to a thread and back.

What is asked for while the threads are busy, or in the same turn of the loop, goes to the kernel together:

    loop      transfer() -> queue ..................................... told, all of them at once
    threads                '-> as many as wait -> io_submit, io_getevents -'

Each file has threads of its own, and a batch is of one file: io_submit waits where the file is locked, as by a punch, and
nobody hears of a batch before all of it is done. What waits because DEPTH are under way can be cancelled; what is in the
queue is handed over, and its caller waits for it. Where the kernel has no AIO, or allows no more rings (fs.aio-max-nr), each
transfer is a preadv or pwritev of its own, in more threads.

Sources: io_submit(2), io_getevents(2), linux/aio_abi.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import platform
import struct
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import trio

DEPTH = 64  # transfers of a file that are under way; more wait for their turn
TOGETHER = 32  # of one system call
THREADS, THREADS_WITHOUT_RING = 4, 16  # of a file

READ, WRITE = 0, 1
"""IOCB_CMD_PREAD and IOCB_CMD_PWRITE."""

_NUMBERS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""Of io_setup, io_destroy, io_getevents and io_submit, which no C library wraps; by machine."""
_IOCB = struct.Struct("<QIIHhiQQqQII")  # data, key, flags, command, priority, file, memory, length, offset, -, flags, -
_EVENT = struct.Struct("<QQqq")  # data, iocb, result, -

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_long = ctypes.c_long

_under_way: dict[int, int] = {}  # by thread: which of its batches the kernel has
_batches = itertools.count()


def batches_under_way() -> set[tuple[str, str]]:
    """Those that the kernel has, each with a name of its own: until they are done this process cannot end. Any thread."""
    return {(f"transfers of {thread}", str(batch)) for thread, batch in _under_way.copy().items()}


class OpenFile(Protocol):
    descriptor: int  # -1 once it is closed: whoever comes late must not meet another file under its number


class Transfer:
    """address: of *buffer* in memory. result: bytes, or a negative errno; error: a bug met instead. then: told on the loop."""

    __slots__ = ("address", "buffer", "command", "error", "file", "offset", "result", "then", "token")

    def __init__(
        self,
        command: int,
        file: OpenFile,
        offset: int,
        buffer: memoryview,
        address: int,
        then: Callable[[Transfer], None],
    ) -> None:
        self.command = command
        self.file = file
        self.offset = offset
        self.buffer = buffer
        self.address = address
        self.result = 0
        self.error: BaseException | None = None
        self.then = then
        self.token = trio.lowlevel.current_trio_token()


class Ring:
    """An AIO context of one thread. Raises: OSError where there is none to be had."""

    def __init__(self) -> None:
        numbers = _NUMBERS.get(platform.machine())
        if numbers is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        setup, self._destroy, self._getevents, self._submit = map(_long, numbers)
        self._context = ctypes.c_ulong(0)
        if _libc.syscall(setup, _long(TOGETHER), ctypes.byref(self._context)):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._iocbs = bytearray(_IOCB.size * TOGETHER)
        base = ctypes.addressof((ctypes.c_char * len(self._iocbs)).from_buffer(self._iocbs))
        self._pointers = (ctypes.c_void_p * TOGETHER)(*(base + _IOCB.size * index for index in range(TOGETHER)))
        self._events = memoryview(bytearray(_EVENT.size * TOGETHER))
        self._events_memory = (ctypes.c_char * len(self._events)).from_buffer(self._events)

    def close(self) -> None:
        """Returns when the kernel has none of their buffers any more, whatever they have come to."""
        _libc.syscall(self._destroy, self._context)

    def carry_out(self, transfers: Sequence[Transfer]) -> None:
        """Do *transfers*, TOGETHER at most, and wait for all of them."""
        for index, one in enumerate(transfers):
            length, where = len(one.buffer), index * _IOCB.size
            _IOCB.pack_into(
                self._iocbs, where, index, 0, 0, one.command, 0, one.file.descriptor, one.address, length, one.offset, 0, 0, 0
            )  # fmt: skip
        thread = threading.get_ident()
        _under_way[thread] = next(_batches)
        try:
            submitted = max(0, _libc.syscall(self._submit, self._context, _long(len(transfers)), self._pointers))
            left = submitted
            while left:
                least = _long(left)
                count = max(0, _libc.syscall(self._getevents, self._context, least, least, self._events_memory, None))
                for index, _, result, _ in _EVENT.iter_unpack(self._events[: _EVENT.size * count]):
                    transfers[index].result = result
                left -= count  # a signal may have cut it short
        finally:
            del _under_way[thread]
        # The kernel takes no more at once, or has an error for the next one; and AIO begins nothing anew after a signal.
        one_by_one(transfers[submitted:])
        one_by_one([one for one in transfers[:submitted] if one.result == -errno.EINTR])


def one_by_one(transfers: Sequence[Transfer]) -> None:
    """Do *transfers*."""
    for one in transfers:
        try:
            if one.command == WRITE:
                one.result = os.pwritev(one.file.descriptor, (one.buffer,), one.offset)
            else:
                one.result = os.preadv(one.file.descriptor, (one.buffer,), one.offset)
        except OSError as exc:
            one.result = -(exc.errno or errno.EIO)


def carry_out(ring: Ring | None, transfers: Sequence[Transfer]) -> None:
    """Do *transfers*, TOGETHER at most, and wait for all of them."""
    if ring is None or len(transfers) == 1:
        one_by_one(transfers)
    else:
        ring.carry_out(transfers)


class Transfers:
    """Those of *file*. One event loop."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._queue: SimpleQueue[Transfer | None] = SimpleQueue()
        self._threads = self._under_way = 0
        self._most_threads = THREADS
        self._turns = trio.lowlevel.ParkingLot()

    def close(self) -> None:
        """The threads end when they have done what was handed to them."""
        ending, self._threads = self._threads, 0
        for _ in range(ending):
            self._queue.put(None)

    async def transfer(self, command: int, offset: int, buffer: memoryview, address: int) -> int:
        """READ into or WRITE from *buffer* at *address*: how many bytes, which may be fewer than asked for.

        Raises: OSError.
        """
        if self._under_way >= DEPTH:
            await self._turns.park()  # whoever ends hands its place over
        else:
            self._under_way += 1
        task = trio.lowlevel.current_task()
        one = Transfer(command, self._file, offset, buffer, address, lambda _: trio.lowlevel.reschedule(task))
        self._hand_over(one)
        await trio.lowlevel.wait_task_rescheduled(_go_on)
        if one.error is not None:
            raise one.error
        if one.result < 0:
            raise OSError(-one.result, os.strerror(-one.result))
        return one.result

    def try_begin(
        self, command: int, offset: int, buffer: memoryview, address: int, then: Callable[[Transfer], None]
    ) -> bool:
        """Begin one whose end *then* is told, on the loop and not before this has returned. False where it would wait."""
        if self._under_way >= DEPTH:
            return False
        self._under_way += 1
        self._hand_over(Transfer(command, self._file, offset, buffer, address, then))
        return True

    def _hand_over(self, one: Transfer) -> None:
        """It has a place."""
        if self._threads < min(self._most_threads, self._under_way):
            try:
                threading.Thread(target=self._work, name="direct I/O", daemon=True).start()
                self._threads += 1
            except RuntimeError:  # the system has no more of them
                if not self._threads:
                    self._leave_place()
                    raise
        self._queue.put(one)

    def _leave_place(self) -> None:
        if self._turns:
            self._turns.unpark()
        else:
            self._under_way -= 1

    def _tell(self, done: Sequence[Transfer]) -> None:
        for one in done:
            self._leave_place()
            one.then(one)

    def _work(self) -> None:
        ring = _ring()
        if ring is None:
            self._most_threads = THREADS_WITHOUT_RING
        while (first := self._queue.get()) is not None:
            together = [first]
            with contextlib.suppress(Empty):
                while len(together) < TOGETHER:
                    more = self._queue.get_nowait()
                    if more is None:
                        self._queue.put(None)
                        break
                    together.append(more)
            try:
                carry_out(ring, together)
            except BaseException as exc:  # the callers', whatever it is
                if ring is not None:  # it may have begun them, and may know results that nobody asked for
                    ring.close()
                    ring = _ring()
                for one in together:
                    one.error = exc
            with contextlib.suppress(trio.RunFinishedError):
                first.token.run_sync_soon(self._tell, together)
        if ring is not None:
            ring.close()


def _ring() -> Ring | None:
    try:
        return Ring()
    except OSError:
        return None


def _go_on(_: Any) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED
