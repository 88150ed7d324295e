"""Run every coroutine test on every loop, and let no test leave anything behind."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

import aiopidfd
from aiopidfd._backends import sigchld_backend
from aiopidfd._backends.backend import ENVIRONMENT, decision, probe_pidfd
from aiopidfd._kernel import syscalls, threads
from aiopidfd._watch import registries

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment] # tests on uvloop are skipped, with a reason

pytest_plugins = ["tests.helpers.selection"]

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

# A shell that starts us in the background ignores SIGINT, and children inherit that: Ctrl-C would end neither them nor us.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TEST_TIMEOUT_S = 600  # longer than any bound in a test; then all threads' tracebacks, and the end

LOOPS = [
    "asyncio",
    pytest.param("uvloop", marks=pytest.mark.skipif(uvloop is None, reason="uvloop is not installed")),
]
BACKENDS = ["pidfd", "sigchld"] if probe_pidfd() is None else ["sigchld"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Multiply each test that runs on a loop by the kinds of loops and by the backends that work here."""
    if inspect.iscoroutinefunction(metafunc.function):
        metafunc.fixturenames.append("loop_factory")
    if "loop_factory" in metafunc.fixturenames and "backend" not in metafunc.fixturenames:
        metafunc.fixturenames.append("backend")
    if "loop_factory" in metafunc.fixturenames:
        metafunc.parametrize("loop_factory", LOOPS, indirect=True)
        # A module that is about one of them says so, and so does a test that needs pidfds.
        backends = getattr(metafunc.module, "BACKENDS", BACKENDS)
        if "pidfds" in metafunc.fixturenames and "pidfd" in backends:
            backends = ["pidfd"]
        metafunc.parametrize("backend", backends, indirect=True)


@pytest.fixture
def loop_factory(request: pytest.FixtureRequest) -> LoopFactory:
    """What makes a new loop of the kind under test."""
    return _loop_factory(request.param)


@pytest.fixture(params=LOOPS)
def loop_class(request: pytest.FixtureRequest) -> Any:
    """Each of our loop classes."""
    return aiopidfd.UvloopEventLoop if request.param == "uvloop" else aiopidfd.SelectorEventLoop


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """The backend under test, by name."""
    return str(request.param)


@pytest.fixture(autouse=True)
def chosen_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the environment choose the backend under test, for this process and for those that the test starts."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and "backend" in callspec.params:
        monkeypatch.setenv(ENVIRONMENT, callspec.params["backend"])
    # Nothing is decided yet. Modules have the object, so it stays.
    monkeypatch.setattr(decision, "name", None)
    monkeypatch.setattr(decision, "logged", set())


def _loop_factory(kind: str) -> LoopFactory:
    return asyncio.SelectorEventLoop if kind == "asyncio" else uvloop.new_event_loop


# pytest-asyncio runs the coroutine tests. It does not multiply them, since synchronous tests are multiplied in the same way;
# does not notice what a loop's exception handler is called with; and makes no loop in another thread, or a second one, for
# which there is run_on().


class _UnderTest:
    """The loop of the coroutine test that runs."""

    kind: str
    errors: ClassVar[list[dict[str, Any]]] = []


def _new_loop() -> asyncio.AbstractEventLoop:
    """Make that loop. (All fixtures of the test have been set up.)"""
    loop = _loop_factory(_UnderTest.kind)()
    loop.set_exception_handler(lambda _, context: _UnderTest.errors.append(context))
    loop.slow_callback_duration = TEST_TIMEOUT_S  # debug mode logs what is slower, and on a busy machine anything may be
    return loop


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories() -> dict[str, LoopFactory]:
    """Have pytest-asyncio run a coroutine test on the loop under test."""
    return {"under test": _new_loop}


if sys.version_info < (3, 10):  # for which there is no pytest-asyncio with that hook

    class _Policy(asyncio.DefaultEventLoopPolicy):
        _loop_factory = staticmethod(_new_loop)

    @pytest.fixture
    def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
        """Have pytest-asyncio run a coroutine test on the loop under test."""
        return _Policy()


@pytest.fixture(autouse=True)
def no_errors_of_the_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a coroutine test if its loop's exception handler was called, until the loop was closed."""
    _UnderTest.errors.clear()
    if inspect.iscoroutinefunction(request.function):
        _UnderTest.kind = request.node.callspec.params["loop_factory"]
    yield
    errors = [context for context in _UnderTest.errors if not _is_of_old_streams(context)]
    assert not errors, f"the loop's exception handler was called: {errors}"


