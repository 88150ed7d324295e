"""Markdown of a run: for each metric the medians side by side, then everything else folded away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .plan import BENCHMARKS, Benchmark, Metric, is_ours
from .results import Results, Table, percentile


def write_report(results: Results) -> str:
    """Return the whole report."""
    lines = [f"`{results['command']}`", ""]
    lines += [f"- {name}: {value}" for name, value in results["environment"].items()]
    if results["unfinished"]:
        lines += ["", f"**Not finished:** {results['unfinished']}."]
    for name in dict.fromkeys(cell["benchmark"] for cell in results["cells"]):
        lines += _write_benchmark(BENCHMARKS[name], Table(results, name))
    return "\n".join(lines) + "\n"


def _write_benchmark(benchmark: Benchmark, table: Table) -> Iterator[str]:
    yield from ("", f"### {benchmark.title} (`{benchmark.name}`)")
    for name, metric in benchmark.metrics.items():
        peers = [peer for peer in benchmark.peers if any(table.samples(name, peer, x) for x in table.xs)]
        if peers:
            yield from ("", f"**{metric.title}**, p50 in {metric.unit}", "")
            yield from _write_medians(benchmark, table, name, peers)
            yield from _write_faster_peers(benchmark, table, name, metric)
    remarks = [*benchmark.notes, *(f"Missing: {peer} ({reason})." for peer, reason in table.troubles("missing"))]
    for (peer, reason), xs in table.troubles("error").items():
        remarks.append(f"Failed: {peer} at {', '.join(f'{x:,}' for x in xs)}: {reason}.")
    if remarks:
        yield from ("", *(f"- {remark}" for remark in remarks))
    yield from ("", "<details><summary>All percentiles</summary>", "")
    yield from _write_details(benchmark, table)
    yield from ("", "</details>")


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _write_medians(benchmark: Benchmark, table: Table, metric: str, peers: list[str]) -> Iterator[str]:
    yield _row([benchmark.x_title, *(f"{x:,}" for x in table.xs)])
    yield _row(["---", *("---:" for _ in table.xs)])
    for peer in peers:
        name = f"**{peer}**" if is_ours(peer) else peer
        yield _row([name, *(_median_and_ratio(benchmark, table, metric, peer, x) for x in table.xs)])


def _median_and_ratio(benchmark: Benchmark, table: Table, metric: str, peer: str, x: int) -> str:
    median = table.p50(metric, peer, x)
    if median is None:
        return "-"
    ratio = table.ratio(metric, (peer, x), (benchmark.reference, x))
    if ratio is None or peer == benchmark.reference:
        return format_value(median)
    return f"{format_value(median)} ({ratio:.2g}x)" if ratio < 10 else f"{format_value(median)} ({ratio:,.0f}x)"


def _write_faster_peers(benchmark: Benchmark, table: Table, name: str, metric: Metric) -> Iterator[str]:
    """Say where a peer wins. The floor is none: it does not do what an event loop does."""
    sign = -1 if metric.more_is_better else 1
    wins = []
    for x in table.xs:
        medians = {peer: table.p50(name, peer, x) for peer in benchmark.peers}
        ranked = sorted((sign * median, peer) for peer, median in medians.items() if median is not None)
        ours = next((pair for pair in ranked if is_ours(pair[1])), None)
        floors = {benchmark.reference} if benchmark.has_floor else {"C program", "C fork server"}
        better = [peer for value, peer in ranked if ours and value < ours[0] and peer not in floors]
        if ours and better:
            wins.append(f"at {x:,} {' and '.join(better)}")
    if wins:
        yield from ("", f"Better than the best of ours: {'; '.join(wins)}.")


def _write_details(benchmark: Benchmark, table: Table) -> Iterator[str]:
    yield _row(["metric", benchmark.x_title, "peer", "n", "p50", "p90", "p99", "max", f"x {benchmark.reference}"])
    yield _row(["---", "---:", "---", *("---:" for _ in range(6))])
    for name, metric in benchmark.metrics.items():
        for x in table.xs:
            for peer in benchmark.peers:
                samples = table.samples(name, peer, x)
                if samples:
                    ratio = table.ratio(name, (peer, x), (benchmark.reference, x))
                    values = [format_value(percentile(samples, percent)) for percent in (50, 90, 99, 100)]
                    ratio_text = "-" if ratio is None else f"{ratio:.2f}"
                    yield _row([f"{name}, {metric.unit}", f"{x:,}", peer, str(len(samples)), *values, ratio_text])


def format_value(value: float) -> str:
    """Return three digits, or all of a larger whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
