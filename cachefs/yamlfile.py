"""Reads a YAML file into plain values and remembers where each of them stands.

`read` turns the node graph that PyYAML composes into dictionaries, lists, text, numbers, booleans and None. For every
value and key it keeps the line and column under the value's *path* (`("disks", "vm1", "layers", 0)`), so that whoever
checks the values later can say where a mistake is. Anchors, aliases and merge keys (`<<`) work. Compared with
`yaml.safe_load`:

- keys are text as it is written (`1: ...` and `yes: ...` are the names "1" and "yes"), and a key twice is a mistake;
- tags other than those of the plain values are refused, and so are `.nan`, `.inf` and whole numbers beyond 64 bits;
- what YAML 1.1 and 1.2 read differently, or only YAML 1.1 reads at all, stays text: numbers with a leading 0
  (`0640`), dates, and base 60 (`1:30`).

No content makes `read` raise anything but ConfigError: sizes, nesting and the expansion of aliases are bounded.
**Source:** https://yaml.org/spec/1.1/, https://yaml.org/type/
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.constructor import SafeConstructor

from cachefs.errors import ConfigError
from cachefs.units import shown

MAX_BYTES = 16 << 20
MAX_DEPTH = 64
MAX_VALUES = 200_000  # with aliases expanded

Keys = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_.-]{1,128}")


class Position(NamedTuple):
    """Both count from 1."""

    line: int
    column: int


class Document:
    """The values of one file, where they stand, and the mistakes found so far."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.root: Any = None
        self.keys: dict[Keys, Position] = {}
        self.values: dict[Keys, Position] = {}
        self.unreadable: set[Keys] = set()
        """Paths of values that `read` reported and replaced by None: nothing more is to be said about them."""
        self._problems: dict[str, tuple[Position, int]] = {}

    def problem(self, path: Keys, message: str, at_key: bool = False, position: Position | None = None) -> None:
        """Note a mistake in the value at *path*, or in its key; one that is missing stands where its parent does."""
        if path in self.unreadable and position is None:
            return
        place = position or self.place(path, at_key)
        name = path_name(path)
        line = f"{self.file}:{place.line}:{place.column}: {name + ': ' if name else ''}{message}"
        self._problems.setdefault(line, (place, len(self._problems)))

    def place(self, path: Keys, at_key: bool = False) -> Position:
        if not at_key and path in self.values:
            return self.values[path]
        while path and path not in self.keys:
            path = path[:-1]
        return self.keys[path] if path else self.values.get((), Position(1, 1))

    def raise_problems(self) -> None:
        """Raises: ConfigError with every mistake noted, in the order of the file; if there is none, nothing."""
        if self._problems:
            raise ConfigError(sorted(self._problems, key=self._problems.__getitem__))


def path_name(path: Keys) -> str:
    """*path* as messages show it: `disks.vm1.layers[0].cow`."""
    name = ""
    for key in path:
        if isinstance(key, int):
            name += f"[{key}]"
        else:
            name += ("." if name else "") + (key if _PLAIN_KEY.fullmatch(key) else shown(key))
    return name


def read(file: Path) -> Document:
    """The document in *file*; mistakes that leave the rest readable are noted in it, not raised.

    Raises: ConfigError when the file cannot be read or is not one YAML document in UTF-8.
    """
    document = Document(file)
    node = _compose(document, _text(document))
    if node is None or node.tag == _TAG + "null":
        raise ConfigError([f"{file}:1:1: the file is empty: it needs at least one disk below 'disks'"])
    document.root = _Builder(document).value(node, ())
    return document


