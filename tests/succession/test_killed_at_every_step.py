"""The stores survive a kill at every step of what they do; and each thing that could be wrong about that is noticed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("kill_scenarios.py")
EVERY = int(os.environ.get("CACHEFS_KILL_EVERY", "0"))
"""Steps from one kill to the next; 1 for all of them, also where a sample, of another phase in each run, is the default."""


def kill(scenario: str, every: int, first: int = 1, mutant: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), scenario, str(every), str(first), *([mutant] if mutant else [])]
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=False, timeout=1500
    )


@pytest.mark.timeout(1600)
@pytest.mark.parametrize(
    ("scenario", "every", "least"),
    [
        *(("overlay", 2, 60), ("ephemeral", 4, 40), ("stacked", 8, 140), ("pool", 80, 700)),
        *(("gathered", 5, 70), ("remote", 8, 70), ("remote-lost", 4, 70)),
    ],
)
def test_nothing_acknowledged_is_lost_wherever_the_kill_falls(scenario: str, every: int, least: int) -> None:
    every = EVERY or every
    first = 1 + os.getpid() % every
    done = kill(scenario, every, first)
    assert done.returncode == 0, f"from step {first}, every {every}:\n{done.stderr}\n{done.stdout}"
    steps = re.fullmatch(r"steps (\d+)\n", done.stdout)
    assert steps is not None
    assert int(steps[1]) >= least  # or nobody was counting
    print(f"{scenario}: {int(steps[1]) // every} kills in {steps[1]} steps")


@pytest.mark.parametrize(
    ("scenario", "first", "mutant", "noticed"),
    [
        ("overlay", 25, "dirty-bits-dropped", r"cut after entry \d+: sector \d+ holds"),
        ("overlay", 15, "map-before-dirty-bit", r"cut after entry \d+: sector \d+ holds"),
        ("overlay", 20, "written-cleared-before-zero", r"cut after entry \d+: sector \d+ holds"),
        ("stacked", 80, "evictions-forgotten", r"blocks \[.*\] are still being evicted"),
        ("gathered", 15, "freed-before-written", r"cut after entry \d+: sector \d+ holds"),
        ("remote-lost", 15, "forgotten-when-answered", r"cut after entry \d+: sector \d+ holds"),
    ],
)
def test_a_wrong_order_is_noticed(scenario: str, first: int, mutant: str, noticed: str) -> None:
    done = kill(scenario, 1, first, mutant)
    assert done.returncode == 1
    assert re.search(noticed, done.stderr), done.stderr
    assert done.stdout.startswith("killed at step ")
