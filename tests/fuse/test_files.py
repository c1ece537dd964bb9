"""What the file that is a disk says of itself, and what it refuses."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

MIB = 1 << 20
SIZE = 8 * MIB
FRESH = 40  # disks, one for each test that wants one
KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE = 0x01, 0x02, 0x08, 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(descriptor, mode, offset, length) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def pattern(length: int) -> bytes:
    """Bytes that differ everywhere, zeros nowhere."""
    return b"".join(b"%07x\n" % number for number in range(length // 8))


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "LC_ALL": "C"},
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 MiB of data at 0 and at 4 MiB, holes between."""
    path = tmp_path_factory.mktemp("base") / "base.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset in (0, 4 * MIB):
            file.seek(offset)
            file.write(pattern(MIB))
    return path


@pytest.fixture(scope="module")
def mounted(module_mount: Any, base: Path) -> Any:
    over_base: dict[str, Any] = {"image": "base", "layers": [{"cow": {}}]}
    disks: dict[str, Any] = {f"fresh{number}": over_base for number in range(FRESH)}
    disks["odd"] = {"backend": {"memory": {"size": 130000}}}
    disks["shared"] = {**over_base, "mode": "0640", "uid": 65534, "gid": 65533}
    disks["golden"] = {"image": "base"}
    disks["empty"] = {"backend": {"memory": {"size": SIZE}}}
    disks["cached"] = {**over_base, "page_cache": True}
    return module_mount({"images": {"base": {"backend": {"file": {"path": str(base)}}}}, "disks": disks})


_numbers = iter(range(FRESH))


@pytest.fixture
def disk(mounted: Any) -> Path:
    """A disk that nobody has touched."""
    return Path(mounted.path / f"fresh{next(_numbers)}")


@pytest.fixture
def descriptor(disk: Path) -> Iterator[int]:
    found = os.open(disk, os.O_RDWR)
    yield found
    os.close(found)


# ---- what stat says


def test_directory_lists_the_disks_and_nothing_else(mounted: Any) -> None:
    expected = {f"fresh{number}" for number in range(FRESH)} | {"odd", "shared", "golden", "empty", "cached"}
    assert set(os.listdir(mounted.path)) == expected


@pytest.mark.parametrize(("name", "size"), [("odd", 130000), ("golden", SIZE)])
def test_size_is_exact(mounted: Any, name: str, size: int) -> None:
    path = mounted.path / name
    assert path.stat().st_size == size
    assert len(path.read_bytes()) == size


def test_a_disk_is_a_regular_file_for_its_owner_only(disk: Path) -> None:
    found = disk.stat()
    assert stat.S_ISREG(found.st_mode)
    assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (0o600, os.getuid(), os.getgid())


def test_mode_and_owner_are_as_configured(mounted: Any) -> None:
    found = (mounted.path / "shared").stat()
    assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (0o640, 65534, 65533)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("name", "uid", "gid", "may"),
    [
        ("golden", 65534, 65534, ""),
        ("shared", 65534, 65534, "rw"),
        ("shared", 1234, 65533, "r"),
        ("shared", 1234, 1234, ""),
    ],
)
def test_permissions_hold_for_other_users(mounted: Any, name: str, uid: int, gid: int, may: str) -> None:
    # the way to the mountpoint is open to root only, so they start inside
    script = 'exec 2>/dev/null; (: <"$0") && printf r; (: >>"$0") && printf w; exit 0'
    ids = ("--reuid", str(uid), "--regid", str(gid), "--clear-groups")
    done = subprocess.run(
        ["setpriv", *ids, "sh", "-c", script, name], cwd=mounted.path, capture_output=True, text=True, check=True
    )
    assert done.stdout == may


@pytest.mark.parametrize("name", ["golden", "empty", "odd", "cached"])
def test_blocks_are_never_none(mounted: Any, name: str) -> None:
    assert (mounted.path / name).stat().st_blocks >= 8


