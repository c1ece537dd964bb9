"""The configuration: YAML -> frozen objects, or every mistake in it at once.

`load` reads the file in four steps that all go on after a mistake: the YAML itself (`cachefs.yamlfile`), the keys of
the file, each image and each disk (`cachefs.schema`), the layers and backends (the `Config` of their classes, found in
the registries), and what only the whole can show: which image a disk names, and who else uses its store. A mistake is
one line, `file:line:column: disks.vm1.layers[0].cow.block_size: message`.

The models are validated as strict JSON, so `"yes"` is no boolean and `1.0` no whole number, while paths, lists and
enums may still be written as YAML has them.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import pydantic

from cachefs.backends import BACKENDS
from cachefs.layers import LAYERS
from cachefs.layers.base import Options
from cachefs.layers.cache import CacheConfig
from cachefs.layers.cow import overlay_path
from cachefs.schema import DISK_ONLY, NAME, DiskKeys, FileKeys, ImageKeys, PoolKeys, json_schema
from cachefs.units import format_duration, format_size, parse_duration, parse_size, shown
from cachefs.yamlfile import Document, Keys, path_name, read

__all__ = ["Config", "DiskSpec", "ImageSpec", "LayerSpec", "PoolSpec", "json_schema", "load", "restore"]


@dataclass(frozen=True)
class LayerSpec:
    """A layer or backend of a stack. path: where it stands in the configuration, "disks.vm1.layers[0].cow"."""

    kind: str
    options: Options
    path: str


@dataclass(frozen=True)
class PoolSpec:
    """A pool. options: its keys. path: where it stands in the configuration, "pools.node"."""

    name: str
    options: PoolKeys
    path: str


@dataclass(frozen=True)
class ImageSpec:
    """A named lower stack, shared by every disk that names it. Never written."""

    name: str
    layers: tuple[LayerSpec, ...]
    backend: LayerSpec


@dataclass(frozen=True)
class DiskSpec:
    """A disk: its layers, top to bottom, over exactly one of *image* and *backend*."""

    name: str
    layers: tuple[LayerSpec, ...]
    image: str | None
    backend: LayerSpec | None
    mode: int = 0o600
    uid: int | None = None
    gid: int | None = None
    page_cache: bool = False
    read_only: bool = False

    @property
    def writable(self) -> bool:
        """Whether writes get as far as something that keeps them. An image is never written."""
        if self.read_only:
            return False
        keeper = next((layer for layer in self.layers if not layer.options.passes_writes), None)
        return keeper.kind == "cow" if keeper is not None else self.image is None

    @property
    def has_cow(self) -> bool:
        return any(layer.kind == "cow" for layer in self.layers)


@dataclass(frozen=True)
class Config:
    """The whole file. file, state_dir: absolute. poll: seconds, 0 is off. spill: bytes."""

    file: Path
    state_dir: Path
    poll: float
    spill: int
    pools: Mapping[str, PoolSpec]
    images: Mapping[str, ImageSpec]
    disks: Mapping[str, DiskSpec]
    values: str = field(default="", compare=False, repr=False)
    """What the file said, as JSON: `restore` makes the same configuration of it."""

    def foundation(self, name: str) -> tuple[object, ...]:
        """All that decides which bytes disk *name* has and where they lie: it stays the same while the disk is open."""
        disk = self.disks[name]
        image = None if disk.image is None else self.images[disk.image]
        layers = (*disk.layers, *(image.layers if image is not None else ()))
        names = [layer.options.pool for layer in layers if isinstance(layer.options, CacheConfig)]
        pools = [(self.pools[pool].options.path, self.pools[pool].options.block_size) for pool in names]
        stores = [
            overlay_path(self.state_dir, name, _store_path(layer)) for layer in disk.layers if layer.kind == "cow"
        ]
        return disk.layers, disk.backend, image, disk.writable, pools, stores


def load(path: Path) -> Config:
    """The configuration in the file *path*; relative paths in it begin at the file's directory.

    Raises: ConfigError with every mistake in the file.
    """
    return _build(read(path))


def restore(file: Path, values: str) -> Config:
    """The configuration that `load` once made of *file*, whatever the file says now.

    Raises: ConfigError when this version of cachefs does not take it.
    """
    document = Document(file)
    document.root = json.loads(values)
    return _build(document)


def _build(document: Document) -> Config:
    root = document.root
    if not isinstance(root, dict):
        document.problem((), f"must be a mapping with the key 'disks', not {shown(root)}")
        document.raise_problems()
    loader = _Loader(document, root)
    keys = loader.check(FileKeys, root, ())
    pools = {name: loader.pool(value, at) for name, value, at in loader.entries("pools")}
    images = {name: loader.image(value, at) for name, value, at in loader.entries("images")}
    disks = {name: loader.disk(value, at) for name, value, at in loader.entries("disks")}
    if not root.get("disks"):
        example = "vm1: {backend: {file: {path: vm1.raw}}}"
        document.problem(("disks",), f"there is no disk: add one below 'disks', such as {example}")
    found_pools = {name: pool for name, pool in pools.items() if pool is not None}
    found_images = {name: image for name, image in images.items() if image is not None}
    found_disks = {name: disk for name, disk in disks.items() if disk is not None}
    if keys is not None:
        _check_stores(document, keys.state_dir, found_pools, found_images, found_disks)
    _check_caches(document, found_images, found_disks)
    document.raise_problems()
    assert keys is not None  # or there was a problem
    return Config(
        document.file.absolute(),
        keys.state_dir,
        keys.poll,
        keys.spill,
        found_pools,
        found_images,
        found_disks,
        values=json.dumps(root),
    )


AnyKeys = TypeVar("AnyKeys", bound=Options)


class _Role(NamedTuple):
    """What is wanted at a place: a layer or a backend."""

    word: str
    registry: Mapping[str, Any]
    example: str
    opposite_word: str
    opposite: Mapping[str, Any]
    opposite_key: str


_LAYER = _Role("layer", LAYERS, "cow: {}", "backend", BACKENDS, "backend")
_BACKEND = _Role("backend", BACKENDS, "file: {path: vm1.raw}", "layer", LAYERS, "layers")


class _Loader:
    """Values -> objects; notes mistakes in the document and returns None for what has some."""

    def __init__(self, document: Document, root: dict[str, Any]) -> None:
        self.document = document
        self.root = root
        self.context = {"directory": document.file.absolute().parent}

    def entries(self, key: str) -> Iterator[tuple[str, Any, Keys]]:
        """Name, mapping and path of each image or disk."""
        section = self._mapping(self.root.get(key), (key,))
        for name, value in (section or {}).items():
            at = (key, name)
            if not NAME.fullmatch(name):
                wrong = (
                    "is not a name: letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 128"
                )
                self.document.problem(at, wrong, at_key=True)
            mapping = self._mapping(value, at)
            if mapping is not None:
                yield name, mapping, at

    def pool(self, value: dict[str, Any], at: Keys) -> PoolSpec | None:
        keys = self.check(PoolKeys, value, at)
        return None if keys is None else PoolSpec(str(at[-1]), keys, path_name(at))

    def image(self, value: dict[str, Any], at: Keys) -> ImageSpec | None:
        keys = self.check(ImageKeys, value, at)
        layers = self._layers(value.get("layers"), (*at, "layers"))
        backend = self._spec(value["backend"], (*at, "backend"), _BACKEND) if "backend" in value else None
        for index, layer in enumerate(layers or ()):
            if layer.kind in DISK_ONLY:
                wrong = f"an image cannot have {layer.kind!r}, which belongs to one disk: move it to the disks"
                self.document.problem((*at, "layers", index, layer.kind), wrong, at_key=True)
        if keys is None or layers is None or backend is None:
            return None
        return ImageSpec(str(at[-1]), layers, backend)

    def disk(self, value: dict[str, Any], at: Keys) -> DiskSpec | None:
        keys = self.check(DiskKeys, value, at)
        layers = self._layers(value.get("layers"), (*at, "layers"))
        image = value.get("image")
        backend = self._spec(value["backend"], (*at, "backend"), _BACKEND) if "backend" in value else None
        if image is None and "backend" not in value:
            self.document.problem(at, "has neither 'image' nor 'backend': it needs one of them", at_key=True)
        elif image is not None and "backend" in value:
            self.document.problem(at, "has both 'image' and 'backend': keep one of them", at_key=True)
        elif isinstance(image, str):
            self._check_named("image", image, (*at, "image"))
        if keys is None or layers is None or (image is None and backend is None):
            return None
        settings = keys.model_dump(exclude={"layers", "backend"})
        return DiskSpec(name=str(at[-1]), layers=layers, backend=backend, **settings)

    def check(self, model: type[AnyKeys], value: dict[str, Any], at: Keys) -> AnyKeys | None:
        try:
            return model.model_validate_json(json.dumps(value), strict=True, context=self.context)
        except pydantic.ValidationError as exc:
            self._report(exc, model, at)
            return None

    def _report(self, exc: pydantic.ValidationError, model: type[Options], at: Keys) -> None:
        """One problem for each place; where a union fails, the sentences of its members are joined."""
        sentences: dict[tuple[Keys, bool], list[str]] = {}
        for error in exc.errors(include_url=False):
            place = (*at, *error["loc"])
            while error["type"] != "missing" and place not in self.document.values and len(place) > len(at):
                place = place[:-1]
            unknown = error["type"] == "extra_forbidden"
            keys = _model_at(model, error["loc"][:-1]).model_fields
            sentence = _unknown("key", str(place[-1]), keys) if unknown else _sentence(error)
            found = sentences.setdefault((place, unknown), [])
            if sentence not in found:
                found.append(sentence)
        for (place, unknown), found in sentences.items():
            self.document.problem(place, ", or ".join(found), at_key=unknown)

    def _check_named(self, word: str, name: str, at: Keys) -> None:
        """That there is the image or pool *name*."""
        section = self.root.get(f"{word}s")
        names = section if isinstance(section, dict) else {}
        if name not in names:
            self.document.problem(at, _unknown(word, name, names))

    def _mapping(self, value: Any, at: Keys) -> dict[str, Any] | None:
        """*value*; {} for nothing at all, None (and a problem) for what is no mapping."""
        if value is None or isinstance(value, dict):
            return value or {}
        self.document.problem(at, f"must be a mapping, not {shown(value)}")
        return None

    def _layers(self, value: Any, at: Keys) -> tuple[LayerSpec, ...] | None:
        if value is not None and not isinstance(value, list):
            return None  # already reported by `check`
        specs = [self._spec(item, (*at, index), _LAYER) for index, item in enumerate(value or ())]
        found = tuple(spec for spec in specs if spec is not None)
        return found if len(found) == len(specs) else None

    def _spec(self, value: Any, at: Keys, role: _Role) -> LayerSpec | None:
        """The layer or backend that *value* (`{cow: {}}`, `{cow: null}` or `"cow"`) stands for."""
        if isinstance(value, str):
            self.document.keys[*at, value] = self.document.place(at)
            value = {value: None}
        if not isinstance(value, dict) or len(value) != 1:
            keys = ", ".join(shown(key) for key in value) if isinstance(value, dict) else ""
            found = f"found {keys}" if keys else f"not {'{}' if value == {} else shown(value)}"
            wrong = f"must be one {role.word} with its options indented below it, such as '{role.example}'; {found}"
            self.document.problem(at, wrong)
            return None
        ((kind, raw),) = value.items()
        at = (*at, kind)
        if kind in role.registry:
            options = self._mapping(raw, at)
            checked = None if options is None else self.check(role.registry[kind].Config, options, at)
            if isinstance(checked, CacheConfig):
                self._check_named("pool", checked.pool, (*at, "pool"))
            return None if checked is None else LayerSpec(kind, checked, path_name(at))
        if kind in role.opposite:
            wrong = f"{kind!r} is a {role.opposite_word}, not a {role.word}: move it to {role.opposite_key!r}"
        else:
            wrong = _unknown(role.word, kind, role.registry)
        self.document.problem(at, wrong, at_key=True)
        return None


class _Claim(NamedTuple):
    """Somebody's use of a store, as `at` in the configuration says."""

    at: Keys
    writes: bool


