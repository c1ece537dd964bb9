"""The search for a cut that breaks a promise: the same one for the real layer and for its mutants."""

from __future__ import annotations

import trio
from examples import examples
from hypothesis import HealthCheck, Phase, given, seed, settings
from powercut import Counted, Example, try_example


def search(from_seed: int, most: int, counted: Counted) -> None:
    """Try up to *most* examples, counting into *counted*. Raises AssertionError when a promise is broken.

    Nothing is shrunk: which thread is faster is no part of an example, so that a smaller one may pass by luck.
    """

    @seed(from_seed)
    @settings(
        max_examples=most,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(examples())
    def property(example: Example) -> None:
        trio.run(try_example, example, counted)

    property()