def test_blocks_tell_what_overlay_and_base_hold(disk: Path, base: Path, wait_until: Callable[..., Any]) -> None:
    held = base.stat().st_blocks
    assert abs(disk.stat().st_blocks - held) <= 8
    with disk.open("r+b") as file:
        file.write(pattern(2 * MIB))
    wait_until(lambda: disk.stat().st_blocks >= held + 2 * MIB // 512, "attributes are brought up to date", timeout=5)


def test_mtime_moves_with_writes_and_only_with_them(disk: Path, wait_until: Callable[..., Any]) -> None:
    before = disk.stat().st_mtime_ns
    assert disk.read_bytes()[:8] == pattern(8)
    with disk.open("r+b") as file:
        assert os.fstat(file.fileno()).st_mtime_ns == before
        started = time.time_ns()
        file.write(b"x")
        file.flush()
        wait_until(lambda: disk.stat().st_mtime_ns > before, "mtime", timeout=5)
    # the kernel's clock that file systems use ticks every few milliseconds
    assert started - 50_000_000 < disk.stat().st_mtime_ns < time.time_ns()


def test_mtime_can_be_set(disk: Path) -> None:
    os.utime(disk, ns=(10**18, 10**18))
    assert disk.stat().st_mtime_ns == 10**18


# ---- copies


def test_tar_sparse_archives_the_contents_of_a_fresh_disk(disk: Path, base: Path, tmp_path: Path) -> None:
    run("tar", "-S", "-C", disk.parent, "-cf", tmp_path / "disk.tar", disk.name)
    run("tar", "-C", tmp_path, "-xf", tmp_path / "disk.tar")
    assert (tmp_path / disk.name).read_bytes() == base.read_bytes()
    assert (tmp_path / "disk.tar").stat().st_size < 3 * MIB  # the holes are not in it


def test_tar_sparse_archives_a_disk_that_holds_next_to_nothing(mounted: Any, tmp_path: Path) -> None:
    with (mounted.path / "odd").open("r+b") as file:
        file.seek(5000)
        file.write(b"here")
    run("tar", "-S", "-C", mounted.path, "-cf", tmp_path / "disk.tar", "odd")
    run("tar", "-C", tmp_path, "-xf", tmp_path / "disk.tar")
    assert (tmp_path / "odd").read_bytes() == (mounted.path / "odd").read_bytes()


def test_rsync_copies_a_fresh_disk_and_later_what_changed(
    disk: Path, base: Path, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    need("rsync")
    copy = tmp_path / "copy"
    run("rsync", "-a", disk, copy)
    assert copy.read_bytes() == base.read_bytes()
    before = disk.stat().st_mtime_ns
    with disk.open("r+b") as file:
        file.seek(3 * MIB)
        file.write(b"changed")
    wait_until(lambda: disk.stat().st_mtime_ns > before, "mtime", timeout=5)
    # rsync compares whole seconds
    os.utime(copy, ns=(before - 2 * 10**9, before - 2 * 10**9))
    run("rsync", "-a", disk, copy)
    assert copy.read_bytes() == disk.read_bytes()
    assert copy.stat().st_mtime_ns == disk.stat().st_mtime_ns


def test_cp_sparse_keeps_holes(disk: Path, base: Path, tmp_path: Path) -> None:
    run("cp", "--sparse=auto", disk, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == base.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 <= 2 * MIB + 64 * 1024


def test_dd_writes_into_a_disk_with_notrunc(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(bytes(range(256)) * 4096)
    run("dd", f"if={tmp_path / 'new'}", f"of={disk}", "bs=64K", "conv=notrunc", "seek=16")
    assert disk.read_bytes()[MIB : 2 * MIB] == (tmp_path / "new").read_bytes()


def test_dd_without_notrunc_is_refused_and_changes_nothing(disk: Path, base: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run("dd", "if=/dev/zero", f"of={disk}", "bs=64K", "count=1")
    assert "Operation not permitted" in caught.value.stderr
    assert disk.read_bytes() == base.read_bytes()


def test_qemu_img_convert_reads_a_disk_and_writes_one(disk: Path, mounted: Any, base: Path, tmp_path: Path) -> None:
    need("qemu-img")
    copy = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, copy)
    run("qemu-img", "compare", copy, base)
    target = mounted.path / f"fresh{next(_numbers)}"
    with target.open("r+b") as file:
        file.write(b"\xff" * SIZE)
    run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", copy, target)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", target, base)


def test_qemu_img_map_shows_holes(disk: Path) -> None:
    need("qemu-img")
    found = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", disk).stdout)
    data = [(part["start"], part["length"]) for part in found if part["data"]]
    assert data == [(0, MIB), (4 * MIB, MIB)]
    assert sum(part["length"] for part in found) == SIZE


# ---- what is refused


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda disk: (disk.parent / "new").touch(), id="create"),
        pytest.param(lambda disk: disk.unlink(), id="unlink"),
        pytest.param(lambda disk: disk.rename(disk.parent / "other"), id="rename"),
        pytest.param(lambda disk: disk.rename(disk.parent / "golden"), id="rename over another"),
        pytest.param(lambda disk: (disk.parent / "folder").mkdir(), id="mkdir"),
        pytest.param(lambda disk: (disk.parent / "link").symlink_to(disk), id="symlink"),
        pytest.param(lambda disk: os.link(disk, disk.parent / "link"), id="link"),
        pytest.param(lambda disk: os.mkfifo(disk.parent / "pipe"), id="mknod"),
        pytest.param(lambda disk: os.truncate(disk, SIZE - 1), id="shrink"),
        pytest.param(lambda disk: os.truncate(disk, SIZE + 1), id="grow"),
        pytest.param(lambda disk: os.truncate(disk, 0), id="empty"),
        pytest.param(lambda disk: os.close(os.open(disk, os.O_WRONLY | os.O_TRUNC)), id="O_TRUNC"),
        pytest.param(lambda disk: disk.chmod(0o666), id="chmod"),
        pytest.param(lambda disk: os.chown(disk, 1, 1), id="chown"),
        pytest.param(lambda disk: os.setxattr(disk, "user.cachefs.status", b"{}"), id="setxattr"),
        pytest.param(lambda disk: os.removexattr(disk, "user.cachefs.status"), id="removexattr"),
    ],
)
def test_changes_of_the_directory_are_refused(mounted: Any, change: Callable[[Path], None]) -> None:
    disk = mounted.path / "shared"
    before = sorted(os.listdir(mounted.path)), disk.stat().st_size, disk.stat().st_mode, disk.read_bytes()
    with pytest.raises(OSError) as caught:
        change(disk)
    assert caught.value.errno == errno.EPERM
    assert (sorted(os.listdir(mounted.path)), disk.stat().st_size, disk.stat().st_mode, disk.read_bytes()) == before


