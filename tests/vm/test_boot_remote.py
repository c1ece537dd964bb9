"""Guests boot from images behind NBD servers, through overlay and cache; what they were sent stands in the servers' logs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nbdservers import Servers, certificates

from cachefs.testing.guest import Guest

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(400)]

SAMPLED = 16 * 4096  # bytes that are read to know the image by


def boot_twice(mount: Any, guest: Guest, backend: dict[str, Any], tmp_path: Path, sent: Callable[[], int]) -> None:
    """A guest boots, writes and flushes; then, in another mount, it and a second one boot over what is cached.

    sent: bytes that the server has read for us so far, as its own log says.
    """
    config = {
        "pools": {"node": {"path": str(tmp_path / "pool"), "quota": "256MiB"}},
        "images": {"cloud": {"layers": [{"cache": {"pool": "node"}}], "backend": backend}},
        "disks": {name: {"layers": ["cow"], "image": "cloud"} for name in ("vm1", "vm2")},
    }
    mounted = mount(config)
    said = guest.boot(mounted.path / "vm1", "boot")
    assert "digests ok 12 files" in said
    assert "boot 1, wrote before: nothing" in said
    assert "wrote and synced 2048 KiB" in said
    mounted.umount()
    first = sent()
    assert first > 2 << 20  # the files, and what the guest reads around them

    mounted = mount(config)
    assert "boot 2, wrote before: ok" in guest.boot(mounted.path / "vm1", "boot")
    assert "boot 1, wrote before: nothing" in guest.boot(mounted.path / "vm2", "boot")
    mounted.umount()
    again = sent() - first
    print(f"the server sent {first / 1e6:.1f} MB for the first boot and {again / 1e3:.0f} kB for the next two")
    assert again <= SAMPLED + first // 50


def test_guest_boots_from_a_compressed_qcow2_with_a_backing_file(
    mount: Any, guest: Guest, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.which("qemu-nbd")
    assert real is not None  # it comes with qemu-img, and that with the guest
    distribution, cloud = tmp_path / "distribution.qcow2", tmp_path / "cloud.qcow2"
    subprocess.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", base, distribution], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", distribution, "-F", "qcow2", cloud], check=True)
    # the same qemu-nbd, made to say what it sends
    tracing = tmp_path / "bin" / "qemu-nbd"
    tracing.parent.mkdir()
    tracing.write_text(f'#!/bin/sh\nexec {real} --trace "enable=nbd_co_send_*read*,file={tmp_path}/trace.$$" "$@"\n')
    tracing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tracing.parent}:{os.environ['PATH']}")

    def sent() -> int:
        said = "".join(trace.read_text() for trace in tmp_path.glob("trace.*"))
        return sum(int(length) for length in re.findall(r"structured_read\w* Send .* len = (\d+)", said))

    boot_twice(mount, guest, {"qcow2": {"path": str(cloud)}}, tmp_path, sent)


def test_guest_boots_from_a_server_over_tls_that_takes_5_ms(
    mount: Any, guest: Guest, base: Path, tmp_path: Path, servers: Servers
) -> None:
    made, log = certificates(tmp_path / "tls"), tmp_path / "requests.log"
    filters = ("--filter=log", "--filter=delay")
    uri, _ = servers.nbdkit_tls(made, "-r", *filters, "file", base, "rdelay=5ms", f"logfile={log}")
    tls = {"ca": "ca-cert.pem", "cert": "client-cert.pem", "key": "client-key.pem"}
    backend = {"uri": uri, "tls": {key: str(made / name) for key, name in tls.items()}}

    def sent() -> int:
        return sum(int(length, 16) for length in re.findall(r" Read id=.* count=0x([0-9a-f]+)", log.read_text()))

    boot_twice(mount, guest, {"nbd": backend}, tmp_path, sent)


def test_guest_boots_from_a_web_server(mount: Any, guest: Guest, base: Path, tmp_path: Path, servers: Servers) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "cloud.raw").symlink_to(base)
    url, log = servers.nginx(images)
    command = ["nbdkit", "--readonly", "--filter=retry", "curl", f"url={url}/cloud.raw", "retries=2", "retry-delay=1"]

    def sent() -> int:
        return sum(int(count) for count in re.findall(r"^GET bytes=\S+ (\d+)$", log.read_text(), re.MULTILINE))

    boot_twice(mount, guest, {"nbd": {"command": command}}, tmp_path, sent)
