"""The ends of one loop's children that somebody is still to be told of."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque

from . import _reaper
from ._exit import ExitStatus, Source
from ._gate import Gate
from ._thief import warn_lost
from ._watched import Child

_SOURCES: dict[int, Source] = {
    _reaper.SOURCE_REAPED: "reaped",
    _reaper.SOURCE_PEEKED: "peeked",
    _reaper.SOURCE_RECOVERED: "recovered",
    _reaper.SOURCE_LOST: "lost",
}


class Ends:
    """Children that have ended, and gates at which something was said. `untold` may be appended to from any thread."""

    __slots__ = ("_loop", "untold")

    def __init__(self, loop: weakref.ReferenceType[asyncio.AbstractEventLoop]) -> None:
        self._loop = loop
        self.untold: deque[Child | Gate] = deque()

    def tell(self) -> None:
        """Tell all observers, in the loop's thread.

        One by one, so that nobody is told twice and nobody is forgotten when one of them raises: SystemExit and
        KeyboardInterrupt go on to the caller, who is to call again.
        """
        untold = self.untold
        while untold:
            child = untold[0]
            try:
                if child.tell():
                    continue
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as exc:
                assert isinstance(child, Child)  # a gate tells only us
                self._report(exc, child.pid)
                continue
            if untold and untold[0] is child:  # else an observer has had the loop run, and so us
                untold.popleft()

    def _report(self, exc: BaseException, pid: int) -> None:
        loop = self._loop()
        if loop is not None:
            loop.call_exception_handler({"message": f"Exception in the exit callback for pid {pid}", "exception": exc})


def exit_status(child: Child, status: int, source: int, rusage: bytes) -> ExitStatus:
    """Make an ExitStatus of what the reaper says, and warn if the status is lost."""
    if source <= _reaper.SOURCE_PEEKED:
        return ExitStatus(child.pid, status, _SOURCES[source], rusage)
    if source == _reaper.SOURCE_LOST:
        if child.stranger:
            return ExitStatus(child.pid, 0, "not-child")
        warn_lost(child.pid)
    return ExitStatus(child.pid, status, _SOURCES[source])
