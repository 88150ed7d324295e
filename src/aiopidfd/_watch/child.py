"""One watched process and its observers, each with the context in which it is called.

There may be thousands of these objects, so they are small and cheap: slots instead of a dict, a function instead of an
`__init__` (calling one takes longer than what it does), and room for one observer, since nearly every child has one.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextvars import Context
from os import waitstatus_to_exitcode
from typing import Any, Optional

from .._backends.backend import Backend
from .._backends.lost_status import warn_lost
from .._backends.orphans import Orphan
from .._kernel.exit_status import ExitStatus, Source
from .._kernel.reaper import SOURCE_LOST, SOURCE_PEEKED, SOURCE_REAPED, SOURCE_RECOVERED, Record

Observer = Callable[..., object]
"""Called with an ExitStatus or, if it was given `args`, with pid, returncode, *args."""

Args = Optional[tuple[Any, ...]]
"""None: an internal observer. It takes an ExitStatus; asyncio's futures keep the contexts of its users."""

_NOBODY: AbstractSet[object] = frozenset()


class Child:
    """One watched process of one loop.

    `pidfd` is -1 once the process was reaped, and if the backend uses none. Once it was reaped `result` is the record of
    the reaper, or an ExitStatus.

    Each observer has a key. A second observer with the same key replaces the first. The first observer stands in slots; a
    dict for others is made when there are others.
    """

    __slots__ = (
        "_args",
        "_key",
        "_observer",
        "_others",
        "backend",
        "context",
        "orphan",
        "peek",
        "peekers",
        "pid",
        "pidfd",
        "result",
        "stranger",
    )

    pid: int
    pidfd: int
    backend: Backend
    result: Record | ExitStatus | None
    peek: bool
    stranger: bool
    peekers: AbstractSet[object]  # the keys of observers that asked for reap=False
    orphan: Orphan  # set when the loop is closed
    context: Context | None  # of the next observer; None if that is an internal one
    _key: object
    _observer: Observer | None
    _args: Args
    _others: dict[object, tuple[Observer, Args, Context | None]] | None

    def add_observer(self, key: object, observer: Observer, args: Args, context: Context | None) -> None:
        """Add an observer, or replace the one that has this key."""
        if self._key is key or (self._observer is None and not self._others):
            self._key, self._observer, self._args, self.context = key, observer, args, context
        else:
            if self._others is None:
                self._others = {}
            self._others[key] = observer, args, context

    def remove_observer(self, key: object) -> bool:
        """Remove the observer with this key. Return whether there was one."""
        if self._key is key and self._observer is not None:
            self._key = self._observer = self._args = self.context = None
            return True
        return self._others is not None and self._others.pop(key, None) is not None

    def is_observed_by(self, key: object) -> bool:
        """Return whether there is an observer with this key."""
        return (self._key is key and self._observer is not None) or (self._others is not None and key in self._others)

    def count_observers(self) -> int:
        """Return how many observers there are."""
        return (self._observer is not None) + (len(self._others) if self._others else 0)

    def drop_observers(self) -> None:
        """Drop all observers, with their callbacks and contexts."""
        self._key = self._observer = self._args = self.context = self._others = None

    def notify(self) -> bool:
        """Call one observer and remove it. Return whether there are others."""
        result, observer, args, context = self.result, self._observer, self._args, self.context
        if result is None:
            return False
        if observer is None:
            return self._promote()
        self._observer = self._args = self.context = (
            None  # first: the observer may run the loop, which calls this function again
        )
        if args is None:
            if not isinstance(result, ExitStatus):
                result = self.result = exit_status(self, result)
            observer(result)
        else:
            assert context is not None
            if isinstance(result, ExitStatus):
                returncode = result.returncode
            elif result[3] == SOURCE_REAPED:
                returncode = waitstatus_to_exitcode(result[2])
            else:
                result = self.result = exit_status(self, result)
                returncode = result.returncode
            if args:
                context.run(observer, self.pid, returncode, *args)
            else:  # nearly always. To unpack an empty tuple takes as long as all the rest
                context.run(observer, self.pid, returncode)
        return bool(self._others)

    def _promote(self) -> bool:
        """Move the next of the other observers into the slots. Return whether there was one."""
        if not self._others:
            return False
        self._key = next(iter(self._others))
        self._observer, self._args, self.context = self._others.pop(self._key)
        return True


def make_child(  # noqa: PLR0917 - by position, which is faster
    pid: int,
    pidfd: int,
    backend: Backend,
    key: object,
    observer: Observer,
    args: Args = None,
    context: Context | None = None,
) -> Child:
    """Return a Child that has one observer."""
    child = Child()
    child.pid = pid
    child.pidfd = pidfd
    child.backend = backend
    child.result = None
    child.peek = False
    child.stranger = False
    child.peekers = _NOBODY
    child._key = key
    child._observer = observer
    child._args = args
    child.context = context
    child._others = None
    return child


_SOURCES: dict[int, Source] = {
    SOURCE_REAPED: "reaped",
    SOURCE_PEEKED: "peeked",
    SOURCE_RECOVERED: "recovered",
    SOURCE_LOST: "lost",
}


def exit_status(child: Child, record: Record) -> ExitStatus:
    """Return the ExitStatus that a record of the reaper means. Log a warning if the status is lost.

    Called in the loop's thread, without the lock: a logging handler is user code.
    """
    _, _, status, source, rusage = record
    if source <= SOURCE_PEEKED:
        return ExitStatus(child.pid, status, _SOURCES[source], rusage)
    if source == SOURCE_LOST:
        if child.stranger:
            return ExitStatus(child.pid, 0, "not-child")
        warn_lost(child.pid)
    return ExitStatus(child.pid, status, _SOURCES[source])
