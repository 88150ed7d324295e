"""One watched process."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet

from ._backend import Backend
from ._exit import ExitStatus

Observer = Callable[[ExitStatus], object]

_NOBODY: AbstractSet[object] = frozenset()


class Child:
    """One watched process of one loop.

    `pidfd` is -1 from the moment it was reaped (or if the backend has none), `ended` is true from then on. `observers` maps
    whoever watches to what to call; a second entry of the same key replaces the first.
    """

    __slots__ = ("backend", "ended", "observers", "peek", "peekers", "pid", "pidfd", "stranger")

    def __init__(self, pid: int, pidfd: int, backend: Backend, observers: dict[object, Observer]) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.backend = backend
        self.observers = observers
        self.ended = False
        self.peek = False
        self.stranger = False
        self.peekers: AbstractSet[object] = _NOBODY  # the observers that asked for reap=False