def _check_stores(
    document: Document,
    state_dir: Path,
    pools: Mapping[str, PoolSpec],
    images: Mapping[str, ImageSpec],
    disks: Mapping[str, DiskSpec],
) -> None:
    """A store that somebody writes has no other user: an overlay or a writable file has exactly one owner."""
    claims: dict[str, list[_Claim]] = {}

    def claim(store: Path, at: Keys, writes: bool) -> None:
        at = (*at, "path") if (*at, "path") in document.values else at
        claims.setdefault(os.path.realpath(store), []).append(_Claim(at, writes))

    def claim_backend(backend: LayerSpec, at: Keys, writes: bool) -> None:
        if (path := _store_path(backend)) is not None:
            claim(path, at, writes)
        elif (store := backend.options.remote_store) is not None:
            claims.setdefault(store, []).append(_Claim(at, writes))

    for pool in pools.values():
        claim(pool.options.path, ("pools", pool.name), writes=True)
    for image in images.values():
        claim_backend(image.backend, ("images", image.name, "backend", image.backend.kind), writes=False)
    for disk in disks.values():
        for index, layer in enumerate(disk.layers):
            if layer.kind == "cow":
                path = overlay_path(state_dir, disk.name, _store_path(layer))
                claim(path, ("disks", disk.name, "layers", index, layer.kind), writes=True)
        if disk.backend is not None:
            writes = disk.writable and not disk.has_cow
            claim_backend(disk.backend, ("disks", disk.name, "backend", disk.backend.kind), writes)
    for pool in pools.values():
        inside = os.path.realpath(pool.options.path)
        for store, (first, *_) in [*claims.items(), (os.path.realpath(state_dir), (_Claim(("state_dir",), True),))]:
            if store.startswith(f"{inside.rstrip('/')}/") or (store == inside and first.at == ("state_dir",)):
                at = ("pools", pool.name, "path")
                wrong = f"{path_name(first.at)} lies in it, at {store}: a pool has its directory for itself"
                document.problem(at, wrong)
    for store, users in claims.items():
        for index, user in enumerate(users):
            other = next((one for one in users[:index] if one.writes or user.writes), None)
            if other is not None:
                written = f"{path_name(other.at)} (line {document.place(other.at).line})"
                wrong = f"{store} is used by {written} too: a store that is written has exactly one user"
                document.problem(user.at, wrong)


