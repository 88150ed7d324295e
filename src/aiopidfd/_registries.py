"""The registries of all loops of the process, and what becomes of them in a forked child."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref

from . import _sigchld
from ._registry import Registry

_registries: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Registry] = weakref.WeakKeyDictionary()
_lock = threading.RLock()  # re-entrant as the registries' own, for Python signal handlers
_hooked = False


def registry_of(loop: asyncio.AbstractEventLoop) -> Registry:
    """Return the registry of `loop`, made on first use.

    Raises:
        RuntimeError: the loop is closed.
        OSError: EMFILE, ENFILE, out of descriptors.
    """
    global _hooked  # noqa: PLW0603 - a process has one at-fork hook, put in place by the first registry
    registry = _registries.get(loop)
    if registry is None:
        if loop.is_closed():
            raise RuntimeError("the event loop is closed")
        _sigchld.settle_abandoned()
        with _lock:
            registry = _registries.get(loop)
            if registry is None:
                if not _hooked:
                    os.register_at_fork(after_in_child=_after_fork_in_child)
                    _hooked = True
                registry = _registries[loop] = Registry(loop)
    return registry


def find_registries() -> list[Registry]:
    """Return the registries of all loops that have one."""
    with _lock:
        return list(_registries.values())


def _after_fork_in_child() -> None:
    global _lock  # noqa: PLW0603 - another thread of the parent may have held the lock at the fork
    _lock = threading.RLock()
    registries = list(_registries.values())
    _registries.clear()
    for registry in registries:
        registry.forget_in_child()
    _sigchld.forget_after_fork()
