"""Exits of one loop's children that are reaped but not reported to all observers yet."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque

from .child import Child
from .loop_link import LoopLink
from .start_gate import StartGate


class Notifier:
    """Calls the observers of children that have ended, and completes the futures of start gates.

    Any thread may append to `pending`.
    """

    __slots__ = ("_link", "_loop", "pending")

    def __init__(self, loop: weakref.ReferenceType[asyncio.AbstractEventLoop], link: LoopLink) -> None:
        self._loop = loop
        self._link = link
        self.pending: deque[Child | StartGate] = deque()

    def notify_all(self) -> None:
        """Call all observers, in the loop's thread.

        An observer is removed before it is called, so each is called once, even if one of them raises. SystemExit and
        KeyboardInterrupt reach the caller, who has to call again.
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
                    assert isinstance(child, Child)  # the future of a start gate raises nothing
                    self.report(exc, f"Exception in the exit callback for pid {child.pid}")
                    continue
                if pending and pending[0] is child:  # else an observer has run the loop, which has called us
                    pending.popleft()
        finally:
            link.depth = depth

    def report(self, exc: BaseException, message: str) -> None:
        """Call the loop's exception handler."""
        loop = self._loop()
        if loop is not None:
            loop.call_exception_handler({"message": message, "exception": exc})
