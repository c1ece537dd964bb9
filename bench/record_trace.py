#!/usr/bin/env python3
"""Records what a booting Debian guest reads from its image: the trace that bench/replay.py plays.

    sudo bench/record_trace.py .build/trace bench/traces/debian-boot.csv.gz

makes a Debian image in the folder (debootstrap, mke2fs -d; kept there), mounts it with cachefs under an overlay, boots it
with QEMU's tcg until its services run, and writes every read that reached the image below the overlay. Needs root,
debootstrap and qemu-system-x86_64. The program serves the mount itself too, with one more layer, `trace`, under `cow`.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from cachefs.extent import Extent
from cachefs.layers import LAYERS
from cachefs.layers.base import Done, Environment, Later, Layer, Options, Statistics

PACKAGES = (
    "systemd-sysv", "udev", "dbus", "linux-image-amd64", "kmod", "openssh-server", "cron", "rsyslog", "iproute2", "ifupdown",
    "isc-dhcp-client", "python3", "sudo", "vim-tiny", "less", "ca-certificates", "nginx-light", "procps",
    "apparmor", "chrony", "git", "mariadb-server",
)  # fmt: skip
IMAGE_SIZE = 2 << 30
MEMORY_MIB = 1024
BOOT_LIMIT_S = 900
UNIT = """\
[Unit]
Description=Says that the boot is complete, and powers off
After=nginx.service ssh.service cron.service rsyslog.service mariadb.service chrony.service
[Service]
Type=oneshot
StandardOutput=tty
TTYPath=/dev/ttyS0
ExecStart=-/usr/bin/python3 -c "import http.server, json, sqlite3, ssl"
ExecStart=-/usr/bin/git --version
ExecStart=/bin/echo GUEST done
ExecStart=/usr/bin/systemctl poweroff
[Install]
WantedBy=multi-user.target
"""


class TraceConfig(Options):
    path: str


class Trace:
    """Passes reads on and writes each to *path*: microseconds since open, offset, length."""

    Config = TraceConfig

    def __init__(self, child: Layer, path: Path, owner: str) -> None:
        self.name = f"{owner}/trace"
        self.child = child
        self.geometry = child.geometry
        self.caps = child.caps
        self.identity = child.identity
        self._began = time.monotonic()
        self._file = path.open("w")

    @classmethod
    @asynccontextmanager
    async def open(cls, config: TraceConfig, child: Layer, env: Environment) -> AsyncIterator[Trace]:
        layer = cls(child, Path(config.path), env.owner)
        yield layer
        layer._file.close()

    def _note(self, offset: int, length: int) -> None:
        self._file.write(f"{(time.monotonic() - self._began) * 1e6:.0f},{offset},{length},r\n")

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        if not self.child.try_read_into(offset, buffer):
            return False
        self._note(offset, len(buffer))
        return True

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self._note(offset, len(buffer))
        await self.child.read_into(offset, buffer)

    def try_read_later(self, offset: int, buffer: memoryview, done: Later) -> bool:
        return False

    def try_write(self, offset: int, data: memoryview) -> bool:
        return self.child.try_write(offset, data)

    def try_flush(self, done: Done) -> bool:
        return self.child.try_flush(done)

    def try_extent(self, offset: int, length: int) -> Extent | None:
        return self.child.try_extent(offset, length)

    async def write(self, offset: int, data: memoryview) -> None:
        await self.child.write(offset, data)

    async def flush(self) -> None:
        await self.child.flush()

    async def trim(self, offset: int, length: int) -> None:
        await self.child.trim(offset, length)

    async def zero(self, offset: int, length: int) -> None:
        await self.child.zero(offset, length)

    async def extents(self, offset: int, length: int, limit: int = 1024) -> list[Extent]:
        return await self.child.extents(offset, length, limit)

    async def prefetch(self, offset: int, length: int) -> None:
        await self.child.prefetch(offset, length)

    def allocated_bytes(self) -> int:
        return self.child.allocated_bytes()

    def pending_error(self) -> Exception | None:
        return self.child.pending_error()

    def statistics(self) -> Statistics:
        return Statistics(self.name, {}, self.child.statistics())


# ------------------------------------------------------------------------------------------------------------ the guest


def build_image(folder: Path) -> None:
    """folder/{debian.raw,vmlinuz,initrd}, unless they are there."""
    image = folder / "debian.raw"
    if image.exists():
        return
    root = folder / "root"
    if root.exists():
        shutil.rmtree(root)
    print("debootstrap, some minutes ...", flush=True)
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", "bookworm", root], check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    units = root / "etc/systemd/system"
    (units / "trace-done.service").write_text(UNIT)
    (units / "multi-user.target.wants").mkdir(exist_ok=True)
    (units / "multi-user.target.wants/trace-done.service").symlink_to("../trace-done.service")
    (root / "etc/fstab").write_text("/dev/vda / ext4 errors=remount-ro 0 1\n")
    for package in (root / "var/cache/apt/archives").glob("*.deb"):
        package.unlink()
    shutil.copy(next((root / "boot").glob("vmlinuz-*")), folder / "vmlinuz")
    shutil.copy(next((root / "boot").glob("initrd.img-*")), folder / "initrd")
    part = folder / "debian.raw.part"
    with part.open("wb") as file:
        file.truncate(IMAGE_SIZE)
    subprocess.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-E", "root_owner=0:0,lazy_itable_init=0", "-d", root, part],
        check=True,
    )
    part.rename(image)
    shutil.rmtree(root)


def boot(folder: Path, disk: Path) -> None:
    command = [
        "timeout", str(BOOT_LIMIT_S), "qemu-system-x86_64", "-M", "pc", "-accel", "tcg,thread=multi", "-smp", "2",
        "-m", str(MEMORY_MIB), "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio",
        "-kernel", str(folder / "vmlinuz"), "-initrd", str(folder / "initrd"),
        "-append", "root=/dev/vda rw console=ttyS0 systemd.mask=getty@tty1.service",
        "-drive", f"file={disk},format=raw,if=virtio,discard=unmap",
    ]  # fmt: skip
    console = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    (folder / "console.log").write_bytes(console.stdout)
    if b"GUEST done" not in console.stdout:
        sys.exit(f"the guest did not finish its boot: see {folder / 'console.log'}")


def record(folder: Path, out: Path) -> None:
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    build_image(folder)
    state, mountpoint, raw = folder / "state", folder / "disks", folder / "trace.csv"
    shutil.rmtree(state, ignore_errors=True)
    mountpoint.mkdir(exist_ok=True)
    config = folder / "trace.yaml"
    config.write_text(
        f"state_dir: {state}\n"
        f"images: {{debian: {{layers: [{{trace: {{path: {raw}}}}}], backend: {{file: {{path: {folder}/debian.raw}}}}}}}}\n"
        "disks: {vm: {layers: [{cow: {}}], image: debian}}\n"
    )
    daemon = subprocess.Popen([sys.executable, __file__, "mount", "--foreground", config, mountpoint])
    try:
        while not (mountpoint / "vm").exists():
            if daemon.poll() is not None:
                sys.exit("the mount failed (above)")
            time.sleep(0.1)
        print("booting, one to five minutes ...", flush=True)
        began = time.monotonic()
        boot(folder, mountpoint / "vm")
        print(f"booted and off again in {time.monotonic() - began:.0f} s", flush=True)
    finally:
        subprocess.run([sys.executable, "-m", "cachefs", "umount", mountpoint], check=False)
        daemon.wait(30)
    head = f"# size={IMAGE_SIZE} guest=debian12; microseconds,offset,length,operation\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(gzip.compress((head + raw.read_text()).encode(), mtime=0))
    print(f"{out}: {out.stat().st_size} bytes")


LAYERS["trace"] = Trace

if __name__ == "__main__":
    if sys.argv[1:2] == ["mount"]:
        from cachefs.cli import main

        main()
    else:
        parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
        parser.add_argument("folder", type=Path, help="where the image is made and kept")
        parser.add_argument("out", type=Path, help="the trace, .csv.gz")
        options = parser.parse_args()
        record(options.folder, options.out)
