"""Subprocesses for tests, and the loops for them: of our classes, and others with a watcher."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import aiopidfd
from aiopidfd import PidfdWatcher
from aiopidfd._programs.transport import SubprocessTransport

from .. import conftest
from ..conftest import LoopFactory
from .children import await_zombie

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment] # tests on uvloop are skipped, with a reason


PIPE = subprocess.PIPE
# An option that needs Popen, so that Popen starts the process.
BY_POPEN: dict[str, Any] = {"preexec_fn": int}

needs_uvloop = pytest.mark.skipif(uvloop is None, reason="uvloop is not installed")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
needs_child_watchers = pytest.mark.skipif(
    sys.version_info >= (3, 14), reason="asyncio.set_child_watcher is gone in Python 3.14"
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test with a loop twice: on a loop of our classes, and on a loop with a watcher."""
    if inspect.iscoroutinefunction(metafunc.function) or "loop_factory" in metafunc.fixturenames:
        metafunc.parametrize("plug", ["class", "attached"], indirect=True)


@pytest.fixture
def plug(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have conftest run the test on a loop that starts subprocesses by our functions."""
    make_plain_loop = conftest._loop_factory

    def attached(kind: str) -> asyncio.AbstractEventLoop:
        loop = make_plain_loop(kind)()
        PidfdWatcher().attach_loop(loop)
        return loop

    def loop_factory(kind: str) -> LoopFactory:
        if request.param == "attached":
            return lambda: attached(kind)
        return aiopidfd.SelectorEventLoop if kind == "asyncio" else aiopidfd.UvloopEventLoop

    if hasattr(request, "param"):
        monkeypatch.setattr(conftest, "_loop_factory", loop_factory)


async def drain() -> None:
    """Let the loop see everything that is ready now: each round polls its descriptors once."""
    for _ in range(10):
        await asyncio.sleep(0)


async def output_of(*command: Any, **keywords: Any) -> str:
    """The output of a program, which must succeed."""
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, **keywords)
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode().rstrip()


async def talk(process: asyncio.subprocess.Process, data: bytes | None = None) -> tuple[bytes | None, bytes | None]:
    """The result of `communicate`: None for a stream that is no pipe. (asyncio's type hints do not know that.)"""
    return await process.communicate(data)


async def shell_output(script: str, **keywords: Any) -> str:
    return await output_of("/bin/sh", "-c", script, **keywords)


def is_ours(process: asyncio.subprocess.Process) -> bool:
    """Whether its transport is ours."""
    return isinstance(process._transport, SubprocessTransport)  # type: ignore[attr-defined] # there is no public way


@contextlib.contextmanager
def gate() -> Iterator[tuple[int, Callable[[], None]]]:
    """A descriptor that a child reads from until the function is called."""
    read, write = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, read)
        opened = stack.enter_context(contextlib.ExitStack())
        opened.callback(os.close, write)
        yield read, opened.close


def reading(held: int) -> str:
    """A shell command that exits when the gate opens. (Debian's sh does not support descriptors of two digits.)"""
    return f"read x < /proc/self/fd/{held}"


def await_end(pid: int) -> None:
    """Return once the child has ended. It may be reaped by then."""
    with contextlib.suppress(ChildProcessError):
        await_zombie(pid)


def assert_reaped(pid: int) -> None:
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


class Recorder(asyncio.SubprocessProtocol):
    """A protocol that records the calls of its methods, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.end = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.record("connection_made")

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.record("data", fd, data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self.record("pipe_lost", fd)

    def process_exited(self) -> None:
        self.record("exited")

    def connection_lost(self, exc: Exception | None) -> None:
        assert exc is None
        self.end.set_result(None)
        self.record("connection_lost")

    def record(self, *event: Any) -> None:
        self.events.append(event)


class Raiser(Recorder):
    """A protocol whose methods raise."""

    def record(self, *event: Any) -> None:
        super().record(*event)
        raise ZeroDivisionError(event[0])


EVENTS = [
    ("connection_made",),
    ("connection_lost",),
    ("data", 1, b"out\n"),
    ("data", 2, b"err\n"),
    ("exited",),
    ("pipe_lost", 0),
    ("pipe_lost", 1),
    ("pipe_lost", 2),
]


def assert_in_order(events: list[tuple[Any, ...]]) -> None:
    """Assert that each event is there once, and after those that it depends on."""
    assert sorted(events) == sorted(EVENTS)
    assert events[0] == ("connection_made",)
    assert events[-1] == ("connection_lost",)
    for fd, data in ((1, b"out\n"), (2, b"err\n")):
        assert events.index(("data", fd, data)) < events.index(("pipe_lost", fd))


async def answer() -> tuple[bool, str]:
    process = await asyncio.create_subprocess_exec("/bin/echo", "hello", stdout=PIPE)
    output, _ = await process.communicate()
    return is_ours(process), output.decode()


ANSWER = (True, "hello\n")
