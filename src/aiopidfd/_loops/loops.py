"""Loop classes that start subprocesses in C and reap them by the registry, and `run()`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from functools import lru_cache
from typing import Any, TypeVar

from .plug import Plugged

_T = TypeVar("_T")
LoopFactory = Callable[[], asyncio.AbstractEventLoop]


class SelectorEventLoop(Plugged, asyncio.SelectorEventLoop):  # type: ignore[misc] # Plugged's signatures are wider
    """asyncio's loop. Its subprocesses need no policy, no child watcher, no thread and no signal."""


@lru_cache(maxsize=1)  # users and `run()` get the same class
def make_uvloop_class() -> type[asyncio.AbstractEventLoop]:
    """Return the class `UvloopEventLoop`. ImportError: uvloop is not installed."""
    try:
        import uvloop  # noqa: PLC0415 - an optional dependency
    except ImportError as exc:
        raise ImportError("UvloopEventLoop needs uvloop: pip install 'aiopidfd[uvloop]'") from exc

    class UvloopEventLoop(Plugged, uvloop.Loop):  # type: ignore[misc] # Plugged's signatures are wider
        """uvloop's loop. Its subprocesses start without fork(), and their exit is reported even if other code reaps them."""

    UvloopEventLoop.__module__ = "aiopidfd"
    UvloopEventLoop.__qualname__ = "UvloopEventLoop"
    return UvloopEventLoop


def best_loop_factory() -> LoopFactory:
    """Return `UvloopEventLoop` if uvloop is installed, else `SelectorEventLoop`."""
    try:
        return make_uvloop_class()
    except ImportError:
        return SelectorEventLoop


def run(main: Coroutine[Any, Any, _T], *, loop_factory: LoopFactory | None = None, debug: bool | None = None) -> _T:
    """Run a coroutine as `asyncio.run` does, on a loop from `loop_factory`. Works on every Python.

    The default is `UvloopEventLoop` if uvloop is installed, else `SelectorEventLoop`.

    Raises:
        ValueError: `main` is not a coroutine.
        RuntimeError: a loop is already running in this thread.
    """
    if not asyncio.iscoroutine(main):
        raise ValueError(f"a coroutine was expected, got {main!r}")
    if asyncio._get_running_loop() is not None:
        main.close()
        raise RuntimeError("run() cannot be called from a running event loop")
    factory = loop_factory or best_loop_factory()
    if sys.version_info >= (3, 11):
        with asyncio.Runner(debug=debug, loop_factory=factory) as runner:
            return runner.run(main)
    return _run_before_runner(main, factory, debug)


def _run_before_runner(main: Coroutine[Any, Any, _T], factory: LoopFactory, debug: bool | None) -> _T:
    """Do what asyncio.run does on Python 3.9 and 3.10, with a loop from `factory`."""
    loop = factory()
    try:
        asyncio.set_event_loop(loop)
        if debug is not None:
            loop.set_debug(debug)
        return loop.run_until_complete(main)
    finally:
        try:
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            if left:  # gather() of nothing needs a current loop: Python 3.10.0 to 3.10.8 warn that there is none
                loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            for task in left:
                if not task.cancelled() and task.exception() is not None:
                    loop.call_exception_handler(
                        {"message": "unhandled exception during run() shutdown", "exception": task.exception(), "task": task}
                    )
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            asyncio.set_event_loop(None)
            loop.close()
