"""The keys of the configuration file as models, and the JSON Schema made from them and from the registries.

The docstring of a key is its description in the schema. What stands below `layers` and `backend` is validated by the
`Config` of the layer's or backend's class, so the models here leave it open.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic.json_schema import models_json_schema

from cachefs.backends import BACKENDS
from cachefs.layers import LAYERS
from cachefs.layers.base import Options
from cachefs.units import Duration, LocalPath, Size, format_duration, format_size, parse_duration, parse_size, shown

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
"""Of a disk, an image or a pool."""

DISK_ONLY = frozenset({"cow"})
"""Layers that hold what belongs to one disk, so that no image may have them."""

_MODE = re.compile(r"0o?[0-7]{1,4}", re.ASCII)
_MAX_ID = (1 << 32) - 2  # (uid_t) -1 means "leave it"


def _power_of_two(size: int) -> int:
    if size & (size - 1) or not 4 << 10 <= size <= 1 << 20:
        raise ValueError(f"{format_size(size)} is not a power of two from 4KiB to 1MiB")
    return size


BlockSize = Annotated[Size, AfterValidator(_power_of_two)]


def _mode(value: object) -> int:
    """A number with a leading 0 arrives as text, see `cachefs.yamlfile`; one without it is refused: 400 is not 0400."""
    if not isinstance(value, str) or not _MODE.fullmatch(value):
        meant = f"0{value}" if _MODE.fullmatch(f"0{value}") else "octal digits after a 0, such as 0640"
        raise ValueError(f"{shown(value)} is not a mode: write {meant}")
    mode = int(value.replace("o", ""), 8)
    if mode & ~0o666:
        raise ValueError(f"{value} has bits outside 0666, which mean nothing for a disk: write {mode & 0o666:04o}")
    return mode


Mode = Annotated[
    int,
    BeforeValidator(_mode),
    # an integer because editors read 0640 as one, either 416 or 640
    WithJsonSchema({"type": ["string", "integer"], "pattern": "^0o?[0-7]{1,4}$", "examples": ["0640"]}),
]


class FileKeys(Options):
    """Configuration of cachefs: the virtual disks of a mount."""

    state_dir: LocalPath = Path("/var/lib/cachefs")
    """Directory for what belongs to the disks: overlays without a path of their own, and state of the daemon."""
    poll: Annotated[Duration, Field(le=0.001)] = 50e-6
    """How long the daemon polls for the next request before it sleeps, at most 1ms; 0 switches polling off."""
    spill: Annotated[Size, Field(ge=64 << 20)] = 4 << 30
    """Most bytes of writes that may wait for stores that hang, of all disks; beyond 64MiB they lie in the state_dir."""
    pools: Any = None
    """Directories for caches, by name; each has one quota that all images in it share."""
    images: Any = None
    """Lower stacks by name, shared by the disks that name them and never written."""
    disks: Any = None
    """The disks by name; each is one file of the mount. At least one."""


class PoolKeys(Options):
    """A directory in which caches keep what was read, with one quota for all of them."""

    path: LocalPath
    """The directory, used by nothing else; made when it does not exist. A local file system, best on an SSD."""
    quota: Annotated[Size, Field(ge=16 << 20)]
    """Most bytes that the directory may hold on disk, everything included; at least 16MiB."""
    min_free: Size = 0
    """Bytes that stay free on the pool's file system for others; below it the pool gives space back."""
    evict: Literal["sieve", "never"] = "sieve"
    """What happens when the quota is reached: what is used least makes room, or nothing more is kept."""
    block_size: BlockSize = 64 << 10
    """Unit of fetching and keeping: a power of two from 4KiB to 1MiB. To change it empties the pool."""
    direct: bool = False
    """What is cached bypasses the page cache (O_DIRECT): memory belongs to the guests. Maps do not matter."""
    cache_timeout: Annotated[Duration, Field(ge=0.05, le=60)] = 1.0
    """How long the pool's file system may take for an answer before disks are served without it."""


class ImageKeys(Options):
    """A lower stack that disks share."""

    layers: list[Any] | None = None
    """Layers, top to bottom, each one name with its options."""
    backend: Any
    """Where the bytes live: one name with its options."""


