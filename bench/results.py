"""The samples of a run: kept as JSON, read as percentiles or as ratios."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

from .cell import Outcome

VERSION = 1


class Cell(Outcome):
    """One cell that was run."""

    benchmark: str
    peer: str
    x: int
    round: int
    seconds: float


class Results(TypedDict):
    """One run. `unfinished` says why some of the planned cells are not there, or is empty."""

    version: int
    command: str
    environment: dict[str, str]
    unfinished: str
    cells: list[Cell]


def save(results: Results, path: Path) -> None:
    """Write `results`, one cell a line."""
    head = {key: value for key, value in results.items() if key != "cells"}
    cells = ",\n".join(json.dumps(cell) for cell in results["cells"])
    path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "cells": [\n{cells}\n]}}\n', encoding="utf-8")


def load(path: Path) -> Results:
    """Read what `save` has written. ValueError: the file is something else."""
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(results, dict) or results.get("version") != VERSION:
        raise ValueError(f"{path.name} is not a result of this version of the benchmarks")
    return results


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return the percentile, interpolated between the two nearest samples."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


class Table:
    """The samples of one benchmark, by metric, peer and x."""

    def __init__(self, results: Results, benchmark: str) -> None:
        self._cells = [cell for cell in results["cells"] if cell["benchmark"] == benchmark]
        self.xs = sorted({cell["x"] for cell in self._cells})

    def samples(self, metric: str, peer: str, x: int) -> list[float]:
        """Return the samples of all rounds."""
        return [sample for _, samples in self._by_round(metric, peer, x) for sample in samples]

    def p50(self, metric: str, peer: str, x: int) -> float | None:
        """Return the median of the samples of all rounds, or None if there are none."""
        samples = self.samples(metric, peer, x)
        return statistics.median(samples) if samples else None

    def ratio(self, metric: str, numerator: tuple[str, int], denominator: tuple[str, int]) -> float | None:
        """Return the ratio of two medians, each a peer's at an x.

        It is taken inside each round, since a whole round may run on a slower machine than the next one; of these
        ratios the median is returned. None if no round has both.
        """
        ratios = self.ratios(metric, numerator, denominator)
        return statistics.median(ratios) if ratios else None

    def ratios(self, metric: str, numerator: tuple[str, int], denominator: tuple[str, int]) -> list[float]:
        """Return that ratio of each round that has both."""
        above = {round_: statistics.median(samples) for round_, samples in self._by_round(metric, *numerator)}
        below = {round_: statistics.median(samples) for round_, samples in self._by_round(metric, *denominator)}
        return [above[round_] / below[round_] for round_ in above if below.get(round_)]

    def troubles(self, kind: Literal["missing", "error"]) -> dict[tuple[str, str], list[int]]:
        """Return each (peer, reason) with the values of x where it was met."""
        found: dict[tuple[str, str], list[int]] = {}
        for cell in self._cells:
            if kind in cell:
                xs = found.setdefault((cell["peer"], cell[kind]), [])
                if cell["x"] not in xs:
                    xs.append(cell["x"])
        return found

    def _by_round(self, metric: str, peer: str, x: int) -> list[tuple[int, list[float]]]:
        return [
            (cell["round"], cell["samples"][metric])
            for cell in self._cells
            if cell["peer"] == peer and cell["x"] == x and cell.get("samples", {}).get(metric)
        ]
