from __future__ import annotations

import os
from pathlib import Path

import pytest

from cachefs.store.identity import SAMPLE_SIZE, SAMPLES, Identity, identity_of_device, identity_of_file


def identify(path: Path) -> Identity:
    with path.open("rb") as file:
        return identity_of_file(file.fileno())


def test_file_is_its_size_time_and_inode_wherever_it_lies(tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    image.write_bytes(b"x" * 1000)
    before = identify(image)
    moved = image.rename(tmp_path / "b.raw")
    assert before.changes(identify(moved)) == []
    moved.read_bytes()
    assert before == identify(moved)


def test_change_of_a_file_is_told_in_words(tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    image.write_bytes(b"x" * 1000)
    before = identify(image)
    os.utime(image, ns=(0, 12345))
    (change,) = before.changes(identify(image))
    assert change == f"modification time was {before.facts['modification time']}, is 12345"
    os.truncate(image, 2000)
    os.utime(image, ns=(0, int(before.facts["modification time"])))
    assert before.changes(identify(image)) == ["size was 1000, is 2000"]
    copy = tmp_path / "copy"
    copy.write_bytes(b"x" * 1000)
    os.utime(copy, ns=(0, int(before.facts["modification time"])))
    (change,) = before.changes(identify(copy))
    assert change.startswith("inode was ")


def test_another_kind_of_base_is_another_base() -> None:
    assert Identity("file", {"size": "1"}).changes(Identity("memory", {"size": "1"})) == ["it was a file, is a memory"]


def test_fact_that_only_one_of_them_knows_is_a_change() -> None:
    assert Identity("x", {}).changes(Identity("x", {"etag": "1"})) == ["etag was unknown, is 1"]
    assert Identity("x", {"etag": "1"}).changes(Identity("x", {})) == ["etag was 1, is unknown"]


@pytest.mark.parametrize("size", [SAMPLE_SIZE * 100, 130000, 5000, 4096, 100])
def test_device_is_its_size_and_samples_from_first_to_last_byte(tmp_path: Path, size: int) -> None:
    image = tmp_path / "device"
    image.write_bytes(bytes(size))
    with image.open("r+b") as file:
        before = identity_of_device(file.fileno(), size)
        for at in (0, size - 1):
            os.pwrite(file.fileno(), b"x", at)
            (change,) = before.changes(identity_of_device(file.fileno(), size))
            assert change.startswith("content sample was ")
            os.pwrite(file.fileno(), b"\0", at)
        assert before == identity_of_device(file.fileno(), size)
        assert "size was" in before.changes(identity_of_device(file.fileno(), size - 1))[-1]


def test_samples_are_spread_over_the_device(tmp_path: Path) -> None:
    size = SAMPLE_SIZE * SAMPLES * 4
    image = tmp_path / "device"
    image.write_bytes(bytes(size))
    with image.open("r+b") as file:
        before = identity_of_device(file.fileno(), size)
        noticed = 0
        for quarter in range(SAMPLES * 4):
            os.pwrite(file.fileno(), b"x" * SAMPLE_SIZE, quarter * SAMPLE_SIZE)
            noticed += identity_of_device(file.fileno(), size) != before
            os.pwrite(file.fileno(), bytes(SAMPLE_SIZE), quarter * SAMPLE_SIZE)
    assert SAMPLES <= noticed <= 2 * SAMPLES
