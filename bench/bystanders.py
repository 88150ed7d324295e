"""`python -m bench.bystanders`: what the SIGCHLD backend costs where signals are not for it.

Not one of the benchmarks of `python -m bench`: nothing else does the same, so that there is nothing to compare with. It
measures the CPU time of the loop's thread, in one process: with 10 and with many pending children, for each exit of a child
that somebody else has made and reaps; for each exit of ours, without and with a foreign zombie that nobody reaps; and while
another process sends SIGCHLD as fast as it can.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import aiopidfd

from . import children, programs
from .loops import new_loop

# Sends SIGCHLD to process argv[1] for argv[2] seconds.
_STORM: Final = """
import os, sys, time
pid, end = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    for _ in range(100):
        os.kill(pid, 17)
"""


class _Pending:
    """Children that are watched, and live as long as this is open."""

    def __init__(self, count: int) -> None:
        read, self._write = os.pipe()
        self._waiting = [asyncio.ensure_future(aiopidfd.wait(children.start(read))) for _ in range(count)]
        os.close(read)

    async def close(self) -> None:
        os.close(self._write)
        await asyncio.gather(*self._waiting)


async def _measure(step: Callable[[], object], times: int, gap_s: float) -> float:
    """Return the median CPU time of the loop's thread for `step` and for `gap_s` after it, in us."""
    costs = []
    for _ in range(times):
        before = time.thread_time_ns()
        step()
        await asyncio.sleep(gap_s)
        costs.append((time.thread_time_ns() - before) / 1000)
    return statistics.median(costs)


def _start_pair(count: int) -> list[tuple[int, int]]:
    """Start children that end one by one; give the pid of each, and the descriptor to close."""
    made = []
    for _ in range(count):
        read, write = os.pipe()
        made.append((children.start(read), write))
        os.close(read)
    return made


async def measure_foreign_exits(times: int, gap_s: float) -> float:
    """Return what the exit of somebody else's child costs: another thread reaps it."""
    made = _start_pair(times)
    reaper = threading.Thread(target=lambda: [os.waitpid(pid, 0) for pid, _ in made])
    reaper.start()
    left = iter(made)
    cost = await _measure(lambda: os.close(next(left)[1]), times, gap_s)
    reaper.join()
    return cost


async def measure_own_exits(times: int, gap_s: float) -> float:
    """Return what the exit of a watched child costs, the call of its observer with it."""
    made = _start_pair(times)
    waiting = [asyncio.ensure_future(aiopidfd.wait(pid)) for pid, _ in made]
    await asyncio.sleep(0.05)
    left = iter(made)
    cost = await _measure(lambda: os.close(next(left)[1]), times, gap_s)
    await asyncio.gather(*waiting)
    return cost


async def measure_storm(seconds: float) -> float:
    """Return the part of a CPU that the loop's thread uses while another process sends SIGCHLD, in percent."""
    storm = subprocess.Popen([sys.executable, "-c", _STORM, str(os.getpid()), str(seconds + 0.5)])
    await asyncio.sleep(0.3)
    before, began = time.thread_time(), time.monotonic()
    await asyncio.sleep(seconds)
    used, took = time.thread_time() - before, time.monotonic() - began
    while storm.poll() is None:
        await asyncio.sleep(0.05)
    return 100 * used / took


async def measure_all(pending: int, times: int, gap_s: float, storm_s: float) -> dict[str, float]:
    """Measure each with so many pending children."""
    children.raise_descriptor_limit()
    held = _Pending(pending)
    await asyncio.sleep(0.2)
    idle = await _measure(lambda: None, times, gap_s)
    found = {"foreign exit": await measure_foreign_exits(times, gap_s) - idle}
    found["own exit"] = await measure_own_exits(times, gap_s) - idle
    ((zombie, write),) = _start_pair(1)
    os.close(write)
    children.await_end(zombie)
    found["own exit, foreign zombie"] = await measure_own_exits(times, gap_s) - idle
    found["foreign exit, foreign zombie"] = await measure_foreign_exits(times, gap_s) - idle
    os.waitpid(zombie, 0)
    if storm_s:
        found["storm, % of a CPU"] = await measure_storm(storm_s)
    await held.close()
    return found


def main() -> None:
    """Measure on the loop and with the backend that are named, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.bystanders", description="See the module's docstring.")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--backend", choices=("pidfd", "sigchld"), default="sigchld")
    parser.add_argument("--pending", type=int, nargs="+", default=[10, 2000])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--gap-ms", type=float, default=20.0, help="between two exits")
    parser.add_argument("--storm-s", type=float, default=2.0)
    arguments = parser.parse_args()
    os.environ["AIOPIDFD_BACKEND"] = arguments.backend
    with tempfile.TemporaryDirectory() as directory:
        programs.compile_all(Path(directory))
        os.environ[children.PROGRAMS_VARIABLE] = directory
        for pending in arguments.pending:
            loop = new_loop(arguments.loop)
            measuring = measure_all(pending, arguments.times, arguments.gap_ms / 1000, arguments.storm_s)
            found = loop.run_until_complete(measuring)
            loop.close()
            for what, value in found.items():
                print(f"{arguments.loop:8} {arguments.backend:8} {pending:5} pending  {what:30} {value:8.1f}", flush=True)


if __name__ == "__main__":
    main()
