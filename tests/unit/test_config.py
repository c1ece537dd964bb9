import contextlib
import json
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from cachefs import config, yamlfile
from cachefs.backends import BACKENDS
from cachefs.config import Config, json_schema, load
from cachefs.errors import ConfigError
from cachefs.layers import LAYERS
from cachefs.layers.base import Options
from cachefs.units import Duration, LocalPath, Size

EXAMPLE = Path(__file__).parents[2] / "config.example.yaml"
DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"
LIST = "must be a list, such as [a, b] or lines that begin with '-', not"
DISK = "disks: {d: {backend: {memory: {size: 1MiB}}}}\n"

Load = Callable[[str | bytes], Config]
Problems = Callable[[str | bytes], list[str]]


@pytest.fixture
def load_text(tmp_path: Path) -> Load:
    def run(text: str | bytes) -> Config:
        file = tmp_path / "c.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(file)

    return run


@pytest.fixture
def problems(load_text: Load, tmp_path: Path) -> Problems:
    """The problems of a text, without the name of the file and the colon behind it."""

    def run(text: str | bytes) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load_text(text)
        start = f"{tmp_path / 'c.yaml'}:"
        assert all(line.startswith(start) for line in caught.value.problems)
        return [line.removeprefix(start) for line in caught.value.problems]

    return run


def disk(keys: str) -> str:
    """A file with the disk `d`, which stands in line 1 from column 13 on, over the image `i`."""
    return f"disks: {{d: {{{keys}}}}}\nimages: {{i: {{backend: {{file: {{path: i.raw}}}}}}}}\n"


class TestValid:
    def test_example_has_every_key_and_resolves_against_its_directory(self) -> None:
        example = load(EXAMPLE)
        assert example.file == EXAMPLE
        assert example.state_dir == EXAMPLE.parent / "state"
        assert example.poll == 50e-6
        assert example.images["debian12"].backend.options.path == EXAMPLE.parent / "images/debian12.raw"  # type: ignore[attr-defined]
        node = example.pools["node"].options
        assert (node.path, node.quota) == (EXAMPLE.parent / "pools/node", 64 << 20)
        assert example.images["debian12"].layers[0].options.pool == "node"  # type: ignore[attr-defined]
        build = example.disks["build"]
        assert build.layers[0].options.block_size == 65536  # type: ignore[attr-defined]
        assert (build.mode, build.layers[0].path) == (0o660, "disks.build.layers[0].cow")
        assert build.backend is not None
        assert build.backend.path == "disks.build.backend.file"

    def test_example_shows_every_key_of_the_schema(self) -> None:
        text = EXAMPLE.read_text()
        assert [key for key in schema_keys() if f"{key}:" not in text] == []

    def test_defaults(self, load_text: Load) -> None:
        result = load_text(DISK)
        assert (result.state_dir, result.poll, result.images) == (Path("/var/lib/cachefs"), 50e-6, {})
        d = result.disks["d"]
        assert (d.layers, d.image, d.mode, d.uid, d.gid) == ((), None, 0o600, None, None)
        assert (d.page_cache, d.read_only) == (False, False)

    @pytest.mark.parametrize("cow", ["cow", "{cow: {}}", "{cow: null}", "{cow: }", '"cow"'])
    def test_layer_without_options_may_be_written_short(self, load_text: Load, cow: str) -> None:
        layers = load_text(disk(f"layers: [{cow}], image: i")).disks["d"].layers
        assert [layer.kind for layer in layers] == ["cow"]

    def test_nothing_below_layers_or_images_is_an_empty_list_or_mapping(self, load_text: Load) -> None:
        result = load_text("images:\ndisks:\n  d:\n    layers:\n    backend: {memory: {size: 1}}\n")
        assert (result.images, result.disks["d"].layers) == ({}, ())

    @pytest.mark.parametrize(
        ("keys", "writable"),
        [
            ("layers: [cow], image: i", True),
            ("image: i", False),
            ("layers: [cow], image: i, read_only: true", False),
            ("backend: {memory: {size: 1}}", True),
            ("backend: {memory: {size: 1}}, read_only: true", False),
        ],
    )
    def test_disk_over_an_image_is_writable_with_cow_only(self, load_text: Load, keys: str, writable: bool) -> None:
        assert load_text(disk(keys)).disks["d"].writable is writable

    @pytest.mark.parametrize("mode", ["0640", '"0640"', "0o640"])
    def test_mode_is_octal_with_or_without_quotes(self, load_text: Load, mode: str) -> None:
        assert load_text(disk(f"image: i, mode: {mode}")).disks["d"].mode == 0o640

    @pytest.mark.parametrize(("poll", "seconds"), [("0", 0.0), ("1ms", 1e-3), ("20us", 20e-6)])
    def test_poll_is_a_duration_and_0_is_off(self, load_text: Load, poll: str, seconds: float) -> None:
        assert load_text(f"poll: {poll}\n{DISK}").poll == seconds

    def test_anchors_aliases_and_merge_keys_work(self, load_text: Load) -> None:
        text = (
            "disks:\n  a: &a {layers: &l [cow], image: i, mode: 0640}\n  b: {<<: *a, mode: 0600}\n"
            "  c: {<<: [{read_only: true}, *a], layers: *l}\nimages: {i: {backend: {memory: {size: 1}}}}\n"
        )
        disks = load_text(text).disks
        assert [(d.mode, d.read_only, len(d.layers)) for d in disks.values()] == [
            (0o640, False, 1),
            (0o600, False, 1),
            (0o640, True, 1),
        ]

    def test_names_that_yaml_takes_for_numbers_or_booleans_are_names(self, load_text: Load) -> None:
        text = "disks: {1: {image: '007'}, yes: {image: '007'}}\nimages: {007: {backend: {memory: {size: 1}}}}\n"
        assert list(load_text(text).disks) == ["1", "yes"]

    def test_byte_order_mark_is_ignored(self, load_text: Load) -> None:
        assert load_text(b"\xef\xbb\xbf" + DISK.encode()).disks

    def test_readers_may_share_a_file(self, load_text: Load) -> None:
        text = (
            "disks: {a: {layers: [cow], backend: {file: {path: f}}},\n"
            "        b: {read_only: true, backend: {file: {path: f}}}}\n"
            "images: {i: {backend: {file: {path: f}}}}\n"
        )
        assert len(load_text(text).disks) == 2


