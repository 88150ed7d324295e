"""The loops that are compared, each with the child watcher that a cell asks for."""

from __future__ import annotations

import asyncio
import asyncio.unix_events
import importlib
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Literal, Protocol, TypeVar

T = TypeVar("T")
LoopName = Literal["asyncio", "uvloop"]
WatcherName = Literal["pidfd", "safe", "threaded"]
BackendName = Literal["pidfd", "sigchld"]


class Watcher(Protocol):
    """What asyncio's child watchers and ours have in common."""

    def add_child_handler(self, pid: int, callback: Callable[..., object], *args: Any) -> None:
        """Have `callback(pid, returncode, *args)` called when the child ends."""


class MissingError(Exception):
    """This Python does not have what is to be measured."""


def new_loop(name: LoopName) -> asyncio.AbstractEventLoop:
    """Return a plain loop, as the peer itself makes it."""
    if name == "uvloop":
        import uvloop

        return uvloop.new_event_loop()
    return asyncio.SelectorEventLoop()


def new_our_loop(name: LoopName) -> asyncio.AbstractEventLoop:
    """Return a loop whose subprocesses run through our watcher."""
    aiopidfd = import_ours()
    factory = aiopidfd.UvloopEventLoop if name == "uvloop" else aiopidfd.SelectorEventLoop
    loop: asyncio.AbstractEventLoop = factory()
    return loop


def import_ours() -> Any:
    """Return the library: as Any, since a cell may ask for what this version does not have, which is for the cell to say."""
    return importlib.import_module("aiopidfd")


def run(loop: asyncio.AbstractEventLoop, main: Coroutine[Any, Any, T]) -> T:
    """Run `main`. The loop is not closed: a cell may leave ten thousand children on it, and ends by _exit."""
    return loop.run_until_complete(main)


def new_asyncio_watcher(name: WatcherName, loop: asyncio.AbstractEventLoop) -> Watcher:
    """Return one of asyncio's watchers, which is also the one that `loop`'s subprocesses use from now on."""
    class_name = f"{name.capitalize()}ChildWatcher"
    public = getattr(asyncio, class_name, None)
    if public is not None:
        public_watcher: Any = public()
        public_watcher.attach_loop(loop)
        asyncio.set_child_watcher(public_watcher)
        watcher: Watcher = public_watcher
        return watcher
    # Python 3.14 has two of them left, without public names; the loop holds the one it uses.
    private = getattr(asyncio.unix_events, f"_{class_name}", None)
    if private is None:
        raise MissingError(f"Python {sys.version_info[0]}.{sys.version_info[1]} has no {class_name}")
    watcher = private()
    loop._watcher = watcher  # type: ignore[attr-defined] # private to CPython's loop
    return watcher


def new_our_watcher(backend: BackendName) -> Watcher:
    """Return our watcher. The backend is that of `aiopidfd.wait()`, too."""
    os.environ["AIOPIDFD_BACKEND"] = backend  # read by the library when it chooses a backend for the first time
    aiopidfd = import_ours()
    watcher: Watcher = aiopidfd.PidfdWatcher() if backend == "pidfd" else aiopidfd.PidfdWatcher(backend=backend)
    return watcher
