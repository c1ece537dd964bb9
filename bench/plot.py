"""The run as a picture: per job, how many times as fast as the best peer. Left of 1 is slower, right of it faster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report import CONTROL, SUBJECT, Row, Run, summarize

COLOURS = {"faster": "#1a7f5a", "slower": "#c0392b"}
MARKERS = "osD^v"


def write_plot(run: Run, path: Path) -> None:
    """SVG or PNG by the name's ending; the same run gives the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "cachefs", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    storages = run.storages()
    height = 1.6 + 0.36 * max(len(summarize(run, storage)) for storage in storages)
    figure, axes = pyplot.subplots(1, len(storages), figsize=(7.2 * len(storages), height), squeeze=False)
    for axis, storage in zip(axes[0], storages, strict=True):
        _draw(axis, run, storage)
    handles, labels = axes[0][0].get_legend_handles_labels()
    handles.insert(0, Patch(color=COLOURS["faster"], alpha=0.8))
    labels.insert(0, "cachefs (grey: within the noise; bracket: smallest to largest)")
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.6 / height, 1, 1))
    figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _draw(axis: Any, run: Run, storage: str) -> None:
    rows = [row for row in summarize(run, storage) if row.ratio is not None and row.peer is not None]
    for index, row in enumerate(rows):
        _draw_row(axis, index, row)
    others = [name for name in run.targets if name not in (SUBJECT, CONTROL)]
    for marker, name in zip(MARKERS, others, strict=False):
        points = [
            (row.values[name].median / row.values[row.peer].median, index)
            for index, row in enumerate(rows)
            if row.peer and name in row.values and (run.targets[name].flushes or not run.jobs[row.job].syncs)
        ]
        if points:
            axis.scatter(*zip(*points, strict=True), marker=marker, s=22, label=name, zorder=3, alpha=0.85)
    axis.axvline(1, color="#222222", linewidth=1, zorder=2)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.4), max(high, 4) * 1.6)
    axis.set_xticks(
        [tick for tick in (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 10, 25, 100) if low <= tick <= max(high, 4) * 1.6]
    )
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.minorticks_off()
    axis.set_yticks(range(len(rows)), [run.jobs[row.job].title for row in rows])
    axis.invert_yaxis()
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_title(f"data in {storage}: speed relative to the best peer", loc="left")


def _draw_row(axis: Any, index: int, row: Row) -> None:
    assert row.ratio is not None
    ratio = row.ratio
    colour = COLOURS.get(row.verdict, "#999999")
    axis.barh(index, ratio.median - 1, left=1, height=0.62, color=colour, alpha=0.8, zorder=1)
    axis.plot([ratio.low, ratio.high], [index, index], color="#333333", linewidth=1.2, marker="|", zorder=2)
    axis.annotate(
        f"{ratio.median:.2f}x", (1, index), xycoords=("axes fraction", "data"), ha="right", va="center", color=colour
    )
