from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import ROOT, Kept, Served, Supervised

from cachefs import mounts


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`served(config, "supervisor")`: mounted, and answering."""
    made: list[Served] = []

    def serve(config: dict[str, Any], keeper: str = "supervisor", *options: str, package: Path = ROOT) -> Served:
        kind = Supervised if keeper == "supervisor" else Kept
        folder = tmp_path / f"served{len(made)}"
        folder.mkdir()
        file = folder / "config.yaml"
        file.write_text(json.dumps({"state_dir": str(folder / "state"), **config}))
        new = kind(folder, file, options, package)
        new.start()
        made.append(new)
        return new

    yield serve
    for one in made:
        one.clean_up()
        if mounts.find_mount(one.path) is not None:
            mounts.try_unmount(one.path, lazy=True)
