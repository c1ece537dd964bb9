"""The map of a disk as people see it: a strip for each layer, and which of them answers for how much."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from typing import TYPE_CHECKING

from cachefs.diskmap import DiskMap, LayerMap
from cachefs.extent import MapState
from cachefs.units import short_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_MARKS = {
    MapState.ABSENT: ("·", "dim", "absent"),
    MapState.DATA: ("█", "blue", "data"),
    MapState.ZERO: ("░", "cyan", "zero"),
    MapState.HOLE: ("░", "cyan", "zero"),
    MapState.CACHED: ("▓", "green", "cached"),
    MapState.UNKNOWN: ("?", "dim", "not asked yet"),
}


def show(found: DiskMap) -> None:
    """A strip for each layer, and whose each range is."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    width = max(20, console.width - max(len(layer.name) for layer in (found.whole, *found.layers)) - 2)
    pictures = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for layer in (found.whole, *found.layers):
        pictures.add_row(layer.name, _strip(layer, found.size, width - 2))
    console.print(pictures)
    console.print(_legend(), soft_wrap=True)
    console.print()
    _show_sizes(console, found)


def _strip(layer: LayerMap, size: int, width: int) -> Text:
    """*width* cells, each as most of its range is; a range smaller than a cell that holds data is not lost in it."""
    from rich.text import Text

    starts = [run.offset for run in layer.runs]
    text = Text(no_wrap=True)
    for cell in range(width):
        start, end = size * cell // width, max(size * cell // width + 1, size * (cell + 1) // width)
        index = bisect_right(starts, start) - 1
        shares: Counter[MapState] = Counter()
        while index < len(starts) and starts[index] < end:
            run = layer.runs[index]
            shares[run.state] += min(run.end, end) - max(run.offset, start)
            index += 1
        mark, style, _ = _MARKS[shares.most_common(1)[0][0]]
        text.append(mark, style)
    return text


def _legend() -> Text:
    from rich.text import Text

    text = Text()
    for state in (MapState.DATA, MapState.CACHED, MapState.ZERO, MapState.ABSENT, MapState.UNKNOWN):
        mark, style, word = _MARKS[state]
        text.append(mark, style)
        text.append(f" {word}   ")
    return text


def _show_sizes(console: Console, found: DiskMap) -> None:
    from rich.table import Table

    answers: Counter[int] = Counter()
    for start, end, _, depth in found.pieces():
        answers[depth] += end - start
    table = Table("layer", "depth", "data", "cached", "zero", "absent", "runs", "answers for", box=None, pad_edge=False)
    for layer in (found.whole, *found.layers):
        place = found.sources.index(layer) if layer in found.sources else None
        sizes = layer.sizes()
        zero = sizes[MapState.ZERO] + sizes[MapState.HOLE]
        columns = (sizes[MapState.DATA], sizes[MapState.CACHED], zero, sizes[MapState.ABSENT] + sizes[MapState.UNKNOWN])
        table.add_row(
            layer.name,
            "" if place is None else str(place),
            *(short_size(count) if count else "" for count in columns),
            str(len(layer.runs)),
            "" if place is None else short_size(answers[place]),
        )
    console.print(table)
