"""Out of descriptors: close the pidfds of running programs, and watch those programs by SIGCHLD."""

from __future__ import annotations

from .._backends.backend import logger
from .._watch.registry import Registry
from .._watch.starting import StartingProgram

# Three pipes have six ends. subprocess.Popen opens one more pipe for errors.
_ENOUGH = 8


def free_descriptors(registry: Registry) -> bool:
    """Close the pidfds of some watched programs. Return whether there were any.

    Forked children keep theirs: a user may have got the number from the `fileno` method of the child's handle.
    """
    freed = 0
    with registry._lock:
        for child in tuple(registry._children.values()):
            if freed < _ENOUGH and isinstance(child._key, StartingProgram) and not (child.peek or child.stranger):
                freed += registry.watch_by_sigchld(child)
    if freed:
        logger.info("out of descriptors: watching %d running programs by SIGCHLD", freed)
    return freed > 0