def _text(document: Document) -> str:
    file = document.file
    try:
        with open(file, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as exc:
        reason = os.strerror(exc.errno) if isinstance(exc, OSError) and exc.errno else "not a path"
        raise ConfigError([f"{file}: cannot be read: {reason}"]) from exc
    if len(content) > MAX_BYTES:
        raise ConfigError([f"{file}: longer than {MAX_BYTES >> 20} MiB"])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        place = _place_in(content[: exc.start].decode("utf-8", "replace"))
        wrong = f"byte 0x{content[exc.start]:02x} is not UTF-8: save the file as UTF-8"
        raise ConfigError([f"{file}:{place.line}:{place.column}: {wrong}"]) from exc


def _compose(document: Document, text: str) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as exc:
        place = _place_in(text[: exc.position])
        message = f"the character U+{exc.character:04X} is not allowed"
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        place = _position(mark) if mark else Position(1, 1)
        message = _syntax_message(exc)
    except RecursionError:
        place, message = Position(1, 1), "nested too deeply"
    except (ValueError, OverflowError, LookupError, AttributeError) as exc:
        # PyYAML's scanner lets some of these through, such as chr() of the escape "\UFFFFFFFF"
        place, message = Position(1, 1), f"not YAML: {exc}"
    else:
        return node
    raise ConfigError([f"{document.file}:{place.line}:{place.column}: {message}"])


def _syntax_message(exc: yaml.MarkedYAMLError) -> str:
    problem, context = exc.problem or "", exc.context or ""
    if "cannot start any token" in problem and "'\\t'" in problem:
        return "not YAML: a tab where only spaces may stand"
    if "mapping values are not allowed here" in problem:
        return "not YAML: a ':' that does not belong here (wrong indentation in this line or the one before?)"
    return f"not YAML: {', '.join(part for part in (context, problem) if part)}".replace("\n", " ")


def _position(mark: Any) -> Position:
    return Position(mark.line + 1, mark.column + 1)


def _place_in(before: str) -> Position:
    """The position that follows the text *before*."""
    return Position(before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)


class _Builder:
    """Turns nodes into values and fills the document's positions."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.count = 0

    def value(self, node: yaml.Node, path: Keys) -> Any:
        self._count(node, path)
        self.document.values[path] = _position(node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            try:
                return _scalar(node)
            except ValueError as exc:
                return self._unreadable(node, path, str(exc))
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            for index, item in enumerate(node.value):
                self.document.keys[*path, index] = _position(item.start_mark)
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        return self._unreadable(node, path, _wrong_tag(node.tag))

    def _mapping(self, node: yaml.MappingNode, path: Keys) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node, merged in self._entries(node, path):
            key = self._key(key_node, path)
            if key is None or (merged and key in result):
                continue
            here = (*path, key)
            if key in result:
                first = self.document.keys[here].line
                wrong = f"appears twice in this mapping, first in line {first}"
                self.document.problem(here, wrong, position=_position(key_node.start_mark))
                continue
            self.document.keys[here] = _position(key_node.start_mark)
            result[key] = self.value(value_node, here)
        return result

    def _entries(
        self, node: yaml.MappingNode, path: Keys, outer: tuple[yaml.Node, ...] = ()
    ) -> Iterator[tuple[yaml.Node, yaml.Node, bool]]:
        """Key, value and "came by merging": first the mapping's own entries, which win, then those that `<<` merges."""
        sources: list[yaml.Node] = []
        for key, value in node.value:
            if key.tag != _TAG + "merge":
                yield key, value, bool(outer)
            elif isinstance(value, yaml.SequenceNode):
                sources += value.value
            else:
                sources.append(value)
        outer = (*outer, node)
        for source in sources:
            self._count(source, path)
            if not isinstance(source, yaml.MappingNode) or any(source is one for one in outer):
                wrong = "'<<' takes a mapping or a list of mappings, and none that contains it"
                self.document.problem(path, wrong, position=_position(source.start_mark))
            else:
                yield from self._entries(source, path, outer)

    def _key(self, node: yaml.Node, path: Keys) -> str | None:
        position = _position(node.start_mark)
        if not isinstance(node, yaml.ScalarNode):
            self.document.problem(path, "a key must be a name, not a list or mapping", position=position)
        elif node.tag.removeprefix(_TAG) not in _SCALARS:
            self.document.problem(path, _wrong_tag(node.tag), position=position)
        elif not _encodable(node.value):
            self.document.problem(path, "a key holds half of a surrogate pair", position=position)
        else:
            return str(node.value)
        return None

    def _count(self, node: yaml.Node, path: Keys) -> None:
        self.count += 1
        wrong = ""
        if self.count > MAX_VALUES:
            wrong = f"more than {MAX_VALUES} values, aliases counted each time they are used"
        elif len(path) > MAX_DEPTH:
            wrong = f"nested more than {MAX_DEPTH} deep (an alias that contains itself?)"
        if wrong:
            place = _position(node.start_mark)
            raise ConfigError([f"{self.document.file}:{place.line}:{place.column}: {wrong}"])

    def _unreadable(self, node: yaml.Node, path: Keys, message: str) -> None:
        self.document.problem(path, message, position=_position(node.start_mark))
        self.document.unreadable.add(path)


def _wrong_tag(tag: str) -> str:
    return f"the tag {shown(tag.replace(_TAG, '!!'))} is not supported: remove it"


def _encodable(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    """The value of a scalar. Raises: ValueError, with a sentence."""
    text: str = node.value
    kind = node.tag.removeprefix(_TAG)
    if kind not in _SCALARS:
        raise ValueError(_wrong_tag(node.tag))
    if not _encodable(text):
        raise ValueError("half of a surrogate pair is not text")
    if kind == "null":
        return None
    if kind == "bool":
        if text.lower() not in SafeConstructor.bool_values:
            raise ValueError(f"{shown(text)} is not a boolean: write true or false")
        return bool(SafeConstructor.bool_values[text.lower()])
    if kind in ("int", "float") and ":" not in text:
        return _integer(text) if kind == "int" else _float(text)
    return text


_SCALARS = {"str", "null", "bool", "int", "float", "timestamp", "merge", "value"}


def _integer(text: str) -> int | str:
    digits = text.replace("_", "").lstrip("+-")
    if re.fullmatch(r"0[0-9]+", digits):
        return text
    try:
        number = int(digits, 0)
    except ValueError:
        number = 1 << 64
    if number >= 1 << 63:
        raise ValueError(f"{shown(text)} is not a whole number of at most 63 bits")
    return -number if text.startswith("-") else number


def _float(text: str) -> float:
    try:
        number = float(text.replace("_", ""))
    except ValueError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{shown(text)} is not a finite number")
    return number
