"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

from . import before, environment, goals, programs, report
from .plan import BENCHMARKS, plan_jobs
from .progress import Progress
from .results import VERSION, Cell, Results, load, save
from .runner import run_jobs

_ROUNDS = 5
_QUICK_ROUNDS = 2
_TIMEOUT_S = 300
# Together less than the three minutes that a quick run may take.
_QUICK_BUDGET_S = 145
_QUICK_TIMEOUT_S = 30

_EPILOG = """\
of an earlier run's JSON file:
  python -m bench table FILE          print its tables again
  python -m bench goals FILE          hold it against the goals
  python -m bench plot FILE [DIR]     draw its pictures into DIR (default: the current directory)
"""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    try:
        if arguments and arguments[0] in ("table", "goals", "plot"):
            return _show_file(arguments)
        return _run(_parse(arguments))
    except (programs.CompilerError, OSError, ValueError) as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure aiopidfd against its peers. Prints Markdown tables.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"{', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer samples, smaller sizes: three minutes for everything")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"default: {_ROUNDS}, or {_QUICK_ROUNDS} if quick")
    parser.add_argument("--backend", choices=("pidfd", "sigchld"), help="of ours in latency and cost (default: both)")
    parser.add_argument("--before", metavar="REVISION", help="measure ours alone, beside that earlier commit of it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every sample in FILE")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw a PNG and an SVG of each benchmark into DIR")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}")
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.before and options.plot:
        parser.error("--before has no pictures")
    return options


def _describe_command(options: argparse.Namespace) -> str:
    """Return the command without file names, which say nothing about the figures."""
    parts = ["python -m bench", *options.names]
    parts += ["--quick"] if options.quick else []
    parts += [f"--rounds {options.rounds}"] if options.rounds else []
    parts += [f"--backend {options.backend}"] if options.backend else []
    parts += [f"--before {options.before}"] if options.before else []
    return " ".join(parts)


def _run(options: argparse.Namespace) -> int:
    if options.plot:
        from . import plot  # before the run: without matplotlib it would be in vain

        options.plot.mkdir(parents=True, exist_ok=True)
    rounds = options.rounds or (_QUICK_ROUNDS if options.quick else _ROUNDS)
    jobs = plan_jobs(options.names or list(BENCHMARKS), rounds, quick=options.quick, backend=options.backend)
    if options.before:
        jobs = before.plan_pairs(jobs)
    results: Results = {
        "version": VERSION,
        "command": _describe_command(options),
        "environment": environment.describe(),
        "unfinished": "",
        "cells": [],
    }
    progress = Progress(jobs)
    with tempfile.TemporaryDirectory() as directory:
        programs.compile_all(Path(directory))
        earlier = before.install(options.before, Path(directory)) if options.before else None

        def end(cell: Cell) -> None:
            results["cells"].append(cell)
            progress.end(cell)

        results["unfinished"] = run_jobs(
            jobs,
            Path(directory),
            timeout_s=_QUICK_TIMEOUT_S if options.quick else _TIMEOUT_S,
            budget_s=_QUICK_BUDGET_S if options.quick else math.inf,
            before=earlier,
            on_start=progress.start,
            on_end=end,
        )
    progress.clear()
    print(before.write_comparison(results) if options.before else report.write_report(results), end="")
    if options.json:
        save(results, options.json)
    if options.plot:
        plot.draw_all(results, options.plot)
    return 130 if results["unfinished"].startswith("interrupted") else 0


def _show_file(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("action", choices=("table", "goals", "plot"))
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("directory", type=Path, metavar="DIR", nargs="?", default=Path())
    options = parser.parse_args(arguments)
    results = load(options.file)
    if options.action == "table":
        print(report.write_report(results), end="")
    elif options.action == "goals":
        print(goals.write_goals(results), end="")
    else:
        from . import plot

        options.directory.mkdir(parents=True, exist_ok=True)
        plot.draw_all(results, options.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
