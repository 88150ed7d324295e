"""One watched process, and who is to be told of its end."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from os import waitstatus_to_exitcode
from typing import Any, Optional

from ._backend import Backend
from ._exit import ExitStatus
from ._reaper import Record

Observer = Callable[..., object]
"""Called with an ExitStatus or, where there are args to it, with pid, returncode, *args."""

Args = Optional[tuple[Any, ...]]

_NOBODY: AbstractSet[object] = frozenset()


class Child:
    """One watched process of one loop.

    `pidfd` is -1 from the moment it was reaped (or if the backend has none); from then on `end` says how it ended, by the
    reaper's record where that is all there is to say.

    Whoever observes it has a key; a second observer of the same key replaces the first. Nearly every child has one: so there
    is a place for one, and a dict only for others. What there is for each child counts when there are thousands.
    """

    __slots__ = ("_args", "_key", "_observer", "_others", "backend", "end", "peek", "peekers", "pid", "pidfd", "stranger")

    pid: int
    pidfd: int
    backend: Backend
    end: Record | ExitStatus | None
    peek: bool
    stranger: bool
    peekers: AbstractSet[object]  # the observers that asked for reap=False
    _key: object
    _observer: Observer | None
    _args: Args
    _others: dict[object, tuple[Observer, Args]] | None

    def add_observer(self, key: object, observer: Observer, args: Args) -> None:
        """Have this observer told, instead of the one that has this key if there is one."""
        if self._key is key or (self._observer is None and not self._others):
            self._key, self._observer, self._args = key, observer, args
        else:
            if self._others is None:
                self._others = {}
            self._others[key] = observer, args

    def remove_observer(self, key: object) -> bool:
        """Return whether there was an observer with this key."""
        if self._key is key and self._observer is not None:
            self._key = self._observer = self._args = None
            return True
        return self._others is not None and self._others.pop(key, None) is not None

    def count_observers(self) -> int:
        """Return how many are to be told."""
        return (self._observer is not None) + (len(self._others) if self._others else 0)

    def tell(self) -> bool:
        """Tell one observer of the end, who then is none any more; return whether there are others to be told."""
        end, observer, args = self.end, self._observer, self._args
        if end is None:
            return False
        if observer is not None:
            self._observer = None
        elif self._others:
            _, (observer, args) = self._others.popitem()
        else:
            return False
        if args is None:
            if not isinstance(end, ExitStatus):
                pid, _, status, _, rusage = end
                end = self.end = ExitStatus(pid, status, "reaped", rusage)
            observer(end)
        else:
            returncode = end.returncode if isinstance(end, ExitStatus) else waitstatus_to_exitcode(end[2])
            if args:
                observer(self.pid, returncode, *args)
            else:  # as nearly always: to unpack nothing takes as long as all the rest
                observer(self.pid, returncode)
        return bool(self._others)


def make_child(  # noqa: PLR0917 - by position, which is faster
    pid: int, pidfd: int, backend: Backend, key: object, observer: Observer | None, args: Args = None
) -> Child:
    """Make one. Not by an __init__: to call one of Python's takes longer than all that it does."""
    child = Child()
    child.pid = pid
    child.pidfd = pidfd
    child.backend = backend
    child.end = None
    child.peek = False
    child.stranger = False
    child.peekers = _NOBODY
    child._key = key
    child._observer = observer
    child._args = args
    child._others = None
    return child
