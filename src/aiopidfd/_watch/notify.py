"""The ends of one loop's children that somebody is still to be told of."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque

from .child import Child
from .loop_link import LoopLink
from .start_gate import StartGate


class Notifier:
    """Children that have ended, and gates at which something was said. `pending` may be appended to from any thread."""

    __slots__ = ("_link", "_loop", "pending")

    def __init__(self, loop: weakref.ReferenceType[asyncio.AbstractEventLoop], link: LoopLink) -> None:
        self._loop = loop
        self._link = link
        self.pending: deque[Child | StartGate] = deque()

    def notify_all(self) -> None:
        """Tell all observers, in the loop's thread.

        One by one, so that nobody is told twice and nobody is forgotten when one of them raises: SystemExit and
        KeyboardInterrupt go on to the caller, who is to call again.
        """
        pending, link, renewed = self.pending, self._link, False
        depth = link.depth
        try:
            link.depth = depth + 1
            while pending:
                child = pending[0]
                if not renewed and child.context is not None:
                    link.renew()  # a user's callback may run the loop
                    renewed = True
                try:
                    if child.notify():
                        continue
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as exc:
                    assert isinstance(child, Child)  # a gate tells only us
                    self.report(exc, f"Exception in the exit callback for pid {child.pid}")
                    continue
                if pending and pending[0] is child:  # else an observer has had the loop run, and so us
                    pending.popleft()
        finally:
            link.depth = depth

    def report(self, exc: BaseException, message: str) -> None:
        """Have the loop's exception handler called."""
        loop = self._loop()
        if loop is not None:
            loop.call_exception_handler({"message": message, "exception": exc})
