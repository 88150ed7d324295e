"""How far a run has come: one line on a terminal, nothing anywhere else."""

from __future__ import annotations

import statistics
import sys
import time

from .plan import Job
from .results import Cell


class Progress:
    """Tells the cell that runs, and the time that is left as far as the cells that were run can tell."""

    def __init__(self, jobs: list[Job]) -> None:
        self._jobs = jobs
        self._visible = sys.stderr.isatty()
        self._start_s = time.monotonic()
        self._seconds: dict[tuple[str, str, int], float] = {}

    def start(self, number: int, job: Job) -> None:
        """Show that `job` is being run."""
        x = f"{job.x:,}"
        text = f"{number + 1}/{len(self._jobs)} {job.benchmark}, {job.peer} at {x}{self._tell_left(number)}"
        self._show(text)

    def end(self, cell: Cell) -> None:
        """Learn how long a cell takes, and say at once if it has failed."""
        self._seconds[cell["benchmark"], cell["peer"], cell["x"]] = cell["seconds"]
        if self._visible and "error" in cell:
            self._show(f"{cell['benchmark']}, {cell['peer']} at {cell['x']:,} failed: {cell['error']}")
            sys.stderr.write("\n")

    def clear(self) -> None:
        """Take the line away."""
        self._show("")

    def _tell_left(self, number: int) -> str:
        if not self._seconds:
            return ""
        guess = statistics.mean(self._seconds.values())  # for cells of the first round
        left_s = sum(self._seconds.get((job.benchmark, job.peer, job.x), guess) for job in self._jobs[number:])
        return f" · {left_s / 60:.0f} min left" if left_s > 90 else f" · {left_s:.0f} s left"

    def _show(self, text: str) -> None:
        if self._visible:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
