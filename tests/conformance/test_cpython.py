"""CPython's own tests of asyncio's subprocesses, on our loops and on loops with a watcher."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import sys
import unittest
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest

import aiopidfd
from aiopidfd import PidfdWatcher
from aiopidfd._backends import backend

from ..conftest import run_on

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment] # tests on uvloop are skipped, with a reason

cpython = pytest.importorskip("test.test_asyncio.test_subprocess", reason="this Python came without its own tests")

# Kinds of loops, by how they are made. The last has asyncio's own transport, with a PidfdWatcher as the child watcher.
OURS = ("SelectorEventLoop", "UvloopEventLoop")
ATTACHED = ("attached asyncio loop", "attached uvloop loop")
ON_UVLOOP = ("UvloopEventLoop", "attached uvloop loop")
# Without pidfds, subprocess.Popen starts the programs. With pidfds, the C code does.
SIGCHLD = "SelectorEventLoop by SIGCHLD"
CHILD_WATCHER = "asyncio.set_child_watcher"

IN_C = (*OURS, *ATTACHED)
KINDS = (*IN_C, SIGCHLD, CHILD_WATCHER)


class Exemption(NamedTuple):
    """A test of CPython that must fail on some kinds of loops, and the reason."""

    reason: str
    kinds: tuple[str, ...]
    since: tuple[int, ...] = (3, 9)  # the first Python in which all releases have it
    run: bool = True  # false if it leaves a process behind when it fails


ON_OUR_TRANSPORT = (*IN_C, SIGCHLD)
_NO_CONNECTING = Exemption("it replaces loop.connect_read_pipe() or its like, which we do without", ON_OUR_TRANSPORT)

# Unless they would leave a process, they are run and must fail: an exemption that is not needed any more is an error.
EXEMPTIONS = {
    "test_close_kill_running": Exemption(
        "it replaces Popen.kill() and counts its calls; our transport kills by pidfd", ON_OUR_TRANSPORT
    ),
    "test_pause_reading": _NO_CONNECTING,
    "test_subprocess_read_pipe_cancelled": _NO_CONNECTING._replace(since=(3, 15), run=False),
    "test_subprocess_write_pipe_cancelled": _NO_CONNECTING._replace(since=(3, 15), run=False),
    "test_subprocess_read_write_pipe_cancelled": _NO_CONNECTING._replace(since=(3, 15), run=False),
    "test_watcher_implementation": Exemption(
        "it looks for asyncio's private loop._watcher, which uvloop's loops do not have", ON_UVLOOP, (3, 14)
    ),
    "test_pid_not_reaped_before_exit_published": Exemption(
        "it looks into the threads of asyncio's private _ThreadedChildWatcher", ON_OUR_TRANSPORT, (3, 15), run=False
    ),
}

# Our wait() does not wait for pipes. So these close the loop while a grandchild has a pipe, which causes a warning.
LEAVE_A_PIPE = ("test_kill_issue43884",)


class NotOurs(NamedTuple):
    """Tests of CPython that are not run: they are about asyncio's own objects, without any of our code."""

    reason: str
    since: tuple[int, ...]
    until: tuple[int, ...] = (4,)


NOT_OURS = {
    "SubprocessTransportTests": NotOurs("of the private BaseSubprocessTransport, with a mock for the process", (3, 9)),
    "MultiLoopChildWatcherTests": NotOurs("of the deprecation of asyncio.MultiLoopChildWatcher", (3, 12), (3, 14)),
    "GenericWatcherTests.test_create_subprocess_fails_with_inactive_watcher": NotOurs(
        "of how asyncio's loop asks a child watcher, a mock; our loops ask none", (3, 9), (3, 14)
    ),
}


def collect_tests() -> dict[str, Callable[[Any], None]]:
    """Every test that CPython runs on a loop with one of its watchers, by name."""
    found: dict[str, Callable[[Any], None]] = {}
    for _, cls in inspect.getmembers(cpython, inspect.isclass):
        if issubclass(cls, cpython.SubprocessMixin):
            found.update((name, test) for name, test in inspect.getmembers(cls) if name.startswith("test_"))
    return found


TESTS = collect_tests()