def _check_caches(document: Document, images: Mapping[str, ImageSpec], disks: Mapping[str, DiskSpec]) -> None:
    """A cache lies over contents that its pool knows by their identity, and once in a stack."""

    def check(at: Keys, layers: tuple[LayerSpec, ...], below: tuple[LayerSpec, ...]) -> None:
        for index, layer in enumerate(layers):
            if not isinstance(layer.options, CacheConfig):
                continue
            place = (*at, "layers", index, layer.kind)
            under = (*layers[index + 1 :], *below)
            if any(spec.kind == "cow" for spec in under):
                wrong = (
                    "a cache cannot stand above 'cow': the pool knows contents by their base, so disks with the same base "
                    "would be given each other's blocks; move it below the 'cow'"
                )
                document.problem(place, wrong, at_key=True)
            other = next(
                (s for s in under if isinstance(s.options, CacheConfig) and s.options.pool == layer.options.pool), None
            )
            if other is not None:
                wrong = f"{other.path}, which lies below it, is a cache in the same pool: keep one of them"
                document.problem((*place, "pool"), wrong)

    for image in images.values():
        check(("images", image.name), image.layers, ())
    for disk in disks.values():
        check(
            ("disks", disk.name),
            disk.layers,
            images[disk.image].layers if disk.image is not None and disk.image in images else (),
        )


