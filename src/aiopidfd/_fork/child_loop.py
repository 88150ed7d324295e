"""In a forked child, unset the parent's event loop, and clear the child watcher.

Facts about asyncio:

* A policy keeps the current event loop in `_local._loop`. On Python 3.9 to 3.13 it has a child watcher, too.
* set_event_loop(None) detaches the child watcher from the old loop. This warns about pending handlers, and changes the old
  loop and the handler of SIGCHLD.
* A child watcher that is not cleared would wait for the parent's children when the child sets a loop of its own.
"""

from __future__ import annotations

import warnings
from asyncio import events
from typing import Any

from .._loops.policy import make_policy_class

# Modules of policies whose set_event_loop() only sets the loop and attaches the child watcher.
_SIMPLE_POLICY_MODULES = frozenset({"asyncio.events", "asyncio.unix_events", make_policy_class.__module__})

_WATCHERS = "_watcher", "_aiopidfd_watcher"

# Attributes of asyncio's child watchers: those that are set to the value of a new watcher, and those that are cleared.
_INITIAL_VALUES: dict[str, object] = {"_loop": None, "_saved_sighandler": None, "_forks": 0}
_CONTAINERS = "_callbacks", "_zombies", "_threads"


def unset_event_loop(policy: object) -> None:
    """Unset the event loop of `policy`, and clear its child watcher."""
    attributes: dict[str, Any] = getattr(policy, "__dict__", {})
    for name in _WATCHERS:
        if attributes.get(name) is not None:
            _reset_watcher(attributes[name])
    if getattr(type(policy), "set_event_loop", None).__module__ not in _SIMPLE_POLICY_MODULES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            events.set_event_loop(None)
    elif attributes["_local"]._loop is not None:
        attributes["_local"]._loop = None


def _reset_watcher(watcher: object) -> None:
    attributes: dict[str, Any] = getattr(watcher, "__dict__", {})
    for name, value in _INITIAL_VALUES.items():
        if name in attributes:
            attributes[name] = value
    for name in _CONTAINERS:
        if attributes.get(name):
            attributes[name].clear()
    if "_zombies" in attributes and "_lock" in attributes:
        attributes["_lock"]._at_fork_reinit()
