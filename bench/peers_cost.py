"""`cost`: the parent's CPU time to register and reap one of many children that end at once.

At once means: before the loop looks. With fewer cores than children they end one after the other, and a loop that looks
meanwhile is woken for nearly each of them; what is measured then is how often it goes to sleep in between.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from functools import partial
from time import process_time_ns

from .children import Gate, await_end, find_program, raise_descriptor_limit, start
from .loops import BackendName, LoopName, WatcherName, new_asyncio_watcher, new_loop, new_our_watcher, run

Samples = dict[str, list[float]]
Ended = Callable[..., None]

# A first pass with a few children is not counted: it is there for imports, caches and what is made on first use.
_WARM_UP = 16


def _new_samples() -> Samples:
    return {"total": [], "register": [], "reap": []}


def _add_pass(samples: Samples, children: int, register_ns: int, reap_ns: int) -> None:
    samples["total"].append((register_ns + reap_ns) / children / 1000)
    samples["register"].append(register_ns / children / 1000)
    samples["reap"].append(reap_ns / children / 1000)


def _measure_c(children: int, passes: int) -> Samples:
    command = [find_program("floor_cost"), find_program("child"), str(children), str(passes)]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    samples = _new_samples()
    for line in output.splitlines():
        register_ns, reap_ns = map(int, line.split())
        _add_pass(samples, children, register_ns, reap_ns)
    return samples


class _Countdown:
    """Ends with the last of the children. It is what all of the peers call back."""

    def __init__(self, children: int) -> None:
        self._left = children
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ended(self, *_: object) -> None:
        self._left -= 1
        if self._left == 0:
            self._done.set_result(None)

    async def wait(self) -> None:
        await self._done


async def _run_pass(children: int, register: Callable[[int, Ended], object], *, threads: bool) -> tuple[int, int]:
    gate = Gate()
    pids = [start(gate.stdin) for _ in range(children)]
    countdown = _Countdown(children)
    ended = countdown.ended
    start_ns = process_time_ns()
    for pid in pids:
        register(pid, ended)
    registered_ns = process_time_ns()
    gate.open()
    if not threads:  # which reap whatever the loop does
        for pid in pids:
            await_end(pid)
    ended_ns = process_time_ns()
    await countdown.wait()
    end_ns = process_time_ns()
    gate.close()
    return registered_ns - start_ns, end_ns - ended_ns


async def _run_passes(
    children: int, passes: int, register: Callable[[int, Ended], object], *, threads: bool = False
) -> Samples:
    samples = _new_samples()
    await _run_pass(_WARM_UP, register, threads=threads)
    for _ in range(passes):
        _add_pass(samples, children, *await _run_pass(children, register, threads=threads))
    return samples


def _measure_asyncio(watcher: WatcherName, children: int, passes: int) -> Samples:
    raise_descriptor_limit()
    loop = new_loop("asyncio")
    register = new_asyncio_watcher(watcher, loop).add_child_handler
    return run(loop, _run_passes(children, passes, register, threads=watcher == "threaded"))


def _measure_ours(loop: LoopName, backend: BackendName, children: int, passes: int) -> Samples:
    raise_descriptor_limit()
    watcher = new_our_watcher(backend)
    return run(new_loop(loop), _run_passes(children, passes, watcher.add_child_handler))


class _Exited(asyncio.SubprocessProtocol):
    def __init__(self, ended: Ended) -> None:
        self.process_exited = ended  # type: ignore[method-assign] # so that nothing stands between uvloop and the countdown


async def _run_uvloop_pass(children: int) -> int:
    loop = asyncio.get_running_loop()
    gate = Gate()
    countdown = _Countdown(children)
    pids = []
    for _ in range(children):
        transport, _protocol = await loop.subprocess_exec(
            lambda: _Exited(countdown.ended), find_program("child"), stdin=gate.stdin, stdout=None, stderr=None
        )
        pids.append(transport.get_pid())
    gate.open()
    for pid in pids:
        await_end(pid)
    ended_ns = process_time_ns()
    await countdown.wait()
    reap_ns = process_time_ns() - ended_ns
    gate.close()
    return reap_ns


async def _run_uvloop_passes(children: int, passes: int) -> Samples:
    await _run_uvloop_pass(_WARM_UP)
    return {"reap": [await _run_uvloop_pass(children) / children / 1000 for _ in range(passes)]}


def _measure_uvloop(children: int, passes: int) -> Samples:
    return run(new_loop("uvloop"), _run_uvloop_passes(children, passes))


PEERS: dict[str, Callable[[int, int], Samples]] = {
    "C program": _measure_c,
    "asyncio pidfd": partial(_measure_asyncio, "pidfd"),
    "asyncio safe": partial(_measure_asyncio, "safe"),
    "asyncio threaded": partial(_measure_asyncio, "threaded"),
    "uvloop": _measure_uvloop,
    "aiopidfd asyncio": partial(_measure_ours, "asyncio", "pidfd"),
    "aiopidfd uvloop": partial(_measure_ours, "uvloop", "pidfd"),
    "aiopidfd asyncio sigchld": partial(_measure_ours, "asyncio", "sigchld"),
    "aiopidfd uvloop sigchld": partial(_measure_ours, "uvloop", "sigchld"),
}
