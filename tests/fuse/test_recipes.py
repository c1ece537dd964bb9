"""The recipes of docs/backends/recipes.md work as they are written there: the stacks below are taken out of the document.

Only the places are other ones: /srv/images is a folder of the test, and https://images.example its own nginx.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from nbdservers import Servers
from test_files import need, pattern, run

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "docs" / "backends" / "recipes.md"
MIB = 1 << 20
SIZE = 24 * MIB


def recipe(heading: str, images: Path, url: str = "") -> list[Any]:
    """The backends in the section *heading*."""
    section = RECIPES.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(r"```yaml\n(backend:\n.*?)```", section, re.DOTALL)
    assert found, heading
    placed = [text.replace("/srv/images", str(images)).replace("https://images.example", url) for text in found]
    return [yaml.safe_load(text)["backend"] for text in placed]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with debian12.raw: 1 MiB of data at 0, at 7 and at 20 MiB, holes between."""
    folder = tmp_path / "images"
    folder.mkdir()
    with (folder / "debian12.raw").open("wb") as file:
        file.truncate(SIZE)
        for offset in (0, 7 * MIB, 20 * MIB):
            file.seek(offset)
            file.write(pattern(MIB))
    return folder


def check_served(mount: Any, raw: Path, backend: Any) -> None:
    """Disks over *backend* read as *raw*, and an overlay over it takes writes that are there again in the next mount."""
    content = raw.read_bytes()
    config = {
        "images": {"debian12": {"backend": backend}},
        "disks": {"vm": {"layers": ["cow"], "image": "debian12"}, "golden": {"image": "debian12"}},
    }
    mounted = mount(config)
    assert (mounted.path / "golden").read_bytes() == content
    disk = os.open(mounted.path / "vm", os.O_RDWR)
    assert os.pread(disk, 2 * MIB, 7 * MIB - 5) == content[7 * MIB - 5 : 9 * MIB - 5]
    os.pwrite(disk, b"overlay", 7 * MIB + 1)
    os.fsync(disk)
    os.close(disk)
    mounted.umount()

    mounted = mount(config)
    with (mounted.path / "vm").open("rb") as file:
        file.seek(7 * MIB)
        assert file.read(10) == content[7 * MIB : 7 * MIB + 1] + b"overlay" + content[7 * MIB + 8 : 7 * MIB + 10]
    mounted.umount()
    shutil.rmtree(mount.folder / "state")


def test_qcow2_compressed_and_with_a_backing_file(mount: Any, images: Path) -> None:
    need("qemu-img")
    raw, base, top = images / "debian12.raw", images / "base.qcow2", images / "debian12.qcow2"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 3M 1M", "-c", "write -z 20M 64k", top)
    run("qemu-img", "convert", "-O", "raw", top, raw)
    before = top.read_bytes(), base.read_bytes()
    short, written_out = recipe("qcow2", images)
    assert list(short) == ["qcow2"]
    for backend in (short, written_out):
        check_served(mount, raw, backend)
    assert (top.read_bytes(), base.read_bytes()) == before


@pytest.mark.parametrize("form", ["vmdk", "vhdx"])
def test_images_of_other_hypervisors(mount: Any, images: Path, form: str) -> None:
    need("qemu-img")
    run("qemu-img", "convert", "-O", form, images / "debian12.raw", images / f"debian12.{form}")
    (backend,) = recipe(form, images)
    check_served(mount, images / "debian12.raw", backend)


def test_xz(mount: Any, images: Path) -> None:
    need("nbdkit")
    need("xz")
    raw = images / "debian12.raw"
    run("xz", "--keep", "--block-size=16777216", raw)
    (backend,) = recipe("xz", images)
    check_served(mount, raw, backend)


def test_http(mount: Any, servers: Servers, images: Path) -> None:
    need("nbdkit")
    url, log = servers.nginx(images)
    (backend,) = recipe("HTTP", images, url)
    check_served(mount, images / "debian12.raw", backend)
    assert re.search(r"^GET bytes=7340032-\d+ \d+$", log.read_text(), re.MULTILINE)


def test_every_other_recipe_is_a_configuration(cachefs: Any, mount: Any, images: Path) -> None:
    for heading in ("ssh", "RBD"):
        for backend in recipe(heading, images):
            config = mount.write({"disks": {"vm": {"layers": ["cow"], "backend": backend}}})
            done = cachefs("check", config)
            assert (done.returncode, done.stderr) == (0, "")


# ---- what `qcow2:` does beyond its recipe


def qcow2_of(images: Path) -> Path:
    """debian12.qcow2 over base.qcow2."""
    need("qemu-nbd")
    base, top = images / "base.qcow2", images / "debian12.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", images / "debian12.raw", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    return top