class Fancy(Options):
    timeout: Annotated[Duration, Field(gt=0)]
    """How long."""
    evict: Literal["never", "sieve"] = "sieve"
    cluster: Annotated[Size, Field(ge=4096, le=1 << 20)] = 65536
    retries: int | Literal["forever"] = 3
    names: tuple[str, ...] = ()
    store: LocalPath = Path("/x")


class FancyLayer:
    Config = Fancy


class TestRegistry:
    @pytest.fixture(autouse=True)
    def _fancy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(LAYERS, "fancy", FancyLayer)  # type: ignore[arg-type]

    def test_options_of_any_layer_are_read(self, load_text: Load, tmp_path: Path) -> None:
        text = disk("layers: [{fancy: {timeout: 5s, evict: never, retries: forever, names: [a], store: s}}], image: i")
        options = load_text(text).disks["d"].layers[0].options
        assert options == Fancy(timeout="5s", evict="never", retries="forever", names=("a",), store=tmp_path / "s")  # type: ignore[arg-type]

    def test_pydantic_speaks_in_sentences(self, problems: Problems) -> None:
        text = disk(
            "layers: [{fancy: {evict: siefe, cluster: 2MiB, retries: some, names: a}}, "
            "{fancy: {timeout: 0, names: [1]}}], image: i"
        )
        assert [line.partition(": ")[2].removeprefix("disks.d.layers") for line in problems(text)] == [
            "[0].fancy.timeout: must be given",
            "[0].fancy.evict: must be 'never' or 'sieve', not 'siefe'",
            "[0].fancy.cluster: must be at most 1MiB, not '2MiB'",
            "[0].fancy.retries: 'some' is not a whole number, or must be 'forever', not 'some'",
            "[0].fancy.names: must be a list, such as [a, b] or lines that begin with '-', not 'a'",
            "[1].fancy.timeout: must be more than 0, not 0",
            "[1].fancy.names[0]: 1 is not text: put it in quotes if it is meant to be",
        ]

    def test_schema_covers_it(self) -> None:
        assert "timeout" in schema_keys()
        assert '"cow"' not in json.dumps(json_schema()["$defs"]["ImageKeys"])
        assert "fancy" in json.dumps(json_schema()["$defs"]["ImageKeys"])


