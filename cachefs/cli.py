"""Arguments -> calls; exit codes; no logic of its own.

Exit codes: 0 done; 1 something went wrong; 2 the configuration (or the command line) is wrong; 3 a store cannot be opened.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from cachefs import __version__
from cachefs.errors import CachefsError, ConfigError, StoreError

EXIT_ERROR, EXIT_CONFIG, EXIT_STORE = 1, 2, 3


def exit_code(exc: CachefsError) -> int:
    if isinstance(exc, ConfigError):
        return EXIT_CONFIG
    return EXIT_STORE if isinstance(exc, StoreError) else EXIT_ERROR


class Commands(click.Group):
    """A CachefsError is a sentence on stderr and an exit code, never a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except CachefsError as exc:
            click.echo(str(exc), err=True)
            ctx.exit(exit_code(exc))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cachefs")
def cli() -> None:
    """Virtual disks for compute nodes: each disk of a YAML file becomes a file to boot a VM from.

    \b
    Example:
      cachefs check config.yaml
      cachefs mount config.yaml /mnt/disks
      qemu-system-x86_64 ... -drive file=/mnt/disks/vm1,format=raw
      cachefs umount /mnt/disks
    """


config_argument = click.argument("config", type=click.Path(path_type=Path))
# not click.Path, which looks at the file: a daemon that hangs would hang us, and `umount --force` with us
mountpoint_argument = click.argument("mountpoint", type=Path)


@cli.command()
@config_argument
@mountpoint_argument
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground and log to stderr; Ctrl-C drains.")
@click.option(
    "--ready-fd", type=int, hidden=True, help="Run in the background; told where the log goes, -1: nobody is."
)
@click.option("--take-over", hidden=True, help="Descriptors of a predecessor that serves.")
@click.option("--no-resend", is_flag=True, hidden=True, help="As if the kernel could not send requests again.")
def mount(
    config: Path, mountpoint: Path, foreground: bool, ready_fd: int | None, take_over: str | None, no_resend: bool
) -> None:
    """Serve the disks of CONFIG as files in the directory MOUNTPOINT.

    Returns 0 once the mount answers, and serves on in the background; logs then go to the journal, or to a file in
    state_dir where there is none. Exit codes: 2 the configuration is wrong, 3 a store cannot be opened, 1 anything else.

    \b
    Example:
      cachefs mount /etc/cachefs/node.yaml /mnt/disks
      cachefs mount -f config.yaml /mnt/disks     # in the foreground
    """
    from cachefs import start

    if foreground:
        way, _, memory = (take_over or "").partition(",")
        descriptors = (int(way), int(memory)) if take_over else None
        options = start.StartOptions(ready_fd, descriptors, with_resend=not no_resend)
        start.run_in_foreground(config, mountpoint, options)
    else:
        sys.exit(start.run_in_background(config, mountpoint, with_resend=not no_resend))


@cli.command()
@mountpoint_argument
def upgrade(mountpoint: Path) -> None:
    """Let the installed version of cachefs take over MOUNTPOINT, with its configuration file as it is now.

    Machines go on; they see a pause. Disks may be added and dropped, and their settings changed, by editing the file before;
    one that is open must keep its layers and its store. When the successor cannot start the daemon serves on, and the
    command says why.

    \b
    Example:
      pip install --upgrade cachefs && cachefs upgrade /mnt/disks
    """
    from cachefs import upgrading

    click.echo(upgrading.upgrade(mountpoint))


@cli.command()
@mountpoint_argument
@click.option("--force", is_flag=True, help="Do not wait: requests in flight fail, files that are open become dead.")
def umount(mountpoint: Path, force: bool) -> None:
    """Unmount MOUNTPOINT: wait until nobody has a disk open, flush everything, end the daemon.

    Says what it waits for. Ctrl-C gives up waiting and leaves the mount as it is.

    \b
    Example:
      cachefs umount /mnt/disks
      cachefs umount --force /mnt/disks           # when a backing store hangs for good
    """
    from cachefs import stop

    stop.unmount(mountpoint, force=force, say=lambda text: click.echo(text, err=True))


@cli.command()
@mountpoint_argument
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
def status(mountpoint: Path, as_json: bool) -> None:
    """Show the disks served at MOUNTPOINT and what their layers did.

    \b
    Example:
      cachefs status /mnt/disks
      cachefs status --json /mnt/disks | jq .disks.vm1.layers
    """
    from cachefs import statusview

    found = statusview.read(mountpoint)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        statusview.show(found)


@cli.command("map")
@click.argument("where", metavar="CONFIG|MOUNTPOINT", type=Path)
@click.argument("disk")
@click.option("--json", "as_json", is_flag=True, help="In the form of `qemu-img map --output=json`.")
def map_disk(where: Path, disk: str, as_json: bool) -> None:
    """Show what each layer of DISK has of it, and which of them answers for each range.

    A disk that is mounted is asked for at its MOUNTPOINT; with CONFIG the stores are read, while nobody serves from them, and
    nothing in them is changed. Ctrl-C ends it at any moment.

    \b
    Example:
      cachefs map /mnt/disks vm1
      cachefs map --json config.yaml vm1 | jq '[.[] | select(.data).length] | add'
    """
    from cachefs import diskmap, mapview

    found = diskmap.read(where, disk)
    if as_json:
        click.echo(json.dumps(found.as_qemu()))
    else:
        mapview.show(found)


@cli.command()
@config_argument
def check(config: Path) -> None:
    """Report every mistake in CONFIG, without mounting anything.

    \b
    Example:
      cachefs check config.yaml
    """
    from cachefs.config import load
    from cachefs.graph import warnings_about

    loaded = load(config)
    for warning in warnings_about(loaded):
        click.echo(f"warning: {warning}", err=True)
    disks, images = len(loaded.disks), len(loaded.images)
    click.echo(f"{config}: ok: {disks} disk{'s' * (disks != 1)}, {images} image{'s' * (images != 1)}")


