"""The contract of every layer, over every layer, backend and stack of the example configuration; fast path and slow."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

from cachefs.backends import BACKENDS
from cachefs.layers import LAYERS
from cachefs.testing.conformance import LayerContract
from cachefs.testing.stacks import EVEN_SIZE, Case, cases

CASES = cases(Path(__file__).parents[2] / "config.example.yaml")


SLOW_PATHS_IN_THE_INNER_LOOP = {"cow", "cache-small", "align512"}
EVEN_SIZES_IN_THE_INNER_LOOP = {"cow", "cache", "align4096"}


def _parameters() -> list[object]:
    """Every case. What --fast leaves to the whole run is marked: most slow paths and even sizes, what needs more."""

    def is_left(case: Case) -> bool:
        if case.slow and case.name not in SLOW_PATHS_IN_THE_INNER_LOOP:
            return True
        if case.size == EVEN_SIZE and case.name not in EVEN_SIZES_IN_THE_INNER_LOOP:
            return True
        return case.backend in ("nbd", "qcow2") or case.on_disk or case.name.startswith("example-")

    return [pytest.param(case, id=str(case), marks=pytest.mark.slow if is_left(case) else ()) for case in CASES]


@pytest.mark.parametrize("case", _parameters())
class TestLayers(LayerContract):
    """Every test of the contract, for every case."""


def test_matrix_has_every_layer_and_backend() -> None:
    assert {spec.kind for case in CASES for spec in case.layers} >= set(LAYERS)
    assert {case.backend for case in CASES} >= set(BACKENDS)


def test_nobody_overrides_a_test_of_the_contract() -> None:
    contract = {name for name in vars(LayerContract) if name.startswith("test_")}
    assert contract
    modules = [module for name, module in sys.modules.items() if name.rpartition(".")[2].startswith("test_")]
    subclasses = {
        found
        for module in modules
        for _, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, LayerContract) and found is not LayerContract
    }
    assert TestLayers in subclasses
    assert {(one.__name__, name) for one in subclasses for name in contract & set(vars(one))} == set()
