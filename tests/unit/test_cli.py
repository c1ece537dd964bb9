from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import jsonschema
import pytest
import yaml
from click.testing import CliRunner, Result

from cachefs import __version__, statusview
from cachefs.cli import cli, exit_code
from cachefs.errors import BaseChangedError, CachefsError, ConfigError, FormatError, LockedError
from cachefs.store.localfile import FileSystem

EXAMPLE = Path(__file__).parents[2] / "config.example.yaml"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="cachefs")


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


@pytest.mark.parametrize(
    ("path", "command"),
    list(commands()),
    ids=lambda value: " ".join(value) or "cachefs" if isinstance(value, tuple) else "",
)
def test_help_of_every_command_shows_an_example(path: tuple[str, ...], command: click.Command) -> None:
    done = run(*path, "--help")
    assert done.exit_code == 0
    assert "Example" in done.output
    assert " ".join(("cachefs", *path)) in done.output.partition("Example")[2]
    assert command.help
    assert done.output == run(*path, "-h").output


def test_there_are_the_commands_of_the_manual() -> None:
    commands = {"mount", "umount", "upgrade", "status", "check", "schema", "overlay", "pool", "warm", "map"}
    assert commands == set(cli.commands)


def test_version() -> None:
    assert run("--version").output == f"cachefs, version {__version__}\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError(["a line"]), 2),
        (LockedError("x", "y"), 3),
        (FormatError("x", "y"), 3),
        (BaseChangedError("x", "y"), 3),
        (CachefsError("x", "y"), 1),
    ],
)
def test_exit_codes_tell_who_is_to_act(error: CachefsError, code: int) -> None:
    assert exit_code(error) == code


def test_a_wrong_command_line_is_2() -> None:
    assert run("mount").exit_code == 2
    assert run("moutn", "x").exit_code == 2