def test_qcow2_that_is_written_has_what_was_flushed_while_it_is_served_and_all_when_it_was_closed(
    mount: Any, images: Path, tmp_path: Path
) -> None:
    need("fio")
    top = qcow2_of(images)
    mounted = mount({"disks": {"vm": {"backend": {"qcow2": {"path": str(top)}}}}})
    verify = ("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--rw=randwrite", "--bsrange=512-64k")
    size = ("--size=16M", "--iodepth=16", "--fsync=20", "--ioengine=libaio", "--direct=1")
    assert "err= 0" in run("fio", "--name=v", f"--filename={mounted.path / 'vm'}", *size, *verify).stdout
    with (mounted.path / "vm").open("r+b", buffering=0) as disk:
        os.pwrite(disk.fileno(), b"flushed", 20 * MIB)
        os.fsync(disk.fileno())
        run("qemu-img", "convert", "-U", "-O", "raw", top, tmp_path / "flushed.raw")
    assert (mounted.path / "vm").read_bytes() == (tmp_path / "flushed.raw").read_bytes()
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run("qemu-io", "-f", "qcow2", "-c", "write 0 512", top)
    assert "lock" in caught.value.stderr
    said = (mounted.path / "vm").read_bytes()
    mounted.umount()
    run("qemu-img", "check", top)
    run("qemu-img", "convert", "-O", "raw", top, tmp_path / "closed.raw")
    assert (tmp_path / "closed.raw").read_bytes() == said


def test_trims_free_clusters_of_the_qcow2(mount: Any, images: Path) -> None:
    need("qemu-nbd")
    top = images / "trimmed.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", images / "debian12.raw", top)
    mounted = mount({"disks": {"vm": {"backend": {"qcow2": {"path": str(top)}}}}})
    run("fallocate", "--punch-hole", "--offset", 7 * MIB, "--length", MIB, mounted.path / "vm")
    with (mounted.path / "vm").open("rb") as disk:
        disk.seek(7 * MIB)
        assert disk.read(MIB) == bytes(MIB)
    mounted.umount()
    entries = json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", top).stdout)
    assert any(one["start"] <= 7 * MIB and one["start"] + one["length"] >= 8 * MIB and one["zero"] for one in entries)
    used = sum(one["length"] for one in entries if one["data"])
    assert used == 2 * MIB


def test_overlay_refuses_a_qcow2_of_which_any_file_has_changed(
    mount: Any, images: Path, cachefs: Any, tmp_path: Path
) -> None:
    top = qcow2_of(images)
    config = {"disks": {"vm": {"layers": ["cow"], "backend": {"qcow2": {"path": str(top)}}}}}
    for _ in range(2):
        mount(config).umount()
    base = images / "base.qcow2"
    os.utime(base, ns=(base.stat().st_atime_ns, base.stat().st_mtime_ns + 1))
    (tmp_path / "mnt").mkdir()
    done = cachefs("mount", "--foreground", mount.write(config), tmp_path / "mnt")
    assert done.returncode == 3
    assert "modification time of the backing file 1 was" in done.stderr


def test_qcow2_that_cannot_be_served_is_refused_in_one_sentence(
    mount: Any, images: Path, cachefs: Any, tmp_path: Path
) -> None:
    need("qemu-nbd")
    raw = images / "debian12.raw"
    written = images / "written.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", written, "16M")
    holder = mount(
        {"state_dir": str(tmp_path / "other"), "disks": {"vm": {"backend": {"qcow2": {"path": str(written)}}}}}
    )
    at = tmp_path / "mnt"
    at.mkdir()
    for path, sentence in (
        (
            images / "gone.qcow2",
            "vm/qcow2: cannot open .*gone.qcow2: No such file or directory; check backend.qcow2.path",
        ),
        (images, "vm/qcow2: .* is not a regular file; name a qcow2 image"),
        (raw, "vm/qcow2: cannot open .*debian12.raw: .*Image is not in qcow2 format.*; check backend.qcow2.path"),
        (at / "inside.qcow2", "backend.qcow2: .*inside.qcow2 lies inside the mountpoint"),
        (written, 'vm/qcow2: the server .* ended with exit status 1: .*Failed to get "write" lock'),
    ):
        config = mount.write({"disks": {"vm": {"backend": {"qcow2": {"path": str(path)}}}}})
        done = cachefs("mount", "--foreground", config, at)
        assert done.returncode == 3, done.stderr
        assert re.search(sentence, done.stderr), done.stderr
        assert "Traceback" not in done.stderr
    holder.umount()
