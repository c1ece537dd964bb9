"""Sizes, durations and local paths as people write them, and the arithmetic of alignment.

A size is whole bytes: `512`, `64KiB`, `50GiB`. A duration is seconds as a float and always carries a unit: `50us`,
`5s`, `2min`; only `0` needs none. `Size`, `Duration` and `LocalPath` are pydantic types for the `Options` of a layer;
they do the same to values from YAML and say in the JSON Schema what they take.
"""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, PlainValidator, ValidationInfo, WithJsonSchema

SIZE_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
DURATION_UNITS = {
    "us": Fraction(1, 1_000_000),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
}
MAX_SIZE = (1 << 63) - 1  # off_t
MAX_DURATION = 1e9

_SIZE = re.compile(r"(0|[1-9][0-9]*)(B|KiB|MiB|GiB|TiB)?", re.ASCII)
_DURATION = re.compile(r"((?:0|[1-9][0-9]*)(?:\.[0-9]+)?)(us|ms|s|min|h)", re.ASCII)
_NEARLY_SIZE = re.compile(r"0*([0-9]+)\s*([kmgt]?)(?:i?b)?", re.ASCII | re.IGNORECASE)
_NEARLY_DURATION = re.compile(r"0*([0-9]+(?:\.[0-9]+)?)\s*([a-zµ]+)", re.IGNORECASE)
_OTHER_NAMES = {
    "us": ("µs", "usec", "usecs", "microsecond", "microseconds"),
    "ms": ("msec", "msecs", "millisecond", "milliseconds"),
    "s": ("sec", "secs", "second", "seconds"),
    "min": ("m", "mins", "minute", "minutes"),
    "h": ("hr", "hrs", "hour", "hours"),
}
_SHOWN = 60  # characters of a value that a message repeats


def shown(value: object) -> str:
    """*value* for a message: quoted, on one line, and cut where it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a mapping"
    if isinstance(value, str) and len(value) > _SHOWN:
        return repr(value[:_SHOWN]) + "..."
    return "null" if value is None else repr(value)


def parse_size(value: object) -> int:
    """Bytes that *value* (`4096`, `"4096"`, `"64KiB"`) stands for.

    Raises: ValueError, with a sentence that says how to write it.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size: int = value
    elif isinstance(value, str) and len(value) <= _SHOWN and (match := _SIZE.fullmatch(value)):
        size = int(match[1]) * SIZE_UNITS[match[2] or "B"]
    else:
        raise ValueError(f"{shown(value)} is not a size: write {_size_meant(value)}")
    if not 0 <= size <= MAX_SIZE:
        raise ValueError(f"{shown(value)} is not a size: it must lie between 0 and {MAX_SIZE} bytes")
    return size


def _size_meant(value: object) -> str:
    match = _NEARLY_SIZE.fullmatch(value) if isinstance(value, str) and len(value) <= _SHOWN else None
    if match is None:
        return "whole bytes or a whole number with KiB, MiB, GiB or TiB, such as 64KiB"
    return match[1] + (match[2].upper() + "iB" if match[2] else "")


def format_size(size: int) -> str:
    """*size* bytes in the largest unit that divides it: `65536` is "64KiB", `65537` is "65537".

    `parse_size(format_size(size)) == size` for every size that is not negative.
    """
    for name, factor in reversed(SIZE_UNITS.items()):
        if factor > 1 and size and size % factor == 0:
            return f"{size // factor}{name}"
    return str(size)


def short_size(size: int) -> str:
    """*size* bytes rounded to three digits, for tables: "1.5 GiB"."""
    amount, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while amount >= 1000 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:.3g} {units[0]}"