def test_check_counts_what_it_found(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("disks: {vm1: {backend: {memory: {size: 1MiB}}}}")
    done = run("check", path)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == f"{path}: ok: 1 disk, 0 images\n"


def test_check_reports_every_mistake_and_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("pol: 1\ndisks:\n  vm1: {backend: {memory: {size: 1MiB}}, moed: 0600}\n")
    done = run("check", path)
    assert (done.exit_code, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:1:1", f"{path}:3:42"]
    assert "did you mean 'poll'" in lines[0]
    assert "did you mean 'mode'" in lines[1]


def test_check_warns_of_a_base_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("disks: {vm1: {backend: {file: {path: none.raw}}}}")
    done = run("check", path)
    assert done.exit_code == 0
    assert (
        done.stderr == f"warning: disks.vm1.backend.file: cannot open {tmp_path}/none.raw: No such file or directory\n"
    )


CACHED = "disks: {vm1: {layers: [cow, {cache: {pool: p}}], backend: {file: {path: base.raw}}}}\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(b"base")
    return path


def warnings(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    done = run("check", path)
    assert done.exit_code == 0, done.output
    return done.stderr.splitlines()


def test_check_has_nothing_to_say_of_a_pool_that_fits(tmp_path: Path, base: Path) -> None:
    assert warnings(tmp_path, f"pools: {{p: {{path: some/where, quota: 16MiB}}}}\n{CACHED}") == []
    assert not (tmp_path / "some").exists()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("quota: 4000TiB", "pools.p: quota 4000TiB are more than its file system has, "),
        (
            "quota: 16MiB, min_free: 4000TiB",
            "pools.p: quota 16MiB and min_free 4000TiB are more than its file system has, ",
        ),
    ],
)
def test_check_warns_of_a_quota_that_its_file_system_has_not(tmp_path: Path, base: Path, keys: str, says: str) -> None:
    (warning,) = warnings(tmp_path, f"pools: {{p: {{path: p, {keys}}}}}\n{CACHED}")
    assert warning.startswith(f"warning: {says}")
    assert warning.endswith("; it will be full before the quota is reached")


def test_check_warns_of_a_pool_that_may_hang(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileSystem, "may_hang", True)
    found = warnings(tmp_path, f"pools: {{p: {{path: p, quota: 16MiB}}}}\n{CACHED}")
    (warning,) = [line for line in found if "pools.p" in line]
    assert warning.startswith(f"warning: pools.p: {tmp_path}/p lies on a network or FUSE file system; ")


def test_check_warns_of_a_cache_over_memory(tmp_path: Path) -> None:
    text = "disks: {vm1: {layers: [{cache: {pool: p}}], backend: {memory: {size: 1MiB}}}}"
    (warning,) = warnings(tmp_path, f"pools: {{p: {{path: p, quota: 16MiB}}}}\n{text}")
    assert warning.startswith("warning: disks.vm1.layers[0].cache: memory is gone when the daemon ends")


def test_check_warns_of_a_cache_over_a_block_device(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_block_device", lambda self: self == base)
    text = "images: {i: {layers: [{cache: {pool: p}}], backend: {file: {path: base.raw}}}}\ndisks: {vm1: {image: i}}\n"
    (warning,) = warnings(tmp_path, f"pools: {{p: {{path: p, quota: 16MiB}}}}\n{text}")
    assert warning.startswith("warning: images.i.layers[0].cache: the contents of a block device are known by a sample")
    assert "`cachefs pool drop`" in warning


def test_schema_is_a_json_schema_that_accepts_the_example() -> None:
    done = run("schema")
    assert done.exit_code == 0
    schema = json.loads(done.output)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(EXAMPLE.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"disks": {"vm1": {"layers": ["cwo"], "image": "x"}}}, schema)


@pytest.mark.parametrize("command", ["status", "umount"])
def test_a_directory_that_is_no_mount_is_a_sentence(tmp_path: Path, command: str) -> None:
    done = run(command, tmp_path)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "`findmnt -t fuse.cachefs` lists them" in done.stderr
    assert done.stderr.count("\n") == 1


def test_status_shows_an_error_of_a_disk(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = {"mountpoint": "/mnt", "state": "serving", "pid": 7, "version": "1", "uptime_s": 61.2}
    daemon |= {"waiting_requests": 3, "request_errors": 2, "internal_errors": 1}
    layers = [
        {
            "layer": "vm1/cow",
            "state": "failed",
            "allocated_bytes": 3 << 20,
            "read_bytes": 1 << 30,
            "fast_reads": 3,
            "slow_reads": 1,
        },
        {"layer": "base/file"},
    ]
    disk = {"state": "failed", "size": 5 << 30, "layers": layers, "error": "vm1/cow: it is broken; mend it"}
    statusview.show({"daemon": daemon, "disks": {"vm1": disk}})
    head, titles, cow, file, error = capsys.readouterr().out.splitlines()
    assert head == "/mnt: serving, pid 7, cachefs 1, up 61 s, 3 requests waiting, 2 failed, 1 internal errors"
    assert titles.split()[:3] == ["disk", "layer", "state"]
    assert cow.split() == ["vm1", "cow", "failed", "5GiB", "3", "MiB", "1", "GiB", "75.0", "%"]
    assert file.split()[:1] == ["file"]
    assert error == "vm1: vm1/cow: it is broken; mend it"


def cache_layer(name: str, pool: str, bypass: str = "no", **counts: int) -> dict[str, object]:
    return {"layer": name, "pool": pool, "hits": 0, "misses": 0, "bypassed": 0, "bypass": bypass, **counts}


def test_status_shows_pools_and_why_one_is_not_used(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = {"mountpoint": "/mnt", "state": "serving", "pid": 7, "version": "1", "uptime_s": 61.2}
    daemon |= {"waiting_requests": 0, "request_errors": 0, "internal_errors": 0}
    pools = {
        "node": {"quota_bytes": 1 << 30, "used_bytes": 3 << 28, "images": 2},
        "idle": {"quota_bytes": 16 << 20, "used_bytes": 32 << 10, "images": 0},
    }
    shared = cache_layer("img/cache", "node", hits=7, misses=1)
    broken = cache_layer("vm3/cache", "node", "reading: no answer in 1 s", hits=1, bypassed=1)
    stacks = {"vm1": [{"layer": "vm1/cow"}, shared], "vm2": [{"layer": "vm2/cow"}, shared], "vm3": [broken]}
    disks = {name: {"state": "serving", "size": 5 << 30, "layers": layers} for name, layers in stacks.items()}
    statusview.show({"daemon": {**daemon, "pools": pools}, "disks": disks})
    *_, titles, node, idle, why = capsys.readouterr().out.splitlines()
    assert titles.split() == ["pool", "used", "quota", "full", "images", "hits"]
    assert node.split() == ["node", "768", "MiB", "1GiB", "75.0", "%", "2", "80.0", "%"]
    assert idle.split() == ["idle", "32", "KiB", "16MiB", "0.2", "%", "0"]
    assert why == "vm3/cache: served without its pool for now: reading: no answer in 1 s"