class OnLoop:
    """Make the loop for a test of CPython. Fail the test if the loop's exception handler was called."""

    kind: str

    def setUp(self) -> None:
        assert isinstance(self, unittest.TestCase)
        if self.kind == SIGCHLD:
            self._patch(mock.patch.dict(os.environ, {backend.ENVIRONMENT: "sigchld"}))
        # Some newer tests use only the loop that this makes.
        self._patch(mock.patch("asyncio.run", functools.partial(run_on, self.new_loop)))
        self.loop = self.new_loop()
        self.addCleanup(self.loop.close)
        self.errors: list[Any] = []
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context))

    def tearDown(self) -> None:
        assert not self.errors

    def _patch(self, patch: Any) -> None:
        assert isinstance(self, unittest.TestCase)
        patch.start()
        self.addCleanup(patch.stop)

    def new_loop(self) -> asyncio.AbstractEventLoop:
        """Return a new loop of the kind under test."""
        assert isinstance(self, unittest.TestCase)
        if self.kind in OURS or self.kind == SIGCHLD:
            loop: asyncio.AbstractEventLoop = getattr(aiopidfd, self.kind.partition(" ")[0])()
            return loop
        watcher = PidfdWatcher()
        if self.kind == CHILD_WATCHER:
            set_child_watcher(watcher)
            self.addCleanup(set_child_watcher, None)
            return asyncio.SelectorEventLoop()
        loop = uvloop.Loop() if self.kind in ON_UVLOOP else asyncio.SelectorEventLoop()
        watcher.attach_loop(loop)
        self.addCleanup(watcher.close)
        return loop


def set_child_watcher(watcher: Any) -> None:
    """Call `asyncio.set_child_watcher` without its deprecation warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        asyncio.set_child_watcher(watcher)


def make_test_case(kind: str) -> Any:
    """Return CPython's tests as a TestCase on one kind of loop."""
    namespace: dict[str, Any] = {"kind": kind, "__module__": __name__}
    for name, test in TESTS.items():
        namespace[name] = prepare(name, test, kind)
    return pytest.mark.one_of(type("Test", (OnLoop, cpython.SubprocessMixin, unittest.TestCase), namespace))


def prepare(name: str, test: Callable[[Any], None], kind: str) -> Any:
    """Return a copy of the test with its marks for that kind of loop. (Marks are attributes of the function.)"""

    @functools.wraps(test)
    def prepared(self: Any) -> None:
        test(self)

    del prepared.__dict__["__wrapped__"]  # or pytest reports each skip by its line in CPython's file
    exemption = EXEMPTIONS.get(name)
    if exemption is not None and kind in exemption.kinds:
        return pytest.mark.xfail(reason=exemption.reason, run=exemption.run, strict=True)(prepared)
    if name in LEAVE_A_PIPE:
        return pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")(prepared)
    return prepared


needs_uvloop = pytest.mark.skipif(uvloop is None, reason="uvloop is not installed")
needs_child_watchers = pytest.mark.skipif(
    sys.version_info >= (3, 14), reason="asyncio.set_child_watcher is gone in Python 3.14"
)

TestSelectorEventLoop = make_test_case("SelectorEventLoop")
TestUvloopEventLoop = needs_uvloop(make_test_case("UvloopEventLoop"))
TestAttachedAsyncioLoop = make_test_case("attached asyncio loop")
TestAttachedUvloopLoop = needs_uvloop(make_test_case("attached uvloop loop"))
TestSigchld = make_test_case(SIGCHLD)
TestSetChildWatcher = needs_child_watchers(make_test_case(CHILD_WATCHER))


@needs_child_watchers
def test_create_subprocess_with_pidfd() -> None:
    """CPython's test of its PidfdChildWatcher, with our watcher: a loop in a thread that is not the main one."""
    tests = getattr(cpython, "GenericWatcherTests", None)
    if not hasattr(tests, "test_create_subprocess_with_pidfd"):
        pytest.skip("new in Python 3.12")
    result = unittest.TestResult()
    asyncio.set_event_loop(None)  # the test expects that one was set before
    with mock.patch("asyncio.PidfdChildWatcher", PidfdWatcher):
        tests("test_create_subprocess_with_pidfd")(result)  # type: ignore[misc] # it is not None here
    assert result.wasSuccessful(), result.errors + result.failures


def test_each_exemption_names_a_test_that_exists() -> None:
    for name, exemption in EXEMPTIONS.items():
        assert name in TESTS or sys.version_info < exemption.since, name
        assert set(exemption.kinds) <= set(KINDS)
    for name, listed in NOT_OURS.items():
        cls, _, test = name.partition(".")
        exists = hasattr(getattr(cpython, cls, None), test or "run")
        assert exists is (listed.since <= sys.version_info < listed.until), name


def test_every_test_of_cpython_is_run_or_listed() -> None:
    for name, cls in inspect.getmembers(cpython, inspect.isclass):
        if issubclass(cls, cpython.SubprocessMixin) or cls.__module__ != cpython.__name__:
            continue
        for test in vars(cls):
            if test.startswith("test_"):
                assert name in NOT_OURS or f"{name}.{test}" in NOT_OURS or test in globals(), f"{name}.{test}"