@cli.group()
def overlay() -> None:
    """Work on the stores of disks that are not mounted.

    \b
    Example:
      cachefs overlay clear-failed config.yaml vm1
    """


@overlay.command("clear-failed")
@config_argument
@click.argument("disk")
@click.option("--yes", is_flag=True, help="Do not ask.")
def clear_failed(config: Path, disk: str, yes: bool) -> None:
    """Let DISK be written again after the kernel failed to write it out.

    What the guest wrote since its last successful flush before the failure may be lost, in part, and nobody can say what.
    Check the device (dmesg, smartctl) and the guest's file system (fsck) before you trust it.

    \b
    Example:
      cachefs overlay clear-failed config.yaml vm1
    """
    from cachefs import offline

    flag = offline.failed_flag(config, disk)
    click.echo(f"{disk} failed: {flag.read()}")
    if not yes:
        click.confirm("What it did not flush before that may be lost. Let it be written again?", abort=True)
    offline.clear_failed(config, disk)
    click.echo(f"{disk} can be written again; mount it, and run fsck in the guest")


@cli.group()
def pool() -> None:
    """Look at pools, check them, and delete from them, while no daemon uses them.

    `cachefs status` shows the pools of a mount.

    \b
    Example:
      cachefs pool ls config.yaml
      cachefs pool verify config.yaml node
      cachefs pool drop config.yaml node debian12
    """


pool_argument = click.argument("pool")
image_argument = click.argument("image", required=False)


@pool.command("ls")
@config_argument
@click.argument("pool", required=False)
def pool_ls(config: Path, pool: str | None) -> None:
    """List what the pools of CONFIG hold, or POOL alone, one line for each image.

    \b
    Example:
      cachefs pool ls config.yaml
      cachefs pool ls config.yaml node
    """
    from cachefs import pooltool

    refused = 0
    for spec in pooltool.find_pools(config, pool):
        try:
            pooltool.show(spec)
        except StoreError as exc:
            click.echo(str(exc), err=True)
            refused = exit_code(exc)
    sys.exit(refused)


@pool.command("verify")
@config_argument
@pool_argument
@image_argument
@click.option("--dry-run", is_flag=True, help="Say what is wrong, and leave it as it is.")
def pool_verify(config: Path, pool: str, image: str | None, dry_run: bool) -> None:
    """Compare what POOL holds of IMAGE (of all) with its checksums, and forget what disagrees.

    What is forgotten is fetched again when it is wanted. IMAGE is a name or the beginning of an id, as `ls` shows them.
    Ctrl-C ends it and keeps what was found. Exit code 1 when something was wrong.

    \b
    Example:
      cachefs pool verify config.yaml node
      cachefs pool verify --dry-run config.yaml node debian12
    """
    from cachefs import pooltool

    (spec,) = pooltool.find_pools(config, pool)
    verdict = pooltool.verify(spec, image, dry_run=dry_run)
    click.echo(f"{pool}: {verdict.sentence(dry_run=dry_run)}")
    sys.exit(EXIT_ERROR if verdict.wrong or verdict.interrupted else 0)


@pool.command("drop")
@config_argument
@pool_argument
@image_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
def pool_drop(config: Path, pool: str, image: str | None, yes: bool) -> None:
    """Delete IMAGE from POOL, or everything. What is deleted is fetched again when it is wanted.

    IMAGE is a name or the beginning of an id, as `ls` shows them.

    \b
    Example:
      cachefs pool drop config.yaml node debian12
      cachefs pool drop --yes config.yaml node
    """
    from cachefs import pooltool

    (spec,) = pooltool.find_pools(config, pool)
    found = pooltool.describe(spec, image)
    for line in found:
        click.echo(line)
    if found and not yes:
        click.confirm("Delete it?" if len(found) == 1 else f"Delete these {len(found)} images?", abort=True)
    dropped = pooltool.drop(spec, image) if found else 0
    click.echo(f"{pool}: {dropped} image{'s' * (dropped != 1)} deleted")


@cli.command()
@config_argument
@click.argument("image")
@click.option("--range", "wanted", default="0-", help="START-END or START+LENGTH: only this part.")
@click.option("--rate", help="SIZE/s: read no faster from below.")
def warm(config: Path, image: str, wanted: str, rate: str | None) -> None:
    """Fill the cache of IMAGE (or of a disk) before anybody needs it.

    What the pool holds is skipped: after Ctrl-C, run it again to go on. Nothing may be mounted that uses the pool. Exit
    code 1 when it did not come to the end, or could not fetch all.

    \b
    Example:
      cachefs warm config.yaml debian12
      cachefs warm --range 0-4GiB --rate 50MiB/s config.yaml debian12
    """
    from cachefs import warm as warming

    try:
        parsed = warming.parse_range(wanted), None if rate is None else warming.parse_rate(rate)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    outcome = warming.run(config, image, *parsed)
    click.echo(f"{image}: {outcome.sentence()}")
    if outcome.problem:
        click.echo(f"{image}: ended early: {outcome.problem}", err=True)
    elif outcome.interrupted:
        click.echo("interrupted; the same command goes on from here", err=True)
    sys.exit(EXIT_ERROR if outcome.problem or outcome.interrupted or outcome.failed else 0)


@cli.command()
def schema() -> None:
    """Print the JSON Schema of the configuration, for editors.

    \b
    Example:
      cachefs schema > cachefs.schema.json
      # first line of config.yaml: # yaml-language-server: $schema=cachefs.schema.json
    """
    from cachefs.config import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


def main() -> None:
    cli(prog_name="cachefs")
