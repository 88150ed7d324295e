"""Child processes as first-class citizens of asyncio and uvloop on Linux."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ._backends.features import Features, features
from ._fork.afork import ChildStartError, afork
from ._fork.child import notify_ready
from ._fork.handle import AbstractChildProcess, PidfdChildProcess, PosixChildProcess
from ._forkserver.server import ForkServer
from ._kernel.exit_status import ExitStatus
from ._loops.loops import SelectorEventLoop, make_uvloop_class, run
from ._loops.policy import make_policy_class
from ._loops.watcher import PidfdWatcher, wait

__all__ = [
    "AbstractChildProcess",
    "ChildStartError",
    "EventLoopPolicy",
    "ExitStatus",
    "Features",
    "ForkServer",
    "PidfdChildProcess",
    "PidfdWatcher",
    "PosixChildProcess",
    "SelectorEventLoop",
    "UvloopEventLoop",
    "afork",
    "features",
    "notify_ready",
    "run",
    "wait",
]

# Made when they are first asked for: one needs an extra, of the other Python 3.14 warns, and 3.16 has nothing to make it of.
_LAZY: dict[str, Callable[[], type[Any]]] = {"EventLoopPolicy": make_policy_class, "UvloopEventLoop": make_uvloop_class}

# What type checkers read above is looked up below, so that `from aiopidfd import *` asks for nothing that cannot be had.
_NAMES = tuple(__all__)
if not TYPE_CHECKING:
    del __all__


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = globals()[name] = _LAZY[name]()
        return value
    if name == "__all__":
        return [public for public in _NAMES if public not in _LAZY or _can_be_had(public)]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "__all__"})


def _can_be_had(name: str) -> bool:
    try:
        globals().get(name) or __getattr__(name)
    except ImportError:  # no uvloop, or not one for this Python; no event loop policies
        return False
    return True
