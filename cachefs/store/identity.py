"""What a base is known by, so that an overlay notices that it lies over another one.

A regular file is its size, modification time and inode number. A block device has no such thing: its size and a digest
of 16 samples of 4 KiB, spread evenly over it, first and last block included. The device number says nothing (it changes
between boots) and the path says nothing (an image may be moved).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

SAMPLES = 16
SAMPLE_SIZE = 4096


@dataclass(frozen=True)
class Identity:
    """kind: "file", "block-device", "nbd", "qcow2", "memory". facts: name -> value, all strings, compared one by one."""

    kind: str
    facts: Mapping[str, str]

    @property
    def lasts(self) -> bool:
        """Whether equal identities mean equal contents also after the base was closed. Memory begins anew each time."""
        return self.kind != "memory"

    @property
    def is_sampled(self) -> bool:
        """Whether only a part of the contents was looked at, so that two bases may have it that are not the same."""
        return self.kind in ("block-device", "nbd")

    def changes(self, now: Identity) -> list[str]:
        """What differs in *now*, a phrase each ("size was 1048576, is 2097152"); empty when it is the same base."""
        if self.kind != now.kind:
            return [f"it was a {self.kind}, is a {now.kind}"]
        names = sorted(set(self.facts) | set(now.facts))
        return [
            f"{name} was {self.facts.get(name, 'unknown')}, is {now.facts.get(name, 'unknown')}"
            for name in names
            if self.facts.get(name) != now.facts.get(name)
        ]


def identity_of_file(descriptor: int) -> Identity:
    status = os.fstat(descriptor)
    return Identity(
        "file",
        {
            "size": str(status.st_size),
            "modification time": str(status.st_mtime_ns),
            "inode": str(status.st_ino),
        },
    )


def identity_of_device(descriptor: int, size: int) -> Identity:
    """Reads 64 KiB at most. *size* in bytes."""
    digest = hashlib.sha256()
    last = max(0, size - SAMPLE_SIZE)
    for index in range(SAMPLES):
        digest.update(os.pread(descriptor, SAMPLE_SIZE, last * index // (SAMPLES - 1)))
    return Identity("block-device", {"size": str(size), "content sample": digest.hexdigest()})
