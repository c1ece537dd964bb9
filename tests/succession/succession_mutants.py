"""Stores with one step of a succession wrong, each as a patch of the real one: what the kills at every step must notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from cachefs import survivor
from cachefs.layers.writeouts import WriteOuts
from cachefs.nbd.unflushed import Change, Unflushed
from cachefs.pool.summap import SumMap
from cachefs.store.blockmap import BlockMap
from cachefs.store.clusters import Slot
from cachefs.store.sectors import DirtySectors, SectorCopies

Patch = tuple[Any, str, Callable[..., Any]]


def _drop_dirty_bits(dirty: DirtySectors, magic: bytes, copy: Callable[[int, int], tuple[bytes, ...]]) -> SectorCopies:
    copies = _begin_round(dirty, magic, copy)
    dirty._in_round.setall(0)
    return copies


def _map_before_dirty_bit(states: BlockMap, start: int, end: int) -> None:
    marked = []
    with mock.patch.object(BlockMap, "_mark_dirty", lambda _, *sectors: marked.append(sectors)):
        _set_data(states, start, end)
    for sectors in marked:
        states._mark_dirty(*sectors)


def _written_before_zero(states: BlockMap, start: int, end: int) -> None:
    if states.zero.find(0, start, end) < 0:
        return
    states._mark_dirty(start, end)
    before = states.written.count(1, start, end)
    states.written[start:end] = False
    states.zero[start:end] = True
    states.data_blocks -= before


def _forget_answered(changes: Unflushed, change: Change) -> None:
    _answer(changes, change)
    changes.drop(change)


async def _free_before_written(write_outs: WriteOuts, slot: Slot, start: int, end: int) -> None:
    data, offset = bytes(slot.data[start:end]), slot.cluster * write_outs._clusters.cluster_size + start
    slot.drop(start, end)
    await write_outs._child.write(offset, memoryview(data))


def _forget_evictions(states: SumMap, touched: Callable[..., Any]) -> list[int]:
    _take_over(states, touched)
    return []


def _any_epoch(path: object) -> int:
    return 1


_begin_round, _set_data = DirtySectors.begin_round, BlockMap.set_data
_answer, _take_over = Unflushed.answer, SumMap.take_over

MUTANTS: dict[str, tuple[Patch, ...]] = {
    "dirty-bits-dropped": ((DirtySectors, "begin_round", _drop_dirty_bits),),
    "map-before-dirty-bit": ((BlockMap, "set_data", _map_before_dirty_bit),),
    "written-cleared-before-zero": ((BlockMap, "set_zero", _written_before_zero),),
    "forgotten-when-answered": ((Unflushed, "answer", _forget_answered),),
    "freed-before-written": ((WriteOuts, "_write_units", _free_before_written),),
    "evictions-forgotten": ((SumMap, "take_over", _forget_evictions),),
    "epoch-not-looked-at": ((survivor, "read_epoch", _any_epoch), (survivor, "bump_epoch", _any_epoch)),
}


@contextmanager
def applied(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, attribute, instead in MUTANTS[name]:
            stack.enter_context(mock.patch.object(owner, attribute, instead))
        yield
