"""One watched process, who is to be told of its end, and in which context."""

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
"""Called with an ExitStatus or, where there are args to it, with pid, returncode, *args."""

Args = Optional[tuple[Any, ...]]
"""None: the observer is one of ours, which takes an ExitStatus and leaves its users' contexts to asyncio's futures."""

_NOBODY: AbstractSet[object] = frozenset()


class Child:
    """One watched process of one loop.

    `pidfd` is -1 from the moment it was reaped (or if the backend has none); from then on `result` says how it ended, by the
    reaper's record where that is all there is to say.

    Whoever observes it has a key; a second observer of the same key replaces the first. Nearly every child has one: so there
    is a place for one, and a dict only for others. What there is for each child counts when there are thousands.
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
    peekers: AbstractSet[object]  # the observers that asked for reap=False
    orphan: Orphan  # only once the loop was closed
    context: Context | None  # what the next observer to be told is called in; None if it is one of ours
    _key: object
    _observer: Observer | None
    _args: Args
    _others: dict[object, tuple[Observer, Args, Context | None]] | None

    def add_observer(self, key: object, observer: Observer, args: Args, context: Context | None) -> None:
        """Have this observer told, instead of the one that has this key if there is one."""
        if self._key is key or (self._observer is None and not self._others):
            self._key, self._observer, self._args, self.context = key, observer, args, context
        else:
            if self._others is None:
                self._others = {}
            self._others[key] = observer, args, context

    def remove_observer(self, key: object) -> bool:
        """Return whether there was an observer with this key."""
        if self._key is key and self._observer is not None:
            self._key = self._observer = self._args = self.context = None
            return True
        return self._others is not None and self._others.pop(key, None) is not None

    def is_observed_by(self, key: object) -> bool:
        """Return whether there is an observer with this key."""
        return (self._key is key and self._observer is not None) or (self._others is not None and key in self._others)

    def count_observers(self) -> int:
        """Return how many are to be told."""
        return (self._observer is not None) + (len(self._others) if self._others else 0)

    def drop_observers(self) -> None:
        """Keep nobody's context and callback: nobody will be told."""
        self._key = self._observer = self._args = self.context = self._others = None

    def notify(self) -> bool:
        """Tell one observer of the end, who then is none any more; return whether there are others to be told."""
        result, observer, args, context = self.result, self._observer, self._args, self.context
        if result is None:
            return False
        if observer is None:
            return self._promote()
        self._observer = self._args = self.context = None  # first: it may run the loop, and so us
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
            else:  # as nearly always: to unpack nothing takes as long as all the rest
                context.run(observer, self.pid, returncode)
        return bool(self._others)

    def _promote(self) -> bool:
        """Make the next of the others the one to be told; return whether there is one."""
        if not self._others:
            return False
        self._key = next(iter(self._others))
        self._observer, self._args, self.context = self._others.pop(self._key)
        return True


def make_child(pid: int, pidfd: int, backend: Backend) -> Child:
    """Make a Child without observers. An `__init__` would take longer than all that it does."""
    child = Child()
    child.pid = pid
    child.pidfd = pidfd
    child.backend = backend
    child.result = None
    child.peek = False
    child.stranger = False
    child.peekers = _NOBODY
    child._key = child._observer = child._args = child.context = child._others = None
    return child


_SOURCES: dict[int, Source] = {
    SOURCE_REAPED: "reaped",
    SOURCE_PEEKED: "peeked",
    SOURCE_RECOVERED: "recovered",
    SOURCE_LOST: "lost",
}


def exit_status(child: Child, record: Record) -> ExitStatus:
    """Make an ExitStatus of what the reaper says, and warn if the status is lost.

    In the loop's thread, where the lock is not held: a logging handler is a user's code, too.
    """
    _, _, status, source, rusage = record
    if source <= SOURCE_PEEKED:
        return ExitStatus(child.pid, status, _SOURCES[source], rusage)
    if source == SOURCE_LOST:
        if child.stranger:
            return ExitStatus(child.pid, 0, "not-child")
        warn_lost(child.pid)
    return ExitStatus(child.pid, status, _SOURCES[source])
