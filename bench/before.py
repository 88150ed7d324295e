"""An earlier revision of this library beside the present one: `python -m bench --before REVISION`."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .plan import BENCHMARKS, Job, is_ours
from .results import Results, Table

_SUFFIX = ", before"


def name_before(peer: str) -> str:
    """Return the name of the earlier revision of one of our peers."""
    return peer + _SUFFIX


def split_name(peer: str) -> tuple[str, bool]:
    """Return the peer's name in its benchmark, and whether it is the earlier revision."""
    return peer.removesuffix(_SUFFIX), peer.endswith(_SUFFIX)


def install(revision: str, directory: Path) -> Path:
    """Build `revision` of this repository, and return the folder to put in front of `sys.path`.

    ValueError: there is no such revision, or it does not build; with the last words of who says so.
    """
    root, tree, packages = Path(__file__).parent.parent, directory / "before-tree", directory / "before"
    tree.mkdir()
    _call(["git", "-C", str(root), "archive", "--format=tar", f"--output={directory}/before.tar", revision])
    _call(["tar", "-xf", f"{directory}/before.tar", "-C", str(tree)])
    _call([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), str(tree)])
    return packages


def _call(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last_line = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"{Path(command[0]).name} ended with {result.returncode}: {last_line}")


def plan_pairs(jobs: list[Job]) -> list[Job]:
    """Return those jobs that are ours, each beside the same one of the earlier revision; which is first alternates."""
    pairs: list[Job] = []
    for job in jobs:
        if is_ours(job.peer):
            pair = [job, job._replace(peer=name_before(job.peer))]
            pairs += pair if (job.round + len(pairs) // 2) % 2 else reversed(pair)
    return pairs


def write_comparison(results: Results) -> str:
    """Return a table of the present revision as against the earlier one, all ratios taken inside a round."""
    lines = [f"`{results['command']}`", "", *(f"- {name}: {value}" for name, value in results["environment"].items())]
    if results["unfinished"]:
        lines += ["", f"**Not finished:** {results['unfinished']}."]
    lines += ["", "| | before, p50 | now, p50 | ratio | of each round |", "| --- | ---: | ---: | ---: | --- |"]
    for name in dict.fromkeys(cell["benchmark"] for cell in results["cells"]):
        lines += _write_rows(name, Table(results, name))
    for cell in results["cells"]:
        if "error" in cell:
            lines += ["", f"Failed: {cell['benchmark']}, {cell['peer']} at {cell['x']:,}: {cell['error']}."]
    return "\n".join(lines) + "\n"


def _write_rows(name: str, table: Table) -> Iterator[str]:
    benchmark = BENCHMARKS[name]
    for metric, about in benchmark.metrics.items():
        middles = []
        for peer in filter(is_ours, benchmark.peers):
            for x in table.xs:
                ratios = table.ratios(metric, (peer, x), (name_before(peer), x))
                before, now = (table.p50(metric, who, x) for who in (name_before(peer), peer))
                if ratios and before is not None and now is not None:
                    middle = statistics.median(ratios)
                    middles.append(middle)
                    each = " ".join(f"{ratio:.2f}" for ratio in ratios)
                    row = f"| {name} {metric}, {about.unit}: {peer} at {x:,} "
                    yield row + f"| {before:,.1f} | {now:,.1f} | {middle:.3f} | {each} |"
        if middles:
            mean = statistics.geometric_mean(middles)
            yield f"| **{name} {metric}**: geometric mean of the above | | | **{mean:.3f}** | |"
