"""Many lives of children, beside hostile code in the same process: python -m tests.stress --chaos."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import random
import resource
import threading
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import aiopidfd
from aiopidfd._kernel.exit_status import LOST_RETURNCODE
from aiopidfd._kernel.syscalls import can_recover_exit
from aiopidfd._watch.registries import registry_of

from ..conftest import LoopFactory, children, open_descriptors
from ..helpers.mischief import Mischief
from ..helpers.seccomp import compile_c
from .chaos_lives import PATIENCE_S, Act, Held

DESCRIPTORS = 1500  # enough for all lives at a time, and soon used up
WARM_UP = 0.25  # of the time; the growth of memory until then is not counted

# The growth that counts as no leak. The second limit is for the allocators. On a busy machine the warm-up is short, and the
# memory that they keep has grown by 8 MiB in 60 s, and by no more in 300 s.
TRACED_LIMIT = 256 << 10
RESIDENT_LIMIT = 32 << 20


class Chaos:
    """One run: one loop after another until the time is up, and the figures."""

    def __init__(self, factory: LoopFactory, seed: int) -> None:
        self.random = random.Random(seed)
        self.factory = factory
        self.ender = str(compile_c("ender.c", "-O1", "-static"))
        self.executor = ThreadPoolExecutor(4)
        self.waiting_executor = ThreadPoolExecutor(4)  # for calls that may wait for those in the other executor
        self.mischief = Mischief(self.random.random(), self.ender)
        self.recoverable = can_recover_exit()
        self.sources: Counter[str] = Counter()
        self.lives: Counter[str] = Counter()
        self.errors: list[str] = []
        self.untellable = self.lost = self.wrong = self.hung = self.loops = self.refused = 0
        self.left_open: dict[int, str] = {}
        self.left_children: set[int] = set()
        self.traced = self.resident = 0
        self._lock = threading.Lock()

    def run(self, seconds: float) -> None:
        """Make loops until the time is up."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(DESCRIPTORS, hard), hard))
        self._act(0.1)  # so that all is open that a process opens once
        started, descriptors = time.monotonic(), open_descriptors()
        tracemalloc.start()
        memory: tuple[int, int] | None = None
        while (passed := time.monotonic() - started) < seconds:
            if memory is None and passed >= seconds * WARM_UP:
                memory = measure_memory()
            self._act(min(2 + self.random.random() * 8, seconds * WARM_UP))
        self._settle()
        self.waiting_executor.shutdown()
        self.executor.shutdown()
        self.mischief.close()
        traced, resident = measure_memory()
        if memory is not None:
            self.traced, self.resident = traced - memory[0], resident - memory[1]
        self.left_open = {fd: what for fd, what in open_descriptors().items() if descriptors.get(fd) != what}
        self.left_children = children()

    def _act(self, seconds: float) -> None:
        """Run one loop from its start to its end. Some children outlive it."""
        loop = self.factory()
        loop.set_exception_handler(lambda _, context: self.errors.append(repr(context)))
        act = Act(self, loop, self.random.random(), time.monotonic() + seconds)
        try:
            loop.run_until_complete(act.run())
        finally:
            loop.close()
        self.loops += 1
        if self.random.random() < 0.5:
            self.mischief.reset_handler()
        act.release()

    def _settle(self) -> None:
        """Make a new loop, which reaps all children that the library knows."""
        deadline = time.monotonic() + PATIENCE_S
        while children() and time.monotonic() < deadline:
            loop = self.factory()
            loop.run_until_complete(asyncio.sleep(0.1))
            registry_of(loop)
            loop.close()

    def reported(self, child: Held, returncode: int | None, source: str) -> None:
        """Count what was reported of a child. From any thread."""
        with self._lock:
            self.sources[source] += 1
            if source == "lost":
                self.wrong += returncode != LOST_RETURNCODE
                can_be_told = child.by_pidfd and self.recoverable
                if can_be_told or not self.mischief.may_be_reaped_by_others(child.mark):
                    self.lost += 1
                else:
                    self.untellable += 1
            else:
                self.wrong += returncode not in child.may_be

    def count(self, **figures: int) -> None:
        """Add to these figures. From any thread."""
        with self._lock:
            for name, number in figures.items():
                setattr(self, name, getattr(self, name) + number)

    def is_broken(self) -> bool:
        """Return whether a promise was broken."""
        numbers = (self.lost, self.wrong, self.hung, self.left_open, self.left_children, self.errors)
        return any(numbers) or self.traced > TRACED_LIMIT or self.resident > RESIDENT_LIMIT

    def report(self) -> str:
        """All the figures."""
        sources = ", ".join(f"{count} {source}" for source, count in sorted(self.sources.items()))
        return "\n".join(
            [
                f"loops {self.loops}",
                f"lives {sum(self.lives.values())} ({counted(self.lives)})",
                f"mischief {sum(self.mischief.done.values())} ({counted(self.mischief.done)})",
                f"children {sum(self.sources.values())} ({sources})",
                f"refused {self.refused}",
                f"recovered {self.sources['recovered']}",
                f"untellable {self.untellable}",
                f"lost {self.lost}",
                f"wrong {self.wrong}",
                f"hung {self.hung}",
                f"errors {len(self.errors)} {self.errors[:3] or ''}".rstrip(),
                f"descriptors {len(self.left_open)} {self.left_open or ''}".rstrip(),
                f"zombies {len(self.left_children)} {self.left_children or ''}".rstrip(),
                f"traced {self.traced >> 10} KiB more than after {WARM_UP:.0%} of the time",
                f"resident {self.resident >> 10} KiB more than then",
            ]
        )


def counted(what: Counter[str]) -> str:
    """Return the numbers as text."""
    return ", ".join(f"{count} {name}" for name, count in sorted(what.items()))


def measure_memory() -> tuple[int, int]:
    """Return the memory allocated by Python and the memory of the process, in bytes.

    Single large blocks are left out: the interpreter's table of interned strings is one, and grows by 1 MB at any time.
    """
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as statm:
        resident = int(statm.read().split()[1]) * resource.getpagesize()
    sizes = [trace.size for trace in tracemalloc.take_snapshot().traces]
    return sum(size for size in sizes if size < TRACED_LIMIT), resident


def run(kind: str, seconds: float, seed: int) -> int:
    """Run, print the figures, and return 1 if a promise was broken."""
    # Lost statuses are counted. Their warnings would hide the figures.
    logging.getLogger("aiopidfd").addHandler(logging.NullHandler())
    factory: LoopFactory = aiopidfd.SelectorEventLoop if kind == "asyncio" else aiopidfd.UvloopEventLoop
    faulthandler.dump_traceback_later(seconds + 4 * PATIENCE_S, exit=True)
    chaos = Chaos(factory, seed)
    chaos.run(seconds)
    print(chaos.report(), flush=True)
    return 1 if chaos.is_broken() else 0
