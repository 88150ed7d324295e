"""Runs cells, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from .before import split_name
from .cell import Outcome
from .plan import Job
from .results import Cell

_ROOT = Path(__file__).parent.parent


def run_cell(job: Job, programs: Path, timeout_s: float, before: Path | None = None) -> Cell:
    """Run one cell and return its samples, or why there are none. `before`: where the earlier revision is installed.

    Returns when its last child has ended, too: they hold the cell's stdout. So the next cell has the machine for itself.
    """
    peer, is_before = split_name(job.peer)
    arguments = [job.benchmark, peer, str(job.x), str(job.samples), str(programs)]
    # Where multiprocessing leaves the directory of its sockets behind, since the cell ends without a clean-up.
    environment = {**os.environ, "TMPDIR": str(programs)}
    if is_before:
        environment["PYTHONPATH"] = str(before)
    start_s = time.monotonic()
    # In a session of its own, so that Ctrl-C is ours alone: a cell that is killed takes its children with it.
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.cell", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        env=environment,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
        outcome = _read_outcome(process.returncode, output, errors)
    except subprocess.TimeoutExpired:
        outcome = {"error": f"not done after {timeout_s:g} s"}
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    where = {"benchmark": job.benchmark, "peer": job.peer, "x": job.x, "round": job.round}
    return cast("Cell", {**where, **outcome, "seconds": round(time.monotonic() - start_s, 2)})


def _read_outcome(returncode: int, output: str, errors: str) -> Outcome:
    try:
        outcome: Outcome = json.loads(output)
    except ValueError:
        last_line = (errors.strip().splitlines() or ["it said nothing"])[-1]
        return {"error": f"ended with {returncode}: {last_line}"}
    return outcome


def run_jobs(
    jobs: list[Job],
    programs: Path,
    *,
    timeout_s: float,
    budget_s: float,
    before: Path | None = None,
    on_start: Callable[[int, Job], None],
    on_end: Callable[[Cell], None],
) -> str:
    """Run all cells; return why some were left out, or an empty string.

    A peer that is missing, or a cell that has failed, is not tried again in the next round. No cell is started when
    `budget_s` is used up.
    """
    end_s = time.monotonic() + budget_s
    given_up: set[tuple[str, str, int | None]] = set()
    done = 0
    try:
        for number, job in enumerate(jobs):
            if {(job.benchmark, job.peer, None), (job.benchmark, job.peer, job.x)} & given_up:
                continue
            if time.monotonic() > end_s:
                return f"out of time after {number} of {len(jobs)} cells"
            done = number
            on_start(number, job)
            cell = run_cell(job, programs, timeout_s, before)
            on_end(cell)
            if "missing" in cell:
                given_up.add((job.benchmark, job.peer, None))
            elif "error" in cell:
                given_up.add((job.benchmark, job.peer, job.x))
    except KeyboardInterrupt:
        return f"interrupted after {done} of {len(jobs)} cells"
    return ""
