"""What a benchmark run says: pure functions from samples to tables, and the files they are written to.

Everything compared is compared within a round, where the targets ran right after each other: for each round the ratio
of cachefs to the best peer and the ratio of the control (cachefs a second time) to cachefs. The control's largest
deviation from 1 in either direction is the noise; a ratio whose median lies within it says nothing and is shown as ~.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SUBJECT = "cachefs"
CONTROL = "control"
GOALS_STORAGE = "tmpfs"  # goals are about our own work, not about a disk's; but a flush is nothing without a disk
BEGIN = "<!-- benchmark results: begin -->"
END = "<!-- benchmark results: end -->"


class ParseError(Exception):
    """fio's output is not a result; the message says what fio said."""


@dataclass(frozen=True)
class Sample:
    """One run of one job on one target. `value` is in the job's unit, None if the run failed with `error`."""

    storage: str
    job: str
    round: int
    target: str
    value: float | None
    details: dict[str, float] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class JobInfo:
    name: str
    title: str
    unit: str  # "IOPS" or "MB/s"
    syncs: bool = False  # counts only against targets that really flush
    goal: float | None = None  # the least ratio to the best peer, in tmpfs; of one that syncs, everywhere else


@dataclass(frozen=True)
class TargetInfo:
    title: str
    peer: bool = False
    flushes: bool = True
    command: str = ""


