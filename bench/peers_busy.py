"""`busy`: 64 subprocess runs at a time, beside threads that keep the GIL busy."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from time import perf_counter_ns

from .loops import LoopName, WatcherName, new_asyncio_watcher, new_loop, new_our_loop, run
from .peers_spawn import run_subprocess

Samples = dict[str, list[float]]

_CONCURRENT = 64


def _burn(stop: threading.Event) -> None:
    while not stop.is_set():
        for _ in range(10_000):
            pass


async def _run_all(runs: int) -> Samples:
    latencies: list[float] = []
    left = runs

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            start_ns = perf_counter_ns()
            await run_subprocess()
            latencies.append((perf_counter_ns() - start_ns) / 1000)

    start_ns = perf_counter_ns()
    await asyncio.gather(*(work() for _ in range(min(_CONCURRENT, runs))))
    return {"latency": latencies, "throughput": [runs / (perf_counter_ns() - start_ns) * 1e9]}


def _measure(new_loop: Callable[[], asyncio.AbstractEventLoop], threads: int, runs: int) -> Samples:
    async def main() -> Samples:
        await run_subprocess()
        stop = threading.Event()
        burners = [threading.Thread(target=_burn, args=(stop,), daemon=True) for _ in range(threads)]
        for burner in burners:
            burner.start()
        samples = await _run_all(runs)
        stop.set()
        for burner in burners:
            burner.join()
        return samples

    return run(new_loop(), main())


def _new_watched_loop(watcher: WatcherName) -> asyncio.AbstractEventLoop:
    loop = new_loop("asyncio")
    new_asyncio_watcher(watcher, loop)
    return loop


def _measure_asyncio(watcher: WatcherName, threads: int, runs: int) -> Samples:
    return _measure(partial(_new_watched_loop, watcher), threads, runs)


def _measure_uvloop(threads: int, runs: int) -> Samples:
    return _measure(partial(new_loop, "uvloop"), threads, runs)


def _measure_ours(loop: LoopName, threads: int, runs: int) -> Samples:
    return _measure(partial(new_our_loop, loop), threads, runs)


PEERS: dict[str, Callable[[int, int], Samples]] = {
    "asyncio pidfd": partial(_measure_asyncio, "pidfd"),
    "asyncio threaded": partial(_measure_asyncio, "threaded"),
    "uvloop": _measure_uvloop,
    "aiopidfd asyncio": partial(_measure_ours, "asyncio"),
    "aiopidfd uvloop": partial(_measure_ours, "uvloop"),
}
