"""Hostile code in a process with children: it reaps them, replaces SIGCHLD handlers, and uses up descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager

from .seccomp import compile_c

_IGNORE, _NOCLDWAIT, _REAP_ALL = range(3)  # of other_reaper.c
_CHAINING, _NOT_CHAINING = 0, 2  # of handlers.c; one of each, since two that chain can call each other for ever

Kinds = dict[str, Callable[[], AbstractAsyncContextManager[None]]]


class Mischief:
    """Three tasks. Each does one thing after another, for a moment, while the loop runs."""

    def __init__(self, seed: float, ender: str) -> None:
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self._executor = ThreadPoolExecutor(1)
        self._ender = ender
        self._other_reaper = ctypes.CDLL(str(compile_c("other_reaper.c", "-O1", "-shared", "-fPIC", "-pthread")))
        self._handlers = ctypes.CDLL(str(compile_c("handlers.c", "-O1", "-shared", "-fPIC", "-pthread")))
        self._reaper_count = 0
        self._reapers_now = 0
        self._python_reaps = False
        # How long each of them pauses at most. Without pauses, nothing would be left for the SIGCHLD backend to report.
        self._kinds: dict[float, Kinds] = {
            0.5: {"no descriptors": self._no_descriptors},
            3.0: {"waitpid() in a thread": self._thread},
            0.2: {
                "waitpid() in a C handler": lambda: self._reaping_by_signal(_REAP_ALL),
                "SIGCHLD ignored": lambda: self._reaping_by_signal(_IGNORE),
                "SA_NOCLDWAIT": lambda: self._reaping_by_signal(_NOCLDWAIT),
                "waitpid() in a Python handler": self._python_reaper,
                "Python handler": self._python_handler,
                "handler that chains": lambda: self._handler(_CHAINING),
                "handler that does not": lambda: self._handler(_NOT_CHAINING),
                "SIGCHLD at its default": self._default,
            },
        }

    def mark(self) -> int:
        """The argument of `may_be_reaped_by_others` for a child that is made now."""
        return -1 if self._reapers_now else self._reaper_count

    def may_be_reaped_by_others(self, mark: int) -> bool:
        """Return whether other code may have reaped a child at any time since the mark."""
        return self._reapers_now > 0 or self._reaper_count != mark

    async def run(self, deadline: float) -> None:
        """Run until then."""
        await asyncio.gather(*[self._run(kinds, rest_s, deadline) for rest_s, kinds in self._kinds.items()])

    async def _run(self, kinds: Kinds, rest_s: float, deadline: float) -> None:
        while time.monotonic() < deadline:
            kind = self.random.choice(list(kinds))
            async with kinds[kind]():
                self.done[kind] += 1
                for _ in range(self.random.randrange(1, 6)):  # rounds of the loop, however long they take
                    await asyncio.sleep(self.random.random() * 0.02)
            await asyncio.sleep(self.random.random() * rest_s)

    def close(self) -> None:
        """End the helper thread."""
        self._executor.shutdown()

    def reset_handler(self) -> None:
        """Set SIGCHLD to its default."""
        self._handlers.set_default(0)

    @contextlib.contextmanager
    def _reaper(self) -> Iterator[None]:
        self._reaper_count += 1
        self._reapers_now += 1
        try:
            yield
        finally:
            self._reapers_now -= 1

    @contextlib.contextmanager
    def _handler_put_back(self) -> Iterator[None]:
        # Not by signal.signal(): Python keeps its handler, which another handler may still call.
        self._other_reaper.other_save_sigchld()
        try:
            yield
        finally:
            self._other_reaper.other_restore_sigchld()

    @contextlib.asynccontextmanager
    async def _thread(self) -> AsyncIterator[None]:
        with self._reaper():
            if self._other_reaper.other_reaper_start() != 0:
                raise RuntimeError("the hostile thread cannot be started")
            try:
                yield
            finally:
                stopping = asyncio.get_running_loop().run_in_executor(self._executor, self._other_reaper.other_reaper_stop)
                while not stopping.done():  # it may wait for a child to end
                    self._give_it_one()
                    await asyncio.sleep(0.002)

    def _give_it_one(self) -> None:
        decoy = os.posix_spawn(self._ender, ["ender"], {}, file_actions=[(os.POSIX_SPAWN_CLOSE, 0)])
        with contextlib.suppress(ChildProcessError):
            os.waitpid(decoy, 0)

    @contextlib.asynccontextmanager
    async def _reaping_by_signal(self, how: int) -> AsyncIterator[None]:
        with self._reaper(), self._handler_put_back():
            self._other_reaper.other_set_sigchld(how)
            yield

    @contextlib.asynccontextmanager
    async def _python_reaper(self) -> AsyncIterator[None]:
        with self._reaper():
            self._python_reaps = True
            try:
                async with self._python_handler():
                    yield
            finally:
                self._python_reaps = False

    @contextlib.asynccontextmanager
    async def _python_handler(self) -> AsyncIterator[None]:
        with self._handler_put_back():
            signal.signal(signal.SIGCHLD, self._handle)
            yield

    def _handle(self, *_: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while self._python_reaps and os.waitpid(-1, os.WNOHANG)[0] > 0:
                pass

    @contextlib.asynccontextmanager
    async def _handler(self, which: int) -> AsyncIterator[None]:
        with self._handler_put_back():
            self._handlers.install_handler(which)
            yield

    @contextlib.asynccontextmanager
    async def _default(self) -> AsyncIterator[None]:
        with self._handler_put_back():
            self.reset_handler()
            yield

    @contextlib.asynccontextmanager
    async def _no_descriptors(self) -> AsyncIterator[None]:
        held = []
        try:
            with contextlib.suppress(OSError):  # EMFILE
                while True:
                    held.append(os.dup(0))
            for _ in range(min(len(held), self.random.randrange(4))):  # a call that needs more than one may fail halfway
                os.close(held.pop())
            yield
        finally:
            for fd in held:
                os.close(fd)


def is_out_of_descriptors(exc: OSError) -> bool:
    """Return whether the error is a lack of descriptors."""
    return exc.errno in (errno.EMFILE, errno.ENFILE)