def _is_of_old_streams(context: dict[str, Any]) -> bool:
    """Whether asyncio's streams have not looked at the end of a program's stdin, as they do from Python 3.11 on."""
    is_of_pipe = isinstance(context.get("exception"), (BrokenPipeError, ConnectionResetError))
    return sys.version_info < (3, 11) and is_of_pipe and context["message"] == "Future exception was never retrieved"


def run_on(loop_factory: LoopFactory, main: Any, timeout_s: float = 240.0) -> Any:
    """Run a coroutine as asyncio.run does, on a loop from `loop_factory`, in whatever thread this is."""
    loop = loop_factory()
    errors: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    loop.slow_callback_duration = TEST_TIMEOUT_S  # debug mode logs what is slower, and on a busy machine anything may be
    try:
        result = loop.run_until_complete(asyncio.wait_for(main, timeout_s))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()
    assert not errors, f"the loop's exception handler was called: {errors}"
    return result


@pytest.fixture(autouse=True, scope="session")
def process_wide_descriptors() -> None:
    """Let libuv open the pipe that it opens once, with the first loop of the process, and keeps."""
    asyncio.set_event_loop(None)  # pytest-asyncio asks for one: else Python 3.9 makes it then, and keeps it
    if uvloop is not None:
        uvloop.new_event_loop().close()
    syscalls.open_sigchld()  # and aiopidfd what its handler wakes


def open_descriptors() -> dict[int, str]:
    """The descriptors of this process and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of the listing itself
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


# Whether the kernel lists the children of each thread (CONFIG_PROC_CHILDREN).
lists_children = os.path.exists("/proc/thread-self/children")


def children() -> set[int]:
    """The children of this process, zombies and those without an exit signal among them.

    FileNotFoundError: there is no /proc, and no other way to know.
    """
    if not lists_children:
        return {pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if parent_of(pid) == os.getpid()}
    pids: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        # ENOENT, ESRCH: that thread has just ended. What it had is another one's now, and our main thread never ends.
        # pathlib would intern each number. The interpreter's table of such strings then grows by 1 MB, amid a measurement.
        with (
            contextlib.suppress(FileNotFoundError, ProcessLookupError),
            open(f"/proc/self/task/{task}/children", encoding="ascii") as listed,
        ):
            pids.update(map(int, listed.read().split()))
    return pids


def parent_of(pid: int) -> int | None:
    """The parent of a process, or of a zombie; None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return int(stat.read().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


@pytest.fixture(autouse=True)
def nothing_left_behind(process_wide_descriptors: None) -> Iterator[None]:
    """Fail a test that leaves a descriptor, a child or a zombie."""
    descriptors, pids = open_descriptors(), children()
    # pytest's own faulthandler_timeout is a thread, and a fork beside a thread warns on Python 3.12+.
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.alarm(TEST_TIMEOUT_S)

    def left() -> tuple[dict[int, str], set[int]]:
        """What is there now and was not before; standard streams are pytest's to replace."""
        opened = {fd: what for fd, what in open_descriptors().items() if fd > 2 and descriptors.get(fd) != what}
        return opened, children() - pids

    yield
    signal.alarm(0)
    faulthandler.unregister(signal.SIGALRM)
    if left() != ({}, set()):
        gc.collect()  # what only a cycle keeps is not left behind
    opened, made = left()
    assert not opened, f"descriptors left open: {opened}"
    assert not made, f"children left: {made}"


@pytest.fixture
def one_thread() -> None:
    """Be alone: a fork server is made in another way beside threads."""
    deadline = time.monotonic() + 10
    while (threads.count_threads() or 1) > 1:  # those that an earlier test has joined are gone a moment later
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def pidfds(backend: str) -> None:
    """Skip where there can be no fork server."""
    if backend != "pidfd":
        pytest.skip("a fork server needs pidfds; its fallback is tested elsewhere")


@pytest.fixture
def locks_to_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have locks of the process's that an exception at any bytecode may leave locked: amid those that release them.

    A signal handler raises there on Python 3.9 alone. Its own thread can take them again, and all others wait for ever.
    """
    for module in registries, sigchld_backend:
        monkeypatch.setattr(module, "_lock", threading.RLock())
