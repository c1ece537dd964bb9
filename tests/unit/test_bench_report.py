"""The pure parts of bench/: what a benchmark concludes from its samples."""

import dataclasses
import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import fio
import hung
import report
import stall
import targets


def fio_output(read_iops: float = 0, write_iops: float = 0, error: int = 0) -> str:
    def side(iops: float, latency_ns: float) -> dict[str, object]:
        percentile = {"percentile": {"99.000000": latency_ns * 3}} if iops else {}
        clat = {"mean": latency_ns if iops else 0.0, **percentile}
        return {"total_ios": int(iops * 2), "iops": iops, "bw_bytes": int(iops * 4096), "clat_ns": clat}

    job = {"jobname": "x", "error": error, "read": side(read_iops, 100_000), "write": side(write_iops, 300_000)}
    return json.dumps({"fio version": "fio-3.33", "jobs": [job]}, indent=2)


def run_of(values: dict[str, list[float | None]], syncs: bool = False, goal: float | None = None) -> report.Run:
    names = {"cachefs": (False, True), "control": (False, True), "qsd": (True, True), "nbdfuse": (True, False)}
    run = report.Run(
        machine={"kernel": "6.1"},
        settings={"rounds": 3, "runtime": 2.0, "size": "1GiB"},
        jobs={"job": report.JobInfo("job", "4 KiB read", "IOPS", syncs, goal)},
        targets={name: report.TargetInfo(name, peer, flushes) for name, (peer, flushes) in names.items()},
    )
    for target, rounds in values.items():
        for number, value in enumerate(rounds, 1):
            error = "it broke" if value is None else None
            run.samples.append(report.Sample("tmpfs", "job", number, target, value, error=error))
    return run


def test_fio_output_is_summed_over_reads_and_writes():
    found = report.parse_fio(fio_output(read_iops=1000, write_iops=3000))
    assert found["iops"] == 4000
    assert found["mb_s"] == pytest.approx(16.384)
    assert found["latency_us"] == pytest.approx(250)  # weighted by their number
    assert found["p99_us"] == pytest.approx(900)


def test_fio_output_may_have_messages_around_it():
    text = "fio: a warning about {something}\n" + fio_output(read_iops=10) + "\nfio: and one behind\n"
    assert report.parse_fio(text)["iops"] == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fio: no such file", "no such file"),
        ("", "no output"),
        ("bad block size\n" + fio_output(read_iops=10, error=22), "fio error 22: bad block size"),
        (fio_output(), "no I/O"),
        ('{\n"other": 1}', "no JSON from fio"),
    ],
)
def test_fio_output_that_is_no_result_is_refused_with_what_fio_said(text: str, message: str):
    with pytest.raises(report.ParseError, match=message):
        report.parse_fio(text)


def test_spread_has_median_and_extremes():
    assert report.spread([5, 1, 2]) == report.Spread(2, 1, 5, 3)
    assert report.spread([4, 2]) == report.Spread(3, 2, 4, 2)
    assert report.spread([]) is None


def test_noise_is_the_largest_deviation_in_either_direction():
    assert report.noise_of([1.0, 1.1, 0.98]) == pytest.approx(0.1)
    assert report.noise_of([0.8, 1.1]) == pytest.approx(0.25)
    assert report.noise_of([]) is None


@pytest.mark.parametrize(
    ("ratio", "noise", "verdict"),
    [
        (1.2, 0.1, "faster"),
        (1.05, 0.1, "~"),
        (0.95, 0.1, "~"),
        (0.8, 0.1, "slower"),
        (None, 0.1, "?"),
        (2.0, None, "?"),
    ],
)
def test_a_ratio_is_a_result_only_outside_the_noise(ratio: float | None, noise: float | None, verdict: str):
    assert report.verdict_of(ratio, noise) == verdict


def test_ratio_is_taken_within_each_round_against_that_rounds_best_peer():
    run = run_of(
        {"cachefs": [100, 200, 400], "control": [100, 210, 400], "qsd": [50, 100, 100], "nbdfuse": [20, 40, 200]}
    )
    (row,) = report.summarize(run, "tmpfs")
    assert row.ratio == report.Spread(2, 2, 2, 3)
    assert row.peer == "qsd"
    assert row.noise == pytest.approx(0.05)
    assert row.verdict == "faster"


