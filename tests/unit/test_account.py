"""The bytes of a pool."""

from __future__ import annotations

import pytest

from cachefs.pool.account import POOL_BYTES, Account

MIB = 1 << 20


def test_one_percent_is_left_to_the_file_system() -> None:
    account = Account(100 * MIB)
    assert account.limit == 99 * MIB
    assert account.free == 99 * MIB - POOL_BYTES


def test_take_takes_what_fits_and_nothing_else() -> None:
    account = Account(100 * MIB)
    assert not account.take(100 * MIB)
    assert account.used == POOL_BYTES
    assert account.take(account.free)
    assert not account.take(1)
    assert account.take(0)
    account.give_back(10)
    assert account.take(10)
    assert account.used == account.limit


def test_what_is_there_counts_whether_it_fits_or_not() -> None:
    account = Account(MIB)
    account.add(5 * MIB)
    assert account.free < 0
    assert not account.take(1)
    assert account.wants_room
    account.give_back(5 * MIB)
    assert account.take(1)


def test_more_cannot_be_given_back_than_was_taken() -> None:
    account = Account(MIB)
    with pytest.raises(AssertionError, match="gave back more than it took"):
        account.give_back(POOL_BYTES + 1)


def test_room_is_wanted_below_one_mark_and_made_up_to_another() -> None:
    account = Account(100 * MIB)
    assert account.has_enough
    assert not account.wants_room
    assert account.take(account.free - account.enough_free + 1)
    assert not account.has_enough
    assert not account.wants_room
    assert account.take(account.free - account.least_free + 1)
    assert account.wants_room


@pytest.mark.parametrize("quota", [100 << 10, MIB, 16 * MIB, 1 << 30, 1 << 40])
def test_marks_leave_most_of_the_pool_to_use(quota: int) -> None:
    account = Account(quota)
    assert 0 < account.least_free < account.enough_free <= account.limit // 4


def test_file_system_that_has_less_to_spare_bounds_the_pool() -> None:
    account = Account(100 * MIB)
    assert account.take(50 * MIB)
    account.withhold(10 * MIB)
    assert account.free == 10 * MIB
    account.withhold(-MIB)
    assert account.free == -MIB
    account.give_back(2 * MIB)
    assert account.free == MIB
    account.withhold(1000 * MIB)
    assert account.free == account.limit - account.used
