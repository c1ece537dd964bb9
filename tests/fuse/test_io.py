"""Much I/O through a real mount: fio that verifies what it reads, and file systems on a loop device over a disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loopmounts import FILE_SYSTEMS, loop_device, mounted_at, need, run

MIB = 1 << 20
KIB64 = 64 << 10
ROOT = Path(__file__).parents[2]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stack(base: Path, *, cow: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    """One disk, vm1, over *base*."""
    disk = {"layers": [{"cow": cow or {}}], "backend": {"file": {"path": str(base)}}, **keys}
    return {"disks": {"vm1": disk}}


def make_base(folder: Path, size: int) -> Path:
    """Random data in the first megabyte of every four; holes between."""
    path = folder / "base.raw"
    with path.open("wb") as file:
        file.truncate(size)
        for offset in range(0, size, 4 * MIB):
            file.seek(offset)
            file.write(os.urandom(min(MIB, size - offset)))
    return path


def has_io_uring() -> bool:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/io_uring_disabled").read_text().strip() == "0"
    return False


needs_io_uring = pytest.mark.skipif(not has_io_uring(), reason="the kernel refuses io_uring")


def fio(path: Path, *options: str) -> Any:
    need("fio")
    text = run(
        "fio",
        "--name=job",
        f"--filename={path}",
        "--output-format=json",
        "--randseed=7",
        "--allrandrepeat=1",
        *options,
        cwd=path.parent.parent,  # where it may leave its files
    )
    return json.loads(text[text.index("{") :])["jobs"][0]


MIXED = ("--rw=randrw", "--bsrange=512-128k", "--blockalign=512", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1")


# ---- fio


@pytest.mark.slow
@pytest.mark.parametrize(
    ("disk", "engine", "direct"),
    [
        ("cow", "libaio", 1),
        ("cow", "libaio", 0),
        ("cow", "psync", 1),
        pytest.param("cow", "io_uring", 1, marks=needs_io_uring),
        ("page cache", "libaio", 1),
        ("page cache", "libaio", 0),
        ("page cache", "psync", 0),
        ("large blocks", "libaio", 1),
        ("file", "libaio", 1),
        ("memory", "libaio", 1),
    ],
)
def test_fio_reads_back_what_it_wrote(mount: Any, tmp_path: Path, disk: str, engine: str, direct: int) -> None:
    size = 24 * MIB + 512  # no whole number of blocks
    base = make_base(tmp_path, size)
    before = digest(base)
    configs: dict[str, dict[str, Any]] = {
        "cow": stack(base),
        "large blocks": stack(base, cow={"block_size": "64KiB"}),
        "page cache": stack(base, page_cache=True),
        "file": {"disks": {"vm1": {"backend": {"file": {"path": str(base)}}}}},
        "memory": {"disks": {"vm1": {"backend": {"memory": {"size": size}}}}},
    }
    mounted = mount(configs[disk])
    job = fio(
        mounted.path / "vm1", f"--size={size}", *MIXED, "--io_size=24M", f"--ioengine={engine}", f"--direct={direct}"
    )
    assert job["error"] == 0
    assert job["write"]["total_ios"] > 50
    assert mounted.status()["daemon"]["internal_errors"] == 0
    contents = digest(mounted.path / "vm1")
    if disk != "memory":
        mounted.umount()
        assert digest(mount(configs[disk]).path / "vm1") == contents
    if disk != "file":
        assert digest(base) == before


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["libaio", pytest.param("io_uring", marks=needs_io_uring), "psync"])
@pytest.mark.parametrize("page_cache", [False, True])
def test_no_attributes_are_asked_for_during_io(mount: Any, tmp_path: Path, engine: str, page_cache: bool) -> None:
    mounted = mount(stack(make_base(tmp_path, 16 * MIB), page_cache=page_cache))
    before = mounted.status()["daemon"]["requests"]
    fio(
        mounted.path / "vm1",
        *("--size=16M", "--rw=randrw", "--bs=4k", "--number_ios=6000", "--norandommap", "--io_size=64M", "--direct=1"),
        *(f"--ioengine={engine}", "--iodepth=16"),
    )
    after = mounted.status()["daemon"]["requests"]
    counts = {name: count - before.get(name, 0) for name, count in after.items()}
    assert counts["READ"] + counts["WRITE"] >= 6000
    others = {name: count for name, count in counts.items() if name not in ("READ", "WRITE")}
    assert sum(others.values()) < 50, counts


# ---- durability


@pytest.mark.parametrize("flag", ["O_DSYNC", "O_SYNC"])
@pytest.mark.parametrize(
    "engine",
    [
        "plain",
        pytest.param("libaio", marks=pytest.mark.slow),
        pytest.param("io_uring", marks=[needs_io_uring, pytest.mark.slow]),
    ],
)
def test_a_synchronous_direct_write_is_flushed_before_its_reply(
    mount: Any, tmp_path: Path, flag: str, engine: str, wait_until: Callable[..., Any]
) -> None:
    mounted = mount(stack(make_base(tmp_path, MIB)))
    disk = mounted.path / "vm1"
    if engine == "plain":
        descriptor = os.open(disk, os.O_RDWR | os.O_DIRECT | getattr(os, flag))
        with mmap.mmap(-1, 4096) as page:
            for block in range(10):
                assert os.pwritev(descriptor, [page], block * 4096) == 4096
        os.close(descriptor)
    else:
        sync = {"O_DSYNC": "dsync", "O_SYNC": "sync"}[flag]
        fio(
            disk,
            *("--size=40k", "--bs=4k", "--rw=write", "--direct=1", f"--sync={sync}", f"--ioengine={engine}"),
        )
    # the round is counted just after its reply
    wait_until(lambda: mounted.layer("vm1")["flush_rounds"] == 10, "ten rounds")
    assert mounted.layer("vm1")["dirty_map_sectors"] == 0


def test_a_plain_write_is_not_flushed_and_close_flushes_nothing(mount: Any, tmp_path: Path) -> None:
    mounted = mount(stack(make_base(tmp_path, MIB)))
    with (mounted.path / "vm1").open("r+b", buffering=0) as file:
        file.write(b"x" * 4096)
    assert mounted.layer("vm1")["flush_rounds"] == 0
    assert mounted.layer("vm1")["dirty_map_sectors"] == 1


@pytest.mark.parametrize("sync", [os.fsync, os.fdatasync])
@pytest.mark.parametrize("page_cache", [False, True])
def test_fsync_is_a_flush(
    mount: Any, tmp_path: Path, sync: Callable[[int], None], page_cache: bool, wait_until: Callable[..., Any]
) -> None:
    mounted = mount(stack(make_base(tmp_path, MIB), page_cache=page_cache))
    with (mounted.path / "vm1").open("r+b", buffering=0) as file:
        file.write(b"x" * 4096)
        sync(file.fileno())
    wait_until(lambda: mounted.layer("vm1")["flush_rounds"] == 1, "one round")
    assert mounted.layer("vm1")["dirty_map_sectors"] == 0


# ---- file systems


def make_tree(folder: Path) -> Path:
    """Files of many sizes, 24 MiB in all, for `digests`."""
    tree = folder / "tree"
    for number in range(60):
        path = tree / f"{number % 7}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(number * 4001))
    (tree / "big").write_bytes(os.urandom(16 * MIB))
    return tree


def digests(tree: Path) -> dict[str, str]:
    return {str(path.relative_to(tree)): digest(path) for path in sorted(tree.rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("page_cache", [False, True], ids=["direct", "page_cache"])
@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_a_file_system_lives_on_a_disk(
    mount: Any, tmp_path: Path, kind: str, page_cache: bool, wait_until: Callable[..., Any]
) -> None:
    make, check, size = FILE_SYSTEMS[kind]
    need(make[0], check[0])
    if kind not in Path("/proc/filesystems").read_text() and run("sh", "-c", f"modprobe {kind} || true") == "":
        pytest.skip(f"the kernel has no {kind}")
    base = make_base(tmp_path, size)
    before = digest(base)
    tree = make_tree(tmp_path)
    config = stack(base, page_cache=page_cache)
    mounted = mount(config)
    data = tmp_path / "state" / "overlays" / "vm1" / "data"

    with loop_device(mounted.path / "vm1") as device:
        run(*make, device)
        with mounted_at(device, tmp_path / "root") as root:
            shutil.copytree(tree, root / "tree")
            os.sync()
            assert digests(root / "tree") == digests(tree)
            filled = data.stat().st_blocks * 512
            assert filled >= 20 * MIB
            (root / "tree" / "big").unlink()
            os.sync()

            def is_freed() -> bool:
                run("fstrim", root)  # again, because xfs gives up the extents of a deleted file only after a while
                return data.stat().st_blocks * 512 < filled - 12 * MIB

            wait_until(is_freed, "the overlay's space", timeout=20)
        run(*check, device)
    mounted.umount()

    assert digest(base) == before
    again = mount(config)
    with loop_device(again.path / "vm1") as device:
        run(*check, device)
        with mounted_at(device, tmp_path / "root") as root:
            expected = digests(tree)
            expected.pop("big")
            assert digests(root / "tree") == expected
    assert digest(base) == before


@pytest.mark.parametrize("page_cache", [False, True])
def test_read_ahead_and_random_reads_see_the_same_bytes(mount: Any, tmp_path: Path, page_cache: bool) -> None:
    base = make_base(tmp_path, 5 * MIB + 1000)
    mounted = mount(stack(base, page_cache=page_cache))
    expected = bytearray(base.read_bytes())
    with (mounted.path / "vm1").open("r+b", buffering=0) as file:
        assert file.read() == expected
        for offset in range(100, len(expected) - KIB64, 300_007):  # odd places, some in data, some in holes
            os.pwrite(file.fileno(), b"\x5a" * 3001, offset)
            expected[offset : offset + 3001] = b"\x5a" * 3001
            assert os.pread(file.fileno(), KIB64, offset - 50) == expected[offset - 50 : offset - 50 + KIB64]
    with (mounted.path / "vm1").open("rb") as file:  # in small pieces, in order
        assert b"".join(iter(lambda: file.read(8192), b"")) == expected
