"""The stores survive a kill at every system call and line; and each thing that could be wrong about that is noticed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("killing.py")
EVERY = int(os.environ.get("CACHEFS_KILL_EVERY", "0"))
"""Steps from one kill to the next; 1 for all of them. By default a sample, of another phase in each run."""


def kill(scenario: str, every: int, first: int = 1, mutant: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), scenario, str(every), str(first), *([mutant] if mutant else [])]
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=False, timeout=1500
    )


@pytest.mark.timeout(1600)
@pytest.mark.parametrize(("scenario", "every"), [("overlay", 12), ("ephemeral", 60), ("pool", 700)])
def test_nothing_acknowledged_is_lost_wherever_the_kill_falls(scenario: str, every: int) -> None:
    every = EVERY or every
    first = 1 + os.getpid() % every
    done = kill(scenario, every, first)
    assert done.returncode == 0, f"from step {first}, every {every}:\n{done.stderr}\n{done.stdout}"
    steps = re.fullmatch(r"steps (\d+)\n", done.stdout)
    assert steps is not None
    assert int(steps[1]) > 500  # or nobody was counting
    print(f"{scenario}: {int(steps[1]) // every} kills in {steps[1]} steps")


@pytest.mark.parametrize("mutant", ["dirty-bits-dropped", "map-before-dirty-bit", "written-cleared-before-zero"])
def test_a_wrong_order_is_noticed(mutant: str) -> None:
    done = kill("overlay", 7, mutant=mutant)
    assert done.returncode == 1
    assert re.search(r"cut after entry \d+: (sector \d+ holds|nobody touched)", done.stderr), done.stderr
    assert done.stdout.startswith("killed at step ")
