"""The search for a cut that breaks a promise: the same one for the real layer and for its mutants."""

from __future__ import annotations

from collections.abc import Iterable

import trio
from examples import examples
from hypothesis import HealthCheck, Phase, given, seed, settings
from powercut import Counted, Example, try_example


class _Broken(BaseException):
    """*error* says which promise. No Exception, which hypothesis would keep to try the example again."""

    def __init__(self, error: AssertionError) -> None:
        self.error = error


EXAMPLES = 8  # of one seed: hypothesis soon only varies what it had


def search(from_seed: int, counted: Counted) -> None:
    """Try some examples, counting into *counted*. Raises AssertionError when a promise is broken.

    Nothing is shrunk or tried twice: which thread is faster is no part of an example, so that it may pass by luck.
    """

    @seed(from_seed)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(examples())
    def property(example: Example) -> None:
        try:
            trio.run(try_example, example, counted)
        except AssertionError as exc:
            exc.add_note(f"by {example!r}")
            raise _Broken(exc) from exc

    try:
        property()
    except _Broken as exc:
        raise exc.error from None


def search_on(seeds: Iterable[int], counted: Counted) -> None:
    """`search` from each of *seeds*."""
    for from_seed in seeds:
        search(from_seed, counted)
