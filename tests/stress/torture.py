"""Subprocesses from many threads, beside threads in malloc and in fork: python -m tests.stress.torture.

Each thread runs a loop of its own. Each program looks itself at the descriptors that it was given, and ends in a way of its
own, with a copy of what it has read if it has pipes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import os
import random
import sys
import threading
import time
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import Iterator

import aiopidfd
from aiopidfd._programs import spawn

from ..conftest import LoopFactory
from ..helpers.children import DEADLY
from ..helpers.seccomp import compile_c

AT_A_TIME = 8  # in each thread
OTHERS_DESCRIPTORS = 254  # the program's exit code if it has a wrong descriptor, or lacks one

# How long one subprocess may take before it is called hung.
PATIENCE_S = 300.0  # an emulated machine takes 60


class Spawner:
    """The programs of one thread, and their results."""

    def __init__(self, seed: str, count: int) -> None:
        self.random = random.Random(seed)
        self.left = count
        self.reporter = str(compile_c("reporter.c", "-O1"))
        self.counts: Counter[str] = Counter()

    async def run(self) -> None:
        """Start all programs, some at a time."""
        await asyncio.gather(*(self._run_some() for _ in range(AT_A_TIME)))

    async def _run_some(self) -> None:
        while self.left > 0:
            self.left -= 1
            self.counts["programs"] += 1
            try:
                await asyncio.wait_for(self._run_one(), PATIENCE_S)
            except asyncio.TimeoutError:
                self.counts["hung"] += 1

    async def _run_one(self) -> None:
        expected = self.random.choice([self.random.randrange(250), -self.random.choice(DEADLY)])
        text = self.random.randbytes(self.random.randrange(1, 100_000)) if self.random.random() < 0.5 else None
        passed = os.dup(0) if self.random.random() < 0.3 else -1
        try:
            process = await asyncio.create_subprocess_exec(
                self.reporter,
                f"{'+' if text else ''}{expected}",
                *([] if passed < 0 else [str(passed)]),
                stdin=PIPE if text else None,
                stdout=PIPE if text else None,
                pass_fds=() if passed < 0 else (passed,),
            )
        finally:
            if passed >= 0:
                os.close(passed)
        output, _ = await process.communicate(text)
        self.counts["wrong descriptors"] += process.returncode == OTHERS_DESCRIPTORS
        self.counts["wrong"] += process.returncode != expected or output != text


def _run_spawner(factory: LoopFactory, spawner: Spawner, failures: list[BaseException]) -> None:
    loop = factory()
    try:
        loop.run_until_complete(spawner.run())
    except BaseException as exc:
        failures.append(exc)
    finally:
        loop.close()


@contextlib.contextmanager
def _busy(allocating: int, forking: int, *, hostile: bool) -> Iterator[None]:
    """Threads of C code in this process. At the end, print what they have done."""
    library = ctypes.CDLL(str(compile_c("busy.c", "-O1", "-shared", "-fPIC", "-pthread")))
    other_reaper = ctypes.CDLL(str(compile_c("other_reaper.c", "-O1", "-shared", "-fPIC", "-pthread"))) if hostile else None
    library.busy_allocate.restype = library.busy_fork.restype = ctypes.c_long
    done: Counter[str] = Counter()

    def work(name: str) -> None:
        done[name] += getattr(library, f"busy_{name}")()

    threads = [threading.Thread(target=work, args=(name,)) for name in ["allocate"] * allocating + ["fork"] * forking]
    if other_reaper is not None and other_reaper.other_reaper_start() != 0:
        raise RuntimeError("the hostile thread cannot be started")
    try:
        for thread in threads:
            thread.start()
        yield
    finally:
        library.busy_stop()
        for thread in threads:
            thread.join()
        taken = [] if other_reaper is None else [f"{other_reaper.other_reaper_stop()} taken"]
        print(", ".join([*taken, f"{done['allocate']} allocated, {done['fork']} forked"]))


def main() -> int:
    """Parse the command line, run, print, and return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.torture", description=__doc__)
    parser.add_argument("--programs", type=int, default=10_000, help="how many in all (default: 10000)")
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio")
    parser.add_argument("--threads", type=int, default=8, help="that start programs (default: 8)")
    parser.add_argument("--allocating", type=int, default=4, help="threads in malloc (default: 4)")
    parser.add_argument("--forking", type=int, default=2, help="threads in fork (default: 2)")
    parser.add_argument("--hostile", action="store_true", help="have a thread reap every child that it can")
    parser.add_argument("--seed", type=int, default=None, help="of what the programs do (default: a new one)")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(2**32)
    print(f"loop {options.loop}, seed {options.seed}", flush=True)

    factory = aiopidfd.UvloopEventLoop if options.loop == "uvloop" else aiopidfd.SelectorEventLoop
    spawners = [
        Spawner(f"{options.seed} {number}", len(range(number, options.programs, options.threads)))
        for number in range(options.threads)
    ]
    failures: list[BaseException] = []
    threads = [threading.Thread(target=_run_spawner, args=(factory, spawner, failures)) for spawner in spawners]
    _run_spawner(factory, Spawner("warm-up", 1), failures)  # opens all that a process opens once
    before = set(os.listdir("/proc/self/fd"))
    started = time.monotonic()
    with _busy(options.allocating, options.forking, hostile=options.hostile):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    counts = sum((spawner.counts for spawner in spawners), Counter())
    counts["descriptors left"] = len(set(os.listdir("/proc/self/fd")) - before)
    for name in ("programs", "hung", "wrong", "wrong descriptors", "descriptors left"):
        print(f"{name} {counts[name]}")
    print(f"{time.monotonic() - started:.1f} s, started {'in C' if spawn._clone_errno == 0 else 'by Popen'}")
    for failure in failures:
        print(f"{type(failure).__name__}: {failure}")
    return 1 if failures or any(counts[name] for name in counts if name != "programs") else 0


if __name__ == "__main__":
    sys.exit(main())
