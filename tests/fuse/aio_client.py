"""A client whose submitting thread ends while its read is under way: `python aio_client.py WHO WHEN FILE OFFSET LENGTH`.

WHO submits a direct read with io_submit(2): "another" thread, or the "first" one, which leaves a zombie as the process's leader
while the rest lives on. It ends WHEN: "at-once", or "later", when a line comes on stdin. The thread that is left waits for
the read and writes what it got to stdout. Source: io_submit(2), linux/aio_abi.h, asm/unistd.h.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
import threading

# exit (of a thread), io_setup, io_submit, io_getevents
NUMBERS = {"x86_64": (60, 206, 209, 208), "aarch64": (93, 0, 2, 4)}
PREAD = 0

libc = ctypes.CDLL(None, use_errno=True)


class Iocb(ctypes.Structure):
    """struct iocb of linux/aio_abi.h, on a little-endian machine."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_uint32),
        ("opcode", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("descriptor", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("eventfd", ctypes.c_uint32),
    )


class IoEvent(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_uint64),
        ("iocb", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("result2", ctypes.c_int64),
    )


def system_call(number: int, *arguments: object) -> int:
    result = int(libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def main(who: str, when: str, path: str, offset: int, length: int) -> None:
    end_of_thread, setup, submit, get_events = NUMBERS[platform.machine()]
    memory = mmap.mmap(-1, length)
    page = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    context = ctypes.c_ulong(0)
    system_call(setup, ctypes.c_uint(8), ctypes.byref(context))
    read = Iocb(opcode=PREAD, descriptor=descriptor, buffer=page, length=length, offset=offset)
    submitted = threading.Event()

    def ask() -> None:
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(read))
        assert system_call(submit, context, ctypes.c_long(1), pointers) == 1
        submitted.set()
        if when == "later":
            sys.stdin.readline()
        if who == "first":  # Python's own way out would end the process
            libc.syscall(ctypes.c_long(end_of_thread), ctypes.c_long(0))

    def wait() -> None:
        submitted.wait()
        event = IoEvent()
        found = system_call(get_events, context, ctypes.c_long(1), ctypes.c_long(1), ctypes.byref(event), None)
        assert found == 1
        if event.result != length:
            sys.exit(f"the read ended with {event.result}")
        os.write(1, memory[:])
        os._exit(0)

    if who == "first":
        threading.Thread(target=wait).start()
        ask()
    else:
        asking = threading.Thread(target=ask)
        asking.start()
        asking.join()
        wait()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