def test_truncate_to_the_same_size_is_no_change(disk: Path, base: Path) -> None:
    os.truncate(disk, SIZE)
    assert disk.read_bytes() == base.read_bytes()


def test_a_read_only_disk_refuses_to_be_opened_for_writing(mounted: Any) -> None:
    for flags in (os.O_RDWR, os.O_WRONLY, os.O_WRONLY | os.O_TRUNC):
        with pytest.raises(OSError) as caught:
            os.open(mounted.path / "golden", flags)
        assert caught.value.errno == errno.EROFS
    assert (mounted.path / "golden").read_bytes()[:8] == pattern(8)


# ---- the end of the disk


def test_a_write_across_the_end_is_short(descriptor: int) -> None:
    assert os.pwrite(descriptor, b"x" * 4096, SIZE - 1000) == 1000
    assert os.pread(descriptor, 4096, SIZE - 1000) == b"x" * 1000
    assert os.fstat(descriptor).st_size == SIZE


@pytest.mark.parametrize("offset", [SIZE, SIZE + 1, SIZE + 4096, 1 << 50])
def test_a_write_at_or_past_the_end_is_too_big(descriptor: int, offset: int) -> None:
    with pytest.raises(OSError) as caught:
        os.pwrite(descriptor, b"x", offset)
    assert caught.value.errno == errno.EFBIG
    assert os.fstat(descriptor).st_size == SIZE


