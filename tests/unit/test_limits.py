"""Admission: what one disk may hold of the daemon."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.limits import BUFFERS_PER_DISK, HEADER_BYTES, REQUESTS_PER_DISK, Admission, Verdict


def admission(background: int = 65535, queue_bytes: int = 1 << 30) -> Admission[object]:
    return Admission(background, queue_bytes)


def fill(into: Admission[object], disk: int, count: int, data_bytes: int = 0) -> list[Verdict]:
    verdicts = []
    for _ in range(count):
        verdicts.append(into.ask(disk, data_bytes))
        if verdicts[-1] is Verdict.QUEUE:
            into.put(disk, object(), data_bytes)
    return verdicts


def test_requests_beyond_the_buffers_of_a_disk_are_queued_and_another_disk_is_not_concerned() -> None:
    found = admission()
    assert fill(found, 1, BUFFERS_PER_DISK + 1)[-2:] == [Verdict.RUN, Verdict.QUEUE]
    assert fill(found, 2, 1) == [Verdict.RUN]


def test_queued_requests_run_in_order_of_arrival() -> None:
    found = admission()
    fill(found, 1, BUFFERS_PER_DISK)
    first, second = object(), object()
    for request in (first, second):
        assert found.ask(1, 100) is Verdict.QUEUE
        found.put(1, request, 100)
    assert [found.done(1), found.done(1), found.done(1)] == [first, second, None]
    assert found.queued_bytes == 0


def test_a_request_does_not_overtake_those_that_are_queued() -> None:
    found = admission()
    fill(found, 1, BUFFERS_PER_DISK + 1)
    assert found.done(1) is not None
    fill(found, 1, 1)
    assert found.queued_bytes == HEADER_BYTES


def test_a_disk_has_so_many_requests_and_no_more() -> None:
    found = admission()
    verdicts = fill(found, 1, REQUESTS_PER_DISK + 5)
    assert verdicts.count(Verdict.REFUSE) == 5
    assert found.refused == 5
    assert found.most_requests == REQUESTS_PER_DISK


def test_queued_data_of_all_disks_is_bounded() -> None:
    found = admission(queue_bytes=10 * (4096 + HEADER_BYTES))
    fill(found, 1, BUFFERS_PER_DISK)
    fill(found, 2, BUFFERS_PER_DISK)
    assert fill(found, 1, 6, 4096) == [Verdict.QUEUE] * 6
    assert fill(found, 2, 5, 4096) == [Verdict.QUEUE] * 4 + [Verdict.REFUSE]


def test_near_the_kernels_limit_only_the_disk_that_holds_most_is_refused() -> None:
    found = admission(background=80)  # crowded from 70 on
    fill(found, 1, 60)
    fill(found, 2, 10)
    assert fill(found, 1, 1) == [Verdict.REFUSE]
    assert fill(found, 2, 1) == [Verdict.RUN]


def test_a_queued_request_that_nobody_wants_leaves_the_queue() -> None:
    found = admission()
    fill(found, 1, BUFFERS_PER_DISK)
    unwanted = object()
    assert found.ask(1, 4096) is Verdict.QUEUE
    found.put(1, unwanted, 4096)
    assert found.take_queued(1, unwanted)
    assert not found.take_queued(1, unwanted)
    assert not found.take_queued(7, unwanted)
    assert (found.queued_bytes, found.requests) == (0, BUFFERS_PER_DISK)


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["ask", "done"]), st.integers(0, 9000)), max_size=400))
def test_counts_agree_with_a_plain_model(steps: list[tuple[int, str, int]]) -> None:
    found = admission(background=200, queue_bytes=100_000)
    running = {1: 0, 2: 0, 3: 0}
    queues: dict[int, deque[tuple[object, int]]] = {1: deque(), 2: deque(), 3: deque()}
    for disk, step, size in steps:
        if step == "ask":
            verdict = found.ask(disk, size)
            if verdict is Verdict.RUN:
                running[disk] += 1
            elif verdict is Verdict.QUEUE:
                request = object()
                found.put(disk, request, size)
                queues[disk].append((request, size + HEADER_BYTES))
        elif running[disk]:
            successor = found.done(disk)
            assert successor is (queues[disk].popleft()[0] if queues[disk] else None)
            running[disk] -= successor is None
        assert all(count <= BUFFERS_PER_DISK for count in running.values())
        assert found.queued_bytes == sum(cost for queue in queues.values() for _, cost in queue) <= 100_000
        assert found.requests == sum(running.values()) + sum(map(len, queues.values()))