@dataclass
class Run:
    """All that one run found; the JSON file is exactly this."""

    machine: dict[str, str]
    settings: dict[str, Any]
    jobs: dict[str, JobInfo]
    targets: dict[str, TargetInfo]
    samples: list[Sample] = field(default_factory=list)
    file_systems: dict[str, str] = field(default_factory=dict)  # per storage
    idle_percent: dict[str, float] = field(default_factory=dict)
    status: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        summary = [asdict(row) for storage in self.storages() for row in summarize(self, storage)]
        return json.dumps(asdict(self) | {"summary": summary}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Run:
        raw = json.loads(text)
        del raw["summary"]
        raw["jobs"] = {name: JobInfo(**info) for name, info in raw["jobs"].items()}
        raw["targets"] = {name: TargetInfo(**info) for name, info in raw["targets"].items()}
        raw["samples"] = [Sample(**sample) for sample in raw["samples"]]
        return cls(**raw)

    def storages(self) -> list[str]:
        return list(dict.fromkeys(sample.storage for sample in self.samples))


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Row:
    """One job on one storage, over all rounds."""

    storage: str
    job: str
    values: dict[str, Spread]
    peer: str | None  # the better peer by median
    ratio: Spread | None  # cachefs to the best peer of each round
    control: Spread | None  # control to cachefs
    noise: float | None
    verdict: str
    goal: float | None


def parse_fio(text: str) -> dict[str, float]:
    """`fio --output-format=json` to totals over reads and writes: iops, mb_s, latency_us (mean), p99_us, ios.

    Raises: ParseError.
    """
    start = text.find("{\n")
    try:
        jobs = json.JSONDecoder().raw_decode(text, max(start, 0))[0]["jobs"]
    except (ValueError, KeyError):
        raise ParseError(f"no JSON from fio: {text.strip()[-300:] or 'no output'}") from None
    if any(job["error"] for job in jobs):
        raise ParseError(f"fio error {max(job['error'] for job in jobs)}: {text[:start].strip()[-300:]}")
    sides = [job[side] for job in jobs for side in ("read", "write") if job[side]["total_ios"]]
    total = sum(side["total_ios"] for side in sides)
    if not total:
        raise ParseError("fio did no I/O")
    return {
        "iops": sum(side["iops"] for side in sides),
        "mb_s": sum(side["bw_bytes"] for side in sides) / 1e6,
        "latency_us": sum(side["clat_ns"]["mean"] * side["total_ios"] for side in sides) / total / 1e3,
        "p99_us": max(side["clat_ns"].get("percentile", {}).get("99.000000", 0) for side in sides) / 1e3,
        "ios": float(total),
    }


def spread(values: Iterable[float]) -> Spread | None:
    ordered = sorted(values)
    return Spread(statistics.median(ordered), ordered[0], ordered[-1], len(ordered)) if ordered else None


def noise_of(control_ratios: Iterable[float]) -> float | None:
    """The largest deviation from 1 as a factor minus 1, the same up and down: 0.8 and 1.25 are both 0.25."""
    deviations = [abs(math.log(ratio)) for ratio in control_ratios]
    return math.expm1(max(deviations)) if deviations else None


def verdict_of(ratio: float | None, noise: float | None) -> str:
    """Outside the noise "faster" or "slower", inside "~"; "?" where either is unknown."""
    if ratio is None or noise is None:
        return "?"
    if abs(math.log(ratio)) <= math.log1p(noise):
        return "~"
    return "faster" if ratio > 1 else "slower"


def summarize(run: Run, storage: str) -> list[Row]:
    return [row for job in run.jobs if (row := _summarize_job(run, storage, job)).values]


def _summarize_job(run: Run, storage: str, job: str) -> Row:
    rounds: dict[int, dict[str, float]] = {}
    for sample in run.samples:
        if sample.storage == storage and sample.job == job and sample.value:
            rounds.setdefault(sample.round, {})[sample.target] = sample.value
    info = run.jobs[job]
    peers = [name for name, target in run.targets.items() if target.peer and (target.flushes or not info.syncs)]
    spreads = {name: spread(found[name] for found in rounds.values() if name in found) for name in run.targets}
    values = {name: value for name, value in spreads.items() if value is not None}
    against_control = list(_ratios(rounds.values(), CONTROL, [SUBJECT]))
    ratio = spread(_ratios(rounds.values(), SUBJECT, peers))
    noise = noise_of(against_control)
    return Row(
        storage=storage,
        job=job,
        values=values,
        peer=max((peer for peer in peers if peer in values), key=lambda peer: values[peer].median, default=None),
        ratio=ratio,
        control=spread(against_control),
        noise=noise,
        verdict=verdict_of(ratio.median if ratio else None, noise),
        goal=info.goal if (storage == GOALS_STORAGE) != info.syncs else None,
    )


def _ratios(rounds: Iterable[Mapping[str, float]], subject: str, others: Sequence[str]) -> Iterable[float]:
    """Per round, `subject` to the best of `others`; rounds in which either is missing are left out."""
    for found in rounds:
        best = max((found[other] for other in others if other in found), default=None)
        if best and subject in found:
            yield found[subject] / best


# One condition beside two controls


@dataclass(frozen=True)
class Comparison:
    """A figure under some condition and twice without it, over all rounds. ratio: the condition to its round's control."""

    title: str
    unit: str
    control: Spread
    again: Spread
    condition: Spread
    ratio: Spread
    noise: float  # of the second control to the first, the worst round

    @property
    def inside(self) -> bool:
        """Whether the condition changed no more than the controls differ from each other."""
        return verdict_of(self.ratio.median, self.noise) == "~"


def compare(title: str, unit: str, rounds: Sequence[tuple[float, float, float]]) -> Comparison:
    """*rounds*: control, control again and condition of each; all above zero, and at least one round."""
    control, again, condition = (spread(column) for column in zip(*rounds, strict=True))
    ratio = spread(values[2] / values[0] for values in rounds)
    noise = noise_of(values[1] / values[0] for values in rounds)
    if control is None or again is None or condition is None or ratio is None or noise is None:
        raise ValueError("a comparison needs a round")
    return Comparison(title, unit, control, again, condition, ratio, noise)


def comparison_lines(comparisons: Sequence[Comparison], condition: str) -> list[str]:
    """A Markdown table."""
    head = ["figure", "unit", "control", "control again", condition, "ratio", "noise", "inside the noise"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 2)]
    for found in comparisons:
        cells = [f"{number(s.median)} ({number(s.low)}-{number(s.high)})" for s in (found.control, found.again)]
        cells += [f"{number(found.condition.median)} ({number(found.condition.low)}-{number(found.condition.high)})"]
        cells += [f"{found.ratio.median:.2f}x ({found.ratio.low:.2f}-{found.ratio.high:.2f})", f"±{found.noise:.0%}"]
        lines.append("| " + " | ".join([found.title, found.unit, *cells, "yes" if found.inside else "no"]) + " |")
    return lines


# Text


def columns(run: Run) -> list[str]:
    return ["job", "unit", *run.targets, "best peer", "ratio", "noise", "goal"]


def cells(run: Run, row: Row, separator: str) -> list[str]:
    """One table row; `separator` stands between a median and its spread."""
    info = run.jobs[row.job]
    measured = []
    for name, target in run.targets.items():
        value = row.values.get(name)
        text = f"{number(value.median)}{separator}{number(value.low)}-{number(value.high)}" if value else "-"
        measured.append(f"({text})" if value and info.syncs and not target.flushes else text)
    noise = "?" if row.noise is None else f"±{row.noise:.0%}"
    return [info.title, info.unit, *measured, row.peer or "none", ratio_text(row, separator), noise, goal_text(row)]


