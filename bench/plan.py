"""What the benchmarks are: their peers, the values of x, how many samples each cell takes."""

from __future__ import annotations

from typing import NamedTuple

from . import peers_busy, peers_cost, peers_fork, peers_latency, peers_spawn

OURS = "aiopidfd"


class Metric(NamedTuple):
    """One figure of a benchmark. Less is better, but for rates."""

    title: str
    unit: str = "µs"
    more_is_better: bool = False
    is_pictured: bool = True  # there is room for three


class Benchmark(NamedTuple):
    """One benchmark. `full` and `quick` map each x to the samples that a cell takes there."""

    name: str
    title: str
    x_title: str
    metrics: dict[str, Metric]
    peers: tuple[str, ...]
    reference: str  # the ratios' denominator; the floor, where `has_floor`
    has_floor: bool
    full: dict[int, int]
    quick: dict[int, int]
    notes: tuple[str, ...] = ()
    is_bars: bool = False  # x is no scale, so that a line between its values would say nothing


_ALL = (
    Benchmark(
        name="latency",
        title="Exit latency",
        x_title="live children",
        metrics={
            "callback": Metric("kill of a child to the callback"),
            "await": Metric("kill of a child to the return of await wait()"),
        },
        peers=tuple(peers_latency.PEERS),
        reference="waitpid",
        has_floor=True,
        full={0: 100, 100: 100, 1000: 100, 4000: 100, 10_000: 100},
        quick={0: 20, 4000: 20},
        notes=(
            "waitpid is a Python program that blocks in os.waitpid(pid): it can do nothing else meanwhile.",
            "await is Process.wait() of a subprocess for asyncio, uvloop and trio, and aiopidfd.wait(pid) for us.",
        ),
    ),
    Benchmark(
        name="cost",
        title="CPU time of the parent for each child, ending at once",
        x_title="children ending at once",
        metrics={
            "total": Metric("register and reap"),
            "register": Metric("register"),
            "reap": Metric("reap"),
        },
        peers=tuple(peers_cost.PEERS),
        reference="C program",
        has_floor=True,
        full={100: 10, 1000: 5, 4000: 2},
        quick={100: 4, 1000: 2},
        notes=(
            "uvloop registers a child while it spawns it: only its reaping can be told apart.",
            "All have ended before the clock of the reaping starts. What a SIGCHLD handler does as they end, with asyncio "
            "safe and with sigchld, is not counted; what the threads of asyncio threaded do is.",
        ),
    ),
    Benchmark(
        name="spawn",
        title="Start /bin/true and wait for it",
        x_title="memory of the parent, MB",
        metrics={
            "total": Metric("create_subprocess_exec to the end of wait()"),
            "stall": Metric("longest stall of the loop"),
            "cpu": Metric("CPU time for each of 64 at a time"),
            "wall": Metric("time for each of 64 at a time", is_pictured=False),
            "cpu_pipes": Metric("CPU time for each of 64 at a time with three pipes", is_pictured=False),
            "wall_pipes": Metric("time for each of 64 at a time with three pipes", is_pictured=False),
        },
        peers=tuple(peers_spawn.PEERS),
        reference="posix_spawn",
        has_floor=True,
        full={20: 20, 500: 20, 2000: 20},
        quick={20: 6, 500: 6},
        notes=("posix_spawn is a Python program that blocks in os.posix_spawn and os.waitpid.",),
    ),
    Benchmark(
        name="fork",
        title="Fork the parent",
        x_title="memory of the parent, MB",
        metrics={
            "ready": Metric("fork until the child is ready"),
            "total": Metric("fork, exit and wait"),
            "relative": Metric("ready, in percent of a bare os.fork of the same process", unit="%", is_pictured=False),
            "stall": Metric("longest stall of the loop"),
            "each": Metric("fork, exit and wait, each of 16 at a time", is_pictured=False),
        },
        peers=tuple(peers_fork.PEERS),
        reference="os.fork",
        has_floor=False,
        full={20: 10, 500: 10, 2000: 10},
        quick={20: 3, 500: 3},
        notes=(
            "The C program, os.fork and multiprocessing know no loop: they block for the whole of it.",
            "os.fork is the fork of a process that has loaded neither this library nor uvloop. In percent of one of the "
            "same process: the two alternate; what that has loaded, and its at-fork hooks, ours too, are the same for both.",
            "The C fork server sends and calls the same without Python, but forks only when it is asked to.",
            "Before each is a pause of 5 ms, in which our ForkServer forks a worker ahead; 16 at a time go without it.",
            "forkserver and spawn run the function in an interpreter that shares no memory with the parent.",
        ),
    ),
    Benchmark(
        name="busy",
        title="64 runs of /bin/true at a time beside busy Python threads",
        x_title="CPU-bound threads",
        metrics={
            "latency": Metric("create_subprocess_exec to the end of wait()"),
            "throughput": Metric("throughput", unit="runs/s", more_is_better=True),
        },
        peers=tuple(peers_busy.PEERS),
        reference="asyncio pidfd",
        has_floor=False,
        full={0: 256, 1: 256},
        quick={0: 96, 1: 96},
        is_bars=True,
    ),
)

BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}


class Job(NamedTuple):
    """One cell to be run."""

    benchmark: str
    peer: str
    x: int
    round: int
    samples: int


def is_ours(peer: str) -> bool:
    """Return whether `peer` is this library."""
    return peer.startswith(OURS)


def uses_backend(peer: str, backend: str | None) -> bool:
    """Return whether `peer` is to be run if ours are restricted to `backend`."""
    if backend is None or not is_ours(peer):
        return True
    return peer.endswith(" sigchld") == (backend == "sigchld")


def plan_jobs(names: list[str], rounds: int, *, quick: bool, backend: str | None) -> list[Job]:
    """Return all cells in the order in which they are run.

    Rounds are outermost and the peers of one x next to each other, so that what the machine does meanwhile hits them alike;
    each round starts with another peer, so that none always comes after the same one's mess.
    """
    jobs = []
    for round_ in range(rounds):
        for name in names:
            benchmark = BENCHMARKS[name]
            peers = [peer for peer in benchmark.peers if name not in ("latency", "cost") or uses_backend(peer, backend)]
            first = round_ % len(peers)
            for x, samples in (benchmark.quick if quick else benchmark.full).items():
                jobs += [Job(name, peer, x, round_, samples) for peer in peers[first:] + peers[:first]]
    return jobs
