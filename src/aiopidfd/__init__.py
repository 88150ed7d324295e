"""Child processes as first-class citizens of asyncio and uvloop on Linux."""

from __future__ import annotations

from typing import Any

from ._child import notify_ready
from ._exit import ExitStatus
from ._features import Features, features
from ._fork import ChildStartError, afork
from ._forkserver import ForkServer
from ._loops import SelectorEventLoop, make_policy_class, make_uvloop_class, run
from ._process import AbstractChildProcess, PidfdChildProcess, PosixChildProcess
from ._watcher import PidfdWatcher, wait

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

# Made when they are first asked for: one needs an extra, of the other Python 3.14 warns.
_LAZY = {"EventLoopPolicy": make_policy_class, "UvloopEventLoop": make_uvloop_class}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = globals()[name] = _LAZY[name]()
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
