"""`spawn`: start a program and wait for its end, from a parent of a given size: time, stall of the loop, CPU time."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from functools import partial
from subprocess import PIPE
from time import perf_counter_ns, process_time_ns

from .loops import LoopName, WatcherName, new_asyncio_watcher, new_loop, new_our_loop, run
from .memory import grow_to
from .stall import measure_stall

Samples = dict[str, list[float]]
Operation = Callable[[], Awaitable[object]]

TRUE = shutil.which("true") or "/bin/true"
_WARM_UP = 2
_BATCH = 64  # programs at a time, of which
_SAMPLES_PER_BATCH = 5  # there is one for so many single ones


def _measure_posix_spawn(megabytes: int, samples: int) -> Samples:
    grow_to(megabytes)

    def sample() -> float:
        start_ns = perf_counter_ns()
        os.waitpid(os.posix_spawn(TRUE, [TRUE], os.environ), 0)
        return (perf_counter_ns() - start_ns) / 1000

    for _ in range(_WARM_UP):
        sample()
    return {"total": [sample() for _ in range(samples)]}


async def run_subprocess() -> None:
    """Start the program and wait for it, as asyncio's users do."""
    process = await asyncio.create_subprocess_exec(TRUE)
    await process.wait()


async def run_subprocess_with_pipes() -> None:
    """The same with three pipes."""
    process = await asyncio.create_subprocess_exec(TRUE, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    await process.communicate()


async def _sample_batches(samples: int) -> Samples:
    """Run programs by the batch, and measure what one of them costs."""
    measured: Samples = {"cpu": [], "wall": [], "cpu_pipes": [], "wall_pipes": []}
    for _ in range(-(-samples // _SAMPLES_PER_BATCH)):
        for suffix, operation in (("", run_subprocess), ("_pipes", run_subprocess_with_pipes)):
            start_ns, cpu_start_ns = perf_counter_ns(), process_time_ns()
            await asyncio.gather(*(operation() for _ in range(_BATCH)))
            measured[f"cpu{suffix}"].append((process_time_ns() - cpu_start_ns) / _BATCH / 1000)
            measured[f"wall{suffix}"].append((perf_counter_ns() - start_ns) / _BATCH / 1000)
    return measured


async def _sample_asyncio(samples: int) -> Samples:
    return {**await _sample_all(samples, run_subprocess), **await _sample_batches(samples)}


async def _sample_all(samples: int, operation: Operation) -> Samples:
    async def sample() -> float:
        start_ns = perf_counter_ns()
        await operation()
        return (perf_counter_ns() - start_ns) / 1000

    for _ in range(_WARM_UP):
        await operation()
    return {
        "total": [await sample() for _ in range(samples)],
        "stall": [await measure_stall(operation) for _ in range(samples)],
    }


def _measure_asyncio(watcher: WatcherName, megabytes: int, samples: int) -> Samples:
    loop = new_loop("asyncio")
    new_asyncio_watcher(watcher, loop)
    grow_to(megabytes)
    return run(loop, _sample_asyncio(samples))


def _measure_uvloop(megabytes: int, samples: int) -> Samples:
    loop = new_loop("uvloop")
    grow_to(megabytes)
    return run(loop, _sample_asyncio(samples))


def _measure_ours(loop_name: LoopName, megabytes: int, samples: int) -> Samples:
    loop = new_our_loop(loop_name)
    grow_to(megabytes)
    return run(loop, _sample_asyncio(samples))


def _measure_anyio(megabytes: int, samples: int) -> Samples:
    import anyio

    async def operation() -> None:
        # Without its default of three pipes, which the others do not have either.
        async with await anyio.open_process([TRUE], stdin=None, stdout=None, stderr=None) as process:
            await process.wait()

    grow_to(megabytes)
    return anyio.run(_sample_all, samples, operation)


def _measure_trio(megabytes: int, samples: int) -> Samples:
    import trio

    async def operation() -> None:
        await trio.run_process([TRUE], stdin=None)

    async def sample_stall() -> float:
        """Do what measure_stall does on asyncio's loops."""
        longest_ns = 0
        last_ns = perf_counter_ns()

        async def tick() -> None:
            nonlocal longest_ns, last_ns
            while True:
                await trio.lowlevel.checkpoint()
                now_ns = perf_counter_ns()
                longest_ns = max(longest_ns, now_ns - last_ns)
                last_ns = now_ns

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tick)
            await operation()
            longest_ns = max(longest_ns, perf_counter_ns() - last_ns)
            nursery.cancel_scope.cancel()
        return longest_ns / 1000

    async def sample() -> float:
        start_ns = perf_counter_ns()
        await operation()
        return (perf_counter_ns() - start_ns) / 1000

    async def main() -> Samples:
        for _ in range(_WARM_UP):
            await operation()
        return {
            "total": [await sample() for _ in range(samples)],
            "stall": [await sample_stall() for _ in range(samples)],
        }

    grow_to(megabytes)
    return trio.run(main)


PEERS: dict[str, Callable[[int, int], Samples]] = {
    "posix_spawn": _measure_posix_spawn,
    "asyncio pidfd": partial(_measure_asyncio, "pidfd"),
    "asyncio threaded": partial(_measure_asyncio, "threaded"),
    "uvloop": _measure_uvloop,
    "anyio": _measure_anyio,
    "trio": _measure_trio,
    "aiopidfd asyncio": partial(_measure_ours, "asyncio"),
    "aiopidfd uvloop": partial(_measure_ours, "uvloop"),
}
