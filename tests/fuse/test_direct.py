"""Direct files on file systems of their own: the contract of every layer, fio with verify, and what the host caches."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from loopmounts import fresh_file_system

from cachefs.testing.conformance import LayerContract
from cachefs.testing.stacks import EVEN_SIZE, ODD_SIZE, Bench, Case, coalesce_layer

pytestmark = pytest.mark.slow

KINDS = ("ext4", "xfs")
STACKS = {"direct": (), "coalesce-direct": coalesce_layer(cluster="64KiB", buffer="512KiB")}
CASES = [
    Case(f"{name}-{kind}", size, layers, backend="file", direct=True)
    for kind in KINDS
    for name, layers in STACKS.items()
    for size in (EVEN_SIZE, ODD_SIZE)
]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("direct")
    with ExitStack() as stack:
        yield {kind: stack.enter_context(fresh_file_system(kind, folder / kind))[0] for kind in KINDS}


@pytest.mark.parametrize("case", CASES, ids=str)
class TestDirectFiles(LayerContract):
    """Every test of the contract, on ext4 and xfs."""

    @pytest.fixture
    def bench(self, case: Case, roots: dict[str, Path]) -> Iterator[Bench]:
        folder = roots[case.name.rpartition("-")[2]] / "bench"
        yield Bench(case, folder)
        shutil.rmtree(folder)


def fio(path: Path, *arguments: str) -> dict[str, Any]:
    """What fio says about its one job on *path*; it fails the test when a byte is wrong."""
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    command = ["fio", "--name=job", f"--filename={path}", "--output-format=json", "--verify_state_save=0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    return dict(job)


def cached_pages(path: Path) -> int:
    """Of the file, in the page cache of the host."""
    found = subprocess.run(["fincore", "-n", "-o", "PAGES", str(path)], capture_output=True, text=True, check=True)
    return int(found.stdout)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layers", [[], [{"coalesce": {"cluster": "64KiB", "buffer": "1MiB"}}]], ids=["align", "coalesce"]
)
def test_fio_finds_every_byte_again_and_the_host_caches_none(
    mount: Any, roots: dict[str, Path], kind: str, layers: list[Any]
) -> None:
    image = roots[kind] / "disk.raw"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    mounted = mount({"disks": {"disk": {"layers": layers, "backend": {"file": {"path": str(image), "direct": True}}}}})
    verify = ("--rw=randrw", "--bsrange=512-64k", "--size=32m", "--io_size=48m", "--verify=crc32c", "--direct=1")
    fio(mounted.path / "disk", "--ioengine=libaio", "--iodepth=16", "--norandommap=0", *verify)
    assert cached_pages(image) == 0
    mounted.umount()
    image.unlink()


@pytest.mark.parametrize("kind", KINDS)
def test_an_overlay_and_a_cache_past_the_page_cache_are_right_and_the_host_caches_none(
    mount: Any, roots: dict[str, Path], kind: str
) -> None:
    root = roots[kind]
    base = root / "base.raw"
    with base.open("wb") as file:
        file.write(random.Random(1).randbytes(8 << 20))
        file.truncate(32 << 20)
    mounted = mount(
        {
            "pools": {"node": {"path": str(root / "pool"), "quota": "48MiB", "direct": True}},
            "images": {
                "base": {
                    "layers": [{"cache": {"pool": "node"}}],
                    "backend": {"file": {"path": str(base), "direct": True}},
                }
            },
            "disks": {"disk": {"layers": [{"cow": {"path": str(root / "overlay"), "direct": True}}], "image": "base"}},
        }
    )
    assert (mounted.path / "disk").read_bytes() == base.read_bytes()
    verify = ("--rw=randrw", "--bsrange=512-64k", "--size=32m", "--io_size=24m", "--verify=crc32c", "--direct=1")
    fio(mounted.path / "disk", "--ioengine=libaio", "--iodepth=16", "--norandommap=0", *verify)
    (cached,) = (root / "pool").glob("images/*/data")
    assert cached.stat().st_blocks * 512 > 4 << 20, "nothing was cached"
    assert [cached_pages(path) for path in (cached, root / "overlay" / "data")] == [0, 0]
    mounted.umount()
    shutil.rmtree(root / "pool")
    shutil.rmtree(root / "overlay")
    base.unlink()
