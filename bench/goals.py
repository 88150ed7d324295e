"""The goals, each held against the figures of a run."""

from __future__ import annotations

from typing import NamedTuple

from .results import Results, Table


class Goal(NamedTuple):
    """`numerator` over `denominator`, each a peer's median at an x, is at most, or at least, `limit`."""

    benchmark: str
    metric: str
    numerator: tuple[str, int]
    denominator: tuple[str, int]
    at_most: bool
    limit: float


def _list_goals() -> list[Goal]:
    goals = []
    for loop in ("asyncio", "uvloop"):
        ours, fallback = f"aiopidfd {loop}", f"aiopidfd {loop} sigchld"
        for metric in ("callback", "await"):
            goals += [
                Goal("latency", metric, (ours, 0), ("waitpid", 0), True, 1.3),
                Goal("latency", metric, (ours, 10_000), (ours, 0), True, 1.2),
                Goal("latency", metric, ("uvloop", 4000), (ours, 4000), False, 20),
                Goal("latency", metric, (fallback, 4000), (ours, 4000), True, 3),
                Goal("latency", metric, ("uvloop", 4000), (fallback, 4000), False, 10),
            ]
        goals += [
            Goal("cost", "total", (ours, 1000), ("asyncio pidfd", 1000), True, 0.65),
            Goal("cost", "total", (ours, 1000), ("C program", 1000), True, 1.4),
            Goal("fork", "ready", (ours, 20), ("os.fork", 20), True, 1.3),
            Goal("fork", "ready", ("aiotools forkserver", 20), (ours, 20), False, 20),
        ]
    goals += [
        Goal("spawn", "total", ("uvloop", 20), ("aiopidfd uvloop", 20), False, 3),
        Goal("spawn", "total", ("uvloop", 2000), ("aiopidfd uvloop", 2000), False, 50),
    ]
    # Against both of asyncio's, since which one a program gets depends on its Python version.
    for peer in ("asyncio pidfd", "asyncio threaded"):
        goals += [Goal("spawn", "total", ("aiopidfd asyncio", x), (peer, x), True, 1.1) for x in (20, 500, 2000)]
        for loop in ("asyncio", "uvloop"):
            goals += [
                Goal("spawn", "cpu", (f"aiopidfd {loop}", 20), (peer, 20), True, 0.6),
                Goal("spawn", "cpu_pipes", (f"aiopidfd {loop}", 20), (peer, 20), True, 0.65),
                Goal("spawn", "wall", (f"aiopidfd {loop}", 20), (peer, 20), True, 0.8),
            ]
    for loop in ("asyncio", "uvloop"):
        goals += [Goal("spawn", "total", (f"aiopidfd {loop}", x), ("uvloop", x), True, 1) for x in (20, 500, 2000)]
        goals.append(Goal("spawn", "total", (f"aiopidfd {loop}", 2000), (f"aiopidfd {loop}", 20), True, 1.2))
    fork_server = "aiopidfd ForkServer"
    goals += [
        Goal("fork", "ready", ("aiopidfd asyncio", 2000), (fork_server, 2000), False, 20),
        Goal("fork", "ready", (fork_server, 2000), (fork_server, 20), True, 1.5),
        Goal("fork", "ready", ("aiotools forkserver", 2000), (fork_server, 2000), False, 40),
        Goal("fork", "ready", (fork_server, 20), ("C fork server", 20), True, 4),
    ]
    order = ("latency", "cost", "spawn", "fork")
    return sorted(goals, key=lambda goal: order.index(goal.benchmark))


GOALS = _list_goals()


def write_goals(results: Results) -> str:
    """Return a Markdown table of all goals: met, missed or not measured."""
    tables = {name: Table(results, name) for name in ("latency", "cost", "spawn", "fork")}
    lines = [f"`{results['command']}`", "", "| goal | limit | ratio | |", "| --- | ---: | ---: | --- |"]
    for goal in GOALS:
        ratio = tables[goal.benchmark].ratio(goal.metric, goal.numerator, goal.denominator)
        limit = f"{'≤' if goal.at_most else '≥'} {goal.limit:g}"
        lines.append(f"| {_describe(goal)} | {limit} | {'-' if ratio is None else f'{ratio:.2f}'} | {_judge(goal, ratio)} |")
    return "\n".join(lines) + "\n"


def _describe(goal: Goal) -> str:
    (above, above_x), (below, below_x) = goal.numerator, goal.denominator
    if above_x == below_x:
        return f"{goal.benchmark} {goal.metric} at {above_x:,}: {above} / {below}"
    return f"{goal.benchmark} {goal.metric}: {above} at {above_x:,} / {below} at {below_x:,}"


def _judge(goal: Goal, ratio: float | None) -> str:
    if ratio is None:
        return "not measured"
    met = ratio <= goal.limit if goal.at_most else ratio >= goal.limit
    return "met" if met else "**missed**"
