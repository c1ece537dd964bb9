"""Disks whose mount is there before their stacks are: requests wait, or fail, and go on; other disks do not notice."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml

from cachefs import disks as disks_module
from cachefs.config import load
from cachefs.disk import DiskState
from cachefs.disks import Disks
from cachefs.errors import BackendError, StoreError
from cachefs.store import blockstore
from cachefs.survivor import Survivors

SIZE = 1 << 16


def config(folder: Path, *names: str) -> Any:
    disks = {
        name: {"layers": [{"cow": {}}], "backend": {"file": {"path": str(folder / f"{name}.raw")}}} for name in names
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"state_dir": str(folder / "state"), "disks": disks}))
    return load(file)


def make_base(folder: Path, name: str, size: int = SIZE) -> None:
    (folder / f"{name}.raw").write_bytes(b"base" * (size // 4))


@asynccontextmanager
async def running(disks: Disks) -> AsyncIterator[None]:
    with trio.fail_after(20):
        async with disks.running():
            yield


async def read(disks: Disks, name: str) -> bytes:
    found = bytearray(4)
    await disks.disks[name].top.read_into(0, memoryview(found))
    return bytes(found)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.lowlevel.checkpoint()


def left_by(survivors: Survivors) -> Survivors:
    return Survivors([(name, os.dup(descriptor)) for name, descriptor in survivors.kept()])


@pytest.mark.logs("vm1 cannot be opened")
async def test_requests_wait_until_their_disk_can_be_opened_and_others_do_not(tmp_path: Path) -> None:
    make_base(tmp_path, "vm2")
    disks = Disks(config(tmp_path, "vm1", "vm2"), None, Survivors(), known={"vm1": SIZE, "vm2": SIZE})
    got: list[bytes] = []
    async with running(disks), trio.open_nursery() as nursery:

        async def wait() -> None:
            got.append(await read(disks, "vm1"))

        nursery.start_soon(wait)
        assert await read(disks, "vm2") == b"base"
        await disks.wait_tried()
        status = disks.disks["vm1"].status()
        assert status["state"] == "opening"
        assert "vm1.raw" in str(status["waits_for"])
        assert disks.disks["vm1"].size == SIZE
        assert not got
        make_base(tmp_path, "vm1")
        await until(lambda: bool(got))
        assert disks.disks["vm1"].state is DiskState.SERVING
    assert got == [b"base"]


@pytest.mark.logs("vm1 cannot be opened")
async def test_requests_fail_when_their_disk_cannot_be_opened_for_long_and_go_on_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks_module, "PATIENCE_S", 0.0)
    disks = Disks(config(tmp_path, "vm1"), None, Survivors(), known={"vm1": SIZE})
    async with running(disks):
        with pytest.raises(BackendError, match=r"cannot open .*vm1\.raw"):
            await read(disks, "vm1")
        with pytest.raises(BackendError):
            await disks.disks["vm1"].top.flush()
        assert disks.disks["vm1"].state is DiskState.REFUSED
        make_base(tmp_path, "vm1")
        await until(lambda: disks.disks["vm1"].state is DiskState.SERVING)
        assert await read(disks, "vm1") == b"base"


@pytest.mark.logs("vm1 cannot be opened")
async def test_a_disk_of_another_size_than_the_mount_shows_is_not_served(tmp_path: Path) -> None:
    make_base(tmp_path, "vm1")
    disks = Disks(config(tmp_path, "vm1"), None, Survivors(), known={"vm1": 2 * SIZE})
    async with running(disks):
        await disks.wait_tried()
        assert "while it is mounted it has 131072" in str(disks.disks["vm1"].status()["waits_for"])


@pytest.mark.logs("vm1 cannot be opened")
async def test_memory_of_another_version_keeps_its_disk_waiting_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_base(tmp_path, "vm1")
    made = config(tmp_path, "vm1")
    survivors = Survivors()
    first = Disks(made, None, survivors)
    async with running(first):
        await first.disks["vm1"].top.write(0, memoryview(b"acknowledged"))
        left = left_by(survivors)
    monkeypatch.setattr("cachefs.store.files.fcntl.flock", lambda *_: None)
    with monkeypatch.context() as other_version:
        other_version.setattr(blockstore, "LAYOUT", 2)
        other_version.setattr(disks_module, "PATIENCE_S", 0.0)
        second = Disks(made, None, left, known={"vm1": SIZE})
        async with running(second):
            await second.wait_tried()
            await until(lambda: "layout" in str(second.disks["vm1"].status().get("waits_for")))
            status = second.disks["vm1"].status()
            assert status["state"] == "opening"
            assert "memory of layout 1; this version reads 2" in str(status["waits_for"])
    third = Disks(made, None, left_by(left), known={"vm1": SIZE})
    async with running(third):
        assert await read(third, "vm1") == b"ackn"


async def test_a_disk_that_is_refused_is_not_touched(tmp_path: Path) -> None:
    disks = Disks(config(tmp_path, "vm1"), None, Survivors(), known={"vm1": SIZE}, refused={"vm1": "it is the culprit"})
    async with running(disks):
        await disks.wait_tried()
        with pytest.raises(BackendError, match="it is the culprit"):
            await read(disks, "vm1")
    assert not (tmp_path / "state").exists()


async def test_a_new_disk_is_shown_when_it_is_open(tmp_path: Path) -> None:
    make_base(tmp_path, "vm1")
    make_base(tmp_path, "vm2")
    disks = Disks(config(tmp_path, "vm1", "vm2"), None, Survivors(), known={"vm1": SIZE})
    shown: list[str] = []
    disks.on_new = lambda disk: shown.append(disk.name)
    async with running(disks):
        assert "vm2" not in disks.disks
        await disks.wait_tried()
        assert shown == ["vm2"]
        assert await read(disks, "vm2") == b"base"


async def test_at_a_first_mount_everything_must_open(tmp_path: Path) -> None:
    make_base(tmp_path, "vm2")
    disks = Disks(config(tmp_path, "vm1", "vm2", "vm3"), None, Survivors())
    with pytest.raises(ExceptionGroup) as caught:
        async with running(disks):
            pass
    group = caught.group_contains(StoreError, match=r"(?s)vm1\.raw.*vm3\.raw")
    assert group
