"""A writer for crash tests: fills a disk with numbered sectors at random places and says on stdout what it has synced.

Each 512-byte sector is one number (little endian, 8 bytes) repeated; numbers rise with every write, so that of two
contents of a sector the later one is known. A line of stdout is one step of the writer, printed *after* it is done:

    w NUMBER OFFSET LENGTH     written and acknowledged
    s NUMBER                   fsync returned: everything up to write NUMBER is durable

Before each write goes "b NUMBER OFFSET LENGTH" (begun), so that what may have landed without an answer is known as well.

    python writer.py DISK SEED FIRST-NUMBER
"""

from __future__ import annotations

import os
import random
import sys

SECTOR = 512


def content(number: int, length: int) -> bytes:
    return (number.to_bytes(8, "little") * (SECTOR // 8)) * (length // SECTOR)


def main() -> None:
    path, seed, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    dice = random.Random(seed)
    descriptor = os.open(path, os.O_RDWR)
    size = os.fstat(descriptor).st_size
    try:
        while True:
            number += 1
            length = SECTOR * dice.choice((1, 1, 2, 3, 8, 8, 16, 129))
            offset = SECTOR * dice.randrange((size - length) // SECTOR + 1)
            os.write(1, f"b {number} {offset} {length}\n".encode())
            done = os.pwrite(descriptor, content(number, length), offset)
            assert done == length, f"{done} of {length} bytes at {offset}"
            os.write(1, f"w {number} {offset} {length}\n".encode())
            if dice.random() < 0.1:
                os.fsync(descriptor)
                os.write(1, f"s {number}\n".encode())
    except OSError:
        pass  # the daemon is dead


if __name__ == "__main__":
    main()
