"""Adaptive polling: how long to go on asking the device before sleeping in epoll. Pure.

To wake a sleeping server costs some 50 us between two virtual CPUs, more than a cache hit. After a batch the channel
therefore asks on for `window` seconds. The window grows while a little more of it would have caught the next request, and
goes to nothing when requests come too far apart: an idle daemon never polls.

What is measured while asleep includes the time that waking us takes, which polling would have saved: on a slow host every
wait then looks too long. So every PROBE_EVERY-th time that it does, the whole window is tried once; if it catches the
next request it stays open, because a request that is caught is no sleep.

Source: QEMU util/aio-posix.c (poll-max-ns, poll-grow, poll-shrink) and KVM's halt polling have the same rule.
"""

from __future__ import annotations

FIRST_WINDOW_S = 4e-6
PROBE_EVERY = 8


class PollWindow:
    """maximum, window: seconds; maximum 0 switches polling off."""

    def __init__(self, maximum: float) -> None:
        self.maximum = maximum
        self.window = 0.0
        self._too_long = 0  # waits in a row that polling would not have caught, it seems

    def slept(self, waited: float) -> None:
        """The next request came *waited* seconds after the last batch, window included; polling had not caught it."""
        if waited > self.maximum:
            self._too_long += 1
            self.window = 0.0 if self._too_long % PROBE_EVERY else self.maximum
        elif self.window < self.maximum:
            self.window = min(self.maximum, max(FIRST_WINDOW_S, self.window * 2))