def test_a_read_across_the_end_is_short_and_past_it_empty(descriptor: int) -> None:
    assert len(os.pread(descriptor, 4096, SIZE - 100)) == 100
    assert os.pread(descriptor, 4096, SIZE) == b""
    assert os.pread(descriptor, 4096, SIZE + MIB) == b""


def test_a_disk_of_odd_size_is_written_and_read_to_its_last_byte(mounted: Any) -> None:
    descriptor = os.open(mounted.path / "odd", os.O_RDWR)
    try:
        assert os.pwrite(descriptor, b"tail", 130000 - 4) == 4
        assert os.pread(descriptor, 100, 130000 - 4) == b"tail"
    finally:
        os.close(descriptor)


# ---- statfs and extended attributes


def test_statfs_tells_sizes(mounted: Any) -> None:
    found = os.statvfs(mounted.path)
    below = os.statvfs(mounted.path.parent)
    assert found.f_files == FRESH + 5
    assert found.f_blocks * found.f_frsize >= FRESH * SIZE
    assert found.f_namemax == 255
    assert 0 < found.f_bavail * found.f_frsize <= below.f_blocks * below.f_frsize


def test_status_is_an_extended_attribute_of_every_file(mounted: Any, disk: Path) -> None:
    need("getfattr")
    text = run("getfattr", "--only-values", "--absolute-names", "-n", "user.cachefs.status", disk).stdout
    found = json.loads(text)
    assert found["daemon"]["pid"] == mounted.pid
    assert found["daemon"]["state"] == "serving"
    assert found["disk"]["name"] == disk.name
    assert found["disk"]["state"] == "serving"
    assert [layer["layer"] for layer in found["disk"]["layers"]] == [f"{disk.name}/cow", "base/file"]


def test_status_counts_what_was_done(mounted: Any, disk: Path) -> None:
    with disk.open("r+b", buffering=0) as file:
        file.write(b"x" * 8192)
        assert len(file.read(4096)) == 4096
        os.fsync(file.fileno())
    layer = mounted.layer(disk.name)
    assert (layer["written_bytes"], layer["read_bytes"], layer["flushes"]) == (8192, 4096, 1)
    assert layer["data_bytes"] == 8192


def test_extended_attributes_are_the_status_and_no_other(disk: Path) -> None:
    assert os.listxattr(disk) == ["user.cachefs.status"]
    assert os.listxattr(disk.parent) == ["user.cachefs.status"]
    with pytest.raises(OSError) as caught:
        os.getxattr(disk, "user.other")
    assert caught.value.errno == errno.ENODATA


# ---- shared memory


def test_a_shared_mapping_is_refused_without_page_cache(descriptor: int) -> None:
    with pytest.raises(OSError) as caught:
        mmap.mmap(descriptor, 4096, flags=mmap.MAP_SHARED)
    assert caught.value.errno == errno.ENODEV


def test_a_shared_mapping_works_with_page_cache(mounted: Any) -> None:
    descriptor = os.open(mounted.path / "cached", os.O_RDWR)
    try:
        with mmap.mmap(descriptor, MIB, flags=mmap.MAP_SHARED) as mapping:
            assert mapping[:8] == pattern(8)
            mapping[4096:4101] = b"hello"
            mapping.flush()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    assert mounted.layer("cached")["written_bytes"] >= 4096
    direct = os.open(mounted.path / "cached", os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 4096) as buffer:
            assert os.preadv(direct, [buffer], 4096) == 4096
            assert buffer[:5] == b"hello"
    finally:
        os.close(direct)


