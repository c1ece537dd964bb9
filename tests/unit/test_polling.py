from __future__ import annotations

from cachefs.fuse.polling import FIRST_WINDOW_S, PROBE_EVERY, PollWindow

MAXIMUM = 50e-6


def test_rare_requests_are_polled_for_only_now_and_then() -> None:
    window = PollWindow(MAXIMUM)
    polled = 0.0
    for _ in range(800):
        window.slept(1.0)
        polled += window.window
    assert polled <= 800 / PROBE_EVERY * MAXIMUM


def test_the_window_grows_to_its_maximum_while_requests_come_soon() -> None:
    window = PollWindow(MAXIMUM)
    seen = []
    for _ in range(10):
        window.slept(30e-6)
        seen.append(window.window)
    assert seen[0] == FIRST_WINDOW_S
    assert seen == sorted(seen)
    assert seen[-1] == MAXIMUM


def test_one_late_request_ends_polling() -> None:
    window = PollWindow(MAXIMUM)
    for _ in range(10):
        window.slept(30e-6)
    window.slept(MAXIMUM * 1.01)
    assert window.window == 0


def test_polling_can_be_switched_off() -> None:
    window = PollWindow(0.0)
    for waited in (0.0, 1e-9, 1e-3):
        window.slept(waited)
        assert window.window == 0


def test_a_host_that_wakes_us_late_does_not_end_polling_for_good() -> None:
    window = PollWindow(MAXIMUM)
    seen = []
    for _ in range(2 * PROBE_EVERY):
        window.slept(200e-6)
        seen.append(window.window)
    assert seen.count(MAXIMUM) == 2
    assert set(seen) == {0.0, MAXIMUM}
