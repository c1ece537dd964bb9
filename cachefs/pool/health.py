"""Whether one kind of I/O on a pool's files works, and when to try it again after it failed; pure.

works -> failed, for FIRST_PAUSE_S -> one try -> works
                                              -> failed, for twice as long, up to LONGEST_PAUSE_S
"""

from __future__ import annotations

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


class Health:
    """what: "reading" or "writing". reason: why it does not work; empty while it does."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.reason = ""
        self.failures = 0
        self._pause_s = 0.0
        self._retry_at = 0.0
        self._is_tried = False

    @property
    def works(self) -> bool:
        return not self.reason

    def may_try(self, now: float) -> bool:
        """Whether it works, or is to be tried again. *now*: seconds on the clock that `fail` was told."""
        return not self.reason or (now >= self._retry_at and not self._is_tried)

    def begin_try(self) -> None:
        """It is tried now: not once more before this one has ended."""
        self._is_tried = True

    def fail(self, reason: str, now: float) -> bool:
        """It failed. True: it worked before, so this is worth a line in the log."""
        news = not self.reason
        if not news and now < self._retry_at:
            return False  # one more call that was under way when it failed
        self.failures += 1
        self._is_tried = False
        self.reason = reason
        self._pause_s = FIRST_PAUSE_S if news else min(LONGEST_PAUSE_S, 2 * self._pause_s)
        self._retry_at = now + self._pause_s
        return news

    def succeed(self, began: float) -> bool:
        """What *began* then worked. True: it did not before. What began before it may be tried again says nothing."""
        news = bool(self.reason)
        if news and began < self._retry_at:
            return False
        self.reason = ""
        self._is_tried = False
        return news