# ---- fallocate and lseek


@pytest.mark.parametrize("mode", [0, KEEP_SIZE])
def test_fallocate_within_the_size_is_granted_and_changes_nothing(descriptor: int, base: Path, mode: int) -> None:
    fallocate(descriptor, mode, MIB, 2 * MIB)
    fallocate(descriptor, mode, SIZE - 4096, 4096)
    assert os.pread(descriptor, SIZE, 0) == base.read_bytes()


def test_fallocate_beyond_the_size_is_refused(descriptor: int) -> None:
    for mode in (0, KEEP_SIZE):
        with pytest.raises(OSError) as caught:
            fallocate(descriptor, mode, SIZE - 4096, 8192)
        assert caught.value.errno == (errno.EOPNOTSUPP if mode else errno.EFBIG)
    assert os.fstat(descriptor).st_size == SIZE


@pytest.mark.parametrize("mode", [PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE])
def test_fallocate_makes_zeros_to_the_byte(descriptor: int, base: Path, mode: int) -> None:
    fallocate(descriptor, mode, 4096 + 100, 100_000)
    expected = bytearray(base.read_bytes())
    expected[4196:104196] = bytes(100_000)
    assert os.pread(descriptor, SIZE, 0) == bytes(expected)


def test_a_hole_across_the_end_is_punched_up_to_it(descriptor: int) -> None:
    os.pwrite(descriptor, b"x" * 8192, SIZE - 8192)
    fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, SIZE - 4096, MIB)
    assert os.pread(descriptor, 8192, SIZE - 8192) == b"x" * 4096 + bytes(4096)
    assert os.fstat(descriptor).st_size == SIZE


def test_collapse_range_is_not_supported_and_spoils_nothing(descriptor: int, base: Path) -> None:
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            fallocate(descriptor, COLLAPSE_RANGE, 0, 4096)
        assert caught.value.errno == errno.EOPNOTSUPP
    assert os.pread(descriptor, SIZE, 0) == base.read_bytes()
    # an ENOSYS would have made the kernel refuse every fallocate from then on
    fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, 0, 4096)
    assert os.pread(descriptor, 4096, 0) == bytes(4096)


def test_fallocate_of_a_read_only_disk_is_refused(mounted: Any) -> None:
    descriptor = os.open(mounted.path / "golden", os.O_RDONLY)
    try:
        with pytest.raises(OSError):
            fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, 0, 4096)
    finally:
        os.close(descriptor)


def test_lseek_finds_data_and_holes(descriptor: int) -> None:
    os.pwrite(descriptor, b"x", 2 * MIB + 5)  # its whole 4 KiB block is data now
    fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, 64 * 1024, 64 * 1024)
    expected = [(0, 64 * 1024), (128 * 1024, MIB), (2 * MIB, 2 * MIB + 4096), (4 * MIB, 5 * MIB)]
    found, at = [], 0
    for _ in expected:
        data = os.lseek(descriptor, at, os.SEEK_DATA)
        at = os.lseek(descriptor, data, os.SEEK_HOLE)
        found.append((data, at))
    assert found == expected
    with pytest.raises(OSError) as caught:  # the rest is a hole
        os.lseek(descriptor, at, os.SEEK_DATA)
    assert caught.value.errno == errno.ENXIO


def test_lseek_ends_at_the_end(descriptor: int) -> None:
    os.pwrite(descriptor, b"x" * 4096, SIZE - 4096)
    assert os.lseek(descriptor, SIZE - 1, os.SEEK_DATA) == SIZE - 1
    assert os.lseek(descriptor, SIZE - 1, os.SEEK_HOLE) == SIZE
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        with pytest.raises(OSError) as caught:
            os.lseek(descriptor, SIZE, whence)
        assert caught.value.errno == errno.ENXIO
    assert os.lseek(descriptor, 0, os.SEEK_END) == SIZE
