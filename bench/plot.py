"""Pictures of a run: one PNG and one SVG per benchmark, for a README on a light or a dark page."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported, which would look for a display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .plan import BENCHMARKS, Benchmark, is_ours
from .results import Results, Table

# A README is shown some 800 pixels wide; twice that for screens with narrow pixels.
_WIDTH_IN = 8.0
_DPI = 200
_LEGEND_COLUMNS = 3
# On a transparent ground: greys and colours of a middling lightness stand out from white and from near-black.
_TEXT = "#7d8590"
_GRID = "#7d859055"


class _Style(NamedTuple):
    color: str
    marker: str = "o"
    line: str = "-"


_FLOOR = _Style("#7d8590", "", "--")
_STYLES = {
    "C fork server": _Style("#7d8590", "", ":"),
    "aiopidfd asyncio": _Style("#f76707"),
    "aiopidfd uvloop": _Style("#e03131", "s"),
    "aiopidfd asyncio sigchld": _Style("#f76707", "o", ":"),
    "aiopidfd uvloop sigchld": _Style("#e03131", "s", ":"),
    "aiopidfd ForkServer": _Style("#f59f00", "D"),
    "asyncio pidfd": _Style("#228be6", "^"),
    "asyncio safe": _Style("#4c6ef5", "v", "-."),
    "asyncio threaded": _Style("#15aabf", "<"),
    "uvloop": _Style("#37b24d", "P"),
    "trio": _Style("#be4bdb", "X"),
    "anyio": _Style("#f06595", "h"),
    "os.fork": _Style("#868e96", "p"),
    "multiprocessing fork": _Style("#15aabf", "<"),
    "aiotools fork": _Style("#228be6", "^"),
    "aiotools forkserver": _Style("#37b24d", "P"),
    "aiotools forkserver preloaded": _Style("#37b24d", "P", ":"),
    "aiotools spawn": _Style("#be4bdb", "X"),
}


# Any: matplotlib's own type for this is a list of all the keys there are.
_LOOK: Any = {
    "font.size": 9.5,
    "font.family": ["DejaVu Sans", "sans-serif"],
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "svg.fonttype": "none",  # text stays text: smaller, and sharp
}


def draw_all(results: Results, directory: Path) -> None:
    """Draw each benchmark of the run into `directory`."""
    for name in dict.fromkeys(cell["benchmark"] for cell in results["cells"]):
        with plt.rc_context(_LOOK):
            _draw(BENCHMARKS[name], Table(results, name), results, directory)


def _draw(benchmark: Benchmark, table: Table, results: Results, directory: Path) -> None:
    pictured = [name for name, metric in benchmark.metrics.items() if metric.is_pictured]
    values = {metric: _list_medians(benchmark, table, metric) for metric in pictured}
    metrics = [metric for metric in pictured if values[metric]]
    if not metrics:
        return
    is_shared = len({benchmark.metrics[metric].unit for metric in metrics}) == 1
    peers = [peer for peer in benchmark.peers if any(_list_points(table, metric, peer) for metric in metrics)]
    legend_in = 0.25 + 0.2 * math.ceil(len(peers) / _LEGEND_COLUMNS)
    height_in = 3.8 + legend_in
    figure, grid = plt.subplots(1, len(metrics), figsize=(_WIDTH_IN, height_in), squeeze=False, sharey=is_shared)
    figure.subplots_adjust(
        left=0.085,
        right=0.985,
        top=1 - 0.8 / height_in,
        bottom=(0.5 + legend_in) / height_in,
        wspace=0.08 if is_shared else 0.25,
    )
    for axes, metric in zip(grid[0], metrics):
        axes.set_title(benchmark.metrics[metric].title, fontsize=9)
        axes.set_xlabel(benchmark.x_title)
        draw = _draw_bars if benchmark.is_bars else _draw_lines
        draw(axes, benchmark, table, metric)
        scaled = list(chain(*values.values())) if is_shared else values[metric]
        _scale_y(axes, scaled, benchmark.metrics[metric].unit, linear=benchmark.is_bars)
    figure.suptitle(f"{benchmark.title} (median)", y=1 - 0.08 / height_in, fontsize=12, fontweight="bold")
    figure.text(0.5, 1 - 0.46 / height_in, _describe_source(results), fontsize=7.5, ha="center")
    handles = {label: handle for axes in grid[0] for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="lower center", ncols=_LEGEND_COLUMNS, frameon=False, fontsize=9)
    for suffix in ("png", "svg"):
        figure.savefig(directory / f"{benchmark.name}.{suffix}", dpi=_DPI, transparent=True)
    plt.close(figure)


def _list_medians(benchmark: Benchmark, table: Table, metric: str) -> list[float]:
    return [median for peer in benchmark.peers for _, median in _list_points(table, metric, peer)]


def _describe_source(results: Results) -> str:
    facts = results["environment"]
    return " · ".join((facts["CPU"], facts["kernel"].rpartition(" ")[0], f"Python {facts['Python'].split()[0]}"))


def _label(benchmark: Benchmark, peer: str) -> str:
    return f"{peer} (floor)" if _is_floor(benchmark, peer) else peer


def _is_floor(benchmark: Benchmark, peer: str) -> bool:
    return peer.startswith("C ") or (benchmark.has_floor and peer == benchmark.reference)


def _list_points(table: Table, metric: str, peer: str) -> list[tuple[int, float]]:
    medians = ((x, table.p50(metric, peer, x)) for x in table.xs)
    return [(x, median) for x, median in medians if median is not None]


def _draw_lines(axes: Axes, benchmark: Benchmark, table: Table, metric: str) -> None:
    for peer in benchmark.peers:
        points = _list_points(table, metric, peer)
        if points:
            style = _STYLES.get(peer, _FLOOR)
            axes.plot(
                *zip(*points),
                color=style.color,
                marker=style.marker,
                linestyle=style.line,
                linewidth=2.4 if is_ours(peer) else 1.4,
                markersize=5.5 if is_ours(peer) else 5,
                zorder=3 if is_ours(peer) else 2,
                label=_label(benchmark, peer),
            )
    if table.xs[0] == 0 and len(table.xs) > 1:
        axes.set_xscale("symlog", linthresh=table.xs[1])
    elif table.xs[0] > 0:
        axes.set_xscale("log")
    axes.set_xticks(table.xs, [_write_x(x, short=len(table.xs) > 3) for x in table.xs])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.1)


def _draw_bars(axes: Axes, benchmark: Benchmark, table: Table, metric: str) -> None:
    peers = [peer for peer in benchmark.peers if any(table.samples(metric, peer, x) for x in table.xs)]
    width = 0.8 / len(peers)
    for place, peer in enumerate(peers):
        points = _list_points(table, metric, peer)
        offset = (place - (len(peers) - 1) / 2) * width
        positions = [table.xs.index(x) + offset for x, _ in points]
        axes.bar(positions, [median for _, median in points], width * 0.9, color=_STYLES[peer].color, label=peer)
    axes.set_xticks(range(len(table.xs)), [f"{x:,}" for x in table.xs])


def _scale_y(axes: Axes, values: list[float], unit: str, *, linear: bool) -> None:
    low, high = min(values), max(values)
    if linear or high < 10 * low:
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 1000 * low else (1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(low / 1.5, high * 1.5)
    axes.yaxis.set_major_formatter(FuncFormatter(_write_duration if unit == "µs" else _write_rate))
    if unit != "µs":
        axes.set_ylabel(unit)


def _write_duration(microseconds: float, _position: int | None) -> str:
    for factor, unit in ((1_000_000, "s"), (1000, "ms")):
        if microseconds >= factor:
            return f"{microseconds / factor:g} {unit}"
    return f"{microseconds:g} µs" if microseconds else "0"


def _write_x(x: int, *, short: bool) -> str:
    return f"{x // 1000}k" if short and x >= 1000 else f"{x:,}"


def _write_rate(value: float, _position: int | None) -> str:
    return f"{value:,.0f}"
