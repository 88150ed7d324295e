"""One watched process."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet

from ._backend import Backend
from ._exit import ExitStatus

Observer = Callable[[ExitStatus], object]


class Child:
    """One watched process of one loop.

    `pidfd` is -1 from the moment it was reaped (or if the backend has none), `ended` is true from then on. `observers` maps
    whoever watches to what to call; a second entry of the same key replaces the first.
    """

    # Of nearly every child, and so not written once for each.
    ended = False
    peek = False
    stranger = False
    peekers: AbstractSet[object] = frozenset()  # the observers that asked for reap=False

    def __init__(self, pid: int, pidfd: int, backend: Backend, observers: dict[object, Observer]) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.backend = backend
        self.observers = observers
