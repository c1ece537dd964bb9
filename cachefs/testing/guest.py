"""A tiny guest that boots in seconds: Debian's cloud kernel, a busybox initramfs, and a root file system to check.

    build(folder)     -> Guest         folder/{vmlinuz,initrd.gz}, made again only when what they are made of changed
    make_image(path)                   an ext4 with files and their digests, made without root rights or a loop device
    make_tools(path, program)          one with a program of this machine
    guest.boot(disk)  -> list[str]     runs qemu-system-x86_64 to the end; the lines in which the guest says what it did

What the guest does is guest-init.sh. The kernel package is downloaded and unpacked, never installed. Programs used:
apt-get, dpkg-deb, cpio, ldd, a static busybox, mke2fs, qemu-system-x86_64; `scripts/lib.sh` installs them. From a shell:

    python -m cachefs.testing.guest build .build/guest
    python -m cachefs.testing.guest image base.raw
    python -m cachefs.testing.guest boot .build/guest base.raw --scenario check
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import platform
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
KERNEL_PACKAGE = "linux-image-cloud-amd64"
# what the guest needs that is not built into Debian's cloud kernel; crc32c_generic is asked for by name at run time
MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
INIT = Path(__file__).with_name("guest-init.sh")


class GuestError(Exception):
    """The guest could not be built, did not run to its end, or found something wrong."""


def _run(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    """The output of *command*.

    Raises: GuestError with what the command printed.
    """
    program = str(command[0])
    try:
        done = subprocess.run(
            [_program(program), *command[1:]], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise GuestError(f"{program} is not installed") from None
    if done.returncode:
        said = f"{done.stdout}{done.stderr}".rstrip()
        raise GuestError(f"{shlex.join(map(str, command))}: exit {done.returncode}\n{said}")
    return done.stdout


def _program(name: str) -> str:
    # mke2fs lies where a user's PATH does not look
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") or name


# ---------------------------------------------------------------------------------------------- the image of a disk


def make_image(
    path: Path, size: int = 128 * MIB, files: int = 12, contents_size: int = 4 * MIB, unread: bool = False
) -> None:
    """An ext4 of *size* bytes at *path*: *files* files of known contents, /manifest with their SHA-256, /boots.log.

    *contents_size*: of all files together, about. *unread*: the manifest names every second file, in no order, so that a
    guest jumps about and leaves places out. The contents are the same each time, the file system around them (identifiers,
    times) is not.
    """
    contents = random.Random(1)
    # a name of its own, so that whoever finds `path` finds it complete
    with tempfile.TemporaryDirectory(prefix="cachefs-guest-") as scratch:
        root = Path(scratch, "root")
        (root / "files").mkdir(parents=True)
        manifest = []
        for number in range(files):
            # sizes that end anywhere in a block
            data = contents.randbytes(contents.randrange(1, 2 * (contents_size // files)))
            (root / "files" / f"{number}.bin").write_bytes(data)
            manifest.append(f"{hashlib.sha256(data).hexdigest()}  files/{number}.bin\n")
        if unread:
            manifest = manifest[::2]
            contents.shuffle(manifest)
        (root / "manifest").write_text("".join(manifest))
        (root / "boots.log").write_text("made on the host\n")
        part = path.with_name(path.name + ".part")
        with open(part, "wb") as image:
            image.truncate(size)
        try:
            _run(["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-E", "root_owner=0:0,lazy_itable_init=0",
                  "-d", root, part])  # fmt: skip
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)


def make_tools(path: Path, program: str) -> None:
    """An ext4 at *path*, the second disk of guest=fio: /tool is *program* of this machine, /lib has what it is linked to.

    Raises: GuestError when it is not installed.
    """
    found = _run(["ldd", _program(program)])
    with tempfile.TemporaryDirectory(prefix="cachefs-guest-") as scratch:
        libraries = Path(scratch, "root", "lib")
        libraries.mkdir(parents=True)
        shutil.copy(_program(program), libraries.parent / "tool")
        for library in re.findall(r"(/\S+) \(0x", found):
            shutil.copy(library, libraries)
        size = sum(file.stat().st_size for file in libraries.iterdir()) + 32 * MIB
        with path.open("wb") as image:
            image.truncate(size)
        _run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", libraries.parent, path])


# ------------------------------------------------------------------------------------------------- kernel and initrd


def build(folder: Path) -> Guest:
    """The guest in *folder*, made anew when the kernel, busybox, the init script or this module changed."""
    if platform.machine() != "x86_64":
        raise GuestError(f"the test guest is made for x86_64, this machine is {platform.machine()}")
    folder.mkdir(parents=True, exist_ok=True)
    guest = Guest(folder / "vmlinuz", folder / "initrd.gz")
    kernel = _unpacked_kernel(folder)
    busybox = _static_busybox()
    inputs = hashlib.sha256()
    for source in (Path(__file__), INIT, busybox):
        inputs.update(hashlib.sha256(source.read_bytes()).digest())
    inputs.update(kernel.name.encode())
    stamp = folder / "inputs.sha256"
    complete = guest.kernel.exists() and guest.initrd.exists() and stamp.exists()
    if not complete or stamp.read_text() != inputs.hexdigest():
        stamp.unlink(missing_ok=True)
        _install(_one(kernel, "boot/vmlinuz-*").read_bytes(), guest.kernel)
        _install(gzip.compress(_initramfs(kernel, busybox), compresslevel=1), guest.initrd)
        stamp.write_text(inputs.hexdigest())
    return guest


def _install(data: bytes, path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    part.rename(path)


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise GuestError(f"{folder}: no {pattern}; remove that folder and try again")
    return found[-1]


def _unpacked_kernel(folder: Path) -> Path:
    """The folder with the files of the kernel package: one that is there is kept, whatever is newer."""
    kernels = folder / "kernels"
    present = sorted(kernels.glob("linux-image-*")) if kernels.exists() else []
    if present:
        return present[-1]
    if not shutil.which("apt-get"):
        raise GuestError(f"the guest's kernel is Debian's {KERNEL_PACKAGE}, and there is no apt-get here to get it")
    depends = _run(["apt-cache", "depends", KERNEL_PACKAGE])
    name = re.search(r"Depends: (linux-image-\S+)", depends)
    if not name:
        raise GuestError(f"apt knows no {KERNEL_PACKAGE}; run `apt-get update` as root first")
    with tempfile.TemporaryDirectory(prefix="unpack-", dir=folder) as scratch:
        _run(["apt-get", "download", "-q", name[1]], cwd=Path(scratch))
        package = _one(Path(scratch), "*.deb")
        files = Path(scratch, package.stem)
        _run(["dpkg-deb", "-x", package, files])
        kernels.mkdir(exist_ok=True)
        return files.rename(kernels / package.stem)


def _static_busybox() -> Path:
    for candidate in (Path("/bin/busybox"), Path("/usr/bin/busybox")):
        # a dynamic one names its loader
        if candidate.exists() and b"/ld-linux" not in candidate.read_bytes():
            return candidate
    raise GuestError("no static busybox: apt-get install busybox-static")


def _initramfs(kernel: Path, busybox: Path) -> bytes:
    with tempfile.TemporaryDirectory(prefix="cachefs-guest-") as scratch:
        root = Path(scratch)
        for name in ("bin", "dev", "mnt", "modules", "proc", "sys"):
            (root / name).mkdir()
        shutil.copy(busybox, root / "bin/busybox")
        shutil.copy(INIT, root / "init")
        (root / "bin/busybox").chmod(0o755)
        (root / "init").chmod(0o755)
        order = []
        for module in _with_dependencies(kernel, MODULES):
            shutil.copy(module, root / "modules" / module.name)
            order.append(f"{module.stem}\n")
        (root / "modules/order").write_text("".join(order))
        names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        archive = subprocess.run(
            [_program("cpio"), "--create", "--format=newc", "--owner=+0:+0", "--quiet"],
            cwd=root, input=names.encode(), capture_output=True,
        )  # fmt: skip
    if archive.returncode:
        raise GuestError(f"cpio: {archive.stderr.decode(errors='replace')}")
    return archive.stdout


def _with_dependencies(kernel: Path, wanted: Sequence[str]) -> list[Path]:
    """The module files of *wanted* and of all they need, in the order in which they can be loaded.

    An unpacked package has no modules.dep (depmod makes it when the package is installed), so each module's own
    `depends=` is read: `.modinfo` is a list of NUL-terminated `key=value`.
    """
    files = {path.stem.replace("-", "_"): path for path in kernel.glob("lib/modules/*/kernel/**/*.ko")}
    lines = _one(kernel, "lib/modules/*/modules.builtin").read_text().splitlines()
    builtin = {Path(line).stem.replace("-", "_") for line in lines}
    order: list[Path] = []

    def add(name: str) -> None:
        if name in builtin:
            return
        if name not in files:
            raise GuestError(f"{kernel.name} has no module {name}")
        if files[name] in order:
            return
        depends = re.search(rb"\0depends=([^\0]*)\0", files[name].read_bytes())
        for needed in depends[1].decode().split(",") if depends else ():
            if needed:
                add(needed.replace("-", "_"))
        order.append(files[name])

    for name in wanted:
        add(name.replace("-", "_"))
    return order


# ---------------------------------------------------------------------------------------------------------- booting


@dataclass(frozen=True)
class Guest:
    kernel: Path
    initrd: Path

    def command(
        self,
        disk: Path,
        scenario: str = "boot",
        memory_mib: int = 256,
        *,
        second: Path | None = None,
        cache: str = "writeback",
    ) -> list[str]:
        """The QEMU command line that boots from *disk* (a raw image, or a file of a cachefs mount).

        *second*: the guest's /dev/vdb. *cache*: QEMU's word for how it opens both; with anything but none it takes one failed
        fdatasync for the end, and fails every flush from then on.
        """
        # a comma in a file name is written twice
        drives = [
            f"file={str(path).replace(',', ',,')},format=raw,if=virtio,discard=unmap,cache={cache}"
            for path in (disk, second)
            if path is not None
        ]
        return [
            "qemu-system-x86_64", "-M", "pc", "-accel", "tcg", "-m", str(memory_mib), "-nodefaults", "-no-reboot",
            "-display", "none", "-serial", "stdio",
            "-kernel", str(self.kernel), "-initrd", str(self.initrd),
            "-append", f"console=ttyS0 quiet panic=-1 guest={scenario}",
            *(word for drive in drives for word in ("-drive", drive)),
        ]  # fmt: skip

    def boot(
        self,
        disk: Path,
        scenario: str = "boot",
        *,
        second: Path | None = None,
        cache: str = "writeback",
        console_input: int = subprocess.DEVNULL,
        timeout_s: float = 90,
        report: Callable[[str], None] | None = None,
    ) -> list[str]:
        """Boots from *disk* and waits until the guest has powered off; its messages, without the leading "GUEST ".

        *second* and *cache* as in `command`. *console_input*: a descriptor; what is written there is typed at the console.
        *report* gets each message as it comes. A guest that is still running after *timeout_s* is killed.

        Raises: GuestError when it did not say "done", with the end of its console.
        """
        console: list[str] = []
        messages: list[str] = []
        # QEMU's own time limit is timeout(1)'s job: a reader that waits for a line cannot keep one
        command = ["timeout", "--kill-after=1", str(timeout_s)]
        command += self.command(disk, scenario, second=second, cache=cache)
        with subprocess.Popen(
            command, stdin=console_input, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="latin-1"
        ) as qemu:
            assert qemu.stdout is not None
            try:
                for line in qemu.stdout:
                    console.append(line.rstrip())
                    # the console's first line may follow control codes of the firmware
                    _, mark, message = line.rstrip().rpartition("GUEST ")
                    if mark:
                        messages.append(message)
                        if report:
                            report(message)
            except BaseException:
                qemu.terminate()
                raise
        if messages[-1:] != ["done"]:
            code = qemu.returncode  # timeout(1) answers 124 for a command that it had to end
            why = f"still running after {timeout_s:g} s" if code == 124 else f"QEMU ended with {code}"
            tail = "\n".join(f"  | {line}" for line in console[-25:])
            raise GuestError(f"guest={scenario} on {disk}: no 'GUEST done' ({why}). The end of its console:\n{tail}")
        return messages


def main() -> int:
    parser = argparse.ArgumentParser("python -m cachefs.testing.guest", description="Build and boot the test guest.")
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("build", help="make kernel and initramfs")
    sub.add_argument("folder", type=Path)
    sub = commands.add_parser("image", help="make a root file system for it")
    sub.add_argument("path", type=Path)
    sub.add_argument("--mib", type=int, default=128, help="size (default %(default)s)")
    sub = commands.add_parser("boot", help="boot from a disk and print what the guest says")
    sub.add_argument("folder", type=Path, help="where `build` made the guest")
    sub.add_argument("disk", type=Path)
    sub.add_argument("--scenario", choices=("boot", "check", "churn", "fill"), default="boot")
    sub.add_argument("--show", action="store_true", help="print QEMU's command line first")
    options = parser.parse_args()
    try:
        if options.command == "build":
            build(options.folder)
        elif options.command == "image":
            make_image(options.path, options.mib * MIB)
        else:
            guest = Guest(options.folder / "vmlinuz", options.folder / "initrd.gz")
            if options.show:
                print(shlex.join(guest.command(options.disk, options.scenario)), flush=True)
            guest.boot(options.disk, options.scenario, report=lambda line: print(line, flush=True))
    except GuestError as exc:
        print(exc, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
