"""Children that another waitpid() reaps first: fixtures and helpers."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from aiopidfd import ExitStatus, wait
from aiopidfd._backends import sigchld_backend
from aiopidfd._kernel.syscalls import can_recover_exit
from aiopidfd._watch import collector

from ..conftest import LoopFactory, children
from .children import Held, await_zombie
from .seccomp import compile_c

IGNORE, NOCLDWAIT, REAP_ALL = range(3)  # as in other_reaper.c

# (status, pid, returncode, culprit)
CheckReported = Callable[[ExitStatus, int, int, str], None]


@pytest.fixture
def other_reaper() -> Iterator[ctypes.CDLL]:
    """The functions of other_reaper.c. The handler of SIGCHLD is restored afterwards."""
    library = ctypes.CDLL(str(compile_c("other_reaper.c", "-shared", "-fPIC", "-pthread")))
    library.other_save_sigchld()
    handler = signal.getsignal(signal.SIGCHLD)
    yield library
    signal.signal(signal.SIGCHLD, handler)
    library.other_restore_sigchld()


@pytest.fixture(autouse=True)
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the SIGCHLD backend check often, and warn each time that SIGCHLD was ignored."""
    monkeypatch.setattr(sigchld_backend, "_warned_of_ignored", False)
    monkeypatch.setattr(collector, "CHECK_INTERVAL_S", 0.05)
    # A replacement in an earlier test must not be named as the cause.
    monkeypatch.setattr(sigchld_backend, "_replaced", (0.0, ""))


def lost_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages about lost statuses."""
    return [message for message in (record.getMessage() for record in caplog.records) if "lost" in message]


@pytest.fixture
def assert_reported(backend: str, caplog: pytest.LogCaptureFixture) -> CheckReported:
    """Assert that the exit was reported as this kernel allows, and if it was lost, that one warning names the cause."""

    def check(status: ExitStatus, pid: int, code: int, culprit: str) -> None:
        if backend == "pidfd" and can_recover_exit():
            assert (status.pid, status.returncode, status.source) == (pid, code, "recovered")
            assert lost_warnings(caplog) == []
        else:
            assert (status.pid, status.returncode, status.source) == (pid, 255, "lost")
            (message,) = lost_warnings(caplog)
            assert f"pid {pid}:" in message
            assert culprit in message

    return check


async def watched(pid: int) -> asyncio.Task[ExitStatus]:
    """A task that waits for the process, which is watched already."""
    waiting = asyncio.ensure_future(wait(pid))
    await asyncio.sleep(0)
    return waiting


async def drain() -> None:
    """Let the loop see everything that is ready now: each round polls its descriptors once."""
    for _ in range(5):
        await asyncio.sleep(0)


def end_reaped_by_other(child: Held, code: int) -> None:
    """End the child, and return once a thread in waitpid(-1) has reaped it."""
    reaped: list[int] = []
    child.end(code)
    thread = threading.Thread(target=lambda: reaped.append(os.waitpid(-1, 0)[0]))
    thread.start()
    thread.join()
    assert reaped == [child.pid]


def end_reaped_at_once(child: Held, code: int) -> None:
    """End a child that other code reaps at once, and return when it is gone."""
    child.end(code)
    with contextlib.suppress(ChildProcessError):
        await_zombie(child.pid)
    while child.pid in children():  # if the kernel itself reaps, waitid() fails with ECHILD an instant earlier
        os.sched_yield()


def on_loop(program: str, loop_factory: LoopFactory) -> str:
    """The program, with its loop made by `loop_factory`."""
    return program.replace("LOOP", f"import {loop_factory.__module__} as m; loop = m.{loop_factory.__qualname__}()")


@pytest.fixture
def recycle(other_reaper: ctypes.CDLL) -> Iterator[Callable[[int], int]]:
    """Make a new child with the pid of a reaped one. Return the descriptor for its exit code."""
    pipes: list[int] = []
    pids: list[int] = []

    def make(pid: int) -> int:
        read, write = os.pipe()
        pipes.append(write)
        made = other_reaper.other_run_as(pid, read, b"read code; exit $code")
        os.close(read)
        if made in (-errno.EPERM, -errno.ENOSYS, -errno.EINVAL):
            pytest.skip(f"the number of a process cannot be chosen here: {os.strerror(-made)}")
        assert made == pid
        pids.append(pid)
        return write

    yield make
    for pipe in pipes:
        os.close(pipe)
    for pid in pids:
        with contextlib.suppress(ChildProcessError):  # reaped by the test
            os.waitpid(pid, 0)
