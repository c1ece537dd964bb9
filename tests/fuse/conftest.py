"""Fixtures of test_faults.py that other tests of real mounts use too."""

from test_faults import opened, threads

__all__ = ["opened", "threads"]
