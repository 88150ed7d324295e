"""The benchmarks: each kind of cell for one sample, so that none rots; what is made of the samples."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import aiopidfd
from aiopidfd._backends.backend import probe_pidfd
from bench import __main__ as command
from bench import environment, goals, plan, programs, report, results, runner
from bench.plan import BENCHMARKS, Job

_SMALLEST_X = {"latency": 1, "cost": 2, "spawn": 1, "fork": 1, "busy": 1}

_CELLS = [(benchmark.name, peer) for benchmark in BENCHMARKS.values() for peer in benchmark.peers]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the compiled programs."""
    if programs.find_compiler() is None:
        pytest.skip("no C compiler")
    directory = tmp_path_factory.mktemp("programs")
    programs.compile_all(directory)
    return directory


def _skip_what_we_lack(benchmark: str, peer: str) -> None:
    needs_pidfds = peer in ("asyncio pidfd", "aiopidfd ForkServer") or (peer, benchmark) == ("C program", "cost")
    ours_by_pidfd = benchmark in ("latency", "cost") and peer in ("aiopidfd asyncio", "aiopidfd uvloop")
    if (needs_pidfds or ours_by_pidfd) and probe_pidfd() is not None:
        pytest.skip("pidfds are forbidden here")
    if peer.endswith("sigchld") and "backend" not in inspect.signature(aiopidfd.PidfdWatcher).parameters:
        pytest.skip("this version has no sigchld backend")
    if peer.endswith("ForkServer") and not hasattr(aiopidfd, "ForkServer"):
        pytest.skip("this version has no ForkServer")


@pytest.mark.parametrize(("benchmark", "peer"), _CELLS)
def test_cell_gives_as_many_samples_as_asked_for(benchmark: str, peer: str, compiled: Path) -> None:
    _skip_what_we_lack(benchmark, peer)
    for _ in range(10):
        cell = runner.run_cell(Job(benchmark, peer, _SMALLEST_X[benchmark], 0, 2), compiled, timeout_s=60)
        # aiotools opens the pidfd of its fork server's child when it gets its pid, and fails if that has exited already.
        if not (peer.startswith("aiotools") and cell.get("error", "").startswith("ProcessLookupError")):
            break
    if "missing" in cell:
        pytest.skip(cell["missing"])
    assert "error" not in cell
    assert cell["samples"]
    for metric, samples in cell["samples"].items():
        assert metric in BENCHMARKS[benchmark].metrics
        assert len(samples) == (1 if metric.startswith(("throughput", "cpu", "wall", "each")) else 2)  # these are of a batch
        assert all(sample > 0 for sample in samples)


def test_cell_that_fails_says_why(compiled: Path) -> None:
    cell = runner.run_cell(Job("cost", "nobody", 1, 0, 1), compiled, timeout_s=60)
    assert cell["error"] == "KeyError: 'nobody'"


def test_cell_that_dies_says_why(tmp_path: Path) -> None:
    cell = runner.run_cell(Job("no such benchmark", "nobody", 1, 0, 1), tmp_path, timeout_s=60)
    assert cell["error"].startswith("ended with 1: ModuleNotFoundError")


def test_cell_that_takes_too_long_is_ended(compiled: Path) -> None:
    cell = runner.run_cell(Job("latency", "waitpid", 0, 0, 100_000), compiled, timeout_s=0.5)
    assert cell["error"] == "not done after 0.5 s"
    assert cell["seconds"] < 30


def _cell(peer: str, x: int, round_: int, **outcome: object) -> results.Cell:
    return {"benchmark": "cost", "peer": peer, "x": x, "round": round_, "seconds": 0.1, **outcome}  # type: ignore[typeddict-item]


def _results(*cells: results.Cell) -> results.Results:
    return {
        "version": results.VERSION,
        "command": "python -m bench cost",
        "environment": environment.describe(),
        "unfinished": "",
        "cells": list(cells),
    }


_RUN = _results(
    _cell("C program", 1000, 0, samples={"total": [10.0, 11.0, 12.0]}),
    _cell("asyncio pidfd", 1000, 0, samples={"total": [22.0]}),
    _cell("aiopidfd asyncio", 1000, 0, samples={"total": [33.0]}),
    _cell("aiopidfd uvloop", 1000, 0, samples={"total": [11.0]}),
    # A round on a machine that has become ten times slower: no ratio changes by it.
    _cell("C program", 1000, 1, samples={"total": [110.0]}),
    _cell("asyncio pidfd", 1000, 1, samples={"total": [220.0]}),
    _cell("aiopidfd asyncio", 1000, 1, samples={"total": [330.0]}),
    _cell("uvloop", 1000, 0, missing="No module named 'uvloop'"),
    _cell("asyncio safe", 1000, 0, error="OSError: no"),
    _cell("asyncio safe", 4000, 0, error="OSError: no"),
)


def test_ratio_is_taken_inside_each_round() -> None:
    table = results.Table(_RUN, "cost")
    assert table.ratio("total", ("asyncio pidfd", 1000), ("C program", 1000)) == 2
    assert table.ratio("total", ("trio", 1000), ("C program", 1000)) is None


def test_percentiles_lie_between_the_samples() -> None:
    samples = [4.0, 1.0, 3.0, 2.0]
    assert [results.percentile(samples, percent) for percent in (0, 50, 90, 100)] == [1, 2.5, 3.7, 4]
    assert results.percentile([7.0], 99) == 7


