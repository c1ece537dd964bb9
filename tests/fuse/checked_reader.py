"""Reads numbered blocks at random and compares them. Arguments: the disk, skewed or random, a seed, how many reads.

Each 4 KiB of the disk holds its number, plus 1, again and again. "skewed": some places are read far more often than others
(Zipf), and all skewed readers like the same ones. Prints how many reads were right. A daemon that dies ends it well.
"""

from __future__ import annotations

import bisect
import errno
import itertools
import os
import random
import sys

PAGE = 4096
BLOCK = 64 << 10
LENGTHS = (PAGE, PAGE, PAGE, PAGE, 4 * PAGE, 16 * PAGE)


def contents(first: int, count: int) -> bytes:
    """Of *count* pages from page *first* on."""
    return b"".join((page + 1).to_bytes(8, "little") * (PAGE // 8) for page in range(first, first + count))


def main(path: str, kind: str, seed: str, most: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    blocks = list(range(size // BLOCK))
    random.Random(1).shuffle(blocks)
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(len(blocks))))
    dice = random.Random(int(seed))
    done = 0
    try:
        while done < int(most):
            rank = bisect.bisect(weights, dice.random() * weights[-1])
            block = blocks[rank] if kind == "skewed" else dice.choice(blocks)
            offset = block * BLOCK + dice.randrange(BLOCK // PAGE) * PAGE
            length = min(dice.choice(LENGTHS), size - offset)
            assert os.pread(descriptor, length, offset) == contents(offset // PAGE, length // PAGE), offset
            done += 1
    except OSError as exc:
        if exc.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            raise
    print(done)


if __name__ == "__main__":
    main(*sys.argv[1:])
