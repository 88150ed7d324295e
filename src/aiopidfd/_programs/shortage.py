"""Descriptors for one more program where none are left: some that run give theirs back, and are watched by SIGCHLD."""

from __future__ import annotations

from .._backends.backend import logger
from .._watch.registry import Registry
from .._watch.starting import StartingProgram

# Three pipes have six ends, and subprocess.Popen makes one more for errors.
_ENOUGH = 8


def free_descriptors(registry: Registry) -> bool:
    """Close the pidfds of some programs that are watched; return whether there were any.

    Of programs alone: nobody else knows the number of such a pidfd, as who calls `fileno` of a forked child's handle does.
    """
    freed = 0
    with registry._lock:
        for child in tuple(registry._children.values()):
            if freed < _ENOUGH and isinstance(child._key, StartingProgram) and not (child.peek or child.stranger):
                freed += registry.watch_by_sigchld(child)
    if freed:
        logger.info("watching %d running programs by SIGCHLD, since there are no descriptors left for another one", freed)
    return freed > 0
