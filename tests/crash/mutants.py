"""Stores with one step of their order wrong, each as a patch of the real one: what the power-cut tests must notice."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import trio

from cachefs.errors import BackendError, NoSpaceError
from cachefs.layers.cow import Cow
from cachefs.store.blockmap import SECTOR_MAGIC, SectorCopy, State
from cachefs.store.blockstore import BlockStore
from cachefs.store.failedflag import FailedFlag
from cachefs.store.rounds import Done, FlushRounds
from cachefs.store.sectors import encode_sector

Patch = tuple[type, str, Callable[..., Any]]
Copies = Iterable[SectorCopy]


def _with_its_errors(make_durable: Callable[[BlockStore, Copies], None]) -> Callable[[BlockStore, Copies], None]:
    """As the real one puts them: a mutant has one thing wrong."""

    def call(store: BlockStore, copies: Copies) -> None:
        if store.failed is not None:
            raise store.failed
        try:
            make_durable(store, copies)
        except OSError as exc:
            if exc.errno == errno.ENOSPC:
                raise NoSpaceError("mutant", str(exc)) from exc
            raise store.flag.fail(exc, store.path) from exc

    return call


def _write_map(store: BlockStore, copies: Copies) -> None:
    if copies:
        store._write_sectors(copies)
        os.fdatasync(store.map_file.descriptor)


@_with_its_errors
def _sync_map_only(store: BlockStore, copies: Copies) -> None:
    _write_map(store, copies)


@_with_its_errors
def _map_before_data(store: BlockStore, copies: Copies) -> None:
    if copies:
        store._write_sectors(copies)
    os.fdatasync(store.data.descriptor)
    if copies:
        os.fdatasync(store.map_file.descriptor)


def _no_copies(store: BlockStore) -> Copies:
    store.data.file_system.syncs.add(store)
    return []


@_with_its_errors
def _copy_after_sync(store: BlockStore, _: Copies) -> None:
    os.fdatasync(store.data.descriptor)
    _write_map(store, store.map.begin_round())


def _write_live_sectors(store: BlockStore, copies: Copies) -> None:
    def live(number: int) -> bytes:
        return encode_sector(SECTOR_MAGIC, store.map.generation, number, b"".join(store.map._copy(number, number + 1)))

    _write_copies(store, [SectorCopy(copy.number, live(copy.number)) for copy in copies])


@_with_its_errors
def _write_only(store: BlockStore, copies: Copies) -> None:
    os.fdatasync(store.data.descriptor)
    if copies:
        store._write_sectors(copies)


def _forget_the_round(store: BlockStore, _: Copies, error: Exception | None) -> None:
    store.map.end_round()


def _join_the_running(rounds: FlushRounds[Any], done: Done) -> None:
    if rounds._running:
        rounds.__dict__.setdefault("late", []).append(done)
    else:
        rounds._begin([done])


def _tell_the_late(rounds: FlushRounds[Any], job: Any, error: Exception | None) -> None:
    for done in rounds.__dict__.pop("late", []):
        done(error)
    _ended(rounds, job, error)


def _publish_first(cow: Cow, start: int, end: int) -> int:
    new = _reserve(cow, start, end)
    cow._map.set_data(start, end)
    return new


async def _punch_anything(store: BlockStore, start: int, end: int) -> None:
    await store.data.punch(start << store.map.shift, (end - start) << store.map.shift)


async def _let_old_bytes_be(cow: Cow, start: int, end: int) -> bytes:
    if start < end and cow._map.state(start >> cow._shift) is State.ZERO:
        await trio.lowlevel.checkpoint()
        return b""
    return await _surroundings(cow, start, end)


def _note_nothing(flag: FailedFlag, exc: OSError, path: object) -> BackendError:
    return BackendError("mutant", f"{path}: {exc}")


_write_copies, _ended = BlockStore._write_sectors, FlushRounds._ended
_reserve, _surroundings = Cow._reserve, Cow._surroundings

MUTANTS: dict[str, tuple[Patch, ...]] = {
    "data-not-synced": ((BlockStore, "_make_durable", _sync_map_only),),
    "map-before-data": ((BlockStore, "_make_durable", _map_before_data),),
    "copied-after-sync": ((BlockStore, "_begin_round", _no_copies), (BlockStore, "_make_durable", _copy_after_sync)),
    "live-sectors-written": ((BlockStore, "_write_sectors", _write_live_sectors),),
    "map-not-synced": ((BlockStore, "_make_durable", _write_only),),
    "failed-round-forgotten": ((BlockStore, "_end_round", _forget_the_round),),
    "running-round-joined": ((FlushRounds, "ask", _join_the_running), (FlushRounds, "_ended", _tell_the_late)),
    "published-before-written": ((Cow, "_reserve", _publish_first),),
    "punched-without-looking": ((BlockStore, "_punch_piece", _punch_anything),),
    "old-bytes-under-zeros": ((Cow, "_surroundings", _let_old_bytes_be),),
    "failed-sync-tried-again": ((FailedFlag, "fail", _note_nothing),),
}


@contextmanager
def applied(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, attribute, instead in MUTANTS[name]:
            stack.enter_context(mock.patch.object(owner, attribute, instead))
        yield
