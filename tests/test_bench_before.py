"""The benchmarks of an earlier revision beside the present one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import before, plan, results, runner
from bench.plan import Job


def test_only_ours_are_run_each_beside_its_earlier_self() -> None:
    jobs = before.plan_pairs(plan.plan_jobs(["cost"], 2, quick=True, backend="pidfd"))
    pairs = list(zip(jobs[::2], jobs[1::2]))
    assert {before.split_name(job.peer)[0] for job in jobs} == {"aiopidfd asyncio", "aiopidfd uvloop"}
    for pair in pairs:
        assert len({(before.split_name(job.peer)[0], job.x, job.round) for job in pair}) == 1
        assert {before.split_name(job.peer)[1] for job in pair} == {False, True}
    assert len({before.split_name(first.peer)[1] for first, _ in pairs}) == 2, "the same one is always first"


def test_earlier_revision_is_imported_from_where_it_was_installed(tmp_path: Path) -> None:
    (tmp_path / "aiopidfd.py").write_text("raise RuntimeError('the earlier one')")
    job = Job("cost", "aiopidfd asyncio", 1, 0, 1)
    cell = runner.run_cell(job._replace(peer=before.name_before(job.peer)), tmp_path, 60, tmp_path)
    assert cell["peer"] == "aiopidfd asyncio, before"
    assert cell["error"] == "RuntimeError: the earlier one"
    assert "the earlier one" not in runner.run_cell(job, tmp_path, 60, tmp_path).get("error", "")


def test_comparison_shows_ratios_of_each_round_and_their_mean() -> None:
    def cell(peer: str, x: int, round_: int, value: float) -> results.Cell:
        samples = {"total": [value]}
        return {"benchmark": "cost", "peer": peer, "x": x, "round": round_, "seconds": 0.1, "samples": samples}

    run: results.Results = {
        "version": results.VERSION,
        "command": "python -m bench cost --before HEAD",
        "environment": {"kernel": "some"},
        "unfinished": "interrupted",
        "cells": [
            *(cell("aiopidfd asyncio", 100, round_, value) for round_, value in enumerate((11, 120))),
            *(cell("aiopidfd asyncio, before", 100, round_, value) for round_, value in enumerate((10, 100))),
            cell("aiopidfd uvloop", 100, 0, 8.0),
            cell("aiopidfd uvloop, before", 100, 0, 8.0),
        ],
    }
    text = before.write_comparison(run)
    assert "- kernel: some\n" in text
    assert "**Not finished:** interrupted." in text
    assert "| cost total, µs: aiopidfd asyncio at 100 | 55.0 | 65.5 | 1.150 | 1.10 1.20 |" in text
    assert "| **cost total**: geometric mean of the above | | | **1.072** | |" in text


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_revision_that_does_not_exist_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["cost", "--quick", "--before", "no-such-revision"]) == 1
    assert "git ended with" in capsys.readouterr().err
