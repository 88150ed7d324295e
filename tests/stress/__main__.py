"""Many children, codes and signals at random, a hostile reaper: python -m tests.stress. It counts what was lost or wrong.

With --chaos it is not only a reaper that is hostile, and nothing may be left behind either: see chaos.py.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import random
import signal
import sys
import time
from collections import Counter

from aiopidfd import wait
from aiopidfd._backends import backend

from ..conftest import LoopFactory, _loop_factory
from ..helpers.children import DEADLY
from ..helpers.seccomp import compile_c
from . import chaos

AT_A_TIME = 64
NATIVE_AT_A_TIME = 4  # uvloop takes milliseconds for each

# How long a round may take. A child that is not reported by then is lost.
PATIENCE_S = 60.0


class Stress:
    """One run: rounds of children until the time is up or the number is reached."""

    def __init__(self, seed: int, *, native: bool) -> None:
        self.random = random.Random(seed)
        self.native = native
        self.ender = str(compile_c("ender.c", "-O1", "-static"))
        self.sources: Counter[str] = Counter()
        self.children = self.lost = self.wrong = self.natives = 0

    async def run(self, seconds: float, children: int) -> None:
        """Make children until the time is up or their number is reached."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.children < children:
            count = min(AT_A_TIME, children - self.children)
            rounds = [self._round(count - NATIVE_AT_A_TIME if self.native else count)]
            if self.native:
                rounds += [self._native() for _ in range(NATIVE_AT_A_TIME)]
            await asyncio.gather(*rounds)

    async def _round(self, count: int) -> None:
        """Start children, watch them, end them in another order, and check what is reported."""
        waits, orders, pids = [], [], []
        for _ in range(count):
            read, write = os.pipe()
            pid = os.posix_spawn(self.ender, ["ender"], {}, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)])
            os.close(read)
            waits.append(asyncio.ensure_future(wait(pid)))
            orders.append(write)
            pids.append(pid)
        await asyncio.sleep(0)  # now they are watched, and may end
        expected = {}
        for number in self.random.sample(range(count), count):
            expected[number] = self._end(pids[number], orders[number])
            if self.random.random() < 0.1:
                await asyncio.sleep(0)
        await asyncio.wait(waits, timeout=PATIENCE_S)
        for number, waiting in enumerate(waits):
            self.children += 1
            if not waiting.done():
                waiting.cancel()
                self.lost += 1
                continue
            status = waiting.result()
            self.sources[status.source] += 1
            self.lost += status.source not in ("reaped", "recovered")
            self.wrong += status.returncode != expected[number] or status.pid != pids[number]

    def _end(self, pid: int, order: int) -> int:
        """Have the child end somehow. Return the expected returncode. The child cannot have ended before."""
        kind = self.random.randrange(3)
        if kind == 0:
            expected = self.random.randrange(256)
            os.write(order, bytes([ord("x"), expected]))
        elif kind == 1:
            expected = -self.random.choice(DEADLY)
            os.write(order, bytes([ord("s"), -expected]))
        else:
            expected = -signal.SIGKILL
            os.kill(pid, signal.SIGKILL)
        os.close(order)
        return expected

    async def _native(self) -> None:
        """Run one subprocess of the loop's own."""
        code = self.random.randrange(256)
        process = await asyncio.create_subprocess_exec(self.ender, stdin=asyncio.subprocess.PIPE)
        await process.communicate(bytes([ord("x"), code]))
        self.children += 1
        self.natives += 1
        self.sources["the loop's own"] += 1
        self.wrong += process.returncode != code

    def report(self) -> str:
        """The figures. The last two must be 0."""
        sources = ", ".join(f"{count} {source}" for source, count in sorted(self.sources.items()) if source != "recovered")
        return (
            f"children {self.children} ({sources})\nrecovered {self.sources['recovered']}\n"
            f"lost {self.lost}\nwrong {self.wrong}"
        )


def run(factory: LoopFactory, stress: Stress, seconds: float, children: int, *, hostile: bool) -> None:
    """Run on a new loop, with a thread in waitpid(-1) if requested."""
    loop = factory()
    other_reaper = ctypes.CDLL(str(compile_c("other_reaper.c", "-O1", "-shared", "-fPIC", "-pthread"))) if hostile else None
    if other_reaper is not None and other_reaper.other_reaper_start() != 0:
        raise RuntimeError("the hostile thread cannot be started")
    try:
        loop.run_until_complete(stress.run(seconds, children))
    finally:
        if other_reaper is not None:
            print(f"taken {other_reaper.other_reaper_stop()}")
        loop.close()


def main() -> int:
    """Parse the command line, run, print; return 1 if anything was lost or wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--children", type=int, default=sys.maxsize, help="how many at most (default: no limit)")
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio")
    parser.add_argument("--backend", choices=["pidfd", "sigchld"], default="pidfd")
    parser.add_argument("--seed", type=int, default=None, help="of codes, signals and order (default: a new one)")
    parser.add_argument(
        "--hostile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="have a thread reap every child that it can (default: with backend pidfd)",
    )
    parser.add_argument("--native", action="store_true", help="mix in children that uvloop starts and reaps itself")
    parser.add_argument("--chaos", action="store_true", help="do all to this process that a process can do to itself")
    options = parser.parse_args()
    if options.chaos and (options.hostile is not None or options.native or options.children != sys.maxsize):
        parser.error("--chaos takes --seconds, --loop, --backend and --seed")
    if options.hostile is None:
        options.hostile = options.backend == "pidfd" and not options.native
    if options.hostile and (options.native or options.backend == "sigchld"):
        parser.error("only pidfds help against a hostile reaper")
    if options.native and options.loop != "uvloop":
        parser.error("--native needs --loop uvloop")
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(2**32)

    os.environ[backend.ENVIRONMENT] = options.backend
    if options.chaos:
        print(f"loop {options.loop}, backend {options.backend}, chaos, seed {options.seed}", flush=True)
        return chaos.run(options.loop, options.seconds, options.seed)
    print(
        f"loop {options.loop}, backend {options.backend}, {'hostile' if options.hostile else 'no'} reaper, "
        f"{'uvloop-native children, ' if options.native else ''}seed {options.seed}",
        flush=True,
    )
    stress = Stress(options.seed, native=options.native)
    started = time.monotonic()
    run(_loop_factory(options.loop), stress, options.seconds, options.children, hostile=options.hostile)
    print(f"{stress.report()}\n{time.monotonic() - started:.1f} s")
    return 1 if stress.lost or stress.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
