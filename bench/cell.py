"""One cell of a benchmark in a process of its own: `python -m bench.cell BENCHMARK PEER X SAMPLES PROGRAMS`."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import TypedDict

from .children import PROGRAMS_VARIABLE


class Outcome(TypedDict, total=False):
    """What a cell prints: samples of each metric, or why there are none."""

    samples: dict[str, list[float]]
    missing: str
    error: str


def measure(benchmark: str, peer: str, x: int, samples: int) -> Outcome:
    """Run the cell in this process."""
    # Not at the top: a spawned child of multiprocessing imports this module first, and need not pay for the rest.
    module = importlib.import_module(f"bench.peers_{benchmark}")
    from .loops import MissingError

    try:
        measured: dict[str, list[float]] = module.PEERS[peer](x, samples)
        return {"samples": {metric: [round(value, 2) for value in values] for metric, values in measured.items()}}
    except (ImportError, MissingError) as exc:
        return {"missing": str(exc)}
    except Exception as exc:
        cause: BaseException = exc
        while hasattr(cause, "exceptions"):  # trio puts everything into groups
            cause = cause.exceptions[0]
        return {"error": f"{type(cause).__name__}: {cause}"}


def main() -> None:
    """Print the outcome as JSON."""
    benchmark, peer, x, samples, programs = sys.argv[1:]
    os.environ[PROGRAMS_VARIABLE] = programs
    print(json.dumps(measure(benchmark, peer, int(x), int(samples))), flush=True)
    # Without the interpreter's end: there may be ten thousand threads to join, or children to be warned of. The children
    # end as their stdin does; the process that started this cell waits for that, since they hold its stdout.
    os._exit(0)


if __name__ == "__main__":
    main()
