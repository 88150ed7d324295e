"""Run every coroutine test on every loop, and let no test leave anything behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment] # tests on uvloop are skipped, with a reason

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

LOOPS = [
    "asyncio",
    pytest.param("uvloop", marks=pytest.mark.skipif(uvloop is None, reason="uvloop is not installed")),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Multiply each test that runs on a loop by the kinds of loops."""
    if inspect.iscoroutinefunction(metafunc.function):
        metafunc.fixturenames.append("loop_factory")
    if "loop_factory" in metafunc.fixturenames:
        metafunc.parametrize("loop_factory", LOOPS, indirect=True)


@pytest.fixture
def loop_factory(request: pytest.FixtureRequest) -> LoopFactory:
    """What makes a new loop of the kind under test."""
    return _loop_factory(request.param)


def _loop_factory(kind: str) -> LoopFactory:
    return asyncio.SelectorEventLoop if kind == "asyncio" else uvloop.new_event_loop


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine test on a loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    run_on(_loop_factory(str(pyfuncitem.callspec.params["loop_factory"])), pyfuncitem.obj(**arguments))
    return True


def run_on(loop_factory: LoopFactory, main: Any, timeout_s: float = 60.0) -> Any:
    """Run a coroutine as asyncio.run does, on a loop from `loop_factory`."""
    loop = loop_factory()
    errors: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: errors.append(context))
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
    if uvloop is not None:
        uvloop.new_event_loop().close()


def open_descriptors() -> dict[int, str]:
    """The descriptors of this process and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of the listing itself
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def children() -> set[int]:
    """The children of this process, zombies and those without an exit signal among them."""
    pids: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{task}/children", encoding="ascii") as listing:
            pids.update(int(pid) for pid in listing.read().split())
    return pids


@pytest.fixture(autouse=True)
def nothing_left_behind(process_wide_descriptors: None) -> Iterator[None]:
    """Fail a test that leaves a descriptor, a child or a zombie."""
    gc.collect()
    descriptors, pids = open_descriptors(), children()
    yield
    gc.collect()
    left = {fd: what for fd, what in open_descriptors().items() if fd > 2 and descriptors.get(fd) != what}
    assert not left, f"descriptors left open: {left}"
    assert not children() - pids, f"children left: {children() - pids}"