class TestMistakes:
    def test_all_are_reported_at_once_in_the_order_of_the_file(self, problems: Problems) -> None:
        text = (
            "state_dri: /x\n"
            "disks:\n"
            "  vm1: {layers: [{cow: {block_size: 5KiB}}], image: debain}\n"
            "  vm2:\n"
            "    backend: {file: {}}\n"
            "    mode: 0755\n"
            "images:\n"
            "  debian: {backend: {flie: {path: a}}}\n"
        )
        assert problems(text) == [
            "1:1: state_dri: unknown key 'state_dri': did you mean 'state_dir'?",
            "3:37: disks.vm1.layers[0].cow.block_size: must be a power of two from 4KiB to 2MiB",
            "3:53: disks.vm1.image: unknown image 'debain': did you mean 'debian'?",
            "5:15: disks.vm2.backend.file.path: must be given",
            "6:11: disks.vm2.mode: 0755 has bits outside 0666, which mean nothing for a disk: write 0644",
            "8:22: images.debian.backend.flie: unknown backend 'flie': did you mean 'file'?",
        ]

    @pytest.mark.parametrize(
        ("keys", "problem"),
        [
            ("", "1:9: disks.d: has neither 'image' nor 'backend': it needs one of them"),
            (
                "image: i, backend: {memory: {size: 1}}",
                "1:9: disks.d: has both 'image' and 'backend': keep one of them",
            ),
            ("image: i, mode: 640", "1:29: disks.d.mode: 640 is not a mode: write 0640"),
            ("image: i, mode: 400", "1:29: disks.d.mode: 400 is not a mode: write 0400"),
            (
                "image: i, mode: rw",
                "1:29: disks.d.mode: 'rw' is not a mode: write octal digits after a 0, such as 0640",
            ),
            (
                "image: i, read_only: maybe",
                "1:34: disks.d.read_only: 'maybe' is not a boolean: write true or false",
            ),
            ('image: i, read_only: "yes"', "1:34: disks.d.read_only: 'yes' is not a boolean: write true or false"),
            ("image: i, layers: 0", f"1:31: disks.d.layers: {LIST} 0"),
            ("image: i, uid: 4294967295", "1:28: disks.d.uid: must be at most 4294967294, not 4294967295"),
            ("image: i, uid: -1", "1:28: disks.d.uid: must be at least 0, not -1"),
            ("image: i, gid: root", "1:28: disks.d.gid: 'root' is not a whole number"),
            ("image: 5", "1:20: disks.d.image: 5 is not text: put it in quotes if it is meant to be"),
            ("image: i, mdoe: 0600", "1:23: disks.d.mdoe: unknown key 'mdoe': did you mean 'mode'?"),
            (
                "image: i, layers: cow",
                f"1:31: disks.d.layers: {LIST} 'cow'",
            ),
            (
                "image: i, layers: [cwo]",
                "1:32: disks.d.layers[0].cwo: unknown layer 'cwo': did you mean 'cow'?",
            ),
            (
                "image: i, layers: [memory]",
                "1:32: disks.d.layers[0].memory: 'memory' is a backend, not a layer: move it to 'backend'",
            ),
            ("backend: cow", "1:22: disks.d.backend.cow: 'cow' is a layer, not a backend: move it to 'layers'"),
            ("backend: ssd", "1:22: disks.d.backend.ssd: unknown backend 'ssd': there is file, memory, nbd, qcow2"),
            (
                "image: i, layers: [{cow: , limit: 5GiB}]",
                "1:32: disks.d.layers[0]: must be one layer with its options indented below it, such as 'cow: {}'; "
                "found 'cow', 'limit'",
            ),
            (
                "backend: ",
                "1:21: disks.d.backend: must be one backend with its options indented below it, such as "
                "'file: {path: vm1.raw}'; not null",
            ),
            ("image: i, layers: [{cow: [1]}]", "1:38: disks.d.layers[0].cow: must be a mapping, not a list"),
            (
                "image: i, layers: [{cow: {ephemeral: maybe}}]",
                "1:50: disks.d.layers[0].cow.ephemeral: 'maybe' is not a boolean: write true or false",
            ),
            (
                "image: i, layers: [{cow: {limit: 50GB}}]",
                "1:46: disks.d.layers[0].cow.limit: '50GB' is not a size: write 50GiB",
            ),
            (
                "backend: {nbd: {timeout: 5s}}",
                "1:28: disks.d.backend.nbd: has neither 'uri' nor 'command': it needs one of them",
            ),
            (
                "backend: {nbd: {uri: 'nbd://h/e', command: [nbdkit]}}",
                "1:28: disks.d.backend.nbd: has both 'uri' and 'command': keep one of them",
            ),
            (
                "backend: {nbd: {command: nbdkit null}}",
                "1:38: disks.d.backend.nbd.command: must be a list, such as [a, b] or lines that begin with '-', not "
                "'nbdkit null'",
            ),
            (
                "backend: {nbd: {command: [/usr/bin/qemu-nbd, --persistent, --fork, /srv/d]}}",
                "1:38: disks.d.backend.nbd.command: has --fork: leave it out, the daemon has to know when its server ends",
            ),
            (
                "backend: {nbd: {command: []}}",
                "1:38: disks.d.backend.nbd.command: is empty: write a program and its arguments, such as "
                "[nbdkit, file, /srv/vm1.raw]",
            ),
            (
                "backend: {nbd: {command: [qemu-nbd, -e, 8]}}",
                "1:53: disks.d.backend.nbd.command[2]: 8 is not text: put it in quotes if it is meant to be",
            ),
            (
                "backend: {nbd: {command: [nbdkit], tls: {}}}",
                "1:28: disks.d.backend.nbd: tls is given, and no URI with nbds://: nothing would be encrypted",
            ),
            (
                "backend: {nbd: {uri: 'nbds://h/e', tls: {xyz: 1}}}",
                "1:54: disks.d.backend.nbd.tls.xyz: unknown key 'xyz': there is ca, cert, key",
            ),
        ],
    )
    def test_of_a_disk(self, problems: Problems, keys: str, problem: str) -> None:
        assert problems(disk(keys)) == [problem]

    @pytest.mark.parametrize("text", ["state_dir: /x\n", "disks:\n", "disks: {}\n"])
    def test_no_disk_says_what_to_add(self, problems: Problems, text: str) -> None:
        (problem,) = problems(text)
        assert "there is no disk: add one below 'disks', such as vm1: {backend: {file: {path: vm1.raw}}}" in problem

    @pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
    def test_empty_file(self, problems: Problems, text: str) -> None:
        (problem,) = problems(text)
        assert problem == "1:1: the file is empty: it needs at least one disk below 'disks'"

    @pytest.mark.parametrize(("text", "what"), [("[1]", "a list"), ("disks", "'disks'"), ("5", "5")])
    def test_file_that_is_no_mapping(self, problems: Problems, text: str, what: str) -> None:
        assert problems(text) == [f"1:1: must be a mapping with the key 'disks', not {what}"]

    @pytest.mark.parametrize("name", ["-a", ".a", "a/b", "a b", "ä", '""', "a" * 129, '"a\\n"'])
    def test_name_that_is_no_file_name(self, problems: Problems, name: str) -> None:
        (problem,) = problems(f"disks: {{? {name} : {{backend: {{memory: {{size: 1}}}}}}}}\n")
        assert "is not a name: letters, digits" in problem
        assert "\n" not in problem

    def test_poll_beyond_1ms(self, problems: Problems) -> None:
        assert problems(f"poll: 2ms\n{DISK}") == ["1:7: poll: must be at most 1ms, not '2ms'"]

    def test_missing_file_and_directory(self, tmp_path: Path) -> None:
        for path, reason in ((tmp_path / "no.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
            with pytest.raises(ConfigError) as caught:
                load(path)
            assert caught.value.problems == (f"{path}: cannot be read: {reason}",)

    def test_cow_in_an_image(self, problems: Problems) -> None:
        text = "images: {i: {layers: [cow], backend: {memory: {size: 1}}}}\ndisks: {d: {image: i}}\n"
        (problem,) = problems(text)
        assert problem.startswith("1:23: images.i.layers[0].cow: an image cannot have 'cow'")


class TestYaml:
    def test_syntax_error_has_its_position(self, problems: Problems) -> None:
        (problem,) = problems("disks:\n  a: [\n  b: }\n")
        assert problem.startswith("3:6: not YAML: ")

    def test_tab_is_named(self, problems: Problems) -> None:
        assert problems("disks:\n\ta: 1\n") == ["2:1: not YAML: a tab where only spaces may stand"]

    def test_key_twice(self, problems: Problems) -> None:
        assert problems(DISK + "poll: 0\npoll: 0\n") == ["3:1: poll: appears twice in this mapping, first in line 2"]

    @pytest.mark.parametrize(
        "value",
        ["!!python/object/apply:os.system [ls]", "!mine 5", "!!binary aGk=", "!!set {a}", "!!int x", "!!bool x"],
    )
    def test_tags_are_refused(self, problems: Problems, value: str) -> None:
        (problem,) = problems(f"{DISK}state_dir: {value}\n")
        assert problem.startswith("2:12: state_dir: ")

    @pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1.0e+999", "9" * 5000, "0x" + "f" * 5000])
    def test_numbers_that_are_none_or_too_large_are_refused(self, problems: Problems, value: str) -> None:
        (problem,) = problems(f"{DISK}poll: {value}\n")
        assert problem.startswith("2:7: poll: ")
        assert len(problem) < 200

    @pytest.mark.parametrize("value", ["0512", "1:30", "2020-01-01"])
    def test_what_yaml_versions_read_differently_is_text(self, problems: Problems, value: str) -> None:
        (problem,) = problems(f"disks: {{d: {{backend: {{memory: {{size: {value}}}}}}}}}\n")
        assert f"'{value}' is not a size" in problem

    def test_bytes_that_are_not_utf8(self, problems: Problems) -> None:
        (problem,) = problems(b"disks:\n  a\xff: {}\n")
        assert problem == "2:4: byte 0xff is not UTF-8: save the file as UTF-8"

    def test_control_character(self, problems: Problems) -> None:
        assert problems(b"a: 1\nb: \x07\n") == ["2:4: the character U+0007 is not allowed"]

    @pytest.mark.parametrize(
        "text",
        [
            "a: &a [*a, *a]\n",
            "a: &a {<<: *a}\n",
            "a: &a {b: *a}\n",
            "[" * 1000,
            "a: " + "{a: " * 100 + "}" * 100 + "\n",
            'a: "\\UFFFFFFFF"\n',
            'a: "\\ud800"\n',
            "? [1]\n: 2\n",
            "? {a: 1}\n: 2\n",
            "--- 1\n--- 2\n",
            "*a\n",
            "%YAML 9.9\n---\na: 1\n",
        ],
    )
    def test_nothing_gets_past_as_a_traceback(self, problems: Problems, text: str) -> None:
        assert problems(text)

    def test_aliases_that_multiply_are_stopped(self, problems: Problems, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(yamlfile, "MAX_VALUES", 1000)
        lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
        (problem,) = problems("\n".join(lines) + "\n")
        assert "more than 1000 values" in problem

    def test_huge_file_is_refused(self, problems: Problems, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(yamlfile, "MAX_BYTES", 1 << 20)
        (problem,) = problems("#" * ((1 << 20) + 1))
        assert "longer than 1 MiB" in problem


class TestStores:
    """A store that is written has exactly one user."""

    OVER = "images: {i: {backend: {file: {path: i.raw}}}}\n"

    @pytest.mark.parametrize(
        "disks",
        [
            "a: {layers: [{cow: {path: o}}], image: i}, b: {layers: [{cow: {path: ./x/../o}}], image: i}",
            "a: {layers: [cow], image: i}, b: {layers: [{cow: {path: /var/lib/cachefs/overlays/a}}], image: i}",
            "a: {layers: [cow, cow], image: i}",
            "a: {backend: {file: {path: f}}}, b: {backend: {file: {path: ./f}}}",
            "a: {backend: {file: {path: f}}}, b: {backend: {file: {path: f}}, read_only: true}",
            "a: {backend: {file: {path: f}}, read_only: true}, b: {backend: {file: {path: f}}}",
            "a: {backend: {file: {path: f}}}, b: {layers: [cow], backend: {file: {path: f}}}",
            "a: {backend: {file: {path: i.raw}}}",
            "a: {backend: {nbd: {uri: nbd://h/x}}}, b: {backend: {nbd: {uri: nbd://h:10809/x, timeout: 1s}}}",
            "a: {backend: {nbd: {uri: nbd://h/x}}}, b: {layers: [cow], backend: {nbd: {uri: nbd://h/x}}}",
            "a: {backend: {nbd: {uri: 'nbd+unix:///x?socket=/s'}}}, b: {backend: {nbd: {uri: 'nbd+unix:///x?socket=/d/../s'}}}",
            "a: {backend: {nbd: {command: [s, f]}}}, b: {backend: {nbd: {command: [s, f], timeout: 1s}}}",
        ],
    )
    def test_shared_store_that_somebody_writes_is_refused(self, problems: Problems, disks: str) -> None:
        (problem,) = problems(f"{self.OVER}disks: {{{disks}}}\n")
        assert "a store that is written has exactly one user" in problem

    def test_symbolic_link_does_not_hide_it(self, problems: Problems, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("f")
        text = "disks: {a: {backend: {file: {path: f}}}, b: {backend: {file: {path: link}}}}\n"
        (problem,) = problems(text)
        assert problem == (
            f"1:69: disks.b.backend.file.path: {tmp_path}/f is used by disks.a.backend.file.path (line 1) too: "
            "a store that is written has exactly one user"
        )

    def test_writer_beside_two_readers_is_the_mistake(self, problems: Problems) -> None:
        text = (
            "disks:\n  a: {backend: {file: {path: f}}, read_only: true}\n"
            "  b: {backend: {file: {path: f}}, read_only: true}\n  c: {backend: {file: {path: f}}}\n"
        )
        (problem,) = problems(text)
        assert problem.startswith("4:30: disks.c.backend.file.path: ")


class TestPools:
    IMAGE = "images: {i: {layers: [{cache: {pool: p}}], backend: {file: {path: i.raw}}}}\n"
    POOL = "pools: {p: {path: p, quota: 16MiB}}\n"

    def pool(self, keys: str) -> str:
        """A file with the pool `p`, which stands in line 1 from column 13 on, and nobody who uses it."""
        return f"pools: {{p: {{{keys}}}}}\n{DISK}"

    def test_keys_have_their_defaults(self, load_text: Load, tmp_path: Path) -> None:
        found = load_text(self.pool("path: x, quota: 1GiB")).pools["p"]
        assert (found.name, found.path, found.options.path) == ("p", "pools.p", tmp_path / "x")
        keys = found.options
        assert (keys.quota, keys.min_free, keys.evict) == (1 << 30, 0, "sieve")
        assert (keys.block_size, keys.cache_timeout) == (65536, 1.0)

    @pytest.mark.parametrize(
        ("keys", "problem"),
        [
            ("quota: 1GiB", "1:9: pools.p.path: must be given"),
            ("path: x", "1:9: pools.p.quota: must be given"),
            ("path: x, quota: 1MiB", "1:29: pools.p.quota: must be at least 16MiB, not '1MiB'"),
            ("path: x, quota: 50GB", "1:29: pools.p.quota: '50GB' is not a size: write 50GiB"),
            (
                "path: x, quota: 1GiB, block_size: 96KiB",
                "1:47: pools.p.block_size: 96KiB is not a power of two from 4KiB to 1MiB",
            ),
            (
                "path: x, quota: 1GiB, block_size: 2MiB",
                "1:47: pools.p.block_size: 2MiB is not a power of two from 4KiB to 1MiB",
            ),
            ("path: x, quota: 1GiB, evict: lru", "1:42: pools.p.evict: must be 'sieve' or 'never', not 'lru'"),
            (
                "path: x, quota: 1GiB, cache_timeout: 1ms",
                "1:50: pools.p.cache_timeout: must be at least 50ms, not '1ms'",
            ),
            ("path: x, qouta: 1GiB, quota: 1GiB", "1:22: pools.p.qouta: unknown key 'qouta': did you mean 'quota'?"),
        ],
    )
    def test_mistakes_of_a_pool(self, problems: Problems, keys: str, problem: str) -> None:
        assert problems(self.pool(keys)) == [problem]

    @pytest.mark.parametrize(
        ("layer", "problem"),
        [
            ("{cache: {pool: nod}}", "1:37: disks.d.layers[0].cache.pool: unknown pool 'nod': did you mean 'node'?"),
            ("{cache: {pool: x}}", "1:37: disks.d.layers[0].cache.pool: unknown pool 'x': there is node"),
            ("cache", "1:22: disks.d.layers[0].cache.pool: must be given"),
            ("{cache: {pool: [node]}}", "1:37: disks.d.layers[0].cache.pool: a list is not text"),
        ],
    )
    def test_a_cache_names_a_pool_that_there_is(self, problems: Problems, layer: str, problem: str) -> None:
        text = f"disks: {{d: {{layers: [{layer}], backend: {{memory: {{size: 1}}}}}}}}\n"
        (found,) = problems(f"{text}pools: {{node: {{path: x, quota: 1GiB}}}}\n")
        assert found.startswith(problem)

    def test_without_pools_there_is_none(self, problems: Problems) -> None:
        (problem,) = problems("disks: {d: {layers: [{cache: {pool: x}}], backend: {memory: {size: 1}}}}\n")
        assert problem == "1:37: disks.d.layers[0].cache.pool: unknown pool 'x': there is none"

    @pytest.mark.parametrize(
        ("layers", "writable"),
        [
            ("{cache: {pool: p}}", False),
            ("{cache: {pool: p, mode: write-through}}", True),
            ("cow, {cache: {pool: p}}", True),
            ("cow, {cache: {pool: p, mode: write-through}}", True),
        ],
    )
    def test_disk_over_a_read_only_cache_is_read_only(self, load_text: Load, layers: str, writable: bool) -> None:
        text = f"{self.POOL}disks: {{d: {{layers: [{layers}], backend: {{memory: {{size: 1}}}}}}}}\n"
        assert load_text(text).disks["d"].writable is writable

    @pytest.mark.parametrize("mode", ["read-only", "write-through"])
    def test_cache_above_cow_would_mix_up_disks(self, problems: Problems, mode: str) -> None:
        layers = f"[{{cache: {{pool: p, mode: {mode}}}}}, cow]"
        (problem,) = problems(f"{self.POOL}disks: {{d: {{layers: {layers}, backend: {{memory: {{size: 1}}}}}}}}\n")
        assert problem.startswith("2:23: disks.d.layers[0].cache: a cache cannot stand above 'cow'")
        assert "move it below the 'cow'" in problem

    @pytest.mark.parametrize(
        ("disk", "places"),
        [
            (
                "layers: [{cache: {pool: p}}, {cache: {pool: p}}], backend: {memory: {size: 1}}",
                "disks.d.layers[1].cache",
            ),
            ("layers: [cow, {cache: {pool: p}}], image: i", "images.i.layers[0].cache"),
        ],
    )
    def test_cache_over_itself_would_wait_for_itself(self, problems: Problems, disk: str, places: str) -> None:
        (problem,) = problems(f"{self.POOL}{self.IMAGE}disks: {{d: {{{disk}}}}}\n")
        assert problem.endswith(f"{places}, which lies below it, is a cache in the same pool: keep one of them")

    def test_caches_of_two_pools_may_lie_over_each_other(self, load_text: Load) -> None:
        text = f"{self.IMAGE}disks: {{d: {{layers: [{{cache: {{pool: fast}}}}], image: i}}}}\n"
        assert load_text(f"pools: {{p: {{path: p, quota: 1GiB}}, fast: {{path: f, quota: 1GiB}}}}\n{text}").disks

    @pytest.mark.parametrize(
        "stores",
        [
            "pools: {p: {path: x, quota: 1GiB}, q: {path: ./y/../x, quota: 1GiB}}\ndisks: {d: {image: i}}\n",
            "pools: {p: {path: x, quota: 1GiB}}\ndisks: {d: {layers: [{cow: {path: x}}], image: i}}\n",
        ],
    )
    def test_pool_shares_its_directory_with_nobody(self, problems: Problems, stores: str) -> None:
        (problem,) = problems(f"{self.IMAGE}{stores}")
        assert "a store that is written has exactly one user" in problem

    @pytest.mark.parametrize(
        ("stores", "who"),
        [
            (
                "pools: {p: {path: x, quota: 1GiB}, q: {path: x/y, quota: 1GiB}}\ndisks: {d: {image: i}}\n",
                "pools.q.path",
            ),
            (
                "pools: {p: {path: x, quota: 1GiB}}\ndisks: {d: {layers: [{cow: {path: x/images/d}}], image: i}}\n",
                "disks.d.layers[0].cow.path",
            ),
            ("pools: {p: {path: ., quota: 1GiB}}\ndisks: {d: {image: i}}\n", "images.i.backend.file.path"),
            ("pools: {p: {path: x, quota: 1GiB}}\nstate_dir: x\ndisks: {d: {image: i}}\n", "state_dir"),
            ("pools: {p: {path: x, quota: 1GiB}}\nstate_dir: x/state\ndisks: {d: {image: i}}\n", "state_dir"),
        ],
    )
    def test_nothing_else_lies_in_a_pool(self, problems: Problems, stores: str, who: str) -> None:
        (problem,) = problems(f"{self.IMAGE}{stores}")
        assert ": pools.p.path: " in problem
        assert f"{who} lies in it" in problem
        assert "a pool has its directory for itself" in problem

    def test_pool_below_state_dir_is_fine(self, load_text: Load) -> None:
        text = "state_dir: s\npools: {p: {path: s/pool, quota: 1GiB}}\ndisks: {d: {image: i}}\n"
        assert load_text(f"{self.IMAGE}{text}").pools


def schema_keys() -> list[str]:
    """Every key that the schema knows."""
    found: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            found.update(node.get("properties", {}))
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(json_schema())
    return sorted(found)


class TestSchema:
    def test_is_a_schema_and_accepts_the_example(self) -> None:
        jsonschema.Draft202012Validator.check_schema(json_schema())
        jsonschema.validate(yaml.safe_load(EXAMPLE.read_text()), json_schema())

    @pytest.mark.parametrize(
        "text",
        [
            "disks: {}",
            "disks: {d: {}}",
            "disks: {d: {image: i, backend: {memory: {size: 1}}}}",
            "disks: {d: {image: i, layers: [cwo]}}",
            "disks: {d: {image: i, layers: [{cow: {blok_size: 1}}]}}",
            "disks: {d: {image: i, layers: [{cow: {}, more: {}}]}}",
            "disks: {d: {image: i, page_cache: maybe}}",
            "disks: {d: {backend: {memory: {size: 50GB}}}}",
            "disks: {'a b': {image: i}}",
            "images: {i: {layers: [cow], backend: {memory: {size: 1}}}}\ndisks: {d: {image: i}}",
            f"pools: {{p: {{quota: 16MiB}}}}\n{DISK}",
            f"pools: {{p: {{path: p, quota: 16MiB, evict: lru}}}}\n{DISK}",
            "disks: {d: {layers: [{cache: {}}], backend: {memory: {size: 1}}}}",
            "disks: {d: {layers: [{cache: {pool: p, mode: write-back}}], backend: {memory: {size: 1}}}}",
        ],
    )
    def test_refuses_what_load_refuses(self, text: str, problems: Problems) -> None:
        assert problems(text)
        assert not jsonschema.Draft202012Validator(json_schema()).is_valid(yaml.safe_load(text))

    def test_every_key_has_a_description(self) -> None:
        for definition in [json_schema(), *json_schema()["$defs"].values()]:
            for key, value in definition["properties"].items():
                assert value.get("description"), key

    def test_every_key_layer_and_backend_is_in_the_docs(self) -> None:
        text = DOCS.read_text()
        assert [key for key in [*schema_keys(), *LAYERS, *BACKENDS] if f"`{key}`" not in text] == []

    def test_every_default_is_in_the_docs(self) -> None:
        rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
        for definition in [json_schema(), *json_schema()["$defs"].values()]:
            for key, value in definition["properties"].items():
                default = value.get("default")
                if default in (None, []):
                    continue
                written = str(default).lower() if isinstance(default, bool) else str(default)
                assert any(row.startswith(f"| `{key}` |") and f"| `{written}` |" in row for row in rows), key


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


class TestDocs:
    def test_mistakes_are_shown_as_they_are_printed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        section = DOCS.read_text().partition("## Mistakes")[2]
        ((written,), (printed,)) = blocks(section, "yaml"), blocks(section, "text")
        Path("config.yaml").write_text(written)
        with pytest.raises(ConfigError) as caught:
            load(Path("config.yaml"))
        assert str(caught.value) == printed.rstrip("\n")

    def test_stacks_of_the_reference_are_valid(self, load_text: Load) -> None:
        examples = blocks(DOCS.read_text().partition("## Mistakes")[0], "yaml")
        assert examples
        for example in examples:
            load_text(example)


def check_any_bytes(content: bytes) -> None:
    """load() returns a Config or raises ConfigError with whole lines."""
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(content)
        file.flush()
        problems: tuple[str, ...] | None = None
        try:
            assert isinstance(load(Path(file.name)), Config)
        except ConfigError as exc:
            problems = exc.problems
    assert problems != ()
    assert all(problem.startswith(f"{file.name}:") for problem in problems or ())
    assert all(problem.splitlines() == [problem] for problem in problems or ())


WORDS = [
    "state_dir", "poll", "images", "disks", "vm1", "i", "layers", "cow", "image", "backend", "file", "memory", "path",
    "size", "block_size", "limit", "ephemeral", "mode", "uid", "read_only", "<<", "0640", "64KiB", "5s", "", "pools", "pool",
    "cache", "quota", "16MiB", "evict", "write-through",
]  # fmt: skip
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(WORDS), st.dates()
)
trees = st.recursive(
    scalars,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.sampled_from(WORDS), children, max_size=6),
    max_leaves=25,
)
stacks = st.fixed_dictionaries(
    {"disks": st.dictionaries(st.sampled_from(WORDS), st.fixed_dictionaries({"layers": trees, "backend": trees}))},
    optional={"images": trees, "state_dir": trees, "poll": trees, "pools": trees},
)


class TestAnyContent:
    @given(st.binary(max_size=200))
    def test_bytes(self, content: bytes) -> None:
        check_any_bytes(content)

    @given(st.text(st.sampled_from(list("a:[]{},&*!|>-?#%@'\"\\ \n\t<~0x.é\u2028\ufeff")), max_size=60))
    def test_punctuation(self, content: str) -> None:
        check_any_bytes(content.encode())

    @pytest.mark.slow
    @settings(deadline=None)
    @given(trees | stacks)
    def test_yaml_trees(self, tree: Any) -> None:
        with contextlib.suppress(UnicodeEncodeError):  # lone surrogates
            check_any_bytes(yaml.safe_dump(tree, allow_unicode=True).encode())

    @pytest.mark.slow
    @settings(deadline=None)
    @given(st.integers(0, 1 << 32), st.integers(1, 5))
    def test_mutations_of_the_example(self, seed: int, count: int) -> None:
        dice = random.Random(seed)
        content = EXAMPLE.read_bytes()
        for _ in range(count):
            start = dice.randrange(len(content))
            end = start + dice.choice([0, 1, 1, 5, 40])
            other = dice.randrange(len(content))
            inserted = dice.choice(
                [b"", b":", b" ", b"\n", b"\t", b"&a ", b"*a", b"!!x ", b"[", b"}", content[other : other + 20]]
            )
            content = content[:start] + inserted + content[end:]
        check_any_bytes(content)


def test_config_lists_its_interface() -> None:
    assert all(hasattr(config, name) for name in config.__all__)
