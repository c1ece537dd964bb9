"""How long a store across a network is waited for: the breaker, and the kernel's own limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from cachefs.backends import remote
from cachefs.errors import BackendTimeout, PermanentError, TransientError
from cachefs.insistence import MAX_BACKOFF_S, Breaker, Insistence, backoff


def test_breaker_opens_a_deadline_after_the_loss_and_closes_when_the_store_is_reached() -> None:
    breaker = Breaker(10.0, holds=False)
    assert breaker.state(0) == "ok"
    breaker.lost(100)
    breaker.lost(105)  # still lost
    assert [(breaker.state(now), breaker.is_open(now)) for now in (109.9, 110)] == [
        ("reconnecting", False),
        ("failing", True),
    ]
    breaker.reached()
    assert (breaker.state(200), breaker.is_open(200)) == ("ok", False)


def test_breaker_never_opens_where_requests_are_held() -> None:
    breaker = Breaker(10.0, holds=True)
    breaker.lost(100)
    assert (breaker.state(1000), breaker.is_open(1000)) == ("holding", False)


def test_pauses_grow_up_to_a_limit_and_are_shortened_by_chance() -> None:
    longest, shortest = backoff(lambda: 1.0), backoff(lambda: 0.0)
    assert [next(longest) for _ in range(8)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, MAX_BACKOFF_S, MAX_BACKOFF_S]
    assert [next(shortest) for _ in range(3)] == [0.05, 0.1, 0.2]


async def test_only_what_may_go_away_is_tried_again(autojump_clock: MockClock) -> None:
    insistence = Insistence("d/x", 10.0, holds=False, trouble=lambda: "?")
    outcomes: list[Any] = [TransientError("d/x", "a"), TransientError("d/x", "b"), 7, PermanentError("d/x", "c")]

    async def attempt() -> int:
        await trio.lowlevel.checkpoint()
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return int(outcome)

    assert await insistence.insist(attempt, "read") == 7
    assert insistence.retries == 2
    with pytest.raises(PermanentError, match="c"):
        await insistence.insist(attempt, "read")
    outcomes[:] = [TransientError("d/x", "it is out of memory")] * 100
    began = trio.current_time()
    with pytest.raises(BackendTimeout, match="read: not done within 10s: it is out of memory"):
        await insistence.insist(attempt, "read")
    assert trio.current_time() - began == pytest.approx(10)


async def test_an_attempt_that_hangs_ends_at_the_deadline(autojump_clock: MockClock) -> None:
    insistence = Insistence("d/x", 10.0, holds=False, trouble=lambda: "cannot connect: Connection refused")
    with pytest.raises(BackendTimeout, match="not done within 10s: cannot connect: Connection refused"):
        await insistence.insist(trio.sleep_forever, "read")


@pytest.mark.parametrize(
    ("default", "most", "keys", "sentence"),
    [
        ("0", "0", {"on_failure": "hold"}, None),
        ("100", "0", {}, None),
        (
            "100",
            "0",
            {"on_failure": "hold"},
            "aborts a whole mount when one request takes 1.667min: .*or on_failure to error",
        ),
        ("0", "70", {}, "or deadline to less than 1min"),
        ("100", "30", {"deadline": "10s"}, None),
        ("100", "20", {"deadline": "10s"}, "or deadline to less than 10s"),
        (None, None, {"on_failure": "hold"}, None),
    ],
)
def test_what_outlasts_the_kernels_own_limit_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    default: str | None,
    most: str | None,
    keys: dict[str, str],
    sentence: str | None,
) -> None:
    monkeypatch.setattr(remote, "_KERNEL_LIMITS", tmp_path)
    for name, value in (("default_request_timeout", default), ("max_request_timeout", most)):
        if value is not None:
            (tmp_path / name).write_text(f"{value}\n")
    if sentence is None:
        remote.RemoteConfig.model_validate(keys)
        return
    with pytest.raises(ValueError, match=sentence):
        remote.RemoteConfig.model_validate(keys)