class DiskKeys(Options):
    """A disk: layers over either an image or a backend."""

    layers: list[Any] | None = None
    """Layers, top to bottom, each one name with its options."""
    image: str | None = None
    """Name of the image that lies below the layers. Without a cow layer the disk is then read-only."""
    backend: Any = None
    """Where the bytes live: one name with its options."""
    mode: Mode = 0o600
    """Permission bits of the disk's file, in octal: within 0666."""
    uid: Annotated[int, Field(ge=0, le=_MAX_ID)] | None = None
    """Owner of the disk's file, a number. Default: the user that runs the daemon."""
    gid: Annotated[int, Field(ge=0, le=_MAX_ID)] | None = None
    """Group of the disk's file, a number. Default: the group that runs the daemon."""
    page_cache: bool = False
    """Let the host's page cache hold the disk, for readers that do buffered I/O; leave it off for virtual machines."""
    read_only: bool = False
    """Refuse every write."""


def json_schema() -> dict[str, Any]:
    """A JSON Schema (2020-12) of the file, for editors: what it accepts and what every key means.

    It cannot say what only the whole file shows, such as two disks over one store.
    """
    kinds: list[Any] = [*LAYERS.values(), *BACKENDS.values()]
    models = [FileKeys, PoolKeys, ImageKeys, DiskKeys, *(kind.Config for kind in kinds)]
    references, generated = models_json_schema([(model, "validation") for model in models])
    definitions = generated["$defs"]
    reference = {model: found for (model, _), found in references.items()}

    def definition(model: type[Options]) -> dict[str, Any]:
        found: dict[str, Any] = definitions[reference[model]["$ref"].removeprefix("#/$defs/")]
        return found

    for model in models:
        _readable_defaults(model, definition(model))
    for model in (ImageKeys, DiskKeys):
        registry = {kind: one for kind, one in LAYERS.items() if model is DiskKeys or kind not in DISK_ONLY}
        properties = definition(model)["properties"]
        described = properties["layers"]["description"]
        items = _kinds(registry, reference) if registry else False
        properties["layers"] = {"type": ["array", "null"], "items": items, "description": described, "default": []}
        properties["backend"] |= _kinds(BACKENDS, reference)
        properties["backend"].pop("default", None)
    definition(DiskKeys)["oneOf"] = [{"required": ["image"]}, {"required": ["backend"]}]
    top = definitions.pop(reference[FileKeys]["$ref"].removeprefix("#/$defs/"))
    names = {"pattern": f"^{NAME.pattern}$"}
    for key, model in (("pools", PoolKeys), ("images", ImageKeys), ("disks", DiskKeys)):
        described = top["properties"][key]["description"]
        top["properties"][key] = {"type": "object", "description": described, "propertyNames": names}
        top["properties"][key]["additionalProperties"] = reference[model]
    top["properties"]["disks"]["minProperties"] = 1
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **top,
        "required": ["disks"],
        "$defs": definitions,
    }


def _kinds(registry: Mapping[str, Any], reference: Mapping[Any, Any]) -> dict[str, Any]:
    """One of the registry's names, either alone or as the only key of a mapping with its options."""
    single = [
        {
            "type": "object",
            "properties": {name: {"anyOf": [reference[kind.Config], {"type": "null"}]}},
            "required": [name],
            "additionalProperties": False,
        }
        for name, kind in registry.items()
    ]
    return {"oneOf": [*single, {"enum": list(registry)}]}


def _readable_defaults(model: type[Options], definition: dict[str, Any]) -> None:
    """Defaults as one writes them: "50us" for 0.00005, "4KiB" for 4096, "0600" for a mode."""
    for name, field in model.model_fields.items():
        validators = {getattr(one, "func", None) for one in field.metadata}
        properties = definition["properties"][name]
        if properties.get("default") is None:
            continue
        if parse_duration in validators:
            properties["default"] = format_duration(field.default)
        elif parse_size in validators:
            properties["default"] = format_size(field.default)
        elif _mode in validators:
            properties["default"] = f"{field.default:04o}"
