"""`latency`: from the kill of one child to its parent's knowing, while many others live and are watched the same way."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from functools import partial
from signal import SIGKILL
from time import perf_counter_ns, sleep

from .children import find_program, raise_descriptor_limit, start
from .loops import (
    BackendName,
    LoopName,
    Watcher,
    WatcherName,
    import_ours,
    new_asyncio_watcher,
    new_loop,
    new_our_watcher,
    run,
)

Samples = dict[str, list[float]]

# Starts a child that is watched, and returns its pid. The argument is called at its end.
StartWatched = Callable[[Callable[[], object]], Awaitable[int]]
# Starts a child, and returns its pid with what waits for its end.
StartAwaited = Callable[[], Awaitable[tuple[int, Callable[[], Awaitable[object]]]]]

# How long a new child gets to be past its exec and asleep, so that its death costs the same each time.
_SETTLE_S = 0.002
_WARM_UP = 3


def _open_stdin() -> int:
    """Return the stdin of all children. Its other end stays open until this process ends, and they with it."""
    stdin, _ = os.pipe()
    return stdin


def _measure_waitpid(live: int, samples: int) -> Samples:
    stdin = _open_stdin()
    for _ in range(live):
        start(stdin)

    def sample() -> float:
        pid = start(stdin)
        sleep(_SETTLE_S)
        start_ns = perf_counter_ns()
        os.kill(pid, SIGKILL)
        os.waitpid(pid, 0)
        return (perf_counter_ns() - start_ns) / 1000

    for _ in range(_WARM_UP):
        sample()
    # It is the floor of both: Python cannot hear of an exit earlier than this.
    return {metric: [sample() for _ in range(samples)] for metric in ("callback", "await")}


async def _sample_callback(start_watched: StartWatched) -> float:
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    pid = await start_watched(lambda: ended.set_result(perf_counter_ns()))
    await asyncio.sleep(_SETTLE_S)
    start_ns = perf_counter_ns()
    os.kill(pid, SIGKILL)
    return (await ended - start_ns) / 1000


async def _sample_await(start_awaited: StartAwaited) -> float:
    pid, wait = await start_awaited()

    async def wait_until() -> int:
        await wait()
        return perf_counter_ns()

    ended = asyncio.ensure_future(wait_until())
    await asyncio.sleep(_SETTLE_S)
    start_ns = perf_counter_ns()
    os.kill(pid, SIGKILL)
    return (await ended - start_ns) / 1000


async def _sample_all(live: int, samples: int, start_watched: StartWatched, start_awaited: StartAwaited) -> Samples:
    for _ in range(live):
        await start_watched(_ignore)
    for _ in range(_WARM_UP):
        await _sample_callback(start_watched)
        await _sample_await(start_awaited)
    return {
        "callback": [await _sample_callback(start_watched) for _ in range(samples)],
        "await": [await _sample_await(start_awaited) for _ in range(samples)],
    }


def _ignore() -> None:
    """Be the callback of those children that outlive the measurement."""


def _start_watched_by(watcher: Watcher, stdin: int) -> StartWatched:
    async def start_watched(callback: Callable[[], object]) -> int:
        pid = start(stdin)
        watcher.add_child_handler(pid, lambda _pid, _returncode: callback())
        return pid

    return start_watched


def _start_subprocess(stdin: int) -> StartAwaited:
    """Return what starts an awaited child the way that asyncio's and uvloop's users do."""

    async def start_awaited() -> tuple[int, Callable[[], Awaitable[object]]]:
        process = await asyncio.create_subprocess_exec(find_program("child"), stdin=stdin)
        return process.pid, process.wait

    return start_awaited


def _measure_asyncio(watcher_name: WatcherName, live: int, samples: int) -> Samples:
    raise_descriptor_limit()
    stdin = _open_stdin()
    loop = new_loop("asyncio")
    watcher = new_asyncio_watcher(watcher_name, loop)
    return run(loop, _sample_all(live, samples, _start_watched_by(watcher, stdin), _start_subprocess(stdin)))


def _measure_ours(loop_name: LoopName, backend: BackendName, live: int, samples: int) -> Samples:
    raise_descriptor_limit()
    stdin = _open_stdin()
    watcher = new_our_watcher(backend)
    aiopidfd = import_ours()

    async def start_awaited() -> tuple[int, Callable[[], Awaitable[object]]]:
        pid = start(stdin)
        return pid, partial(aiopidfd.wait, pid)

    return run(new_loop(loop_name), _sample_all(live, samples, _start_watched_by(watcher, stdin), start_awaited))


class _Exited(asyncio.SubprocessProtocol):
    def __init__(self, callback: Callable[[], object]) -> None:
        self._callback = callback

    def process_exited(self) -> None:
        self._callback()


def _measure_uvloop(live: int, samples: int) -> Samples:
    stdin = _open_stdin()
    loop = new_loop("uvloop")

    async def start_watched(callback: Callable[[], object]) -> int:
        transport, _ = await loop.subprocess_exec(
            lambda: _Exited(callback), find_program("child"), stdin=stdin, stdout=None, stderr=None
        )
        pid = transport.get_pid()
        assert pid is not None
        return pid

    return run(loop, _sample_all(live, samples, start_watched, _start_subprocess(stdin)))


def _measure_trio(live: int, samples: int) -> Samples:
    import trio

    raise_descriptor_limit()
    stdin = _open_stdin()
    latencies: list[float] = []

    async def sample(nursery: trio.Nursery) -> float:
        process = await trio.lowlevel.open_process([find_program("child")], stdin=stdin)
        ended = trio.Event()
        end_ns = 0

        async def wait_until() -> None:
            nonlocal end_ns
            await process.wait()
            end_ns = perf_counter_ns()
            ended.set()

        nursery.start_soon(wait_until)
        await trio.sleep(_SETTLE_S)
        start_ns = perf_counter_ns()
        os.kill(process.pid, SIGKILL)
        await ended.wait()
        return (end_ns - start_ns) / 1000

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(live):
                process = await trio.lowlevel.open_process([find_program("child")], stdin=stdin)
                nursery.start_soon(process.wait)
            for _ in range(_WARM_UP):
                await sample(nursery)
            latencies.extend([await sample(nursery) for _ in range(samples)])
            nursery.cancel_scope.cancel()

    trio.run(main)
    return {"await": latencies}


PEERS: dict[str, Callable[[int, int], Samples]] = {
    "waitpid": _measure_waitpid,
    "asyncio pidfd": partial(_measure_asyncio, "pidfd"),
    "asyncio safe": partial(_measure_asyncio, "safe"),
    "asyncio threaded": partial(_measure_asyncio, "threaded"),
    "uvloop": _measure_uvloop,
    "trio": _measure_trio,
    "aiopidfd asyncio": partial(_measure_ours, "asyncio", "pidfd"),
    "aiopidfd uvloop": partial(_measure_ours, "uvloop", "pidfd"),
    "aiopidfd asyncio sigchld": partial(_measure_ours, "asyncio", "sigchld"),
    "aiopidfd uvloop sigchld": partial(_measure_ours, "uvloop", "sigchld"),
}
