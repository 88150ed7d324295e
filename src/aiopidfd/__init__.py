"""Child processes as first-class citizens of asyncio and uvloop on Linux."""

from ._child import notify_ready
from ._exit import ExitStatus
from ._fork import ChildStartError, afork
from ._process import AbstractChildProcess, PidfdChildProcess, PosixChildProcess
from ._watcher import PidfdWatcher, wait

__all__ = [
    "AbstractChildProcess",
    "ChildStartError",
    "ExitStatus",
    "PidfdChildProcess",
    "PidfdWatcher",
    "PosixChildProcess",
    "afork",
    "notify_ready",
    "wait",
]