def number(value: float) -> str:
    """Three digits: 7.62k, 131k, 4.45k, 910."""
    for limit, divisor, unit in ((999.5, 1, ""), (999.5e3, 1e3, "k"), (math.inf, 1e6, "M")):
        if value < limit:
            scaled = value / divisor
            digits = 0 if scaled >= 99.95 or not unit else 1 if scaled >= 9.995 else 2
            return f"{scaled:.{digits}f}{unit}"
    raise AssertionError("unreachable")


def ratio_text(row: Row, separator: str = " ") -> str:
    if row.ratio is None:
        return "?"
    mark = {"faster": "▲", "slower": "▼"}.get(row.verdict, row.verdict)
    return f"{row.ratio.median:.2f}x {mark}{separator}{row.ratio.low:.2f}-{row.ratio.high:.2f}"


def goal_text(row: Row) -> str:
    if row.goal is None or row.ratio is None:
        return ""
    return f"{row.goal:.1f}x {'ok' if row.ratio.median >= row.goal else 'missed'}"


def requests_of(status: Any) -> dict[str, int] | None:
    """The daemon's count of FUSE requests per opcode, wherever in its status a mapping `requests` stands."""
    if not isinstance(status, dict):
        return None
    found = status.get("requests")
    if isinstance(found, dict) and found and all(isinstance(count, int) for count in found.values()):
        return found
    return next((inner for value in status.values() if (inner := requests_of(value)) is not None), None)


def closing_lines(run: Run) -> list[str]:
    lines = [f"CPU used while idle: {name} {percent:.3f} %" for name, percent in run.idle_percent.items()]
    if counts := requests_of(run.status):
        ordered = sorted(counts.items(), key=lambda entry: -entry[1])
        lines.append("FUSE requests of cachefs: " + ", ".join(f"{name} {count}" for name, count in ordered if count))
    failed = {(s.storage, s.job, s.target): s.error for s in run.samples if s.error}
    lines += [f"failed: {' '.join(where)}: {error}" for where, error in failed.items()]
    return lines + run.notes


def markdown(run: Run, plot: str | None) -> str:
    parts = [" · ".join(f"{name}: {value}" for name, value in run.machine.items())]
    settings = run.settings
    parts.append(
        f"{settings['rounds']} rounds of {settings['runtime']:g} s per job and target, disks of {settings['size']}. "
        "Median, then smallest to largest."
    )
    if plot:
        parts.append(f"![ratio to the best peer, per job]({plot})")
    for storage in run.storages():
        head = columns(run)
        lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 2)]
        lines += ["| " + " | ".join(cells(run, row, "<br>")) + " |" for row in summarize(run, storage)]
        parts += [f"### Data in {storage} ({run.file_systems.get(storage, 'file system unknown')})", "\n".join(lines)]
    parts.append("\n".join("- " + "; ".join(line.splitlines()) for line in closing_lines(run)))
    return "\n\n".join(part for part in parts if part)


def replace_section(document: str, section: str) -> str:
    """The document with what stands between the two markers replaced. Raises: ValueError without both, in order."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document needs both markers: {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{section.strip()}\n\n{END}{after}"


def write_markdown(run: Run, path: Path, plot: Path | None) -> None:
    link = None if plot is None else os.path.relpath(plot, path.parent)
    path.write_text(replace_section(path.read_text(), markdown(run, link)))


def print_tables(run: Run) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal or console.width < 100:
        console = Console(width=170)
    for storage in run.storages():
        table = Table(title=f"data in {storage}, {run.file_systems.get(storage, '')}", title_justify="left")
        for index, name in enumerate(columns(run)):
            table.add_column(name, justify="left" if index < 2 else "right", no_wrap=index == 0, overflow="fold")
        for row in summarize(run, storage):
            table.add_row(*(Text(cell, style=_style(cell)) for cell in cells(run, row, "\n")))
        console.print(table)
    for line in closing_lines(run):
        console.print(Text(line))
    console.print(Text("▲ ▼ outside the noise of the control, ~ inside; (in brackets): does not flush, not compared"))


def _style(cell: str) -> str:
    if "▲" in cell or cell.endswith(" ok"):
        return "green"
    return "red" if "▼" in cell or cell.endswith(" missed") else ""
