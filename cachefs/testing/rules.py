"""Which call a gate holds or a fault hits: operation, range, and the how-manieth of those."""

from __future__ import annotations

from dataclasses import dataclass

EVERYWHERE = 1 << 63


@dataclass
class Rule:
    """The calls of *op* that touch bytes *start* to *end*, from the *nth* on (1 is the first); one of them, or all.

    An operation without a range (flush, sync) touches every range.
    """

    op: str
    nth: int = 1
    start: int = 0
    end: int = EVERYWHERE
    once: bool = True
    seen: int = 0
    hits: int = 0

    def concerns(self, op: str, offset: int, length: int) -> bool:
        """Whether such a call counts, hit or not."""
        return op == self.op and offset < self.end and self.start < offset + max(1, length)

    def matches(self, op: str, offset: int, length: int) -> bool:
        """Whether this call is hit. Counts it."""
        if not self.concerns(op, offset, length):
            return False
        self.seen += 1
        if self.seen < self.nth or (self.once and self.hits):
            return False
        self.hits += 1
        return True

    @property
    def spent(self) -> bool:
        """Nothing will be hit any more."""
        return self.once and self.hits > 0