def test_a_peer_that_does_not_flush_is_no_measure_for_a_job_that_does():
    run = run_of({"cachefs": [100], "control": [100], "qsd": [80], "nbdfuse": [400]}, syncs=True)
    (row,) = report.summarize(run, "tmpfs")
    assert (row.peer, row.ratio) == ("qsd", report.Spread(1.25, 1.25, 1.25, 1))
    assert "(400 400-400)" in report.cells(run, row, " ")


def test_rounds_that_failed_or_are_missing_are_left_out():
    run = run_of({"cachefs": [100, None, 300], "control": [100, 100], "qsd": [50, 50, None]})
    (row,) = report.summarize(run, "tmpfs")
    assert row.values["cachefs"].count == 2
    assert row.ratio == report.Spread(2, 2, 2, 1)
    assert "nbdfuse" not in row.values
    assert report.closing_lines(run) == ["failed: tmpfs job cachefs: it broke", "failed: tmpfs job qsd: it broke"]


def test_a_run_without_peers_or_control_still_makes_a_table():
    run = run_of({"cachefs": [100]})
    (row,) = report.summarize(run, "tmpfs")
    assert report.cells(run, row, " ")[2:] == ["100 100-100", "-", "-", "-", "none", "?", "?", ""]


@pytest.mark.parametrize(("goal", "text"), [(1.4, "1.4x ok"), (2.5, "2.5x missed"), (None, "")])
def test_goals_are_compared_with_the_median_ratio(goal: float | None, text: str):
    run = run_of({"cachefs": [200], "control": [200], "qsd": [100]}, goal=goal)
    assert report.goal_text(report.summarize(run, "tmpfs")[0]) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0"),
        (910.4, "910"),
        (999.6, "1.00k"),
        (7621, "7.62k"),
        (9999, "10.0k"),
        (99960, "100k"),
        (131072, "131k"),
        (2.5e6, "2.50M"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str):
    assert report.number(value) == text


def test_requests_are_found_wherever_the_status_has_them():
    assert report.requests_of({"daemon": {"pid": 1, "requests": {"READ": 5}}}) == {"READ": 5}
    assert report.requests_of({"daemon": {"pid": 1}, "layers": []}) is None
    assert report.requests_of(None) is None


def test_markdown_replaces_only_what_stands_between_the_markers():
    document = f"# Head\n{report.BEGIN}\nold\n{report.END}\n# Tail\n"
    once = report.replace_section(document, "new")
    assert once == f"# Head\n{report.BEGIN}\n\nnew\n\n{report.END}\n# Tail\n"
    assert report.replace_section(once, "new") == once


@pytest.mark.parametrize("document", ["nothing", report.BEGIN, f"{report.END}{report.BEGIN}"])
def test_markdown_without_both_markers_is_refused(document: str):
    with pytest.raises(ValueError, match="markers"):
        report.replace_section(document, "new")


def test_markdown_is_written_with_table_and_a_link_relative_to_it(tmp_path: Path):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"{report.BEGIN}{report.END}")
    report.write_markdown(run_of({"cachefs": [150], "control": [150], "qsd": [100]}), page, tmp_path / "plot.svg")
    text = page.read_text()
    assert "](../plot.svg)" in text
    assert "| 4 KiB read | IOPS | 150<br>150-150 | 150<br>150-150 | 100<br>100-100 | - | qsd | 1.50x ▲" in text


def test_the_page_of_the_project_has_the_markers():
    page = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
    assert "new" in report.replace_section(page.read_text(), "new")


def test_json_holds_the_whole_run():
    run = run_of({"cachefs": [100, None], "control": [90, 95], "qsd": [50, 60]})
    assert report.Run.from_json(run.to_json()) == run


def test_every_target_is_first_at_some_time_and_runs_once_a_round():
    names = ["a", "b", "c"]
    orders = [fio.in_turn(names, number) for number in range(1, 7)]
    assert all(sorted(order) == names for order in orders)
    assert {order[0] for order in orders} == set(names)


