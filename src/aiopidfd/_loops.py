"""The plug: loops whose subprocesses are started and reaped through the registry, and ways to run on them."""

from __future__ import annotations

import asyncio
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from ._subprocess import Transported, subprocess_exec, subprocess_shell

_T = TypeVar("_T")
LoopFactory = Callable[[], asyncio.AbstractEventLoop]


class _Plugged:
    """What our loop classes have before the loop that they extend: the loop is the first argument of these functions."""

    subprocess_exec = subprocess_exec
    subprocess_shell = subprocess_shell


class SelectorEventLoop(_Plugged, asyncio.SelectorEventLoop):  # type: ignore[misc] # _Plugged's signatures are wider
    """asyncio's loop, with subprocesses that need no policy, no child watcher, no thread and no signal."""


def make_uvloop_class() -> type[asyncio.AbstractEventLoop]:
    """Return the class `UvloopEventLoop`. ImportError: uvloop is not installed."""
    try:
        import uvloop  # noqa: PLC0415 - an extra, loaded by those who use it
    except ImportError as exc:
        raise ImportError("UvloopEventLoop needs uvloop: pip install 'aiopidfd[uvloop]'") from exc

    class UvloopEventLoop(_Plugged, uvloop.Loop):  # type: ignore[misc] # _Plugged's signatures are wider
        """uvloop's loop, with subprocesses that cost no fork() and whose end is seen whoever reaps them."""

    UvloopEventLoop.__module__ = "aiopidfd"
    UvloopEventLoop.__qualname__ = "UvloopEventLoop"
    return UvloopEventLoop


def best_loop_factory() -> LoopFactory:
    """Return our loop class on uvloop if that is installed, else on asyncio's own loop."""
    import aiopidfd  # noqa: PLC0415 - its lazily made class is the one that users know

    try:
        factory: LoopFactory = aiopidfd.UvloopEventLoop
    except ImportError:
        factory = SelectorEventLoop
    return factory


def run(main: Coroutine[Any, Any, _T], *, loop_factory: LoopFactory | None = None, debug: bool | None = None) -> _T:
    """Run a coroutine as `asyncio.run` does, on every Python, on a loop from `loop_factory`.

    Without a factory: `UvloopEventLoop` if uvloop is installed, else `SelectorEventLoop`.

    Raises:
        ValueError: `main` is not a coroutine.
        RuntimeError: a loop runs in this thread already.
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
            if left:  # an empty gather() looks for a current loop, and Python 3.10.0 to 3.10.8 warn that there is none
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


def make_policy_class() -> type[Any]:
    """Return the class `EventLoopPolicy`; made on demand, since Python 3.14 warns of every look at a policy class.

    ImportError: there are no event loop policies, as from Python 3.16 on.
    """
    from ._watcher import PidfdWatcher  # noqa: PLC0415 - it imports this module

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            base: type[Any] = asyncio.DefaultEventLoopPolicy
        except AttributeError:
            raise ImportError(
                "EventLoopPolicy needs asyncio's event loop policies, which Python 3.16 has removed: use "
                "aiopidfd.run(main()), or asyncio.run(main(), loop_factory=aiopidfd.SelectorEventLoop)",
                name="aiopidfd",
            ) from None

    class EventLoopPolicy(base):  # type: ignore[misc] # the base depends on the Python version
        """For programs that still set an event loop policy (Python 3.9 to 3.15): its loops are `loop_factory`'s.

        Without a factory: `UvloopEventLoop` if uvloop is installed, else `SelectorEventLoop`. On Python 3.9 to 3.13
        `asyncio.get_child_watcher` and `set_child_watcher` work, on uvloop too.
        """

        def __init__(self, loop_factory: LoopFactory | None = None) -> None:
            super().__init__()
            self._aiopidfd_factory = loop_factory or best_loop_factory()
            self._aiopidfd_watcher: Any = None

        def new_event_loop(self) -> asyncio.AbstractEventLoop:
            """Return a new loop."""
            return self._aiopidfd_factory()

        def get_child_watcher(self) -> Any:
            """Return the child watcher, a `PidfdWatcher` unless another one was set."""
            if self._aiopidfd_watcher is None:
                self._aiopidfd_watcher = PidfdWatcher()
            return self._aiopidfd_watcher

        def set_child_watcher(self, watcher: Any) -> None:
            """Set the child watcher, and close the one before. Subprocesses of our loops do not need one."""
            if self._aiopidfd_watcher is not None:
                self._aiopidfd_watcher.close()
            self._aiopidfd_watcher = watcher

        def set_event_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
            """Set the current loop; in the main thread attach the child watcher to it, as asyncio's policy does."""
            super().set_event_loop(loop)
            if self._aiopidfd_watcher is not None and threading.current_thread() is threading.main_thread():
                self._aiopidfd_watcher.attach_loop(loop)

    EventLoopPolicy.__module__ = "aiopidfd"
    EventLoopPolicy.__qualname__ = "EventLoopPolicy"
    return EventLoopPolicy


# Loops that somebody else made, and the watchers that have plugged into them. A watcher that was dropped stays plugged.
_plugs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, set[weakref.ref[object]]] = weakref.WeakKeyDictionary()


def plug(loop: asyncio.AbstractEventLoop, watcher: object) -> None:
    """Have the subprocesses of `loop` go through its registry, until every watcher that plugged it has unplugged it."""
    if isinstance(loop, _Plugged):
        return
    plugs = _plugs.setdefault(loop, set())
    if not plugs:
        # On the instance, so that other loops of the class stay as they are. Weak: the loop must not hold itself.
        for function in (subprocess_exec, subprocess_shell):
            setattr(loop, function.__name__, partial(_call_plugged, function, weakref.ref(loop)))
    plugs.add(weakref.ref(watcher))


def unplug(loop: asyncio.AbstractEventLoop, watcher: object) -> None:
    """Take back `plug`."""
    plugs = _plugs.get(loop)
    if plugs is None:
        return
    plugs.discard(weakref.ref(watcher))
    if not plugs:
        del _plugs[loop]
        for function in (subprocess_exec, subprocess_shell):
            delattr(loop, function.__name__)


async def _call_plugged(function: Any, loop_ref: Any, *args: Any, **kwargs: Any) -> Transported:
    transported: Transported = await function(loop_ref(), *args, **kwargs)
    return transported