def test_report_has_percentiles_ratios_and_the_winner() -> None:
    text = report.write_report(_RUN)
    assert "| total, µs | 1,000 | C program | 4 | 11.5 | 80.6 | 107 | 110 | 1.00 |" in text
    assert "| **aiopidfd asyncio** | 182 (3x) | - |" in text
    assert "Missing: uvloop (No module named 'uvloop')." in text
    assert "Failed: asyncio safe at 1,000, 4,000: OSError: no." in text
    assert "Better than the best of ours" not in text
    without_uvloop = _results(*(cell for cell in _RUN["cells"] if cell["peer"] != "aiopidfd uvloop"))
    assert "Better than the best of ours: at 1,000 asyncio pidfd." in report.write_report(without_uvloop)


def test_goals_are_met_missed_or_not_measured() -> None:
    text = goals.write_goals(_RUN)
    assert "| cost total at 1,000: aiopidfd asyncio / asyncio pidfd | ≤ 0.65 | 1.50 | **missed** |" in text
    assert "| cost total at 1,000: aiopidfd uvloop / C program | ≤ 1.4 | 1.00 | met |" in text
    assert "| fork ready at 20: aiopidfd uvloop / os.fork | ≤ 1.3 | - | not measured |" in text


def test_goals_name_only_what_is_measured() -> None:
    for goal in goals.GOALS:
        benchmark = BENCHMARKS[goal.benchmark]
        assert goal.metric in benchmark.metrics
        for peer, x in (goal.numerator, goal.denominator):
            assert peer in benchmark.peers
            assert x in benchmark.full


def test_results_survive_their_file(tmp_path: Path) -> None:
    results.save(_RUN, tmp_path / "run.json")
    assert results.load(tmp_path / "run.json") == _RUN


def test_file_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text('{"version": 0}')
    assert command.main(["table", str(tmp_path / "other.json")]) == 1
    assert "not a result" in capsys.readouterr().err


def test_pictures_are_drawn_from_a_file(tmp_path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:  # not imported: numpy starts threads, beside which others fork
        pytest.skip("matplotlib is not installed")
    cells = [
        {**_cell(peer, x, 0, samples={metric: [1.0 + x] for metric in benchmark.metrics}), "benchmark": benchmark.name}
        for benchmark in BENCHMARKS.values()
        for peer in benchmark.peers
        for x in benchmark.full
    ]
    results.save(_results(*cells), tmp_path / "run.json")  # type: ignore[arg-type] # mypy takes {**typed_dict} for a dict
    # In a process of its own: matplotlib keeps its fonts open.
    plot = [sys.executable, "-m", "bench", "plot", str(tmp_path / "run.json"), str(tmp_path / "pictures")]
    subprocess.run(plot, check=True, cwd=Path(__file__).parent.parent)
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == sorted(f"{name}.{suffix}" for name in BENCHMARKS for suffix in ("png", "svg"))


def test_rounds_start_with_different_peers() -> None:
    jobs = plan.plan_jobs(["cost"], 2, quick=True, backend="pidfd")
    assert jobs[0].peer == "C program"
    assert next(job for job in jobs if job.round == 1).peer == "asyncio pidfd"
    assert not any(job.peer.endswith("sigchld") for job in jobs)


@pytest.fixture
def tiny_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of two quick cells a round."""
    tiny = BENCHMARKS["cost"]._replace(quick={2: 1}, peers=("C program", "asyncio threaded"))
    monkeypatch.setitem(BENCHMARKS, "cost", tiny)


@pytest.mark.usefixtures("tiny_plan", "compiled")
@pytest.mark.skipif(probe_pidfd() is not None, reason="pidfds are forbidden here")
def test_command_prints_a_table_and_keeps_the_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["cost", "--quick", "--rounds", "2", "--json", str(tmp_path / "run.json")]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("`python -m bench cost --quick --rounds 2`\n")
    assert "| C program |" in captured.out
    assert str(tmp_path) not in captured.out
    assert captured.err == ""  # no terminal, no progress
    assert len(results.load(tmp_path / "run.json")["cells"]) == 4


@pytest.mark.usefixtures("tiny_plan", "compiled")
def test_interrupted_run_prints_what_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run_one(job: Job, *_: object) -> results.Cell:
        if job.peer != "C program":
            raise KeyboardInterrupt
        return _cell(job.peer, job.x, job.round, samples={"total": [5.0]})

    monkeypatch.setattr(runner, "run_cell", run_one)
    assert command.main(["cost", "--quick"]) == 130
    output = capsys.readouterr().out
    assert "interrupted after 1 of 4 cells" in output
    assert "| C program | 5.0 |" in output


def test_failed_cell_is_not_tried_again_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(job: Job, *_: object) -> results.Cell:
        return _cell(job.peer, job.x, job.round, **({"error": "no"} if job.peer == "A" else {"missing": "no"}))

    ran: list[results.Cell] = []
    monkeypatch.setattr(runner, "run_cell", fail)
    jobs = [Job("cost", peer, x, round_, 1) for round_ in (0, 1) for x in (1, 2) for peer in ("A", "B")]
    assert runner.run_jobs(jobs, tmp_path, timeout_s=1, budget_s=60, on_start=lambda *_: None, on_end=ran.append) == ""
    assert [(cell["peer"], cell["x"]) for cell in ran] == [("A", 1), ("B", 1), ("A", 2)]


def test_quick_run_stops_when_its_time_is_up(tmp_path: Path) -> None:
    jobs = plan.plan_jobs(["cost"], 1, quick=True, backend=None)
    reason = runner.run_jobs(
        jobs, tmp_path, timeout_s=1, budget_s=-1, on_start=lambda *_: None, on_end=lambda _: pytest.fail("it ran")
    )
    assert reason == f"out of time after 0 of {len(jobs)} cells"


def test_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["latencies"])
    assert "no such benchmark: latencies" in capsys.readouterr().err
