"""Stress a fork server: `python -m tests.stress.forkserver`. Exits with 1 if anything was lost or wrong."""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import importlib
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import aiopidfd
from aiopidfd._kernel.syscalls import can_recover_exit

from ..conftest import children

AT_ONCE = 32


def end(how: int) -> int:
    """Exit with a code below 256, or by the signal number above 256."""
    if how >= 256:
        os.kill(os.getpid(), how - 256)
    logging.getLogger("worker").debug("%s", bytearray(1000))
    return how


@contextlib.contextmanager
def thread(step: Callable[[], object]) -> Iterator[None]:
    """A thread that calls `step` again and again."""
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            step()

    runner = threading.Thread(target=run)
    runner.start()
    try:
        yield
    finally:
        done.set()
        runner.join()


def reap_first() -> None:
    """Reap any child, as a careless library does."""
    try:
        pid, _ = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        pid = 0
    reaped[pid] += 1
    time.sleep(0.0002)


reaped: collections.Counter[int] = collections.Counter()
_log = logging.getLogger("stress")


def be_busy() -> None:
    """Use the allocator and the locks of logging."""
    _log.info("%d", len([bytearray(random.randrange(1, 100_000)) for _ in range(10)]))


async def make_workers(server: aiopidfd.ForkServer, count: int) -> collections.Counter[str]:
    """Make `count` workers, AT_ONCE at a time. Count the sources of their statuses."""
    reported: collections.Counter[str] = collections.Counter()
    left = iter(range(count))

    async def make() -> None:
        for number in left:
            how = random.choice([number % 256, 256 + random.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])])
            child = await server.afork(end, how)
            returncode = await child.wait()
            assert child.exit_status is not None
            reported[child.exit_status.source] += 1
            reported["right" if returncode == (how if how < 256 else 256 - how) else "wrong"] += 1

    await asyncio.gather(*[make() for _ in range(AT_ONCE)])
    return reported


async def beside_other_reaper(count: int, method: Any) -> bool:
    """Run beside a thread that reaps all visible children. SIGCHLD is ignored half of the time."""
    async with aiopidfd.ForkServer(start_method=method, preload=[__name__]) as server:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        with thread(reap_first):
            reported = await make_workers(server, count // 2)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            reported += await make_workers(server, count - count // 2)
    taken = sum(reaped.values()) - reaped[0]
    print(f"other reaper, {method}: {dict(reported)}, {taken} reaped in {sum(reaped.values())} attempts")
    # A spawned server's workers have an exit signal, so waitpid(-1) finds them; before Linux 6.15 their status is lost then.
    may_be_lost = reported["lost"] if method == "spawn" and not can_recover_exit() else 0
    return reported["right"] + may_be_lost == count


async def suffer_threads(count: int, method: Any) -> bool:
    """8 threads allocate memory and log; the server was started before them (or beside them, if spawned)."""
    with contextlib.ExitStack() as stack:
        if method == "spawn":
            for _ in range(8):
                stack.enter_context(thread(be_busy))
        async with aiopidfd.ForkServer(start_method=method, preload=[__name__]) as server:
            for _ in range(8 if method == "fork" else 0):
                stack.enter_context(thread(be_busy))
            reported = await make_workers(server, count)
            stack.close()
    print(f"threads, {method}: {dict(reported)}")
    return reported["right"] == count


async def suffer_death(rounds: int) -> bool:
    """Kill the server during 200 requests."""
    results: collections.Counter[str] = collections.Counter()
    async with aiopidfd.ForkServer(restart=True) as server:
        for _ in range(rounds):
            starting = [asyncio.ensure_future(server.afork(end, number)) for number in range(200)]
            await asyncio.sleep(random.uniform(0, 0.15))
            if server.pid is not None:
                os.kill(server.pid, signal.SIGKILL)
            for number, made in enumerate(await asyncio.gather(*starting, return_exceptions=True)):
                if isinstance(made, aiopidfd.AbstractChildProcess):
                    results["child" if await made.wait() == number else "wrong"] += 1
                else:
                    results["error" if isinstance(made, ConnectionResetError) else repr(made)] += 1
    left = children()
    print(f"death, {rounds} rounds: {dict(results)}, {len(left)} children left")
    return results["child"] + results["error"] == 200 * rounds and not left


def main() -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=20_000)
    parser.add_argument("--deaths", type=int, default=50)
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio")
    arguments = parser.parse_args()
    logging.basicConfig(stream=open(os.devnull, "w", encoding="ascii"), level=logging.INFO)  # noqa: SIM115 - until we end
    factory: Any = aiopidfd.SelectorEventLoop if arguments.loop == "asyncio" else aiopidfd.UvloopEventLoop
    good = True
    for suffering in (
        beside_other_reaper(arguments.workers, "fork"),
        beside_other_reaper(arguments.workers // 10, "spawn"),
        suffer_threads(arguments.workers // 4, "fork"),
        suffer_threads(arguments.workers // 4, "spawn"),
        suffer_death(arguments.deaths),
    ):
        began = time.monotonic()
        good = aiopidfd.run(suffering, loop_factory=factory) and good
        print(f"    {time.monotonic() - began:.1f} s", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    # Import it by its name: a spawned fork server finds the functions of its workers there.
    sys.exit(importlib.import_module("tests.stress.forkserver").main())