def test_jobs_have_unique_names_and_stay_on_the_disk():
    jobs = fio.all_jobs()
    assert len({job.name for job in jobs}) == len(jobs) == 18
    size = 1 << 30
    for job in jobs:
        if job.where == "fresh":
            continue
        options = dict(argument[2:].split("=", 1) for argument in job.arguments(Path("/x:y"), size, 0.5, 1)[1:])
        end = int(options["offset"]) + int(options["size"]) * int(options["numjobs"])
        assert end <= (size if "write" not in job.rw and job.rw != "randrw" else size // 2)
        assert options["filename"] == "/x\\:y"
        assert options["runtime"] == "500ms"


def test_a_job_on_fresh_blocks_has_others_in_every_round_and_no_two_writes_in_a_cluster():
    (job,) = (job for job in fio.all_jobs() if job.where == "fresh")
    size = 1 << 30
    ends = [size]
    for number in (1, 2, 3):
        options = dict(argument[2:].split("=", 1) for argument in job.arguments(Path("/x"), size, 0.5, number)[1:])
        assert int(options["offset"]) == ends[-1]
        ends.append(ends[-1] + int(options["size"]))
        assert (options["rw"], options["bs"]) == ("write:61440", "4k")
        assert "time_based" not in options
        assert "ramp_time" not in options


def test_goals_of_jobs_that_sync_are_for_disks_and_those_of_others_for_memory():
    for syncs, storage, goal in (
        (False, "tmpfs", 1.5),
        (True, "tmpfs", None),
        (True, "disk", 1.5),
        (False, "disk", None),
    ):
        run = run_of({"cachefs": [100], "qsd": [100]}, syncs=syncs, goal=1.5)
        run.samples = [dataclasses.replace(sample, storage=storage) for sample in run.samples]
        assert report.summarize(run, storage)[0].goal == goal


def test_a_condition_is_compared_with_the_controls_of_its_own_rounds():
    rounds = [(100.0, 110.0, 50.0), (200.0, 200.0, 190.0), (100.0, 80.0, 90.0)]
    found = report.compare("read", "IOPS", rounds)
    assert found.control == report.Spread(100, 100, 200, 3)
    assert found.ratio == report.Spread(0.9, 0.5, 0.95, 3)
    assert found.noise == pytest.approx(0.25)
    assert found.inside
    assert not report.compare("read", "IOPS", [(100, 101, 80)]).inside
    assert not report.compare("gap", "ms", [(10, 11, 20)]).inside  # more is as far outside as less
    line = report.comparison_lines([found], "held")[2]
    assert line == ("| read | IOPS | 100 (100-200) | 110 (80-200) | 90 (50-190) | 0.90x (0.50-0.95) | ±25% | yes |")


def test_the_other_tools_measure_every_condition_in_turn():
    assert {stall.CONDITIONS[0], hung.CONDITIONS[0]} == {"control"}
    assert {fio.in_turn(hung.CONDITIONS, number)[0] for number in range(1, 7)} == set(hung.CONDITIONS)
    assert stall.PUNCHED + stall.DIRTY <= stall.SIZE


def test_a_client_tells_its_longest_gap(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "disk"
    path.touch()
    targets.os.truncate(path, stall.ACTIVE)
    stall.be_client(path, "write", 0.02)
    found = json.loads(capsys.readouterr().out)
    assert found["count"] >= 1
    assert found["longest_gap_ms"] > 0


def test_cpu_time_of_a_process_is_counted():
    before = targets._cpu_seconds(targets.os.getpid())
    random.Random(1).randbytes(10_000_000)
    assert targets._cpu_seconds(targets.os.getpid()) > before
    assert targets._cpu_seconds(2**22 + 1) == 0


def test_mounts_and_file_systems_are_read_from_the_kernel():
    assert Path("/proc") in targets.mounts_below(Path("/proc"))
    assert targets.file_system_of(Path("/proc/self")) == "proc"
    assert targets._unescape("/a\\040b") == "/a b"


def test_workspace_is_removed_and_so_is_one_that_a_killed_run_left(tmp_path: Path):
    abandoned = tmp_path / f"{targets.PREFIX}old"
    abandoned.mkdir()
    (abandoned / "lock").touch()
    with targets.workspace(tmp_path) as directory:
        assert not abandoned.exists()
        (directory / "file").touch()
        with targets.workspace(tmp_path):
            assert directory.exists()  # locked: in use
    assert list(tmp_path.iterdir()) == []