def _store_path(spec: LayerSpec) -> Path | None:
    path = getattr(spec.options, "path", None)
    return path if isinstance(path, Path) else None


# ---- sentences


def _model_at(model: type[Options], below: Keys) -> type[Options]:
    """The model of what stands *below* one of *model*: another one where a key has a mapping with keys of its own."""
    for key in below:
        field = model.model_fields.get(str(key))
        members = () if field is None else (field.annotation, *get_args(field.annotation))
        model = next((one for one in members if isinstance(one, type) and issubclass(one, Options)), model)
    return model


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    """ "unknown key 'mdoe': did you mean 'mode'?" """
    names = sorted(known)
    close = difflib.get_close_matches(name.lower(), names, n=1) if len(name) <= 128 else []
    if close:
        return f"unknown {what} {shown(name)}: did you mean {close[0]!r}?"
    return f"unknown {what} {shown(name)}: there is " + (", ".join(names) if names else "none")


_SENTENCES = {
    "missing": "must be given",
    "bool_type": "{input} is not a boolean: write true or false",
    "int_type": "{input} is not a whole number",
    "int_from_float": "{input} is not a whole number",
    "float_type": "{input} is not a number",
    "string_type": "{input} is not text: put it in quotes if it is meant to be",
    "list_type": "must be a list, such as [a, b] or lines that begin with '-', not {input}",
    "tuple_type": "must be a list, such as [a, b] or lines that begin with '-', not {input}",
    "dict_type": "must be a mapping, not {input}",
    "model_type": "must be a mapping, not {input}",
    "greater_than_equal": "must be at least {bound}, not {input}",
    "greater_than": "must be more than {bound}, not {input}",
    "less_than_equal": "must be at most {bound}, not {input}",
    "less_than": "must be less than {bound}, not {input}",
    "literal_error": "must be {expected}, not {input}",
    "enum": "must be {expected}, not {input}",
}


def _sentence(error: Any) -> str:
    """What pydantic found, for somebody who does not know pydantic."""
    context = error.get("ctx", {})
    if error["type"] in ("value_error", "assertion_error"):
        return str(context["error"])
    template = _SENTENCES.get(error["type"])
    if template is None:
        message: str = error["msg"]
        return f"{shown(error['input'])}: {message[:1].lower()}{message[1:]}"
    bound = next((context[name] for name in ("ge", "gt", "le", "lt") if name in context), None)
    return template.format(
        input=shown(error["input"]), bound=_like(error["input"], bound), expected=context.get("expected")
    )


def _like(value: object, bound: Any) -> str:
    """*bound* in the notation of *value*: bytes as a size where it is one, seconds as a duration."""
    if bound is None or not isinstance(value, str):
        return str(bound)
    for parse, write in ((parse_size, format_size), (parse_duration, format_duration)):
        try:
            parse(value)
        except ValueError:
            continue
        return write(bound)
    return str(bound)
