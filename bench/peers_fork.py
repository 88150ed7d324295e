"""`fork`: fork a parent of a given size until the child is ready, until it is reaped; how long the loop stands still."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import subprocess
import time
from collections.abc import Awaitable, Callable
from functools import partial
from multiprocessing.connection import Connection
from time import perf_counter_ns
from typing import Any, Literal

from .children import find_program
from .forked import end_at_once
from .loops import LoopName, import_ours, new_loop, run
from .memory import grow_to
from .stall import measure_stall

Samples = dict[str, list[float]]

# Before each sample, of every peer, the C programs among them: what a server forks, it forks now and then. `each` is
# without it.
_PAUSE_S = 0.005
_AT_ONCE = 16

Method = Literal["fork", "forkserver", "spawn"]

# Returns, once the child is ready, what waits for its end.
Fork = Callable[[], Awaitable[Callable[[], Awaitable[object]]]]


def _measure_c(program: str, megabytes: int, samples: int) -> Samples:
    command = [find_program(program), str(megabytes), str(samples)]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    pairs = [line.split() for line in output.splitlines()]
    return {"ready": [int(ready) / 1000 for ready, _ in pairs], "total": [int(total) / 1000 for _, total in pairs]}


def _sample_blocking(samples: int, sample: Callable[[], tuple[int, int]]) -> Samples:
    """Sample what knows no loop. `sample` returns the nanoseconds until ready, and until reaped."""

    def sample_after_pause() -> tuple[int, int]:
        time.sleep(_PAUSE_S)
        return sample()

    sample()
    pairs = [sample_after_pause() for _ in range(samples)]
    return {"ready": [ready / 1000 for ready, _ in pairs], "total": [total / 1000 for _, total in pairs]}


def _fork_bare() -> tuple[int, int]:
    """Fork with a handshake over a pipe; return the nanoseconds until ready, and until reaped."""
    start_ns = perf_counter_ns()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, b"r")
        finally:
            os._exit(0)
    os.close(writer)
    os.read(reader, 1)
    ready_ns = perf_counter_ns() - start_ns
    os.waitpid(pid, 0)
    total_ns = perf_counter_ns() - start_ns
    os.close(reader)
    return ready_ns, total_ns


def _measure_os_fork(megabytes: int, samples: int) -> Samples:
    grow_to(megabytes)
    return _sample_blocking(samples, _fork_bare)


def _say_ready(writer: Connection) -> None:
    writer.send_bytes(b"r")


def _measure_multiprocessing(megabytes: int, samples: int) -> Samples:
    context = multiprocessing.get_context("fork")

    def sample() -> tuple[int, int]:
        start_ns = perf_counter_ns()
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_say_ready, args=(writer,))
        process.start()
        reader.recv_bytes()
        ready_ns = perf_counter_ns() - start_ns
        process.join()
        total_ns = perf_counter_ns() - start_ns
        process.close()
        reader.close()
        writer.close()
        return ready_ns, total_ns

    grow_to(megabytes)
    return _sample_blocking(samples, sample)


async def _sample_all(samples: int, fork: Fork, *, beside_bare: bool = False) -> Samples:
    async def sample() -> tuple[float, float]:
        await asyncio.sleep(_PAUSE_S)
        start_ns = perf_counter_ns()
        wait = await fork()
        ready_ns = perf_counter_ns()
        await wait()
        return (ready_ns - start_ns) / 1000, (perf_counter_ns() - start_ns) / 1000

    async def fork_and_wait() -> None:
        wait = await fork()
        await wait()

    async def sample_each() -> float:
        start_ns = perf_counter_ns()
        await asyncio.gather(*[fork_and_wait() for _ in range(_AT_ONCE)])
        return (perf_counter_ns() - start_ns) / 1000 / _AT_ONCE

    await sample()
    pairs = []
    relative = []
    for _ in range(samples):
        pairs.append(await sample())
        if beside_bare:
            await asyncio.sleep(_PAUSE_S)
            relative.append(pairs[-1][0] * 1000 / _fork_bare()[0] * 100)
    return {
        "ready": [ready for ready, _ in pairs],
        "total": [total for _, total in pairs],
        **({"relative": relative} if beside_bare else {}),
        "stall": [await measure_stall(fork_and_wait) for _ in range(samples)],
        "each": [await sample_each() for _ in range(-(-samples // 4))],
    }


def _measure_aiotools(method: Method, preload: bool, megabytes: int, samples: int) -> Samples:
    import aiotools

    context: Any = multiprocessing.get_context(method)
    if preload:
        context.set_forkserver_preload(["aiotools.fork", "bench.forked"])

    async def fork() -> Callable[[], Awaitable[object]]:
        process = await aiotools.afork(end_at_once, mp_context=context)
        return process.wait

    grow_to(megabytes)
    return run(new_loop("asyncio"), _sample_all(samples, fork))


def _measure_ours(loop: LoopName, megabytes: int, samples: int) -> Samples:
    aiopidfd = import_ours()

    async def fork() -> Callable[[], Awaitable[object]]:
        process = await aiopidfd.afork(end_at_once)
        wait: Callable[[], Awaitable[object]] = process.wait
        return wait

    grow_to(megabytes)
    return run(new_loop(loop), _sample_all(samples, fork, beside_bare=True))


def _measure_fork_server(loop: LoopName, megabytes: int, samples: int) -> Samples:
    aiopidfd = import_ours()

    async def main() -> Samples:
        # Started while this process is small, as its documentation says.
        async with aiopidfd.ForkServer() as server:

            async def fork() -> Callable[[], Awaitable[object]]:
                process = await server.afork(end_at_once)
                wait: Callable[[], Awaitable[object]] = process.wait
                return wait

            grow_to(megabytes)
            return await _sample_all(samples, fork)

    return run(new_loop(loop), main())


PEERS: dict[str, Callable[[int, int], Samples]] = {
    "C program": partial(_measure_c, "floor_fork"),
    "C fork server": partial(_measure_c, "floor_fork_server"),
    "os.fork": _measure_os_fork,
    "multiprocessing fork": _measure_multiprocessing,
    "aiotools fork": partial(_measure_aiotools, "fork", False),
    "aiotools forkserver": partial(_measure_aiotools, "forkserver", False),
    "aiotools forkserver preloaded": partial(_measure_aiotools, "forkserver", True),
    "aiotools spawn": partial(_measure_aiotools, "spawn", False),
    "aiopidfd asyncio": partial(_measure_ours, "asyncio"),
    "aiopidfd uvloop": partial(_measure_ours, "uvloop"),
    "aiopidfd ForkServer": partial(_measure_fork_server, "asyncio"),
}
