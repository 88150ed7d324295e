"""The registries of all loops of the process, and what happens to them in a forked child.

The function that runs in each forked child is short: the kernel copies each page of memory that it writes to.
"""

from __future__ import annotations

import asyncio
import weakref
from _thread import RLock

from .._backends.sigchld_backend import forget_after_fork, settle_abandoned
from .._kernel.at_fork import call_in_forked_children
from .._kernel.syscalls import after_fork_in_child, is_expected_child
from .continued import inherit, leave
from .registry import Registry

# By id(loop). The loop owns its registry, and a registry is removed when it is closed. If a loop is gone without that,
# another loop may have its id, so a look-up checks whose registry it is.
_registries: dict[int, weakref.ReferenceType[Registry]] = {}
# Those of the process that this one was forked from, also by id(loop). Their loops may go on here.
_inherited: dict[int, weakref.ReferenceType[Registry]] = {}
_lock = RLock()  # re-entrant, for Python signal handlers
# The threading module calls this in a child, too. A new lock would take ten pages of memory.
_reinit_lock = _lock._at_fork_reinit  # type: ignore[attr-defined] # not in typeshed


def registry_of(loop: asyncio.AbstractEventLoop) -> Registry:
    """Return the registry of `loop`. The first call creates it.

    Raises:
        RuntimeError: the loop is closed.
        OSError: EMFILE, ENFILE, out of descriptors.
    """
    known = _registries.get(id(loop))
    if known is not None:
        registry = known()
        if registry is not None and registry.loop() is loop:
            return registry
    return _make(loop)


def _make(loop: asyncio.AbstractEventLoop) -> Registry:
    if loop.is_closed():
        raise RuntimeError("the event loop is closed")
    settle_abandoned()
    with _lock:
        known = _registries.get(id(loop))
        registry = None if known is None else known()
        if registry is None or registry.loop() is not loop:
            call_in_forked_children(_after_fork_in_child)
            _leave_inherited(loop)
            registry = Registry(loop, _forget)
            _registries[id(loop)] = weakref.ref(registry)
    return registry


def _leave_inherited(loop: asyncio.AbstractEventLoop) -> None:
    known = _inherited.pop(id(loop), None)
    registry = None if known is None else known()
    if registry is not None and registry.loop() is loop:
        leave(registry)


def _forget(registry: Registry) -> None:
    with _lock:
        for key, known in tuple(_registries.items()):
            if known() is registry or known() is None:
                del _registries[key]


def find_registries() -> list[Registry]:
    """Return the registries of all loops that have one."""
    with _lock:
        return [registry for known in _registries.values() if (registry := known()) is not None]


def _after_fork_in_child() -> None:
    after_fork_in_child()
    _reinit_lock()  # another thread of the parent may hold it
    is_ours = is_expected_child()  # by afork or a fork server: such a child does not use the loops of its parent
    for key, known in _registries.items():
        registry = known()
        if registry is not None:
            registry.closed = True
            if not is_ours:
                inherit(registry)
                _inherited[key] = known
    _registries.clear()
    forget_after_fork()
