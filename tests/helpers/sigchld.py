"""Tests of the SIGCHLD backend: fixtures, other handlers, and helpers."""

from __future__ import annotations

import asyncio
import ctypes
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from aiopidfd import wait
from aiopidfd._backends import sigchld_backend
from aiopidfd._backends.backend import ENVIRONMENT
from aiopidfd._kernel.exit_status import ExitStatus
from aiopidfd._kernel.syscalls import describe_sigchld
from aiopidfd._watch import collector
from aiopidfd._watch.registries import registry_of

from .children import Held
from .seccomp import compile_c

# The check once a second finds an exit without a signal. The rest is for a busy machine.
FOUND_BY_CHECK_S = 2.5

SA_NOCLDWAIT = 2


@pytest.fixture(autouse=True)
def sigchld_at_default(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set SIGCHLD to SIG_DFL before and after the test."""
    monkeypatch.setenv(ENVIRONMENT, "sigchld")
    monkeypatch.setattr(sigchld_backend, "_replaced", (0.0, ""))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@pytest.fixture
def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no check once a second during the test."""
    monkeypatch.setattr(collector, "CHECK_INTERVAL_S", 3600.0)


@pytest.fixture
def handlers() -> Iterator[Any]:
    """Handlers in C: 0 and 1 call the previous handler, 1 without a siginfo_t. 2 and 3 do not call it."""
    library = ctypes.CDLL(str(compile_c("handlers.c", "-shared", "-fPIC")))
    yield library
    library.set_flags(2, 0)


class Noted:
    """A Python handler that counts its calls, and can be awaited."""

    def __init__(self) -> None:
        self.calls = 0
        self.called = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __call__(self, number: int, frame: object) -> None:
        self.calls += 1
        self._loop.call_soon_threadsafe(self.called.set)


async def watch(*children: Held) -> list[asyncio.Task[ExitStatus]]:
    """Watch the children. Return a task for each. Signals from before are handled when this returns."""
    tasks = [asyncio.ensure_future(wait(child.pid)) for child in children]
    await drain()  # a new reaper wakes up once for all earlier signals
    return tasks


async def watch_one(child: Held) -> asyncio.Task[ExitStatus]:
    (task,) = await watch(child)
    return task


def is_in_front() -> bool:
    """Whether the handler of SIGCHLD is ours."""
    return describe_sigchld().startswith("ours")


async def drain() -> None:
    """Let the loop do all that it can do without waiting."""
    for _ in range(10):
        await asyncio.sleep(0)


def backend_of_this_loop() -> sigchld_backend.SigchldBackend:
    """The SIGCHLD backend of the running loop."""
    backend = registry_of(asyncio.get_running_loop())._sigchld
    assert backend is not None
    return backend


def check_now() -> None:
    """Do now what the check once a second does."""
    registry = registry_of(asyncio.get_running_loop())
    with registry._lock:
        registry._take_records(backend_of_this_loop().check())
    registry.collect()


def ignore(handlers: Any) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def discard(handlers: Any) -> None:
    assert handlers.set_default(SA_NOCLDWAIT) == 0


def handle_in_c_and_discard(handlers: Any) -> None:
    handlers.set_flags(2, SA_NOCLDWAIT)
    handlers.install_handler(2)