def parse_duration(value: object) -> float:
    """Seconds that *value* (`"5s"`, `"50us"`, `0`) stands for.

    Raises: ValueError, with a sentence that says how to write it.
    """
    if value in (0, "0") and not isinstance(value, bool):
        return 0.0
    match = _DURATION.fullmatch(value) if isinstance(value, str) and len(value) <= _SHOWN else None
    if match is None:
        raise ValueError(f"{shown(value)} is not a duration: write {_duration_meant(value)}")
    seconds = float(Fraction(match[1]) * DURATION_UNITS[match[2]])
    if seconds > MAX_DURATION:
        raise ValueError(f"{shown(value)} is not a duration: it must not be longer than {MAX_DURATION:.0f}s")
    return seconds


def _duration_meant(value: object) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
        return f"it with its unit, such as {value}s or {value}ms"
    match = _NEARLY_DURATION.fullmatch(value) if isinstance(value, str) and len(value) <= _SHOWN else None
    if match is not None:
        for unit, names in _OTHER_NAMES.items():
            if match[2].lower() in (unit, *names):
                return match[1] + unit
    return "a number with us, ms, s, min or h, such as 5s"


def format_duration(seconds: float) -> str:
    """*seconds* in the largest unit of which there is at least one, to three decimals: "50us", "1.5s", "2min"."""
    for unit in ("h", "min", "s", "ms", "us"):
        number = f"{seconds / float(DURATION_UNITS[unit]):.3f}".rstrip("0").rstrip(".")
        if float(number) >= 1 or (unit == "us" and float(number) > 0):
            return number + unit
    return "0s"


def _local_path(value: object, info: ValidationInfo) -> Path:
    """*value* as a path; a relative one begins at `context["directory"]`, where the validation has such a context."""
    if isinstance(value, Path):
        path = value
    elif isinstance(value, str):
        if not value or "\0" in value:
            raise ValueError(f"{shown(value)} is not a path")
        path = Path(value)
    else:
        raise ValueError(f"{shown(value)} is not a path: put it in quotes if it is one")
    directory = (info.context or {}).get("directory")
    return path if directory is None else Path(directory, path)


def _schema(**keywords: Any) -> WithJsonSchema:
    return WithJsonSchema(keywords)


Size = Annotated[
    int,
    BeforeValidator(parse_size),
    _schema(
        type=["integer", "string"],
        minimum=0,
        pattern="^(0|[1-9][0-9]*)(B|KiB|MiB|GiB|TiB)?$",
        examples=[512, "64KiB", "50GiB"],
    ),
]
"""Bytes."""

Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    _schema(
        type=["integer", "string"],
        minimum=0,
        maximum=0,
        pattern=r"^(0|(0|[1-9][0-9]*)(\.[0-9]+)?(us|ms|s|min|h))$",
        examples=["50us", "5s", "2min"],
    ),
]
"""Seconds."""

LocalPath = Annotated[Path, PlainValidator(_local_path), _schema(type="string", minLength=1, format="path")]
"""A path on this machine; in the configuration a relative one begins at the directory of the file."""


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def align_down(value: int, alignment: int) -> int:
    """The largest multiple of *alignment* (any positive number) that is not above *value*."""
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of *alignment* (any positive number) that is not below *value*."""
    return value + -value % alignment


class Piece(NamedTuple):
    """A part of a request, in bytes. A piece of length 0 is not there."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


def split_aligned(offset: int, length: int, alignment: int) -> tuple[Piece, Piece, Piece]:
    """The partial block at the front, the whole blocks, and the partial block at the back of a range; all in bytes.

    The three follow each other without a gap and make up the range. A range inside one block that does not fill it is
    all head. *alignment* is the block size, a power of two.

    Raises: ValueError for a negative offset or length, or an alignment that is no power of two.
    """
    mask = alignment - 1
    if alignment <= 0 or alignment & mask:
        raise ValueError(f"{alignment} is no power of two")
    if offset < 0 or length < 0:
        raise ValueError(f"{offset}+{length} is no range")
    end = offset + length
    body = (offset + mask) & ~mask
    tail = end & ~mask
    if tail < body or (tail == body == offset):
        return Piece(offset, length), Piece(end, 0), Piece(end, 0)
    return Piece(offset, body - offset), Piece(body, tail - body), Piece(tail, end - tail)
