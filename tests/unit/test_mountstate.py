"""What a mount remembers across its daemons: inodes, open counts, the configuration, crashes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from cachefs import mountstate
from cachefs.mountstate import CRASHES, NAME, RESENT, MountState, open_state
from cachefs.survivor import Survivors


def successor_of(state: MountState) -> MountState:
    """What the next daemon sees, whatever the last one was doing."""
    return open_state(Survivors([(NAME, os.dup(state.memory.descriptor))]))


@pytest.fixture
def state() -> MountState:
    return open_state(Survivors())


def test_inodes_are_kept_and_never_used_again(state: MountState) -> None:
    assert [state.inode(name) for name in ("a", "b", "a")] == [2, 3, 2]
    state.set_size("a", 100)
    state.drop("b")
    after = successor_of(state)
    assert [after.inode(name) for name in ("a", "c", "b")] == [2, 4, 5]
    assert list(after) == ["a", "c", "b"]
    assert after.sizes() == {"a": 100}
    assert after.name_of(4) == "c"
    assert after.name_of(3) is None


def test_names_may_have_128_characters(state: MountState) -> None:
    state.inode("x" * 128)
    assert list(successor_of(state)) == ["x" * 128]


def test_a_disk_that_is_dropped_leaves_nothing_to_the_one_in_its_row(state: MountState) -> None:
    inode = state.inode("a")
    state.set_size("a", 100)
    state.count(10, inode, +1)
    state.drop("a")
    state.inode("b")
    assert state.opens("b") == 0
    assert state.sizes() == {}


def test_an_open_that_is_sent_again_counts_once(state: MountState) -> None:
    inode = state.inode("a")
    state.count(10, inode, +1)
    state.count(12, inode, +1)
    after = successor_of(state)
    after.count(12 | RESENT, inode, +1)  # killed before the reply was written
    assert after.opens("a") == 2
    after.count(14, inode, -1)
    last = successor_of(after)
    last.count(14 | RESENT, inode, -1)
    assert last.opens("a") == 1
    last.count(16 | RESENT, inode, -1)  # one that had not been counted
    assert last.opens("a") == 0
    last.count(18, inode, -1)
    assert last.opens("a") == 0


@pytest.mark.parametrize("stores", range(5))
def test_an_open_counts_once_wherever_the_kill_falls(state: MountState, stores: int) -> None:
    """*stores* words get into the memory, and the rest of the change does not."""
    inode = state.inode("a")
    state.count(10, inode, +1)
    left = stores
    words = state._words

    class Killed:
        def __setitem__(self, index: int, value: int) -> None:
            nonlocal left
            left -= 1
            if left >= 0:
                words[index] = value

        def __getitem__(self, index: int) -> int:
            return words[index]

    state._words = Killed()  # type: ignore[assignment]
    row = state._by_inode[inode]
    before = row[1]
    state.count(12, inode, +1)
    row[1] = before if stores <= 4 else row[1]  # the count itself is the last store
    after = successor_of(state)
    after.count(12 | RESENT, inode, +1)
    assert after.opens("a") == 2


def test_the_configuration_is_one_of_the_two_whatever_happens(state: MountState) -> None:
    state.set_config(Path("/mnt"), Path("/etc/a.yaml"), '{"a": 1}')
    assert successor_of(state).config == (Path("/mnt"), Path("/etc/a.yaml"), '{"a": 1}')
    words = state._words[mountstate._CONFIGS]
    state.set_config(Path("/mnt"), Path("/etc/a.yaml"), '{"a": 2, "b": "ä"}')
    assert successor_of(state).config[2] == '{"a": 2, "b": "ä"}'
    state._words[mountstate._CONFIGS] = words  # killed before the last store
    assert successor_of(state).config[2] == '{"a": 1}'


def test_crashes_are_counted_and_blamed_on_whom_the_daemon_worked_for(state: MountState) -> None:
    a, b = state.inode("a"), state.inode("b")
    state.handling[0] = a
    for _ in range(3):
        state = successor_of(state)
        state.note_crash()
    state.set_waiting(b, True)
    state.note_crash()
    state.set_waiting(a, True)
    state.set_waiting(b, True)
    state.note_crash()
    state.set_opening("b", True)
    state.note_crash()
    assert [crash.inode for crash in state.crashes(60)] == [a, 0, 0, b, 0, b]
    assert state.crashes(-1) == []
    for _ in range(CRASHES):
        state.note_crash()
    assert [crash.inode for crash in state.crashes(60)] == [0] * CRASHES
    state.forget_crashes()
    assert successor_of(state).crashes(60) == []


def test_the_agreement_counts_when_it_is_whole(state: MountState) -> None:
    assert state.agreed is None
    state.agree(b"request" * 10, b"reply" * 16)
    assert successor_of(state).agreed == (b"request" * 10, b"reply" * 16)
    state.forget_connection()
    assert successor_of(state).agreed is None


def test_only_one_daemon_serves_a_mount_at_a_time(state: MountState) -> None:
    state.wait_alone()
    after = successor_of(state)
    waiting = threading.Thread(target=after.wait_alone)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    os.close(state._alone)  # what the end of the process does
    waiting.join(10)
    assert not waiting.is_alive()
