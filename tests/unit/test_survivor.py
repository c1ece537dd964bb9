"""Survivor memory and kept descriptors: what a successor finds, what is void, and what is another version's."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs import notify
from cachefs.errors import LayoutError
from cachefs.survivor import HEAD, MAGIC, Survivors, bump_epoch, read_epoch

STORE = uuid.UUID(int=7)


def successor_of(survivors: Survivors) -> Survivors:
    return Survivors([(name, os.dup(descriptor)) for name, descriptor in survivors.kept()])


def make(folder: Path, survivors: Survivors, content: bytes = b"acknowledged") -> None:
    memory = survivors.memory("map", {1}, STORE, 8192, folder / "epoch")
    memory.body[: len(content)] = content
    survivors.keep({memory.name: memory.descriptor})


def test_a_successor_finds_what_was_written(tmp_path: Path) -> None:
    first = Survivors()
    make(tmp_path, first)
    found = successor_of(first).memory("map", {1, 2}, STORE, 8192, tmp_path / "epoch")
    assert found.is_inherited
    assert bytes(found.body[:13]) == b"acknowledged\0"
    assert read_epoch(tmp_path / "epoch") == 1


@pytest.mark.logs("map.*: memory of an earlier opening is void")
def test_a_memory_of_an_old_epoch_is_void(tmp_path: Path) -> None:
    first = Survivors()
    make(tmp_path, first)
    bump_epoch(tmp_path / "epoch")  # somebody opened the store without it
    second = successor_of(first)
    found = second.memory("map", {1}, STORE, 8192, tmp_path / "epoch")
    assert not found.is_inherited
    assert not any(found.body)
    assert read_epoch(tmp_path / "epoch") == 3
    assert not second.kept()


@pytest.mark.logs("map.*: memory of an earlier opening is void")
@pytest.mark.parametrize("field", ["magic", "kind", "store", "boot"])
def test_a_memory_of_another_is_void(tmp_path: Path, field: str) -> None:
    first = Survivors()
    make(tmp_path, first)
    ((_, descriptor),) = first.kept()
    offset = {"magic": 0, "kind": 8, "store": 24, "boot": 40}[field]
    os.pwrite(descriptor, b"\xff", offset)
    assert not successor_of(first).memory("map", {1}, STORE, 8192, tmp_path / "epoch").is_inherited


def test_a_memory_of_another_layout_waits_for_its_version(tmp_path: Path) -> None:
    first = Survivors()
    make(tmp_path, first)
    second = successor_of(first)
    with pytest.raises(LayoutError, match=r"layout 1; this version reads 2, 3"):
        second.memory("map", {2, 3}, STORE, 8192, tmp_path / "epoch")
    assert second.memory("map", {1}, STORE, 8192, tmp_path / "epoch").is_inherited
    assert read_epoch(tmp_path / "epoch") == 1


def test_a_memory_that_was_not_kept_is_nobodys(tmp_path: Path) -> None:
    first = Survivors()
    first.memory("map", {1}, STORE, 8192, tmp_path / "epoch")  # killed before it was filled
    second = successor_of(first).memory("map", {1}, STORE, 8192, tmp_path / "epoch")
    assert not second.is_inherited


def test_what_is_released_or_dropped_is_not_inherited(tmp_path: Path) -> None:
    first = Survivors()
    make(tmp_path, first)
    second = successor_of(first)
    memory = second.memory("map", {1}, STORE, 8192, tmp_path / "epoch")
    second.release(memory)
    assert successor_of(second).untaken() == set()
    third = successor_of(first)
    third.drop(["map.unknown", *third.untaken()])
    assert third.kept() == []


def test_only_touched_parts_of_a_memory_are_told(tmp_path: Path) -> None:
    memory = Survivors().memory("map", {1}, STORE, 1 << 30, tmp_path / "epoch")
    memory.body[5 << 20] = memory.body[900 << 20] = 1
    parts = list(memory.touched(0, 1 << 30))
    assert [start <= place < end for (start, end), place in zip(parts, (5 << 20, 900 << 20), strict=True)] == [True] * 2
    assert sum(end - start for start, end in parts) <= 4 << 20  # huge pages, where there are any
    assert list(memory.touched(6 << 20, 800 << 20)) == []
    assert os.fstat(memory.descriptor).st_blocks * 512 <= 8 << 20


# ---- the keeper


class Keeper:
    """The receiving end of $NOTIFY_SOCKET. deaf: it takes datagrams in and never answers a barrier."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.messages: list[tuple[dict[str, str], list[int]]] = []
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while True:
            message, descriptors, _, _ = socket.recv_fds(self.socket, 4096, 16)
            if not message:
                return
            fields = dict(line.split("=", 1) for line in message.decode().split("\n"))
            self.messages.append((fields, descriptors))
            if "BARRIER" in fields:
                os.close(descriptors.pop())

    def close(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.sendto(b"", str(path))
        self.thread.join()
        self.socket.close()
        for _, descriptors in self.messages:
            for descriptor in descriptors:
                os.close(descriptor)


@pytest.fixture
def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    path = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    made = Keeper(path)
    yield made
    made.close(path)


def test_the_keeper_has_a_descriptor_when_keep_returns(keeper: Keeper) -> None:
    survivors = Survivors()
    with open(os.devnull) as file:
        survivors.keep({"data.1": file.fileno()})
        (stored, (copy,)), (barrier, _) = keeper.messages
        assert stored == {"FDSTORE": "1", "FDNAME": "data.1", "FDPOLL": "0"}
        assert os.path.sameopenfile(copy, file.fileno())
        assert barrier == {"BARRIER": "1"}
        survivors.drop(["data.1", "data.2"])
        survivors.drop(["data.1"])
    with contextlib.suppress(TimeoutError):
        survivors.keep({})  # a barrier: all before it has arrived
    assert [fields for fields, _ in keeper.messages[2:-1]] == [{"FDSTOREREMOVE": "1", "FDNAME": "data.1"}]


@pytest.mark.logs("whoever keeps this daemon alive does not answer")
def test_a_keeper_that_is_gone_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    survivors = Survivors()
    assert survivors.keeper_answers
    survivors.keep({"data.1": 0})
    assert not survivors.keeper_answers


def test_a_keeper_that_hangs_does_not_hang_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket is full after a few signs of life, and another one waited for room, for ever, in the event loop."""
    path = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    most = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as keeper:
        keeper.bind(str(path))
        for _ in range(most + 5):
            assert notify.say(WATCHDOG="1")
        monkeypatch.setattr(notify, "PATIENCE_S", 0.05)
        assert not notify.notify(READY="1")
        assert not notify.barrier()
    assert not notify.say(WATCHDOG="1")


def test_what_is_kept_already_is_not_sent_again(keeper: Keeper) -> None:
    survivors = Survivors()
    for descriptors in ({"data.1": 0}, {"data.1": 0, "data.2": 1}, {"data.2": 1}):
        survivors.keep(descriptors)
    assert [fields["FDNAME"] for fields, _ in keeper.messages if "FDSTORE" in fields] == ["data.1", "data.2"]
    assert sum("BARRIER" in fields for fields, _ in keeper.messages) == 2


def test_the_head_is_what_its_table_says(tmp_path: Path) -> None:
    memory = Survivors().memory("map", {1}, STORE, 100, tmp_path / "epoch")
    magic, kind, layout, store, _, epoch, length = HEAD.unpack(os.pread(memory.descriptor, HEAD.size, 0))
    assert (magic, kind, layout, store, epoch, length) == (MAGIC, b"map\0\0\0\0\0", 1, STORE.bytes, 1, 100)


def test_a_barrier_works_beyond_the_1024th_descriptor(keeper: Keeper) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(most[0], min(most[1], 4096)), most[1]))
    held = [os.dup(0) for _ in range(1100)]
    try:
        assert max(held) > 1024
        assert notify.barrier()
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, most)
